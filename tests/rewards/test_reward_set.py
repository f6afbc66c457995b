"""Reward functions are called as TRL calls them, and what they return is checked."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import math
import re
import threading
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from gspo_lightning.errors import UserError
from gspo_lightning.rewards import ForTasks, LengthTarget, RewardSet, RewardSpec, SoftOverlong
from gspo_lightning.types import Completion, Dialogue, Prompt

CHAT = [{"role": "user", "content": "hi"}]


def batch():
    prompts = [
        Prompt("t:0", CHAT, torch.tensor([1]), {"answer": "x", "prompt": CHAT}),
        Prompt("t:1", "plain", torch.tensor([1]), {"answer": "y", "extra": 5}),
    ]
    completions = [
        [Completion(torch.tensor([10 * p + g]), f"c{p}{g}", torch.zeros(1), "stop") for g in range(2)] for p in range(2)
    ]
    return prompts, completions


def score(**functions):
    specs = {name: f if isinstance(f, RewardSpec) else RewardSpec(f) for name, f in functions.items()}
    return RewardSet(specs)(*batch())


@pytest.mark.parametrize("fails", [False, True])
def test_a_function_that_computes_with_torch_does_so_in_the_dtype_outside_of_the_precision(fails):
    """Under bf16-true, whose dtype of new tensors is the model's, 0.3 would be 0.30078125."""

    def tenths(completions, **_):
        assert not fails
        return torch.tensor([0.1, 0.2, 0.3, 0.4])

    rewards = RewardSet({"tenths": RewardSpec(tenths)})
    torch.set_default_dtype(torch.bfloat16)  # as the precision does; the fixture of all tests puts it back
    with pytest.raises(UserError) if fails else contextlib.nullcontext():
        found = rewards(*batch())
    assert torch.get_default_dtype() is torch.bfloat16
    assert fails or found.flatten().tolist() == torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float32).tolist()


def test_arguments_are_those_of_trl():
    seen = {}

    def spy(prompts, completions, completion_ids, answer, extra, **kwargs):
        seen.update(locals())
        return [1, 2, 3, 4]

    table = score(spy=spy)
    assert seen["prompts"] == [CHAT, CHAT, "plain", "plain"]
    assert seen["completions"] == [
        [{"role": "assistant", "content": "c00"}],
        [{"role": "assistant", "content": "c01"}],
        "c10",
        "c11",
    ]
    assert seen["completion_ids"] == [[0], [1], [10], [11]]
    assert seen["answer"] == ["x", "x", "y", "y"]
    assert seen["extra"] == [None, None, 5, 5]
    assert seen["kwargs"].keys() == {"policy_tokens", "trainer_state", "log_metric", "log_extra"}
    assert table.tolist() == [[[1.0], [2.0]], [[3.0], [4.0]]]


def test_only_arguments_a_function_takes_are_passed():
    assert score(f=lambda completions: [0.5] * len(completions)).flatten().tolist() == [0.5] * 4


def test_none_becomes_nan_and_bools_and_tensors_become_numbers():
    table = score(f=lambda completions: [None, True, torch.tensor(2.5), 3], g=lambda completions: [0] * 4)
    values = table[..., 0].flatten().tolist()
    assert math.isnan(values[0]) and values[1:] == [1.0, 2.5, 3.0]


def test_numbers_of_numpy_are_rewards_and_one_too_large_for_a_float_is_refused():
    values = [np.float32(0.5), np.int64(2), np.bool_(True), np.array([4.0])]
    assert score(f=lambda completions: values)[..., 0].flatten().tolist() == [0.5, 2.0, 1.0, 4.0]
    for whole in (np.array([0.5, 2.0, 1.0, 4.0]), pd.Series([0.5, 2.0, 1.0, 4.0], index=list("dcba"))):
        assert score(f=lambda completions, whole=whole: whole)[..., 0].flatten().tolist() == [0.5, 2.0, 1.0, 4.0]
    with pytest.raises(UserError, match="must return a list of 4 numbers or None, not 3 values"):
        score(f=lambda completions: np.zeros(3))
    with pytest.raises(UserError, match="must return a list of 4 numbers or None, not float64"):
        score(f=lambda completions: np.float64(1.0))
    with pytest.raises(
        UserError, match="reward function f returned 1000.* for row t:0; return a finite number or None"
    ):
        score(f=lambda completions: [10**400] * 4)


