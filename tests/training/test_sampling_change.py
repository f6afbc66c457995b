"""Sampling settings that change during a run: who follows, what is refused, and what a resumed run samples."""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.objective import Objective
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.training import rollout_update, sampling_change
from gspo_lightning.training.sampling_change import check_ranks_agree, restore_sampling, sampling_state
from gspo_lightning.types import SamplingParams
from tests.scripted import Settings, build_module, trainer, weights
from tests.training.test_one_step_off import Data, Elsewhere


def by_length(completion_ids, **_):
    return [float(sum(ids) % 11) for ids in completion_ids]


class Noting(TransformersEngine):
    """Notes how many completions of which length and temperature it was asked for, by seed."""

    def generate(self, policy, prompts, sampling, seed):
        self.__dict__.setdefault("asked", []).append(
            (sampling.num_generations, sampling.max_completion_length, sampling.temperature)
        )
        return super().generate(policy, prompts, sampling, seed)


class NotingElsewhere(Elsewhere):
    def generate(self, policy, prompts, sampling, seed):
        self.__dict__.setdefault("asked", []).append(
            (sampling.num_generations, sampling.max_completion_length, sampling.temperature)
        )
        return super().generate(policy, prompts, sampling, seed)


def made(folder, engine, rollouts=4, length=8, own=None, loss="dr_grpo", **sampling) -> GSPOModule:
    settings = Settings(optimizer=functools.partial(torch.optim.SGD, lr=0.05), update={"num_minibatches": 2})
    module = build_module(folder, settings)
    return GSPOModule(
        module.policy_loader, RewardSet({"r": RewardSpec(by_length)}),
        objective=Objective(length if own is None else own, loss_type=loss),
        sampling=SamplingParams(**{"num_generations": 3, "max_completion_length": length, **sampling}),
        optimizer=module.optimizer_factory, max_rollouts=rollouts, engine=engine, update=module.update_settings,
    )  # fmt: skip


class Curriculum(L.Callback):
    """After two rollouts completions are longer, more and cooler. Set once, and with NumPy's numbers."""

    def on_train_batch_end(self, trainer, module, *_: Any) -> None:
        if module.rollouts_done == 2:
            cooler, length = np.linspace(1.0, 0.8, 3)[1], np.int64(12)
            module.sampling = replace(
                module.sampling, temperature=cooler, max_completion_length=length, num_generations=4
            )


BEFORE, AFTER = (3, 8, 1.0), (4, 12, 0.9)


class Saving(L.Callback):
    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, module, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{module.rollouts_done}.ckpt")


def fit(module, ckpt=None, callbacks=(), **changes):
    trainer(callbacks=list(callbacks), **changes).fit(module, datamodule=Data(), ckpt_path=ckpt, weights_only=True)


@pytest.fixture
def seen(monkeypatch):
    """Per rollout: length and group size of the completions, and what the update reckons with."""
    found = []
    of = rollout_update.RolloutUpdate.run

    def run(self):
        passes = self.passes
        found.append((
            len(self.scored.completions[0]), passes.objective.max_completion_length, passes.temperature,
            max(c.num_trained for group in self.scored.completions for c in group),
        ))  # fmt: skip
        of(self)

    monkeypatch.setattr(rollout_update.RolloutUpdate, "run", run)
    return found


def test_everyone_follows_from_the_next_rollout_on(micro_model_dir, seen):
    engine = Noting()
    module = made(micro_model_dir, engine)
    fit(module, callbacks=[Curriculum()])
    assert engine.asked == [BEFORE] * 2 + [AFTER] * 2
    assert [row[:3] for row in seen] == engine.asked and [row[3] for row in seen] == [8, 8, 12, 12]
    assert (module.objective.max_completion_length, module.validator.sampled) == (
        12,
        replace(module.sampling, num_generations=2),
    )
    assert module.validator.greedy == replace(module.sampling, num_generations=1, temperature=0.0)
    assert type(module.sampling.temperature) is float and type(module.sampling.max_completion_length) is int


def test_a_constant_of_ones_own_stays(micro_model_dir, seen):
    module = made(micro_model_dir, Noting(), own=12)
    for length in (12, 20):  # at 12 it is the same by chance
        module.sampling = replace(module.sampling, max_completion_length=length)
    assert module.objective.max_completion_length == 12


