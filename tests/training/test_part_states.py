"""The states of an estimator, of reward functions and of tasks: saved in a checkpoint, restored by a resumed run."""

from __future__ import annotations

import functools
import math
import signal
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.callbacks.checkpoint import RolloutCheckpoint
from gspo_lightning.data import MicroDigit, Mixture, PromptDataModule
from gspo_lightning.data.first_rows import FirstRows
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.rewards import ForTasks, RewardSet, RewardSpec
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.engine import EngineUnavailableError
from gspo_lightning.training.out_of_memory import OutOfMemoryError
from gspo_lightning.training.part_states import _fingerprint, gathered_states, restore_states, states_of
from gspo_lightning.types import Rollout
from tests.command_line import run
from tests.scripted import Settings, build_module, scripted_reward, trainer, weights
from tests.training.test_one_step_off import Data, Elsewhere

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class RunningMean(AdvantageEstimator):
    """Rewards less the mean of all rollouts so far."""

    def __init__(self) -> None:
        super().__init__(scale_rewards="none")
        self.total, self.count = torch.zeros(()), 0

    def __call__(self, rewards, everyone=None):
        self.total, self.count = self.total + rewards.sum(), self.count + rewards.numel()
        return rewards - self.total / self.count

    def state_dict(self):
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state):
        self.total, self.count = state["total"], state["count"]


class Tiring:
    """Worth less with every completion that it has scored."""

    def __init__(self) -> None:
        self.scored = {"n": 0}

    def __call__(self, completion_ids, **columns):
        rewards = []
        for ids in completion_ids:
            self.scored["n"] += 1
            rewards.append((sum(ids) % 7) / self.scored["n"])
        return rewards

    def state_dict(self):
        return self.scored  # the object itself, which the next rollout changes

    def load_state_dict(self, state):
        self.scored = state


def made(folder, rollouts=4, engine=None, rewards=None, advantages=None, **more) -> GSPOModule:
    settings = Settings(optimizer=functools.partial(torch.optim.SGD, lr=0.05), update={"num_minibatches": 2})
    module = build_module(folder, settings)
    if rewards is None:
        rewards = {"tiring": Tiring(), "method": Tiring().__call__}
    return GSPOModule(
        module.policy_loader, RewardSet({name: RewardSpec(f) for name, f in rewards.items()}),
        objective=module.objective, sampling=module.sampling, optimizer=module.optimizer_factory,
        max_rollouts=rollouts, engine=engine or TransformersEngine(), update=module.update_settings,
        advantages=advantages or RunningMean(), **more,
    )  # fmt: skip


class Saving(L.Callback):
    def __init__(self, path, after=2):
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, module, *_: Any) -> None:
        if module.rollouts_done == self.after:
            trainer.save_checkpoint(self.path)


def fit(module, data=None, save=None, ckpt=None, callbacks=()):
    runner = trainer(callbacks=[*callbacks, *([Saving(save)] if save else [])])
    runner.fit(module, datamodule=data or Data(), ckpt_path=ckpt, weights_only=True)
    return runner


def resumed_equals_whole(make, path, data=Data, **more):
    whole, resumed = make(), make()
    fit(whole, data(), save=path, **more)
    fit(resumed, data(), ckpt=path, **more)
    assert resumed.rollouts_done == whole.rollouts_done == 4
    assert torch.equal(weights(resumed), weights(whole))
    return whole, resumed


@pytest.mark.parametrize("staleness", [0, 1])
def test_two_rollouts_and_two_more_are_four_to_the_bit(staleness, micro_model_dir, tmp_path):
    whole, resumed = resumed_equals_whole(
        lambda: made(micro_model_dir, engine=Elsewhere() if staleness else None), tmp_path / "x.ckpt"
    )
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["gspo_lightning"]["parts"]
    assert saved["advantages"]["states"][0]["count"] == 2 * 12 and len(saved["advantages"]["states"]) == 1
    # Also with a rollout sampled ahead: it has no rewards yet.
    assert saved["reward function tiring"] == {"class": "Tiring", "states": [{"n": 2 * 12}]}
    assert saved["reward function method"] == {"class": "Tiring", "states": [{"n": 2 * 12}]}
    assert resumed.advantages.count == whole.advantages.count == 4 * 12