def test_a_reward_whose_square_is_no_number_is_refused():
    """Divided by an infinite spread, all advantages of its group would be 0."""
    assert score(f=lambda completions: [1e100] * 4).flatten().tolist() == [1e100] * 4
    with pytest.raises(UserError, match=r"reward function f returned -1e\+300 for row t:0, beyond 1e\+100: the spread"):
        score(f=lambda completions: [-1e300] * 4)


def test_a_reward_that_its_weight_makes_too_large_is_refused():
    """Its square is infinite, or it is itself: the advantages of its group would be 0, or no numbers."""

    def weighted(weight, reward, how="weighted_sum"):
        spec = RewardSpec(lambda completions: [0.0, None, 1.0, reward], weight)
        reward_set = RewardSet({"f": spec, "g": RewardSpec(lambda completions: [0.0] * 4)}, how)
        return reward_set.combine(reward_set(*batch()))

    assert weighted(1e60, 1e40).tolist()[1] == [1e60, 1e100]
    assert weighted(1e100, 0.5, "normalize_then_sum").square().isfinite().all()
    for weight, reward in ((1e60, 1e100), (-1e60, 1e100), (1e100, -1e100), (2.0, 1e100)):
        line = (
            rf"^reward function f returned {re.escape(f'{reward:g}')} for row t:1, times its weight="
            rf"{re.escape(f'{weight:g}')} beyond 1e\+100: the spread of a group overflows there; lower the weight$"
        )
        with pytest.raises(UserError, match=line):
            weighted(weight, reward)
    with pytest.raises(UserError, match=r"^weight=-1e\+200 of a reward function must be at most 1e\+100 in size$"):
        RewardSpec(len, -1e200)


def dialogues():
    """Of five tokens, two of which an environment said; the prompts have a list in their rows."""
    trained = torch.tensor([True, False, False, True, True])
    prompts = [replace(prompt, prompt=CHAT, sample={"hints": ["a", "b"]}) for prompt in batch()[0]]

    def played(reward):
        talk = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
        messages = [*talk, {"role": "assistant", "content": "z"}]
        return Completion(torch.arange(5), "", torch.zeros(5), "stop", Dialogue(trained, messages, reward))

    return prompts, [[played(0.25), played(0.5)] for _ in prompts]


def test_what_a_function_takes_from_a_list_is_there_for_the_others_and_for_the_record():
    seen = []

    def takes(prompts, completions, completion_ids, hints):
        seen.append([hint.pop() for hint in hints])
        prompts[0][0]["content"] = "changed"
        seen.append([ids.pop() for ids in completion_ids])
        return [len(completion.pop()["content"]) for completion in completions]

    prompts, completions = dialogues()
    before = copy.deepcopy([c.dialogue.messages for group in completions for c in group])
    rewards = RewardSet({"f": RewardSpec(takes), "g": RewardSpec(takes)})
    for _ in range(2):
        assert rewards(prompts, completions).unique().tolist() == [1.0]
    assert sorted(seen, key=str) == [["b"] * 4] * 4 + [[4] * 4] * 4
    assert [c.dialogue.messages for group in completions for c in group] == before
    assert CHAT == [{"role": "user", "content": "hi"}] and prompts[0].sample == {"hints": ["a", "b"]}


def test_a_length_reward_counts_what_the_policy_said_and_the_soft_limit_all():
    prompts, completions = dialogues()
    seen = {}
    functions = {
        "target": RewardSpec(LengthTarget(3, 4)),
        "overlong": RewardSpec(SoftOverlong(6, 4)),
        "spy": RewardSpec(lambda policy_tokens, completions: seen.update(own=policy_tokens) or [0.0] * 4),
    }
    table = RewardSet(functions)(prompts, completions)
    # Three tokens of five are the policy's: on the target. All five are 3 beyond the free 2 of a slope of 4.
    assert seen["own"] == [3] * 4 and table.reshape(4, 3).tolist() == [[1.0, -0.75, 0.0]] * 4
    assert RewardSet(functions).required_columns() == {}


