"""Three ranks that gather texts in pieces of four bytes: run_gather_text.py <folder>."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

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


if __name__ == "__main__":
    mp.start_processes(gather, (sys.argv[1],), nprocs=len(TEXTS), start_method="fork")
    print("gathered")
