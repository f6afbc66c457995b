"""In a Trainer of one's own: what would train wrongly without a word is refused, and a subclass is trained whole."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO, MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from gspo_lightning.callbacks import RolloutCheckpoint, RunRecorder
from gspo_lightning.data import MicroLetters, PromptDataModule
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.objective import Objective
from gspo_lightning.objective.mismatch import MismatchCorrection
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rewards import RewardSet, RewardSpec, letter_share
from gspo_lightning.training import batch_checks
from gspo_lightning.training.schedule import Schedule
from gspo_lightning.types import Prompt, PromptBatch, SamplingParams
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer, update_of, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WITHOUT_SIGNAL = scripted_prompts()[1:2] * 2


def fit(module, prompts=None, batches=1, ckpt_path=None, weights_only=None, **changes):
    """Fits on the same batch again and again; returns the Trainer."""
    runner = trainer(**changes)
    loader = Batches(prompts or scripted_prompts(), batches).loader()
    runner.fit(module, loader, ckpt_path=ckpt_path, weights_only=weights_only)
    return runner


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"policy_loader": "bundled:micro"},
            "^policy_loader='bundled:micro': a path; give gspo_lightning.PolicyLoader",
        ),
        ({"rewards": len}, "^rewards is of type builtin_function_or_method; give RewardSet"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])},
            "^optimizer is of type SGD; give what makes one",
        ),
        ({"objective": "grpo"}, r"^objective is of type str; give Objective\(...\)$"),
        ({"update": {"num_minibatches": 2}}, r"^update is of type dict; give UpdateSettings\(...\)$"),
        ({"engine": "vllm"}, r"^engine='vllm': it has no generate\(\); give a RolloutEngine"),
        ({"seed": None}, "^seed=None must be a whole number, at least 0$"),
    ],
)
def test_what_is_given_in_the_place_of_a_part_is_refused_at_once(given, line):
    parts = {
        "policy_loader": PolicyLoader("bundled:micro"),
        "rewards": RewardSet({"letters": RewardSpec(letter_share)}),
    }
    sampling = SamplingParams(num_generations=2, max_completion_length=4)
    settings = {"objective": Objective(max_completion_length=4), "sampling": sampling, "max_rollouts": 1}
    with pytest.raises(UserError, match=line):
        GSPOModule(**{**parts, **settings, "optimizer": torch.optim.SGD, **given})


@pytest.mark.parametrize("rollouts", [None, -1, float("inf"), 2.5])
def test_a_run_without_a_number_of_rollouts_is_refused(rollouts, micro_model_dir):
    """Also where ``max_steps`` or a callback would end it: the schedule goes by them."""
    module = build_module(micro_model_dir, Settings(rollouts=rollouts))
    with pytest.raises(UserError, match=f"^max_rollouts={rollouts} must be a whole number, at least 0$"):
        fit(module, max_steps=2)


def test_numbers_of_numpy_are_numbers(micro_model_dir, tmp_path):
    module = build_module(micro_model_dir, Settings(rollouts=np.int64(2)))
    runner = fit(module, batches=2, callbacks=[RolloutCheckpoint(tmp_path, np.int64(1))])
    assert module.rollouts_done == 2 and (tmp_path / "last.ckpt").is_file() and runner.global_step > 0
    with pytest.raises(UserError, match="^RolloutCheckpoint.every_n_rollouts=0 must be a whole number, at least 1$"):
        RolloutCheckpoint(tmp_path, 0)


@pytest.mark.parametrize(
    ("settings", "changes", "line"),
    [
        (
            {"dtype": "float32"},
            {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]},
            "trainer.precision=16-mixed needs a scaled loss.* use trainer.precision=bf16-mixed",
        ),
        ({"dtype": "float32"}, {"precision": "16-true"}, "trainer.precision=16-true needs a scaled loss"),
        ({"dtype": "float32"}, {"precision": "bf16-true"}, "trainer.precision=bf16-true rounds the updates"),
        ({"dtype": "bfloat16"}, {}, "model.dtype=bfloat16 rounds the updates of full fine-tuning away"),
        ({"dtype": "float32"}, {"precision": "64-true"}, "set model.dtype=float64"),
    ],
    ids=["16-mixed", "16-true", "bf16-true", "weights in bfloat16", "64-true"],
)
def test_a_precision_that_trains_wrongly_is_refused_before_the_first_rollout(settings, changes, line, micro_model_dir):
    module = build_module(micro_model_dir, Settings(**settings))
    with pytest.raises(UserError, match=line):
        fit(module, **changes)
    assert module.rollouts_done == 0


class OnApple(L.Callback):
    """Stands for accelerator="auto" on a machine of Apple's, where Lightning takes its GPU."""

    def on_fit_start(self, trainer, pl_module):
        trainer.strategy._root_device = torch.device("mps")