def test_a_change_in_the_update_is_for_the_next_rollout(micro_model_dir, seen):
    class Amid(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            module.sampling = replace(module.sampling, max_completion_length=12, temperature=0.9)

    changed, plain = (made(micro_model_dir, Noting(), rollouts=1) for _ in range(2))
    fit(changed, callbacks=[Amid()])
    fit(plain)
    assert torch.equal(weights(changed), weights(plain))


@pytest.mark.parametrize("resume_after", [1, 2, 3])
@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.filterwarnings("ignore:rollout.engine.staleness=1. the sampling was changed")
def test_a_resumed_run_samples_as_an_unbroken_one(staleness, resume_after, micro_model_dir, tmp_path):
    make = functools.partial(made, micro_model_dir)
    whole, resumed = (make(NotingElsewhere() if staleness else Noting()) for _ in range(2))
    fit(whole, callbacks=[Curriculum(), Saving(tmp_path)])
    fit(resumed, ckpt=tmp_path / f"{resume_after}.ckpt", callbacks=[Curriculum()])
    assert resumed.sampling == whole.sampling and torch.equal(weights(resumed), weights(whole))


def test_a_rollout_sampled_ahead_keeps_its_settings_and_is_sampled_once(micro_model_dir, seen, recwarn):
    engine = NotingElsewhere()
    fit(made(micro_model_dir, engine), callbacks=[Curriculum()])
    # The third was under way when the change came.
    assert engine.asked == [BEFORE] * 3 + [AFTER]
    assert [row[:3] for row in seen] == engine.asked and [row[3] for row in seen] == [8, 8, 8, 12]
    said = [str(w.message) for w in recwarn if "ampl" in str(w.message)]
    assert said == [
        "rollout.engine.staleness=1: the sampling was changed while this rollout was being sampled ahead; it keeps "
        "the settings before, and the change begins with the next one"
    ]


@pytest.mark.parametrize("staleness", [0, 1])
def test_other_settings_of_the_resumed_run_apply(staleness, micro_model_dir, tmp_path):
    fit(made(micro_model_dir, NotingElsewhere() if staleness else Noting()), callbacks=[Curriculum(), Saving(tmp_path)])
    engine = NotingElsewhere() if staleness else Noting()
    module = made(micro_model_dir, engine, temperature=0.7)
    with pytest.warns(
        UserWarning, match=r"^ckpt_path: the sampling that was set .* is not taken over: this run has other"
    ):
        fit(module, ckpt=tmp_path / "3.ckpt")
    assert engine.asked == [(3, 8, 0.7)] and module.sampling.temperature == 0.7


REFUSED = [
    ({"temperature": 0.0}, "rollout.temperature=0.0 must be above 0: greedy completions are all equal"),
    ({"top_k": 1}, "rollout.top_k=1 leaves one token to draw: greedy completions are all equal"),
    (
        {"num_generations": 1},
        "rollout.num_generations=1 must be at least 2; a group of one has nothing to be compared with",
    ),
    ({"max_completion_length": 0}, "rollout.max_completion_length=0 must be at least 1"),
    ({"max_completion_length": 12.5}, "rollout.max_completion_length=12.5 must be a whole number"),
    ({"top_k": 2.5}, "rollout.top_k=2.5 must be a whole number"),
    ({"temperature": "hot"}, "rollout.temperature='hot' must be a number"),
    ({"min_p": 1.0}, "rollout.min_p=1.0 leaves one token to draw: greedy completions are all equal"),
    (
        {"repetition_penalty": 1.2},
        "rollout.repetition_penalty must be 1.0 in training: it depends on the history, so the policy's "
        "log-probabilities would not be those of the distribution that was sampled",
    ),
]


@pytest.mark.parametrize(("change", "line"), REFUSED)
def test_what_teaches_nothing_is_refused_and_changes_nothing(change, line, micro_model_dir):
    module = made(micro_model_dir, Noting())
    before = module.sampling, module.objective, module.validator.sampled
    with pytest.raises(UserError) as error:
        module.sampling = replace(module.sampling, **change)
    assert str(error.value) == line and (module.sampling, module.objective, module.validator.sampled) == before
    with pytest.raises(UserError, match=r"^sampling is of type dict; set it to dataclasses.replace\(module.sampling, "):
        module.sampling = {"temperature": 0.5}


class OfTheBatch(AdvantageEstimator):
    def __call__(self, rewards, everyone=None):
        return rewards - rewards.mean()


def test_groups_of_one_may_change_and_be_restored_where_the_estimator_takes_them(micro_model_dir):
    module = made(micro_model_dir, Noting(), num_generations=1)
    module.advantages = OfTheBatch()
    module.sampling = replace(module.sampling, temperature=0.5)
    other = made(micro_model_dir, Noting(), num_generations=1)
    other.advantages = OfTheBatch()
    assert restore_sampling(other, sampling_state(module))
    assert (other.sampling.num_generations, other.sampling.temperature) == (1, 0.5)
    drawing = made(micro_model_dir, Noting())
    drawing.advantages, drawing.max_draws = OfTheBatch(), 2
    with pytest.raises(UserError, match=r"^dynamic_sampling.max_draws=2: every group of rollout.num_generations=1 has"):
        drawing.sampling = replace(drawing.sampling, num_generations=1)


@pytest.mark.parametrize("number", [0, 1])
def test_a_setting_that_is_not_taken_over_is_said_by_the_first_rank_and_only_if_one_was_set(
    number, micro_model_dir, monkeypatch
):
    monkeypatch.setattr(sampling_change, "rank", lambda: number)
    module, other = made(micro_model_dir, Noting()), made(micro_model_dir, Noting(), temperature=0.7)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not restore_sampling(other, sampling_state(module)) and not said
        module.sampling = replace(module.sampling, temperature=0.5)
        assert not restore_sampling(other, sampling_state(module))
        assert len(said) == (1 if number == 0 else 0) and other.sampling.temperature == 0.7
        sampling_change.say_begins_later(SimpleNamespace(sampling=1, sampled_with=1))
        assert len(said) == (1 if number == 0 else 0)
        sampling_change.say_begins_later(SimpleNamespace(sampling=1, sampled_with=2))
        assert len(said) == (2 if number == 0 else 0)


def test_strings_that_end_a_completion_may_be_a_list_and_are_restored(micro_model_dir):
    module, other = (made(micro_model_dir, Noting()) for _ in range(2))
    module.sampling = replace(module.sampling, stop=["a", "b"])
    assert module.sampling.stop == ("a", "b")
    assert restore_sampling(other, sampling_state(module)) and other.sampling == module.sampling


class Around:
    """An engine that forwards its calls to another."""

    def __init__(self, engine) -> None:
        self.engine = engine

    def generate(self, policy, prompts, sampling, seed):
        return self.engine.generate(policy, prompts, sampling, seed)


@pytest.mark.parametrize("staleness", [0, 1])
def test_completions_that_the_engine_would_cut_are_refused(staleness, micro_model_dir):
    engine = NotingElsewhere() if staleness else Noting()
    engine.__dict__["max_model_len"] = Data.max_prompt_length + 11
    line = (
        r"^rollout.max_completion_length=12: the engine was made for 19 tokens of prompt and completion, so for at most "
        r"11 here; give it the longest of the run, rollout.engine.max_completion_length$"
    )
    with pytest.raises(UserError, match=line):
        fit(made(micro_model_dir, engine), callbacks=[Curriculum()])
    with pytest.raises(UserError, match=line):  # and before the first rollout
        fit(made(micro_model_dir, engine, length=12))
    with pytest.raises(UserError, match=line):
        fit(made(micro_model_dir, Around(engine), length=12))
    module = made(micro_model_dir, engine, rollouts=1, length=11)
    fit(module)
    assert module.rollouts_done == 1


def test_a_rotation_that_would_change_is_refused(micro_model_dir, monkeypatch):
    monkeypatch.setattr("gspo_lightning.training.sampling_checks._rotation_limit", lambda config: 19)
    with pytest.raises(UserError, match=r"prompts of 8 and completions of 12 tokens exceed 19, beyond which"):
        fit(made(micro_model_dir, Noting()), callbacks=[Curriculum()])


def test_the_curriculum_of_the_documentation(micro_model_dir):
    """Sixteen tokens more with every hundred rollouts; here with every rollout."""
    page = (Path(__file__).parents[2] / "docs/reuse.md").read_text()
    (text,) = (t for t in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "class Longer" in t)
    found: dict[str, Any] = {}
    exec(compile(text, "snippet", "exec"), found)
    engine = Noting()
    fit(made(micro_model_dir, engine, rollouts=3), callbacks=[found["Longer"](first=4, more=2, every=1, longest=7)])
    assert [length for _, length, _ in engine.asked] == [4, 6, 7]


def gathers(monkeypatch, *of_ranks):
    """Stands in for ranks with these settings."""
    monkeypatch.setattr(sampling_change, "world_size", lambda: len(of_ranks))

    def gather(given, own):
        given[:] = [asdict(other) for other in of_ranks]

    monkeypatch.setattr(sampling_change.dist, "all_gather_object", gather)


def test_a_change_on_one_rank_alone_is_refused_on_all(monkeypatch):
    alone = SamplingParams(num_generations=4, max_completion_length=8)
    check_ranks_agree(alone)
    gathers(monkeypatch, alone, alone)
    check_ranks_agree(alone)
    gathers(monkeypatch, alone, alone, replace(alone, temperature=0.7))
    with pytest.raises(UserError) as refused:
        check_ranks_agree(alone)
    assert str(refused.value) == (
        "module.sampling: rollout.temperature is 1.0 on rank 0 and 0.7 on rank 2; set it on every rank alike"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_ranks_are_compared_before_every_rollout(micro_model_dir, monkeypatch):
    compared = []
    monkeypatch.setattr("gspo_lightning.module.check_ranks_agree", compared.append)
    trainer(callbacks=[Curriculum()]).fit(made(micro_model_dir, Noting()), datamodule=Data())
    assert [sampling.num_generations for sampling in compared] == [3, 3, 4, 4]
