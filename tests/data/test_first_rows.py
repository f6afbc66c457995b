"""The same rows in every rollout, and those alone."""

from __future__ import annotations

import pytest

from gspo_lightning.config.build import build, build_data
from gspo_lightning.data import LargestOfFour, MicroLetters, Mixture, PromptDataModule
from gspo_lightning.data.first_rows import FirstRows
from gspo_lightning.data.stream import PromptStream
from gspo_lightning.errors import UserError
from tests.conf.test_groups import resolved
from tests.data.test_mixture import HalfLong, lengths_task


def test_an_endless_task_becomes_its_first_rows_again_and_again():
    task = MicroLetters()
    stream = PromptStream(FirstRows(task, 4), seed=0)
    rows = [stream.row_at(cursor) for cursor in range(12)]
    wanted = {f"micro_letters:train:{n}": task.train_row(n) for n in range(4)}
    assert all(dict(rows[start : start + 4]) == wanted for start in (0, 4, 8))
    assert FirstRows(task, 4).validation_rows() == task.validation_rows()


def test_the_tasks_of_a_mixture_are_still_validated_each():
    data = build_data(*of("data=mixture", "reward=by_task", "overfit_rows=8"))
    assert data.task_names == ("largest", "sums") and data.task.num_train_rows == 8
    assert build_data(*of("overfit_rows=8")).task_names == ()


def of(*overrides):
    plain = resolved(*overrides)
    return plain, build(plain["reward"])


def test_more_rows_than_there_are_or_none_are_refused():
    with pytest.raises(UserError, match="overfit_rows=5 must be between 1 and the task's 4 training rows"):
        FirstRows(FirstRows(LargestOfFour(), 4), 5)
    with pytest.raises(UserError, match="overfit_rows=0"):
        FirstRows(LargestOfFour(), 0)


def test_debug_overfit_gives_every_rollout_the_same_prompts():
    data = build_data(*of("experiment=micro", "debug=overfit", "data.prompts_per_rollout=4"))
    first, second = (sorted(p.uid for p in data.batch_at(cursor).prompts) for cursor in (0, 4))
    assert first == second and len(set(first)) == 4


@pytest.mark.parametrize("kind", ["endless", "finite", "mixture"])
def test_rows_that_are_too_long_give_way_to_others_that_stay(kind, tokenizer_dir):
    """Each place to its own, or in a mixture to one of the same task: the same prompts in every rollout."""
    tasks = {name: lengths_task(name, [3, 40, 3, 40, 40, 3] * 4) for name in "ab"}
    task = {"endless": HalfLong(), "finite": tasks["a"], "mixture": Mixture(tasks, seed=2)}[kind]
    data = PromptDataModule(FirstRows(task, 4), tokenizer_dir, 4, 16, overlong_prompts="drop")
    data.check()
    first, *others = [sorted((p.uid, p.prompt) for p in data.batch_at(4 * n).prompts) for n in range(3)]
    assert others == [first] * 2 and len(set(first)) == 4
    assert kind == "mixture" or len({prompt for _, prompt in first}) == 4
    assert data.rollouts_per_epoch == 1


def test_a_row_that_is_too_long_is_left_out_where_no_other_is_there(tokenizer_dir):
    """As it is without overfit_rows: the rows beside it are enough."""
    data = PromptDataModule(
        FirstRows(lengths_task("a", [3, 40, 3, 3]), 4), tokenizer_dir, 2, 16, overlong_prompts="drop"
    )
    batches = [data.batch_at(4 * epoch) for epoch in range(4)]
    assert {len(batch.prompts) for batch in batches} == {2}
    assert {p.uid for batch in batches for p in batch.prompts} == {f"a:train:{index}" for index in (0, 2, 3)}