def test_a_run_killed_in_its_third_rollout_goes_on_in_its_folder(micro_model_dir, tmp_path):
    run(micro_model_dir, tmp_path, script="tests/training/run_killed.py", expect=-signal.SIGKILL)
    whole, resumed = made(micro_model_dir), made(micro_model_dir)
    fit(whole)
    fit(resumed, ckpt=tmp_path / "last.ckpt", callbacks=[RolloutCheckpoint(tmp_path, 1)])
    assert torch.equal(weights(resumed), weights(whole))


# ---------------------------------------------------------------- dynamic sampling and tasks


@dataclass
class Lesson:
    """Digits whose number of letters, the level, a callback raises; it counts the rows that it has made."""

    name: str = "lesson"
    num_train_rows: Any = None
    level: int = 1
    rows: dict[str, int] = field(default_factory=lambda: {"made": 0})

    def train_row(self, index: int) -> dict[str, Any]:
        self.rows["made"] += 1
        prompt = "ab" * self.level + "abcdefgh"[self.rows["made"] % 8] + str(index % 4) + "="
        return {"prompt": prompt, "answer": str(index % 4)}

    def validation_rows(self) -> list[dict[str, Any]]:
        return MicroDigit(num_validation=2).validation_rows()

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level, self.rows = state["level"], state["rows"]


class Raise(L.Callback):
    """Raises the level with every rollout."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        lesson = trainer.datamodule.task
        while not isinstance(lesson, Lesson):
            lesson = lesson.task if isinstance(lesson, FirstRows) else lesson.tasks["lesson"]
        lesson.level += 1


class Odd(Tiring):
    """Of some groups all rewards are equal."""

    def __call__(self, completion_ids, **columns):
        rewards = super().__call__(completion_ids)
        return [0.5 if n // 3 % 2 and self.scored["n"] % 5 else r for n, r in enumerate(rewards)]


def lessons(folder, task=Lesson):
    return PromptDataModule(task(), str(folder), prompts_per_rollout=4, max_prompt_length=40)


TASKS = {
    "alone": Lesson,
    "in a mixture": lambda: Mixture({"lesson": Lesson(), "digit": MicroDigit()}),
    "first rows": lambda: FirstRows(Lesson(), 8),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("draws", [0, 3])
def test_a_task_with_a_state_makes_the_rows_of_an_unbroken_run(task, draws, micro_model_dir, tmp_path):
    """A batch that is fetched ahead would be made of the level before, in one of the two runs."""
    path = tmp_path / "x.ckpt"
    whole, resumed = resumed_equals_whole(
        lambda: made(micro_model_dir, max_draws=draws, rewards={"odd": Odd()}), path,
        data=lambda: lessons(micro_model_dir, task), callbacks=[Raise()],
    )  # fmt: skip
    assert [p.prompt for p in resumed.last_scored.prompts] == [p.prompt for p in whole.last_scored.prompts]
    saved = torch.load(path, weights_only=True)
    ((key, part),) = ((k, p) for k, p in saved["gspo_lightning"]["parts"].items() if k.startswith("data.task"))
    # After the level was raised a second time; each row was made once, and none of the third rollout yet.
    assert part["states"][0]["level"] == 3
    assert part["states"][0]["rows"]["made"] == saved["PromptDataModule"]["cursor"] // (2 if "tasks" in key else 1)
    assert draws or saved["PromptDataModule"]["cursor"] == 8


def test_what_a_callback_logs_before_a_rollout_makes_no_rows(micro_model_dir):
    data, made_before, made_after = lessons(micro_model_dir), [], []

    class Log(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            made_before.append(data.task.rows["made"])
            module.log("level", float(data.task.level))
            made_after.append(data.task.rows["made"])

    fit(made(micro_model_dir), data, callbacks=[Log()])
    assert made_after == made_before == [0, 4, 8, 12]


class Failing(TransformersEngine):
    """Fails once, in the call of that number."""

    def generate(self, policy, prompts, sampling, seed) -> Rollout:
        calls = self.__dict__.setdefault("calls", [])
        calls.append(seed)
        if len(calls) == self.__dict__.get("fail_at"):
            raise EngineUnavailableError("nobody is left")
        return super().generate(policy, prompts, sampling, seed)


def test_a_rollout_that_broke_off_leaves_no_trace_in_the_states(micro_model_dir, tmp_path):
    """Its rows were made and some of its completions had rewards; a resumed run does both again."""
    make = functools.partial(made, micro_model_dir, max_draws=3)
    whole, counted = make(rewards={"odd": Odd()}, engine=Failing()), []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            counted.append(len(module.engine.calls))

    fit(whole, lessons(micro_model_dir), callbacks=[Raise(), Count()])
    second = counted[1] + 2  # its second call of the third rollout
    assert counted[2] >= second
    engine = Failing()
    engine.__dict__["fail_at"] = second
    cut, resumed = (make(rewards={"odd": Odd()}, engine=e) for e in (engine, Failing()))
    saving = RolloutCheckpoint(tmp_path, every_n_rollouts=100)
    with pytest.raises(EngineUnavailableError, match="nobody is left"):
        fit(cut, lessons(micro_model_dir), callbacks=[Raise(), saving])
    fit(resumed, lessons(micro_model_dir), ckpt=tmp_path / "last.ckpt", callbacks=[Raise()])
    assert torch.equal(weights(resumed), weights(whole))


class Breaks(L.Callback):
    """Fails in the third rollout, once: in the minibatch of that number, or as an engine of one's own does."""

    def __init__(self, where):
        self.where, self.begun = where, 0

    def on_train_batch_start(self, trainer, module, *_):
        self.begun = 0

    def on_before_backward(self, trainer, module, loss):
        if module.rollouts_done == 2 and self.begun == self.where:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.begun += 1