def test_tokens_of_the_policy_are_counted_without_an_environment_too():
    """Whatever a column of the dataset is called."""
    prompts, completions = batch()
    prompts[0].sample["policy_tokens"] = 50
    completions[1][1] = replace(completions[1][1], token_ids=torch.tensor([7, 8, 9]), sampler_logprobs=torch.zeros(3))
    seen = {}
    functions = {
        "target": RewardSpec(LengthTarget(3, 4)),
        "spy": RewardSpec(lambda policy_tokens, completions: seen.update(own=policy_tokens) or [0.0] * 4),
    }
    table = RewardSet(functions)(prompts, completions)
    assert seen["own"] == [1, 1, 1, 3] and table[..., 0].tolist() == [[0.5, 0.5], [0.5, 1.0]]


def test_asynchronous_and_plain_functions_run_side_by_side():
    met = threading.Barrier(2, timeout=5)

    async def one(completions):
        await asyncio.to_thread(met.wait)
        return [1.0] * 4

    def two(completions):
        met.wait()
        return [2.0] * 4

    assert score(one=one, two=two)[..., 0].unique().tolist() == [1.0]


async def cancelled(completions):
    raise asyncio.CancelledError("gone")


def test_functions_run_on_the_gpu_of_their_rank(monkeypatch):
    """Which GPU is the current one is a property of a thread, and in a new one it is the first."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "gpu", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: setattr(current, "gpu", gpu))
    torch.cuda.set_device(3)
    meeting = threading.Barrier(2)

    def where(completions, **_):
        meeting.wait(timeout=10)  # so that each function has a thread of its own
        return [float(torch.cuda.current_device())] * len(completions)

    assert score(one=where, two=where).flatten().tolist() == [3.0] * 8


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda completions: [1.0], "reward function f must return a list of 4 numbers or None, not 1 value"),
        (lambda completions: 1.0, "not float"),
        (lambda completions: "good", "not 4 values"),
        (lambda completions: torch.tensor(1.0), "must return a list of 4 numbers or None, not Tensor"),
        (lambda completions: [1.0, float("nan"), 1.0, 1.0], "reward function f returned nan for row t:0"),
        (lambda completions: [1.0, 1.0, 1.0, float("inf")], "reward function f returned inf for row t:1"),
        (lambda completions: [1.0, 1.0, "1", 1.0], "reward function f returned '1' for row t:1"),
        (lambda completions: 1 / 0, "reward function f raised ZeroDivisionError"),
        (cancelled, "reward function f raised CancelledError: gone (row t:0)"),
    ],
)
def test_what_is_no_reward_is_refused_with_function_and_row(function, text):
    with pytest.raises(UserError) as caught:
        score(f=function)
    assert text in str(caught.value)


def test_an_extra_column_has_one_value_per_completion():
    def short(completions, log_extra):
        log_extra("text", ["a"])
        return [1.0] * 4

    with pytest.raises(UserError, match=r"log_extra\('text', ...\) got 1 value for 4 completions"):
        score(short=short)


def test_an_extra_column_is_of_one_function():
    def one(completions, log_extra):
        log_extra("text", list("abcd"))
        return [1.0] * 4

    def two(completions, log_extra):
        return one(completions, log_extra)

    with pytest.raises(
        UserError, match=r"^log_extra\('text', ...\) is called by two reward functions; rename one column$"
    ):
        score(one=one, two=two)


@pytest.mark.parametrize("column", ["reward", "tokens", "thinking"])
def test_an_extra_column_that_the_record_has_anyway_is_refused(column):
    def one(completions, log_extra):
        log_extra(column, list("abcd"))
        return [1.0] * 4

    with pytest.raises(UserError, match=rf"^log_extra\('{column}', ...\) would be lost: .*; choose another$"):
        score(one=one)


def test_what_functions_log_under_one_name_is_averaged_over_all_of_its_values():
    def one(completions, log_metric):
        for value in (0.1, 0.2, 4.0):
            log_metric("seen", value)
        log_metric("own", -3.0)
        return [1.0] * 4

    def two(completions, log_metric):
        log_metric("seen", 1.5)
        return [1.0] * 4

    rewards = RewardSet({"one": RewardSpec(one), "two": RewardSpec(two)})
    for _ in range(2):  # what the first call logged is gone by the second
        rewards(*batch())
        found = {name: (total.item(), count.item()) for name, (total, count) in rewards.logged_metrics().items()}
        assert found == {
            "reward_log/seen": (pytest.approx(5.8, rel=1e-14), 4.0),
            "reward_log/own": (-3.0, 1.0),
        }


def test_rewards_and_weights_keep_their_precision():
    rewards = RewardSet({"f": RewardSpec(lambda completions: [0.1, 0.2, 0.3, 0.7], weight=0.9)})
    table = rewards(*batch())
    assert table.flatten().tolist() == [0.1, 0.2, 0.3, 0.7]
    expected = [0.9 * value for value in (0.1, 0.2, 0.3, 0.7)]
    for combined in (rewards.combine(table), rewards.weighted_sum(table)):
        assert combined.flatten().tolist() == pytest.approx(expected, rel=1e-14)


def test_a_completion_without_an_environment_beside_one_with_has_no_reward_of_one():
    prompts, completions = batch()
    played = dialogues()[1][0][1]
    completions[0][1] = replace(played, dialogue=replace(played.dialogue, reward=0.0))
    completions[1][0] = played
    seen = {}
    functions = {
        "environment": RewardSpec(
            lambda environment_reward, completions: seen.update(own=environment_reward) or environment_reward
        ),
        "plain": RewardSpec(lambda completions: [2.0] * 4),
    }
    table = RewardSet(functions)(prompts, completions).reshape(4, 2)
    assert seen["own"] == [None, 0.0, 0.5, None]
    assert table.nan_to_num(-1.0).tolist() == [[-1.0, 2.0], [0.0, 2.0], [0.5, 2.0], [-1.0, 2.0]]


def own_process(did):
    class Own:
        def start(self):
            did.append(("start", threading.current_thread()))

        def close(self):
            did.append(("close", threading.current_thread()))

        def check(self):
            raise UserError("no sandbox here")

        def __call__(self, completions, **_):
            did.append(("call", None))
            return [1.0] * len(completions)

    return Own()


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda own: own,
        functools.partial,
        lambda own: ForTasks(functools.partial(functools.partial(own), scale=2), ["a"]),
    ],
    ids=["itself", "partial", "of tasks"],
)
def test_a_function_with_a_process_of_its_own_is_started_where_the_set_is_called_and_closed_with_it(wrapped):
    """A process that another thread starts ends with that thread."""
    did, (prompts, completions) = [], batch()
    prompts = [replace(prompt, sample={"task": "a"}) for prompt in prompts]
    here = threading.current_thread()
    rewards = RewardSet(
        {"own": RewardSpec(wrapped(own_process(did))), "plain": RewardSpec(lambda completions: [1.0] * 4)}
    )
    with pytest.raises(UserError, match="^reward function own: no sandbox here$"):
        rewards.check()
    rewards(prompts, completions)
    rewards.close()
    assert did == [("start", here), ("call", None), ("close", here)]


def test_a_function_that_cannot_run_here_is_refused_by_name_before_the_run():
    class Needs:
        def check(self):
            raise UserError("no sandbox here")

        def __call__(self, completions, **_):
            return [1.0] * len(completions)

    rewards = RewardSet({"plain": RewardSpec(lambda completions: [1.0] * 4), "own": RewardSpec(Needs())})
    with pytest.raises(UserError, match="^reward function own: no sandbox here$"):
        rewards.check()


def test_columns_that_functions_need_are_known_before_the_run():
    def needs(completions, answer, scale=1.0, **kwargs):
        return []

    rewards = RewardSet({"a": RewardSpec(needs), "b": RewardSpec(lambda completions, prompts: [])})
    assert rewards.required_columns() == {"answer": "reward function a"}


def test_columns_that_functions_of_some_tasks_need_are_needed_in_their_rows():
    def needs(completions, answer, unit, **kwargs):
        return []

    def all_need(completions, unit):
        return []

    some = {"x": RewardSpec(ForTasks(needs, ["a", "b"])), "y": RewardSpec(ForTasks(needs, ["c"]))}
    x, y = "reward function x", "reward function y"
    by_task = {"a": x, "b": x, "c": y}
    assert RewardSet(some).required_columns() == {"answer": by_task, "unit": by_task, "task": y}
    everywhere = RewardSet({"z": RewardSpec(all_need), **some}).required_columns()
    assert everywhere == {"answer": by_task, "unit": "reward function z", "task": y}


def test_a_function_of_some_tasks_may_be_asynchronous():
    async def later(completions, answer):
        await asyncio.sleep(0)
        return [float(a == "y") + len(completions) for a in answer]

    prompts, completions = batch()
    for prompt, task in zip(prompts, ("a", "b"), strict=True):
        prompt.sample["task"] = task
    functions = {"b": RewardSpec(ForTasks(later, ["b"])), "plain": RewardSpec(lambda completions: [0.0] * 4)}
    values = RewardSet(functions)(prompts, completions)[..., 0].flatten().nan_to_num(-1.0)
    assert values.tolist() == [-1.0, -1.0, 3.0, 3.0]


def test_a_row_to_which_no_function_applies_is_named():
    functions = {"f": lambda completions: [1, 1, 1, None], "g": lambda completions: [None] * 4}
    with pytest.raises(UserError) as caught:
        score(**functions)
    assert str(caught.value).startswith("row t:1: no reward function applies to a completion (f, g returned None)")


def test_combination_by_weight():
    rewards = RewardSet(
        {"a": RewardSpec(lambda completions: [1, 2, 3, None], 2.0), "b": RewardSpec(lambda completions: [10] * 4, 0.5)}
    )
    assert rewards.combine(rewards(*batch())).tolist() == [[7.0, 9.0], [11.0, 5.0]]


def test_no_function_at_all_is_refused():
    with pytest.raises(UserError, match="reward.functions is empty"):
        RewardSet({})


def test_a_function_that_only_records_does_not_hide_that_no_other_applies():
    def some(completions):
        return [1.0, 1.0, 1.0, None]

    functions = {"some": RewardSpec(some), "seen": RewardSpec(lambda completions: [5.0] * 4, weight=0.0)}
    with pytest.raises(UserError) as caught:
        RewardSet(functions)(*batch())
    line = "row t:1: no reward function with a weight applies to a completion (some returned None); "
    assert str(caught.value).startswith(line)
    # Rewards of turns have no weight, so with an environment all functions may have weight 0.
    recorded = {name: RewardSpec(spec.function, weight=0.0) for name, spec in functions.items()}
    assert RewardSet(recorded)(*batch())[..., 1].eq(5.0).all()


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_function_is_not_named_like_a_metric_of_all_of_them(name):
    with pytest.raises(UserError, match=f"^reward.functions.{name}: reward/{name} is the metric of all functions"):
        RewardSet({name: RewardSpec(lambda completions: [1.0] * 4)})


@pytest.mark.parametrize(
    ("functions", "line"),
    [
        (
            {"f": len},
            "^reward.functions.f is of type builtin_function_or_method; give gspo_lightning.rewards.RewardSpec",
        ),
        ([len], "^reward.functions is of type list; give a dict of names and RewardSpec"),
    ],
)
def test_a_function_without_its_spec_is_refused_by_its_key(functions, line):
    with pytest.raises(UserError, match=line):
        RewardSet(functions)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_function_that_asks_for_the_column_prompt_is_refused_before_the_run(wrapped):
    def function(completions, prompt, **_):
        return [1.0] * len(completions)

    rewards = RewardSet({"f": RewardSpec(ForTasks(function, ["a"]) if wrapped else function)})
    with pytest.raises(UserError, match="^reward function f: it is never given prompt; name the parameter prompts$"):
        rewards.check()
    RewardSet({"f": RewardSpec(lambda completions, prompt=None: [])}).check()