def test_a_device_without_float64_is_refused_before_the_first_rollout(micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    with pytest.raises(UserError, match="trainer.accelerator: Lightning chose mps, but .* set accelerator='cpu'"):
        fit(module, callbacks=[OnApple()])
    assert module.rollouts_done == 0


def test_an_adapter_may_be_trained_in_bf16_true(micro_model_dir):
    change, module = update_of(
        micro_model_dir, Settings(dtype="float32", lora=LoraSettings(r=2)), precision="bf16-true"
    )
    assert module.rollouts_done == 1 and change.abs().max() > 0


@pytest.mark.parametrize(
    ("sampling", "line"),
    [
        ({"temperature": 0.0}, "rollout.temperature=0.0 must be above 0: greedy completions are all equal"),
        ({"repetition_penalty": 1.1}, "rollout.repetition_penalty must be 1.0 in training"),
    ],
)
def test_rollouts_that_teach_nothing_are_refused(sampling, line, micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    with pytest.raises(UserError, match=line):
        module.sampling = replace(module.sampling, **sampling)
    module._sampling = replace(module.sampling, **sampling)  # as the module may have been made
    with pytest.raises(UserError, match=line):
        fit(module)


@pytest.mark.parametrize(
    ("objective", "sampling", "line"),
    [
        (
            {"loss_type": "gmpo", "importance_sampling_level": "sequence"}, {},
            "objective.loss_type=gmpo is not defined for importance_sampling_level=sequence; use token",
        ),
        ({"beta": 0.1, "kl_estimator": "k1"}, {}, "objective.kl_estimator=k1 is not a penalty without"),
        (
            {"mismatch": MismatchCorrection("sequence", "mask", 2.0)}, {"top_p": 0.9},
            "rollout.top_p=0.9 contradicts objective.mismatch",
        ),
    ],
)  # fmt: skip
def test_an_objective_that_contradicts_itself_or_the_sampling_is_refused(objective, sampling, line, micro_model_dir):
    module = build_module(micro_model_dir, Settings(objective=objective))
    with pytest.raises(UserError, match=line):
        module.sampling = replace(module.sampling, **sampling)
        fit(module)
    assert module.rollouts_done == 0


def test_settings_of_the_objective_without_effect_are_warned_of_and_others_are_not(micro_model_dir):
    """With one optimizer step per rollout no clip acts, with two it does."""

    def said(minibatches=1, **objective):
        update = {"num_minibatches": minibatches}
        module = build_module(micro_model_dir, Settings(objective=objective, update=update))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module)
        return [str(w.message).split(";")[0] for w in caught if str(w.message).startswith(("objective.", "update."))]

    clip = {"epsilon": 3e-4, "epsilon_high": 4e-4}
    assert said(**clip) == ["objective.epsilon cannot act: with one optimizer step per rollout the ratio is exactly 1"]
    assert said(minibatches=2, **clip) == said() == []
    assert said(kl_estimator="k2") == ["objective.kl_estimator has no effect with objective.beta=0"]


def test_a_reference_that_cannot_move_is_refused(micro_model_dir):
    update = {"ref_sync_every_n_rollouts": 1}
    module = build_module(
        micro_model_dir, Settings(objective={"beta": 0.1}, update=update, lora=LoraSettings(r=2), dtype="float32")
    )
    with pytest.raises(UserError, match="the reference of a LoRA run is the model without its adapter and cannot"):
        fit(module)


def test_overfit_batches_is_refused_where_the_prompts_are_a_stream(micro_model_dir):
    data = PromptDataModule(MicroLetters(), str(micro_model_dir), prompts_per_rollout=4, max_prompt_length=16)
    with pytest.raises(
        UserError, match=r"trainer.overfit_batches=1: each epoch would continue .*FirstRows\(task, <count>"
    ):
        trainer(overfit_batches=1).fit(build_module(micro_model_dir, Settings()), data)
    module = build_module(micro_model_dir, Settings(rollouts=2))
    fit(module, batches=1, overfit_batches=1)  # a loader of one's own gives the same batch again
    assert module.rollouts_done == 2


ROW_1 = "train_dataloader: row 1: input_ids"
NOT_IDS = (
    "not a tensor (P,) of whole numbers, at least one; give the token ids of one prompt, without a batch dimension"
)


def with_ids(ids):
    return PromptBatch([*scripted_prompts(), Prompt("1", "", ids, {})])


@pytest.mark.parametrize(
    ("batch", "line"),
    [
        ({"prompts": scripted_prompts}, "train_dataloader: a batch is a dict, not a PromptBatch; give PromptBatch"),
        (PromptBatch([]), "train_dataloader: a PromptBatch without prompts"),
        (PromptBatch(["2 + 2"]), "train_dataloader: a PromptBatch of a str, not of Prompts; make_prompt gives one"),
        (with_ids(torch.tensor([[5, 6]])), f"{ROW_1} are a torch.int64 tensor (1, 2), {NOT_IDS}"),
        (with_ids(torch.tensor([5.0, 6.0])), f"{ROW_1} are a torch.float32 tensor (2,), {NOT_IDS}"),
        (with_ids(torch.tensor([], dtype=torch.long)), f"{ROW_1} are a torch.int64 tensor (0,), {NOT_IDS}"),
        (with_ids([5, 6]), f"{ROW_1} are a list, {NOT_IDS}"),
    ],
    ids=["a dict", "empty", "text", "a row of a batch", "no whole numbers", "no ids", "a list"],
)
def test_a_batch_that_no_rollout_can_be_made_of_is_refused(batch, line, micro_model_dir):
    with pytest.raises(UserError) as refused:
        trainer().fit(build_module(micro_model_dir, Settings()), DataLoader([batch], batch_size=None))
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize("twice", ["on one rank", "on two ranks", "nowhere"])
def test_prompts_that_get_the_same_completions_are_warned_of(twice, micro_model_dir, monkeypatch):
    """As where each rank of ddp reads the same IterableDataset; here the other rank has what this one has, or others."""
    first, second = scripted_prompts(count=2), [replace(p, uid=f"other:{p.uid}") for p in scripted_prompts(count=2)]
    prompts = first + (second if twice != "on one rank" else scripted_prompts(count=2))
    if twice == "on two ranks":
        monkeypatch.setattr(batch_checks, "gather_values", lambda values: torch.cat([values, values]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer().fit(build_module(micro_model_dir, Settings()), DataLoader([PromptBatch(prompts)], batch_size=None))
    said = [w for w in caught if str(w.message).startswith("train_dataloader: prompts of one rollout share a uid")]
    assert len(said) == (twice != "nowhere")


# ---------------------------------------------------------------- a loader with a state


class Stateful:
    """Four batches in an epoch; knows how many it has given."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        while self.given < 4:
            self.given += 1
            yield PromptBatch(scripted_prompts(seed=self.given))
        self.given = 0

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


class Sized(Stateful):
    def __len__(self):
        return 4


@pytest.mark.parametrize("stopped", [3, 4])
@pytest.mark.parametrize("kind", [Sized, Stateful])
def test_a_loader_with_a_state_and_a_length_goes_on_where_it_was(kind, stopped, micro_model_dir, tmp_path):
    """Without a length Lightning has read one batch ahead when a checkpoint is saved; with one it does not ask for what
    comes behind the last, so that an epoch without a batch follows, also where a run resumes at the end of one."""
    ended = {}
    for stop, ckpt_path in ((6, None), (stopped, None), (6, tmp_path / "last.ckpt")):
        module = build_module(micro_model_dir, Settings(rollouts=stop))
        saves = [RolloutCheckpoint(tmp_path, 1)] if stop == stopped else []
        trainer(callbacks=saves).fit(module, kind(), ckpt_path=ckpt_path, weights_only=True)
        assert module.rollouts_done == stop
        ended[stop, ckpt_path is None] = weights(module)
    assert torch.equal(ended[6, True], ended[6, False]) == (kind is Sized or stopped == 4)


# ---------------------------------------------------------------- a subclass


class Headed(GSPOModule):
    """A head of 4 weights w on ones: the loss (sum w)^2 has the gradient 2 (sum w) in each of them."""

    def add_head(self):
        self.head = nn.Linear(4, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))

    def auxiliary_loss(self, minibatch):
        return self.head(torch.ones(4, dtype=torch.float64)).square().mean()


class Plain(Headed):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class HeadAlone(Headed):
    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.05)


class TwoOptimizers(Headed):
    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.05) for part in (self.policy, self.head)]


SGD = functools.partial(torch.optim.SGD, lr=0.05)


def headed(folder, cls=Headed, optimizer=SGD, **settings):
    module = build_module(folder, Settings(optimizer=optimizer, **settings))
    module.__class__ = cls
    module.add_head()
    return module


@pytest.mark.parametrize("cls", [Headed, Plain, HeadAlone])
def test_parameters_of_a_subclass_are_stepped_and_their_gradients_do_not_add_up(cls, micro_model_dir):
    """Each step leaves 1 - 4 x 0.05 x 2 = 0.6 of the sum, so all four fall by 0.1, then by 0.06."""
    module = headed(micro_model_dir, cls, rollouts=2)
    fit(module, WITHOUT_SIGNAL, batches=2)
    expected = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).double() - 0.16
    assert torch.allclose(module.head.weight, expected, rtol=0, atol=1e-7)
    assert module.last_metrics["lr"] == 0.05  # also where there is no scheduler


def test_the_norm_that_is_clipped_counts_what_is_stepped(micro_model_dir):
    """The head's gradient is (2, 2, 2, 2), of norm 4."""
    step, module = update_of(micro_model_dir, Settings())
    both = headed(micro_model_dir, update={"max_grad_norm": 1.0})
    fit(both)
    norm = (step.norm() ** 2 + 4**2).sqrt().item()
    assert both.last_metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert both.head.weight[0].tolist() == pytest.approx([w - 0.05 * 2 / norm for w in (0.1, 0.2, 0.3, 0.4)], abs=1e-6)
    alone = headed(micro_model_dir, HeadAlone)
    fit(alone)
    assert alone.last_metrics["grad_norm"] == pytest.approx(4.0, rel=1e-6)


def test_a_resumed_subclass_is_the_unbroken_one_to_the_bit(micro_model_dir, tmp_path):
    adam = functools.partial(torch.optim.AdamW, lr=1e-2)
    build = functools.partial(headed, micro_model_dir, optimizer=adam, rollouts=4)
    straight, half, resumed = build(), build(), build()
    for module in (straight, half, resumed):
        module.schedule = Schedule("linear", warmup_ratio=0.5)
    fit(straight, batches=4)
    fit(half, batches=4, callbacks=[Stop(2)]).save_checkpoint(tmp_path / "half.ckpt")
    with torch.no_grad():
        resumed.head.weight.zero_()
    fit(resumed, batches=4, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.rollouts_done == 4
    assert torch.equal(weights(resumed), weights(straight)) and torch.equal(resumed.head.weight, straight.head.weight)


def test_more_than_one_optimizer_is_refused(micro_model_dir):
    with pytest.raises(
        UserError, match="configure_optimizers: 2 optimizers, but a minibatch is one step of a single one"
    ):
        fit(headed(micro_model_dir, TwoOptimizers))


# ---------------------------------------------------------------- a second fit


class Stop(L.Callback):
    """Ends a fit early and notes the rate that it begins with and the one after each rollout."""

    def __init__(self, after):
        self.after, self.rates = after, []

    def on_train_start(self, trainer, pl_module):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.rates.append(pl_module.last_metrics["lr"])
        trainer.should_stop |= pl_module.rollouts_done >= self.after


def test_a_second_fit_goes_on_in_the_schedule_and_a_third_says_that_nothing_is_left(micro_model_dir, capsys):
    """Four steps, two of them warm-up: the factors are 1/2, 1, 1, 1/2, and 0 behind the last."""
    module = build_module(micro_model_dir, Settings(optimizer=functools.partial(torch.optim.SGD, lr=0.1), rollouts=4))
    module.schedule = Schedule("linear", warmup_ratio=0.5)
    first, second = Stop(2), Stop(4)
    fit(module, batches=4, callbacks=[first])
    fit(module, batches=4, callbacks=[second])
    assert first.rates == pytest.approx([0.05, 0.1, 0.1])
    assert second.rates == pytest.approx([0.1, 0.05, 0.0])
    assert "nothing is trained" not in capsys.readouterr().out
    before = weights(module)
    fit(module, batches=4)
    line = "4 of 4 rollouts are done, so nothing is trained; raise max_rollouts to continue\n"
    assert capsys.readouterr().out == line and torch.equal(weights(module), before)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("saved_by", ["a function", "a class"])
def test_a_checkpoint_knows_its_optimizer_by_what_it_is_and_not_by_what_made_it(saved_by, micro_model_dir, tmp_path):
    made = {
        "a function": lambda groups: torch.optim.AdamW(groups, lr=0.01),
        "a class": functools.partial(torch.optim.AdamW, lr=0.01),
    }
    of = functools.partial(Settings, rollouts=2)
    first = build_module(micro_model_dir, of(optimizer=made.pop(saved_by)))
    fit(first, max_epochs=1, callbacks=[RolloutCheckpoint(tmp_path, every_n_rollouts=1)])
    path = tmp_path / "last.ckpt"
    assert first.rollouts_done == 1
    (other,) = made.values()
    second = build_module(micro_model_dir, of(optimizer=other))
    fit(second, batches=2, ckpt_path=path, weights_only=True)
    assert second.rollouts_done == 2
    third = build_module(micro_model_dir, of(optimizer=functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)))
    with pytest.raises(UserError, match="the checkpoint was saved with AdamW, not SGD"):
        fit(third, batches=2, ckpt_path=path, weights_only=True)


def test_a_recorder_behind_the_checkpoint_is_refused(micro_model_dir, tmp_path):
    recorder, checkpoint = RunRecorder(tmp_path), RolloutCheckpoint(tmp_path, every_n_rollouts=1)
    with pytest.raises(UserError, match="RunRecorder must come before RolloutCheckpoint, which counts its rows"):
        fit(build_module(micro_model_dir, Settings()), callbacks=[checkpoint, recorder])
    fit(build_module(micro_model_dir, Settings()), callbacks=[recorder, checkpoint])
    assert checkpoint.last.exists()


def test_a_checkpoint_that_is_written_later_is_not_moved_before(micro_model_dir, tmp_path):
    module = build_module(micro_model_dir, Settings())
    with pytest.raises(UserError, match="^plugins: AsyncCheckpointIO returns before a checkpoint is written, which"):
        fit(module, callbacks=[RolloutCheckpoint(tmp_path, 1)], plugins=[AsyncCheckpointIO()])
    assert module.rollouts_done == 0
    fit(module, plugins=[AsyncCheckpointIO()])
    assert module.rollouts_done == 1


def test_a_checkpoint_does_not_wait_for_validations_that_never_come(micro_model_dir, tmp_path):
    data = PromptDataModule(MicroLetters(num_validation=2), str(micro_model_dir), 2, 64)
    checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=2, validate_every_n_rollouts=2)
    runner = trainer(callbacks=[checkpoint], limit_val_batches=1, val_check_interval=1, check_val_every_n_epoch=None)
    with pytest.raises(UserError, match="give it val_check_interval=2 and check_val_every_n_epoch=None"):
        runner.fit(build_module(micro_model_dir, Settings()), datamodule=data)


def test_a_subclass_with_an_optimizer_of_its_own_resumes_its_checkpoint(micro_model_dir, tmp_path):
    """The factory, which it does not ask, would make another."""
    unused = functools.partial(torch.optim.AdamW, lr=0.1)
    fit(headed(micro_model_dir, Plain, unused, rollouts=2), max_epochs=1, callbacks=[RolloutCheckpoint(tmp_path, 1)])
    again = headed(micro_model_dir, Plain, unused, rollouts=2)
    fit(again, batches=2, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.rollouts_done == 2
