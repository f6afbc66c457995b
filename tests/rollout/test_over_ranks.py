"""What rank 0 is sent of the other ranks' prompts, and what they are told of its errors."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.distributed.failing import ErrorOfAllRanks
from gspo_lightning.errors import UserError
from gspo_lightning.rollout import EngineUnavailableError, over_ranks
from gspo_lightning.types import Prompt

PROMPT = Prompt("t:0", "2 + 2?", torch.tensor([3, 4]), {"answer": 4})


@pytest.fixture()
def sent(monkeypatch):
    """Two ranks that ask the same; the prompts that this one, rank 0, sends."""
    prompts = []

    def gather(mine, gathered, dst):
        prompts.extend(mine)
        gathered[:] = [mine, mine]

    def scatter(answer, parts, src):
        answer[0] = parts[1]

    monkeypatch.setattr(over_ranks, "world_size", lambda: 2)
    monkeypatch.setattr(over_ranks, "rank", lambda: 0)
    monkeypatch.setattr(over_ranks.dist, "gather_object", gather)
    monkeypatch.setattr(over_ranks.dist, "scatter_object_list", scatter)
    return prompts


@pytest.mark.parametrize("with_rows", [True, False])
def test_rows_travel_only_where_they_are_read(with_rows, sent):
    seen = []
    answered = over_ranks.on_first_rank([PROMPT], lambda all_: seen.extend(all_) or [["a"], ["b"]], with_rows=with_rows)
    assert answered == [["b"]]
    row = ("2 + 2?", {"answer": 4}) if with_rows else ("", {})
    assert [(p.uid, p.input_ids.tolist(), p.prompt, p.sample) for p in seen] == [("t:0", [3, 4], *row)] * 2
    assert [(p.prompt, p.sample) for p in sent] == [row]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (UserError("environment guess raised KeyError: 'row'"), ErrorOfAllRanks),
        (EngineUnavailableError("no server left"), EngineUnavailableError),
    ],
    ids=["an environment fails", "no server left"],
)
def test_a_rank_is_told_what_went_wrong_on_the_first_and_that_all_are_told(error, raised, sent):
    def generate(prompts):
        raise error

    with pytest.raises(raised) as told:
        over_ranks.on_first_rank([PROMPT], generate)
    assert type(told.value) is raised and str(told.value) == str(error)
