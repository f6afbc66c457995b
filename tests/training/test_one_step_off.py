"""Sampling ahead: which weights sample, what the ratio is taken against, and what a checkpoint holds of it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import shutil
import threading
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import GraniteConfig, GraniteForCausalLM

from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.policy.load import LoraSettings, compile_layers
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.engine import EngineUnavailableError
from gspo_lightning.rollout.weights import checksum, trained_parameters
from gspo_lightning.training import rollout_update
from gspo_lightning.training.one_step_off import OneStepOff
from gspo_lightning.training.rollout_update import minibatches_of
from gspo_lightning.types import Prompt, PromptBatch, Rollout, SamplingParams
from tests.scripted import ScriptedSource, Settings, build_module, scripted_prompts, trainer, weights
from tests.support import make_prompt, micro_policy, padded_logprobs, relative_distance

PROMPTS = [make_prompt(torch.arange(5, 9 + n), uid=f"t:{n}") for n in range(2)]


@dataclass
class Elsewhere:
    """An engine that samples in this process but says that it does not, and remembers what it was asked."""

    scripted: bool = False
    staleness: int = 1
    calls: list[tuple[int, int, bool]] = field(default_factory=list)
    """Seed, checksum of the weights, and whether the call came from the trainer's thread."""
    fail_at: int | None = None
    started: threading.Event = field(default_factory=threading.Event)

    def __deepcopy__(self, memo: Any) -> Elsewhere:
        """The same, as `VLLMServerEngine`."""
        return self

    def generate(self, policy: Any, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        self.started.set()
        here = threading.current_thread() is threading.main_thread()
        self.calls.append((seed, checksum(trained_parameters(policy)), here))
        assert not torch.is_grad_enabled() or here
        if len(self.calls) - 1 == self.fail_at:
            raise EngineUnavailableError("nobody is left")
        if self.scripted:
            return Rollout(prompts, [prompt.sample["completions"] for prompt in prompts])
        return TransformersEngine().generate(policy, prompts, sampling, seed)


class Data(ScriptedSource):
    """Rollouts of scripted prompts."""

    def __init__(self, same: bool = False) -> None:
        super().__init__()
        self.same = same

    def batch_at(self, cursor: int) -> PromptBatch:
        return PromptBatch(scripted_prompts(seed=0 if self.same else cursor), cursor + 1)

    def state_dict(self) -> dict[str, int]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.cursor = state_dict["cursor"]

    def train_dataloader(self) -> DataLoader[PromptBatch]:
        data, cursor = self, self.cursor

        class Batches(IterableDataset[PromptBatch]):
            def __iter__(self):
                at = cursor
                while True:
                    yield data.batch_at(at)
                    at += 1

        return DataLoader(Batches(), batch_size=None)


def module_with(folder, engine, rollouts=3, lr=0.05, lora=None, **objective) -> GSPOModule:
    settings = Settings(
        objective={"epsilon": 10.0, "epsilon_high": 10.0, **objective},
        update={"num_minibatches": 2},
        optimizer=functools.partial(torch.optim.SGD, lr=lr),
        rollouts=rollouts,
        lora=lora,
    )
    torch.manual_seed(0)  # of an adapter
    module = build_module(folder, settings)
    return GSPOModule(
        module.policy_loader, module.rewards, objective=module.objective, sampling=module.sampling,
        optimizer=module.optimizer_factory, max_rollouts=rollouts, engine=engine, update=module.update_settings,
    )  # fmt: skip


class Versions(L.Callback):
    """Weights before the first and after every rollout."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.checksums: list[int] = []

    def note(self, module: GSPOModule) -> None:
        self.weights.append(weights(module))
        self.checksums.append(checksum(trained_parameters(module.policy)))

    def on_train_start(self, trainer: L.Trainer, module: GSPOModule) -> None:  # type: ignore[override]
        self.note(module)

    def on_train_batch_end(self, trainer: L.Trainer, module: GSPOModule, *_: Any) -> None:  # type: ignore[override]
        self.note(module)


def fit(module, data=None, **changes):
    versions = Versions()
    runner = trainer(callbacks=[versions], **changes)
    runner.fit(module, datamodule=data or Data())
    return runner, versions


def test_rollout_k_plus_1_is_sampled_by_the_weights_that_update_k_began_with(micro_model_dir):
    engine = Elsewhere()
    _, versions = fit(module_with(micro_model_dir, engine, rollouts=4))
    assert len(set(versions.checksums)) == 5
    # Rollout 0 by version 0 in the trainer's thread; then 1 by 0, 2 by 1 and 3 by 2, elsewhere; none for a fifth.
    sampled_by = [versions.checksums.index(total) for _, total, _ in engine.calls]
    assert sampled_by == [0, 0, 1, 2]
    assert [here for _, _, here in engine.calls] == [True, False, False, False]


def gradient_of_stale_update(folder, now, behaviour, prompts, advantages, groups):
    """By the formula: the mean over the completions of ``s_i A_i`` with ``s_i`` against the behaviour's likelihood."""
    policies = []
    for vector in (now, behaviour):
        policy = micro_policy(folder)
        torch.nn.utils.vector_to_parameters(vector.clone(), policy.parameters())
        policies.append(policy)
    rows = [(prompts[g].input_ids, [c.token_ids for c in prompts[g].sample["completions"]]) for g in groups]
    new, _ = padded_logprobs(policies[0].base_model, rows)
    with torch.no_grad():
        old, _ = padded_logprobs(policies[1].base_model, rows)
    loss, start, count = 0.0, 0, 0
    for group, (_, completions) in zip(groups, rows, strict=True):
        for number, completion in enumerate(completions):
            end = start + len(completion)
            ratio = (new[start:end] - old[start:end]).mean().exp()
            loss, start, count = loss - ratio * advantages[group, number], end, count + 1
    (loss / count).backward()
    return torch.cat([p.grad.flatten() for p in policies[0].parameters()])


def test_the_ratio_of_every_minibatch_is_against_the_weights_that_sampled(micro_model_dir, monkeypatch):
    """Two minibatches, one after the other, each against version k - 1; in float64, to 1e-6."""
    module = module_with(micro_model_dir, Elsewhere(scripted=True), rollouts=2, lr=0.005)
    steps: list[torch.Tensor] = []
    taken: list[tuple[int, ...]] = []

    def noted(*arguments):
        minibatches = minibatches_of(*arguments)
        taken.extend(minibatch.groups for minibatch in minibatches)
        return minibatches

    monkeypatch.setattr(rollout_update, "minibatches_of", noted)

    class Steps(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            steps.append(weights(module))

    versions = Versions()
    runner = trainer(callbacks=[versions, Steps()])
    runner.fit(module, datamodule=Data(same=True))
    before_second = steps[2:4]
    assert len(steps) == 4 and len(taken) == 4
    prompts = scripted_prompts()
    after = [steps[3], versions.weights[2]]
    for groups, start, end in zip(taken[2:], before_second, after, strict=True):
        expected = gradient_of_stale_update(
            micro_model_dir, start, versions.weights[0], prompts, module.last_scored.advantages, groups
        )
        assert relative_distance((start - end) / 0.005, expected) < 1e-11
    on_policy = gradient_of_stale_update(
        micro_model_dir, steps[2], steps[2], prompts, module.last_scored.advantages, taken[2]
    )
    assert relative_distance((steps[2] - steps[3]) / 0.005, on_policy) > 1e-2


def test_the_mismatch_of_a_stale_rollout_is_measured_by_the_weights_that_sampled(micro_model_dir):
    module = module_with(micro_model_dir, Elsewhere(), rollouts=3, lr=1.0)
    fit(module)
    assert module.last_metrics["sampler_mismatch/abs_mean"] < 1e-5
    assert abs(module.last_metrics["ratio/p50"] - 1) > 1e-3


def test_the_next_rollout_begins_before_the_update_and_the_update_does_not_wait_for_it(micro_model_dir):
    engine, release = Elsewhere(), threading.Event()
    module = module_with(micro_model_dir, engine, rollouts=2)
    sample = engine.generate

    def slowly(*arguments: Any) -> Rollout:
        if engine.calls:
            engine.started.set()
            assert release.wait(30), "the update waited for the rollout"
        return sample(*arguments)

    engine.generate = slowly  # type: ignore[method-assign]

    class Release(L.Callback):
        def on_train_batch_end(self, trainer, module, *_: Any) -> None:
            assert engine.started.wait(30)
            release.set()

    trainer(callbacks=[Release()]).fit(module, datamodule=Data())
    assert module.rollouts_done == 2


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)], ids=["full", "LoRA"])
@pytest.mark.parametrize("lost", [False, True], ids=["pending", "pending rollout lost"])
def test_a_resumed_run_goes_on_bit_identically_with_the_pending_rollout(lost, lora, micro_model_dir, tmp_path):
    module_of = functools.partial(module_with, micro_model_dir, rollouts=4, lr=0.5, lora=lora)
    whole = module_of(Elsewhere())
    fit(whole)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, *_: Any) -> None:
            if module.rollouts_done == 2:
                trainer.save_checkpoint(tmp_path / "x.ckpt")

    # Call 2 samples the third rollout ahead; where it fails, the checkpoint is saved all the same.
    cut = module_of(Elsewhere(fail_at=2 if lost else None))
    runner = trainer(callbacks=[Save()])
    if lost:
        with pytest.raises(EngineUnavailableError, match="nobody is left"):
            runner.fit(cut, datamodule=Data())
        assert cut.rollouts_done == 2
        runner.save_checkpoint(tmp_path / "x.ckpt")  # as the command line does when a rollout cannot be had
    else:
        runner.fit(cut, datamodule=Data())
    engine = Elsewhere()
    resumed = module_of(engine)
    trainer().fit(resumed, datamodule=Data(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(weights(resumed), weights(whole))
    # Without its completions the third rollout is sampled once more, by the weights that would have; with them, never.
    assert len(engine.calls) == (2 if lost else 1)


@pytest.fixture(scope="module")
def granite_dir(micro_model_dir, tmp_path_factory):
    """A model that runs padded, which is found out after a checkpoint is loaded: its head divides the logits."""
    folder = tmp_path_factory.mktemp("granite")
    shutil.copytree(micro_model_dir, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_multiplier=0.25, logits_scaling=2.0, pad_token_id=2, eos_token_id=2,
    )  # fmt: skip
    model = GraniteForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*falling back to padded forwards")
@pytest.mark.parametrize("lost", [False, True], ids=["pending", "pending rollout lost"])
def test_a_resumed_run_of_a_model_that_runs_padded_goes_on_bit_identically(lost, granite_dir, tmp_path):
    module_of = functools.partial(module_with, granite_dir, rollouts=4, lr=0.5)
    whole = module_of(Elsewhere())
    fit(whole)
    assert whole.policy.is_padded
    cut = module_of(Elsewhere(fail_at=2 if lost else None))
    runner = trainer(max_steps=4)
    runner.fit(cut, datamodule=Data())
    assert cut.rollouts_done == 2
    runner.save_checkpoint(tmp_path / "x.ckpt")
    resumed = module_of(Elsewhere())
    trainer().fit(resumed, datamodule=Data(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert resumed.rollouts_done == 4
    assert torch.equal(weights(resumed), weights(whole))


def test_the_weights_that_sampled_are_restored_where_the_policy_is_by_then(micro_model_dir):
    """Lightning loads a checkpoint before it moves the module to its device."""
    policy, sampling = micro_policy(micro_model_dir), SamplingParams(2, 6)
    before = OneStepOff(Elsewhere())
    before.launch(policy, PROMPTS, sampling, 3)
    ahead = OneStepOff(Elsewhere())
    ahead.load_state_dict(before.state_dict())
    policy.to("meta")
    policy.base_model.tie_weights()  # only from there torch unties them
    assert ahead.generate(policy, PROMPTS, sampling, 3).completions and ahead.is_stale
    assert ahead.behaviour.device.type == "meta"


def test_a_lost_rollout_that_cannot_be_had_again_is_recorded_again(micro_model_dir):
    """Saved before it is asked for, as after a failed validation, and after a failed second attempt."""
    policy, sampling = micro_policy(micro_model_dir), SamplingParams(2, 6)
    before = OneStepOff(Elsewhere(fail_at=0))
    before.launch(policy, PROMPTS, sampling, 3)
    saved = before.state_dict()
    began_with = torch.cat([p.detach().flatten() for p in policy.parameters()])
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    ahead = OneStepOff(Elsewhere(fail_at=0))
    ahead.load_state_dict(saved)
    for attempt in range(2):
        if attempt:
            with pytest.raises(EngineUnavailableError, match="nobody is left"):
                ahead.generate(policy, PROMPTS, sampling, 3)
        again = ahead.state_dict()
        assert (again["key"], again["completions"]) == (saved["key"], None)
        assert torch.equal(torch.cat([value.flatten() for value in again["behaviour"]]), began_with)
    third = OneStepOff(Elsewhere())
    third.load_state_dict(again)
    rollout = third.generate(policy, PROMPTS, sampling, 3)
    assert [len(group) for group in rollout.completions] == [2, 2] and third.is_stale


def test_a_rollout_of_an_earlier_run_is_waited_for_and_forgotten(micro_model_dir):
    """A program of one's own that catches an error and goes back to a checkpoint without a pending rollout."""
    policy, sampling, release, engine = (
        micro_policy(micro_model_dir),
        SamplingParams(2, 6),
        threading.Event(),
        Elsewhere(),
    )
    sample, ended = engine.generate, []

    def slowly(*arguments: Any) -> Rollout:
        assert release.wait(30)
        try:
            return sample(*arguments)
        finally:
            ended.append(True)

    engine.generate = slowly  # type: ignore[method-assign]
    ahead = OneStepOff(engine)
    ahead.launch(policy, PROMPTS, sampling, 3)
    threading.Timer(0.2, release.set).start()
    ahead.load_state_dict({})
    assert ended == [True]
    ahead.generate(policy, PROMPTS, sampling, 3)
    assert not ahead.is_stale and [seed for seed, _, _ in engine.calls] == [3, 3]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, True), ({"seed": 7}, False), ({"temperature": 0.5}, False), ({"num_generations": 3}, False)],
    ids=["same", "seed", "temperature", "generations"],
)
def test_a_pending_rollout_of_other_settings_is_dropped_with_a_line(changes, kept, micro_model_dir):
    policy, sampling, seed = micro_policy(micro_model_dir), SamplingParams(4, 6), changes.get("seed", 3)
    before, buffer = OneStepOff(Elsewhere()), io.BytesIO()
    before.launch(policy, PROMPTS, sampling, 3)
    torch.save(before.state_dict(), buffer)
    buffer.seek(0)
    engine = Elsewhere()
    ahead = OneStepOff(engine)
    ahead.load_state_dict(torch.load(buffer, weights_only=True))
    asked = replace(sampling, **{name: value for name, value in changes.items() if name != "seed"})
    rollout = ahead.generate(policy, PROMPTS, asked, seed)
    assert [len(group) for group in rollout.completions] == [asked.num_generations] * len(PROMPTS)
    assert (ahead.is_stale, len(engine.calls)) == (kept, 0 if kept else 1)
    with warnings.catch_warnings(record=True) as lines:
        warnings.simplefilter("always")
        ahead.launch(policy, PROMPTS, asked, seed + 1)
    said = [str(line.message) for line in lines if "was sampled ahead, by the run" in str(line.message)]
    assert len(said) == (0 if kept else 1) and all(
        line.endswith("is dropped: it is not of the seed, prompts and sampling settings that came next")
        for line in said
    )
    assert ahead.generate(policy, PROMPTS, asked, seed + 1).completions and ahead.is_stale


@pytest.mark.parametrize("edit", ["other tokens", "the same in a row, cut elsewhere"])
def test_a_pending_rollout_is_not_handed_out_for_other_prompts_under_the_same_uids(edit, micro_model_dir):
    policy, sampling, engine = micro_policy(micro_model_dir), SamplingParams(2, 6), Elsewhere()
    ahead = OneStepOff(engine)
    ahead.launch(policy, PROMPTS, sampling, 3)
    one, other = PROMPTS
    edited = [replace(one, input_ids=one.input_ids.flip(0)), other]
    if edit != "other tokens":
        joined = torch.cat([one.input_ids, other.input_ids])
        edited = [replace(one, input_ids=joined[:3]), replace(other, input_ids=joined[3:])]
    ahead.generate(policy, edited, sampling, 3)
    assert (ahead.is_stale, len(engine.calls)) == (False, 2)
    ahead.generate(policy, [replace(p, input_ids=p.input_ids.int()) for p in PROMPTS], sampling, 3)
    assert (ahead.is_stale, len(engine.calls)) == (True, 2)


def test_a_pending_rollout_took_as_long_as_the_checkpoint_says(micro_model_dir):
    policy, sampling = micro_policy(micro_model_dir), SamplingParams(2, 6)
    before = OneStepOff(Elsewhere())
    before.launch(policy, PROMPTS, sampling, 3)
    state = before.state_dict()
    assert state["seconds"] > 0.001
    ahead = OneStepOff(Elsewhere())
    ahead.load_state_dict(state)
    ahead.generate(policy, PROMPTS, sampling, 3)
    assert ahead.is_stale and ahead.seconds == pytest.approx(state["seconds"], rel=1e-12)


def test_a_lost_rollout_takes_as_long_as_the_second_attempt(micro_model_dir):
    policy, sampling = micro_policy(micro_model_dir), SamplingParams(2, 6)
    before = OneStepOff(Elsewhere(fail_at=0))
    before.launch(policy, PROMPTS, sampling, 3)
    engine, state = Elsewhere(), before.state_dict() | {"seconds": 99.0}
    sample = engine.generate

    def slowly(*arguments: Any) -> Rollout:
        threading.Event().wait(0.05)
        return sample(*arguments)

    engine.generate = slowly  # type: ignore[method-assign]
    ahead = OneStepOff(engine)
    ahead.load_state_dict(state)
    ahead.generate(policy, PROMPTS, sampling, 3)
    assert ahead.is_stale and 0.05 <= ahead.seconds < 30


def test_other_sampling_waits_for_the_pending_rollout_and_leaves_it(micro_model_dir):
    """A validation in between: the engine does one thing at a time."""
    policy, sampling, release, engine = (
        micro_policy(micro_model_dir),
        SamplingParams(2, 6),
        threading.Event(),
        Elsewhere(),
    )
    sample, busy = engine.generate, []

    def alone(*arguments: Any) -> Rollout:
        busy.append(len(busy))
        if len(engine.calls) == 0:
            threading.Timer(0.2, release.set).start()
            assert release.wait(30)
        try:
            assert busy == [0]
            return sample(*arguments)
        finally:
            busy.clear()

    engine.generate = alone  # type: ignore[method-assign]
    ahead = OneStepOff(engine)
    ahead.launch(policy, PROMPTS, sampling, 3)
    between = ahead.generate(policy, PROMPTS, SamplingParams(1, 6), 9)
    assert [len(group) for group in between.completions] == [1, 1] and not ahead.is_stale
    assert ahead.generate(policy, PROMPTS, sampling, 3).completions and ahead.is_stale
    assert ahead.generate(policy, PROMPTS, sampling, 5).completions and not ahead.is_stale  # by the current weights
    assert [seed for seed, _, _ in engine.calls] == [3, 9, 5]


def test_a_rollout_ahead_that_failed_is_said_to_whoever_asks_next_and_stays(micro_model_dir):
    """A validation in between: what failed would fail again, and its checkpoint has to know of it."""
    policy, sampling = micro_policy(micro_model_dir), SamplingParams(2, 6)
    ahead = OneStepOff(Elsewhere(fail_at=0))
    ahead.launch(policy, PROMPTS, sampling, 3)
    with pytest.raises(EngineUnavailableError, match="nobody is left"):
        ahead.generate(policy, PROMPTS, SamplingParams(1, 6), 9)
    assert ahead.state_dict()["completions"] is None


def test_a_program_that_goes_on_after_a_failed_rollout_has_it_by_the_weights_that_would_have_sampled_it(
    micro_model_dir,
):
    """In the same process, as in a notebook, once the servers are back."""
    whole = module_with(micro_model_dir, Elsewhere(), rollouts=4, lr=0.5)
    fit(whole)
    engine, data = Elsewhere(fail_at=2), Data()
    module = module_with(micro_model_dir, engine, rollouts=4, lr=0.5)
    with pytest.raises(EngineUnavailableError, match="nobody is left"):
        fit(module, data)
    assert module.rollouts_done == 2
    fit(module, data)
    assert module.rollouts_done == 4 and torch.equal(weights(module), weights(whole))
    assert [seed for seed, _, _ in engine.calls] == [0, 1, 2, 2, 3]


def test_a_copy_has_the_pending_rollout_and_its_weights(micro_model_dir):
    """As `EMAWeightAveraging` copies a module whose run was stopped and goes on in the same process."""
    policy, sampling, engine = micro_policy(micro_model_dir), SamplingParams(2, 6), Elsewhere()
    ahead = OneStepOff(engine)
    ahead.launch(policy, PROMPTS, sampling, 3)
    copied = copy.deepcopy(ahead)
    ours, theirs = (one.generate(policy, PROMPTS, sampling, 3).completions for one in (ahead, copied))
    assert [[c.token_ids.tolist() for c in g] for g in ours] == [[c.token_ids.tolist() for c in g] for g in theirs]
    assert len(engine.calls) == 1 and copied.is_stale and copied.behaviour is not ahead.behaviour
    assert checksum(trained_parameters(copied.behaviour)) == checksum(trained_parameters(policy))


def test_only_what_is_trained_is_copied(micro_model_dir):
    from gspo_lightning.training.one_step_off import _share_frozen

    policy = micro_policy(micro_model_dir)
    first, *rest = policy.parameters()
    for parameter in rest:
        parameter.requires_grad_(False)
    copied_first, *copied_rest = _share_frozen(policy).parameters()
    assert copied_first is not first and torch.equal(copied_first, first)
    assert all(a is b for a, b in zip(copied_rest, rest, strict=True))


def test_a_layer_that_is_trained_later_has_a_copy_from_then_on(micro_model_dir):
    """As callbacks such as `BaseFinetuning` unfreeze one: shared, it would be that of the policy during the update."""
    policy, ahead, prompts = micro_policy(micro_model_dir), OneStepOff(Elsewhere(True)), scripted_prompts()
    late, *_ = policy.parameters()
    late.requires_grad_(False)
    for seed in range(2):
        ahead.launch(policy, prompts, SamplingParams(2, 3), seed)
        ahead.generate(policy, prompts, SamplingParams(2, 3), seed)
        late.requires_grad_(True)
    before = late.detach().clone()
    with torch.no_grad():
        late.add_(1.0)
    assert torch.equal(next(ahead.behaviour.parameters()), before)


def test_the_copy_is_compiled_where_the_policy_is(micro_model_dir):
    """Else old and new log-probabilities of equal weights would differ by the rounding of other kernels."""
    from gspo_lightning.training.one_step_off import _share_frozen

    policy = micro_policy(micro_model_dir)
    compile_layers(policy.base_model)
    compiled = [[m._compiled_call_impl is not None for m in p.modules()] for p in (policy, _share_frozen(policy))]
    assert compiled[0] == compiled[1] and sum(compiled[0]) == len(policy.base_model.get_decoder().layers)


def test_the_copy_is_made_once_and_then_overwritten(micro_model_dir):
    policy, ahead, prompts, copies = micro_policy(micro_model_dir), OneStepOff(Elsewhere(True)), scripted_prompts(), []
    for seed in range(2):
        with torch.no_grad():
            next(policy.parameters()).add_(1.0)
        ahead.launch(policy, prompts, SamplingParams(2, 3), seed)
        ahead.generate(policy, prompts, SamplingParams(2, 3), seed)
        copies.append(ahead.behaviour)
    assert copies[0] is copies[1]
    assert checksum(trained_parameters(copies[1])) == checksum(trained_parameters(policy))


def test_what_cannot_be_foreseen_is_refused(micro_model_dir):
    module = module_with(micro_model_dir, Elsewhere())
    with pytest.raises(UserError, match="staleness=1 needs a data module that keeps its position: PromptDataModule"):
        trainer().fit(module, DataLoader([PromptBatch(scripted_prompts(), 0)] * 3, batch_size=None))
    with pytest.raises(UserError, match="max_draws=2 and rollout.engine.staleness=1 exclude each other"):
        GSPOModule(
            module.policy_loader, module.rewards, objective=module.objective, sampling=module.sampling,
            optimizer=module.optimizer_factory, max_rollouts=1, engine=Elsewhere(), max_draws=2,
        )  # fmt: skip


class Ends(L.Callback):
    """Lets the rollout ahead end behind the update, and notes what new tensors are then."""

    def __init__(self, engine):
        self.engine, self.dtypes = engine, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.engine.may_end.set()
        if pl_module.ahead._pending is not None:
            pl_module.ahead._pending.join()
        self.engine.may_end.clear()
        self.dtypes.append(torch.get_default_dtype())


class Late(Elsewhere):
    """Ends a rollout ahead when it is told to, and notes the autocast that it has had."""

    def __init__(self):
        super().__init__(scripted=True)
        self.may_end, self.autocast = threading.Event(), []

    def generate(self, policy, prompts, sampling, seed):
        if threading.current_thread() is not threading.main_thread():
            self.autocast.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            assert self.may_end.wait(60)
        return super().generate(policy, prompts, sampling, seed)


@pytest.mark.parametrize(("precision", "autocast"), [("bf16-true", False), ("bf16-mixed", torch.bfloat16)])
def test_the_thread_that_samples_ahead_has_the_autocast_and_leaves_the_dtype_of_new_tensors(
    precision, autocast, micro_model_dir
):
    """That dtype is one of all threads: it would stay bfloat16 for the rewards and whatever else comes between."""
    engine = Late()
    module = module_with(micro_model_dir, engine, lora=LoraSettings(r=2))
    module.policy_loader = replace(module.policy_loader, dtype="float32")
    ends = Ends(engine)
    trainer(callbacks=[ends], precision=precision).fit(module, datamodule=Data())
    assert engine.autocast == [autocast] * 2 and ends.dtypes == [torch.float32] * 3


def test_the_thread_that_samples_ahead_has_the_gpu_of_its_rank(micro_model_dir, monkeypatch):
    """In a new thread the current GPU is the first one, on any rank."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: chosen.append((threading.current_thread().name, gpu)))
    policy, ahead = micro_policy(micro_model_dir), OneStepOff(Elsewhere(scripted=True))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    ahead.launch(policy, scripted_prompts(), SamplingParams(2, 3), 3)
    ahead._pending.join()
    assert chosen == [("rollout ahead", 1)]


def test_a_rollout_that_was_handed_out_is_kept_for_a_checkpoint_and_can_be_pickled(micro_model_dir):
    """A fitted module can be, and a thread cannot."""
    policy, ahead = micro_policy(micro_model_dir), OneStepOff(Elsewhere(scripted=True))
    asked = policy, scripted_prompts(), SamplingParams(2, 3), 3
    ahead.launch(*asked)
    completions = ahead.generate(*asked).completions
    again = pickle.loads(pickle.dumps(ahead._taken))
    assert [[c.text for c in group] for group in again.value] == [[c.text for c in group] for group in completions]
    assert ahead.state_dict() == {} and ahead.state_dict(in_hand=True)["key"] == list(again.key)
    ahead.launch(*asked)
    assert ahead._taken is None
    ahead._pending.join()
