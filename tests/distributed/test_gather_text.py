"""Texts of several ranks, gathered in pieces."""

from __future__ import annotations

import torch.multiprocessing as mp
from torch import distributed as dist

from gspo_lightning.distributed import ranks

TEXTS = ["abcdefghij", "", "äöü\ud800"]
"""Of three ranks: of several pieces, of none, and one with half of a surrogate pair, as a completion may have."""


def gather(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(TEXTS))
    ranks._PIECE = 4
    found = [ranks.gather_text(TEXTS[rank]), ranks.gather_text("")]
    assert found == (["".join(TEXTS), ""] if rank == 0 else ["", ""]), found
    dist.destroy_process_group()


def test_texts_of_any_length_arrive_whole_in_the_order_of_ranks(tmp_path):
    mp.start_processes(gather, (str(tmp_path),), nprocs=len(TEXTS), start_method="fork")
