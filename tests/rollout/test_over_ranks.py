"""What rank 0 is sent of the other ranks' prompts."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.rollout import over_ranks
from gspo_lightning.types import Prompt


@pytest.mark.parametrize("with_rows", [True, False])
def test_rows_travel_only_where_they_are_read(with_rows, monkeypatch):
    sent, seen = [], []

    def gather(mine, gathered, dst):
        sent.extend(mine)
        gathered[:] = [mine, mine]

    def scatter(answer, parts, src):
        answer[0] = parts[0]

    monkeypatch.setattr(over_ranks, "world_size", lambda: 2)
    monkeypatch.setattr(over_ranks, "rank", lambda: 0)
    monkeypatch.setattr(over_ranks.dist, "gather_object", gather)
    monkeypatch.setattr(over_ranks.dist, "scatter_object_list", scatter)
    prompt = Prompt("t:0", "2 + 2?", torch.tensor([3, 4]), {"answer": 4})
    answered = over_ranks.on_first_rank([prompt], lambda all_: seen.extend(all_) or [["a"], ["b"]], with_rows=with_rows)
    assert answered == [["a"]]
    row = ("2 + 2?", {"answer": 4}) if with_rows else ("", {})
    assert [(p.uid, p.input_ids.tolist(), p.prompt, p.sample) for p in seen] == [("t:0", [3, 4], *row)] * 2
    assert [(p.prompt, p.sample) for p in sent] == [row]