class Missing(MicroDigit):
    """Has no row for the third rollout of four prompts, at first."""

    def train_row(self, index):
        if index == 9:
            raise FileNotFoundError("9.png")
        return super().train_row(index)


class Offline(TransformersEngine):
    calls = 0

    def generate(self, policy, prompts, sampling, seed):
        self.calls += 1
        if self.calls == 3:
            raise ConnectionError("no route to host")
        return super().generate(policy, prompts, sampling, seed)


@pytest.mark.parametrize(
    ("where", "staleness", "error", "saved"),
    [
        ("row", 0, UserError, True),
        ("engine", 0, ConnectionError, True),
        (0, 0, OutOfMemoryError, True),
        (1, 0, OutOfMemoryError, False),
        (0, 1, OutOfMemoryError, False),  # the rollout in hand was of weights that are gone
    ],
    ids=[
        "a row",
        "an own engine",
        "no memory for the first step",
        "none for the second",
        "none behind a rollout ahead",
    ],
)
def test_whole_rollouts_are_saved_where_one_ends_before_its_first_step(
    where, staleness, error, saved, micro_model_dir, tmp_path
):
    def make(engine=TransformersEngine):
        return made(micro_model_dir, engine=Elsewhere() if staleness else engine())

    whole, cut, resumed = make(), make(Offline if where == "engine" else TransformersEngine), make()
    data = lambda task=MicroDigit: None if staleness else lessons(micro_model_dir, task)  # noqa: E731
    fit(whole, data())
    with pytest.raises(error):
        fit(
            cut,
            data(Missing if where == "row" else MicroDigit),
            callbacks=[Breaks(where), RolloutCheckpoint(tmp_path, every_n_rollouts=100)],
        )
    assert (tmp_path / "last.ckpt").exists() is saved
    if saved:
        fit(resumed, data(), ckpt=tmp_path / "last.ckpt")
        assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("draws", [0, 3])
