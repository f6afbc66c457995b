"""A mixture: exact proportions, rows fixed by their index, rewards and validation per task."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

from gspo_lightning.advantages import combine_rewards
from gspo_lightning.data import Arithmetic, Mixture, PromptDataModule, RowsTask
from gspo_lightning.data.tasks import Endless
from gspo_lightning.errors import UserError
from gspo_lightning.rewards import ForTasks, RewardSet, RewardSpec
from gspo_lightning.training.validation import ValidationSettings, Validator
from gspo_lightning.types import Prompt, Rollout, SamplingParams
from tests.support import make_completion


def rows_task(name, count, held_out=1):
    rows = [{"prompt": f"{name}{number}", "answer": name} for number in range(count + held_out)]
    return RowsTask(rows, name=name, num_validation=held_out, conversational=False)


def test_every_round_holds_the_weights_exactly_and_spreads_them():
    mixture = Mixture({"a": rows_task("a", 50), "b": rows_task("b", 50)}, {"a": 3, "b": 1})
    names = [mixture.train_row(index)["task"] for index in range(40)]
    assert all(Counter(names[start : start + 4]) == {"a": 3, "b": 1} for start in range(0, 40, 4))
    # By hand: a stands at 1/6, 3/6, 5/6 of the round, b at 1/2, behind the a that comes first in the config.
    assert names[:4] == ["a", "a", "b", "a"]


def test_every_row_of_a_finite_task_comes_once_before_any_comes_twice():
    mixture = Mixture({"a": rows_task("a", 6), "b": rows_task("b", 4)}, {"a": 2, "b": 1}, seed=3)
    rows = [mixture.train_row(index) for index in range(3 * 6)]
    of_a = [row["prompt"] for row in rows if row["task"] == "a"]
    of_b = [row["prompt"] for row in rows if row["task"] == "b"]
    assert len(set(of_a[:6])) == 6 and len(set(of_a[6:12])) == 6 and of_a[:6] != of_a[6:12]
    assert len(set(of_b[:4])) == 4 and len(of_b) == 6


def test_a_row_depends_on_seed_and_index_alone():
    def mixture(seed=0):
        return Mixture({"a": rows_task("a", 20), "s": Arithmetic()}, {"a": 2, "s": 1}, seed=seed)

    first, second = mixture(), mixture()
    backwards = [second.train_row(i) for i in reversed(range(60))][::-1]
    assert [first.train_row(i) for i in range(60)] == backwards
    assert [mixture(1).train_row(i) for i in range(60)] != backwards


def test_held_out_rows_are_those_of_every_task_and_name_it():
    mixture = Mixture({"a": rows_task("a", 5, 2), "b": rows_task("b", 5, 3)})
    assert [row["task"] for row in mixture.validation_rows()] == ["a"] * 2 + ["b"] * 3
    held_out = {row["prompt"] for row in mixture.validation_rows()}
    assert not held_out & {mixture.train_row(index)["prompt"] for index in range(20)}


@pytest.mark.parametrize(
    ("tasks", "weights", "message"),
    [
        ({}, None, "data.task.tasks is empty"),
        ({"a": Arithmetic()}, {"b": 1}, "must name the same tasks; a, b do not"),
        ({"a": Arithmetic()}, {"a": 0}, "data.task.weights.a=0 must be a whole number above 0"),
        ({"a": Arithmetic()}, {"a": 0.5}, "data.task.weights.a=0.5 must be a whole number above 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(tasks, weights, message):
    with pytest.raises(UserError, match=message):
        Mixture(tasks, weights)


def test_a_row_that_has_a_task_column_is_refused():
    task = RowsTask([{"prompt": "x", "task": "y"}, {"prompt": "z", "task": "y"}], num_validation=1)
    with pytest.raises(UserError, match="has a column 'task'"):
        Mixture({"a": task}).train_row(0)


# ---------------------------------------------------------------- rewards and validation per task


def length_of(completions, **_):
    return [float(len(text)) for text in completions]


def is_empty(completions, **_):
    return [float(not text) for text in completions]


def is_answer(completions, answer):
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def rewards():
    return RewardSet(
        {
            "for_a": RewardSpec(ForTasks(is_answer, ["a"])),
            "for_b": RewardSpec(ForTasks(length_of, ["b"])),
        }
    )


def prompts():
    rows = [{"task": "b"}, {"task": "a", "answer": "yes"}, {"task": "b"}]
    return [Prompt(f"t:{n}", "p", torch.tensor([1, 2]), row) for n, row in enumerate(rows)]


def completions(*texts):
    return [[make_completion([5, 2], text) for text in group] for group in texts]


def test_a_function_for_one_task_sees_its_rows_alone_and_says_that_it_does_not_apply_to_others():
    table = rewards()(prompts(), completions(["xx", "x"], ["yes", "no"], ["xxx", ""]))
    nan = float("nan")
    expected = torch.tensor(
        [[[nan, 2], [nan, 1]], [[1, nan], [0, nan]], [[nan, 3], [nan, 0]]], dtype=torch.float64
    )  # fmt: skip
    assert torch.equal(table.nan_to_num(-1), expected.nan_to_num(-1))
    assert combine_rewards(table, torch.ones(2, dtype=torch.float64)).tolist() == [[2, 1], [1, 0], [3, 0]]


def test_a_function_that_returns_too_few_values_is_named():
    broken = RewardSet({"broken": RewardSpec(ForTasks(lambda completions: [1.0], ["b"]))})
    with pytest.raises(UserError, match="reward function broken raised ValueError: returned 1 value for 4"):
        broken(prompts(), completions(["x", "y"], ["x", "y"], ["x", "y"]))


def test_for_no_task_is_refused():
    with pytest.raises(UserError, match="never applies"):
        ForTasks(length_of, [])


class Scripted:
    """Greedy: x, no, xx; sampled: two completions each."""

    def generate(self, policy, prompts, sampling, seed):
        texts = [["x"], ["no"], [""]] if sampling.num_generations == 1 else [["x", ""], ["yes", "no"], ["x", "x"]]
        return Rollout(prompts, completions(*texts))


def test_validation_measures_each_task_apart_by_the_function_that_applies():
    validator = Validator(ValidationSettings(2), rewards(), SamplingParams(2, 4), seed=0)
    validator.reset(("a", "b"))
    validator.update(None, Scripted(), prompts())
    values = validator.compute(torch.device("cpu"))
    # Greedy: b is right once of two, a is wrong. Sampled: b 1 of 2 and 2 of 2, a 1 of 2.
    assert values["val/accuracy"] == pytest.approx(1 / 3)
    assert values["val/accuracy/a"] == 0.0 and values["val/accuracy/b"] == 0.5
    assert values["val/sampled_accuracy"] == pytest.approx(4 / 6)
    assert values["val/sampled_accuracy/a"] == 0.5 and values["val/sampled_accuracy/b"] == 0.75
    assert values["val/pass@2"] == 1.0
    assert [sample["right"] for sample in validator.samples] == [True, False, False]


def test_the_named_function_decides_what_is_right_and_not_the_sum_of_all():
    weighed = RewardSet({"words": RewardSpec(length_of, weight=5.0), "empty": RewardSpec(is_empty, weight=0.5)})
    validator = Validator(ValidationSettings(2, reward="empty"), weighed, SamplingParams(2, 4), seed=0)
    validator.update(None, Scripted(), prompts())
    assert [(sample["reward"], sample["right"]) for sample in validator.samples] == [
        (5.0, False), (10.0, False), (0.5, True),
    ]  # fmt: skip
    assert validator.compute(torch.device("cpu"))["val/accuracy"] == pytest.approx(1 / 3)


class HalfLong(Endless):
    """Every other row is too long."""

    name = "half_long"

    def train_row(self, index):
        return {"prompt": f"{index % 997}b" if index % 2 else "b" * 40}

    def validation_rows(self):
        return []


def lengths_task(name, lengths):
    rows = [{"prompt": f"{number}{name * length}"} for number, length in enumerate(lengths)]
    return RowsTask(rows, name=name, num_validation=0, conversational=False)


@pytest.mark.parametrize("long", [HalfLong(), lengths_task("b", [40, 3] * 20)], ids=["endless", "finite"])
def test_the_proportions_are_those_of_what_is_trained_on_also_where_rows_are_left_out(long, tokenizer_dir):
    mixture = Mixture({"a": lengths_task("a", [3] * 40), "b": long}, {"a": 1, "b": 3}, seed=2)

    def data():
        return PromptDataModule(mixture, tokenizer_dir, 8, 16, overlong_prompts="drop")

    batches = list(islice(data().train_dataloader(), 40))
    assert all(Counter(p.sample["task"] for p in batch.prompts) == {"a": 2, "b": 6} for batch in batches)
    assert [batch.cursor for batch in batches] == [8 * number for number in range(1, 41)]
    assert sum(batch.dropped for batch in batches) == 3 * 40  # half of b's places
    assert max(len(prompt.input_ids) for batch in batches for prompt in batch.prompts) <= 16
    texts = [[(prompt.uid, prompt.prompt) for prompt in batch.prompts] for batch in batches]
    for number in (7, 29):  # as a run that is resumed there
        again = data().batch_at(8 * number)
        assert [(prompt.uid, prompt.prompt) for prompt in again.prompts] == texts[number]
    of_b = Counter(prompt.prompt for batch in batches for prompt in batch.prompts if prompt.sample["task"] == "b")
    assert len(of_b) == (20 if mixture.tasks["b"].num_train_rows else len(of_b)) and len(of_b) >= 20


def test_a_task_of_a_mixture_whose_rows_are_all_too_long_is_named(tokenizer_dir):
    mixture = Mixture({"a": lengths_task("a", [3] * 40), "b": lengths_task("b", [40] * 5)})
    data = PromptDataModule(mixture, tokenizer_dir, 8, 16, overlong_prompts="drop")
    line = (
        "^data.max_prompt_length=16: row mixture:train:1 of task b is longer, and no row was found in its place that is"
    )
    with pytest.raises(UserError, match=line):
        data.batch_at(0)