def test_a_second_fit_after_a_rollout_that_broke_off_is_the_unbroken_run(draws, micro_model_dir):
    """As in a notebook, where the cell that fits is run again: the same objects go on, and weights had not moved."""

    class Break(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if module.rollouts_done == 2:
                raise ValueError("stopped by hand")

    whole, cut = (made(micro_model_dir, max_draws=draws, rewards={"odd": Odd()}) for _ in range(2))
    fit(whole, lessons(micro_model_dir), callbacks=[Raise()])
    data = lessons(micro_model_dir)
    with pytest.raises(ValueError, match="stopped by hand"):
        fit(cut, data, callbacks=[Raise(), Break()])
    assert cut.advantages.count == 3 * 12
    fit(cut, data, callbacks=[Raise()])
    assert torch.equal(weights(cut), weights(whole)) and cut.rollouts_done == 4
    assert cut.advantages.count == whole.advantages.count == 4 * 12
    assert data.task.rows["made"] == data.cursor


def test_a_part_that_was_replaced_after_a_rollout_that_broke_off_begins_afresh(micro_model_dir):
    class Break(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            raise ValueError("stopped by hand")

    module = made(micro_model_dir)
    module.advantages.count = 5
    with pytest.raises(ValueError, match="stopped by hand"):
        fit(module, callbacks=[Break()])
    module.advantages = RunningMean()
    fit(module)
    assert module.advantages.count == 4 * 12


def test_rows_made_ahead_of_their_time_are_refused(micro_model_dir):
    line = (
        r"^rollout.engine.staleness=1: data.task has a state, but its rows would be made a rollout before their time, "
        r"and not again by a resumed run; set staleness to 0, or make rows from their index alone$"
    )
    with pytest.raises(UserError, match=line):
        fit(made(micro_model_dir, engine=Elsewhere()), lessons(micro_model_dir))


# ---------------------------------------------------------------- what is refused, and what is said


class Half(AdvantageEstimator):
    def state_dict(self):
        return {}


class HalfReward:
    def __call__(self, completions, **_):
        return [0.0] * len(completions)

    def load_state_dict(self, state):
        pass


def test_one_of_the_two_methods_is_refused(micro_model_dir):
    rest = "; give it both, and its state is saved in checkpoints and restored on a resume, or neither$"
    with pytest.raises(UserError, match=rf"^advantages \(Half\) has state_dict but no load_state_dict{rest}"):
        made(micro_model_dir, advantages=Half())
    line = rf"^reward function a \(HalfReward\) has load_state_dict but no state_dict{rest}"
    with pytest.raises(UserError, match=line):
        RewardSet({"a": RewardSpec(ForTasks(HalfReward(), ["x"]))})
    task = type("HalfTask", (Lesson,), {"state_dict": None})
    line = rf"^data.task.tasks.b \(HalfTask\) has load_state_dict but no state_dict{rest}"
    with pytest.raises(UserError, match=line):
        lessons(micro_model_dir, lambda: Mixture({"b": task()}))


def test_a_state_in_another_process_is_refused():
    line = (
        r"^reward function a has a state \(state_dict\) and timeout_s=3.0: its process would keep the state from the "
        r"checkpoints; set timeout_s to null, or take state_dict and load_state_dict away$"
    )
    with pytest.raises(UserError, match=line):
        RewardSet({"a": RewardSpec(functools.partial(Tiring()), timeout_s=3.0)})


class Holding(Tiring):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def state_dict(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


REST = (
    ", which a checkpoint cannot hold, because it is read without pickle; use numbers, text, bytes, None, tensors, and "
    "lists, tuples, sets and dicts of them"
)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"a": [1, np.float64(2)]}, f"its state_dict()['a'][1] is of type numpy.float64{REST}"),
        ({"a": {"b": np.zeros(2)}}, f"its state_dict()['a']['b'] is of type numpy.ndarray{REST}"),
        ({1: Tiring()}, f"its state_dict()[1] is of type tests.training.test_part_states.Tiring{REST}"),
        ({"t": torch.eye(2).to_sparse()}, f"its state_dict()['t'] is of type torch.Tensor{REST}"),
        (KeyError("x"), "state_dict() raised KeyError: 'x'"),
    ],
)
def test_a_state_that_no_checkpoint_could_hold_is_refused_before_the_first_rollout(value, line, micro_model_dir):
    module = made(micro_model_dir, rewards={"a": Holding(value)})
    with pytest.raises(UserError) as error:
        fit(module)
    assert str(error.value) == f"reward function a (Holding): {line}" and module.rollouts_done == 0


def test_whatever_a_state_may_hold_comes_back(micro_model_dir, tmp_path):
    parameter = torch.nn.Parameter(torch.arange(6.0)[2:])
    value = {
        "a": [None, True, 2**130, -0.5, 1j, "ü", b"b", (1, {2})],
        (1, "k"): {"t": torch.tensor(1.5), "p": parameter},
    }
    loaded = []
    part = Holding(value)
    part.load_state_dict = loaded.append
    fit(made(micro_model_dir, rewards={"a": part}), save=tmp_path / "x.ckpt")
    fit(made(micro_model_dir, rewards={"a": part}), ckpt=tmp_path / "x.ckpt")
    (found,) = loaded
    assert found["a"] == value["a"] and found[1, "k"]["t"].item() == 1.5
    assert torch.equal(found[1, "k"]["p"], parameter) and not found[1, "k"]["p"].requires_grad
    assert found[1, "k"]["p"].untyped_storage().nbytes() == 16


def test_states_have_one_print_only_if_they_are_equal_to_the_bit():
    """Else a checkpoint would hold one of two different states of its ranks, for both."""
    zeros = torch.zeros
    different = [
        None, True, False, 1, 0, 1.0, 0.0, -0.0, 1j, "1", b"1", "", b"", "None", [], (), set(), {}, OrderedDict(),
        [1, 2], [12], (1, 2), {1, 2}, {1: 2}, {2: 1}, {3: 2}, [[1], [2]], [[1, 2]], [[1], 2], [1, [2]], [1, 2, 1, 2],
        ["ab", "c"], ["a", "bc"], ["a", "b", "c"], {"a": [1], "b": []}, {"a": [1, "b", []]}, {"a": [1, "b"]},
        zeros(4), zeros(4, dtype=torch.float64), zeros(4, dtype=torch.int32), zeros(2, 2), zeros(1, 4), zeros(4, 1),
        zeros(2, 4), zeros(()), zeros(1), zeros(0), zeros(0, 2), torch.tensor([0.0, 0.0, 0.0, -0.0]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[1.0, 3.0], [2.0, 4.0]]), torch.tensor([True, False]), torch.tensor([False, True]),
    ]  # fmt: skip
    prints = [_fingerprint(state) for state in different]
    assert len(set(prints)) == len(different)
    one_way, other_way = {0, 8}, {8, 0}  # both in the same slot, so the order is that of coming
    assert list(one_way) != list(other_way)
    turned = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T  # the same numbers in another order in memory
    equal = [
        (turned, torch.tensor([[1.0, 3.0], [2.0, 4.0]])), (one_way, other_way),
        (math.nan, math.nan), (torch.tensor([math.nan]), torch.tensor([math.nan])), ("\ud800", "\ud800"),
        ({"a": [1, (2.5, None)]}, {"a": [1, (2.5, None)]}),
    ]  # fmt: skip
    for one, other in equal:
        assert _fingerprint(one) == _fingerprint(other)


def test_what_a_part_does_to_the_state_it_was_given_is_not_done_to_the_checkpoint(micro_model_dir):
    tired = Tiring()
    tired.scored["n"] = 5
    saved = gathered_states(states_of(made(micro_model_dir, rewards={"a": tired})))
    for _ in range(2):
        module = made(micro_model_dir, rewards={"a": Tiring()})
        restore_states(module, saved)
        part = module.rewards.functions["a"].function
        assert part.scored == {"n": 5}
        part.scored["n"] += 1


def lines_of_resume(module, path):
    with pytest.warns(UserWarning) as found:
        fit(module, ckpt=path)
    return sorted(str(w.message) for w in found if str(w.message).startswith("ckpt_path: "))


def test_parts_that_come_and_go_are_named(micro_model_dir, tmp_path):
    path, plain = tmp_path / "x.ckpt", scripted_reward
    fit(made(micro_model_dir, rewards={"a": Tiring(), "b": plain, "c": Tiring()}), save=path)
    module = made(micro_model_dir, rewards={"a": Odd(), "b": Tiring(), "c": plain})
    assert lines_of_resume(module, path) == [
        "ckpt_path: reward function a (Odd) starts afresh: the checkpoint has only one of Tiring in its place",
        "ckpt_path: reward function b (Tiring) starts afresh: the checkpoint has none in its place",
        "ckpt_path: the checkpoint has a state of reward function c (Tiring), which this run does not have or which "
        "has no state here; it is dropped",
    ]
    assert module.advantages.count == 4 * 12
    assert [module.rewards.functions[n].function.scored["n"] for n in "ab"] == [2 * 12] * 2


def test_a_state_that_is_not_taken_is_one_line(micro_model_dir, tmp_path):
    path = tmp_path / "x.ckpt"
    fit(made(micro_model_dir, rewards={"a": Holding({"x": 1})}), save=path)
    module = made(micro_model_dir, rewards={"a": Holding({"x": 1})})
    module.rewards.functions["a"].function.load_state_dict = lambda state: state["mean"]
    line = (
        r"^ckpt_path: reward function a \(Holding\) does not take its state in the checkpoint: load_state_dict\(\) "
        r"raised KeyError: 'mean'$"
    )
    with pytest.raises(UserError, match=line):
        fit(module, ckpt=path)
