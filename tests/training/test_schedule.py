"""Learning-rate factors, by hand."""

from __future__ import annotations

import functools
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning

from gspo_lightning.errors import UserError
from gspo_lightning.training.schedule import Schedule
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("constant"), [1, 1, 1, 1, 1]),
        (Schedule("constant", warmup_ratio=0.4), [0.5, 1, 1, 1, 1]),
        (Schedule("constant", warmup_ratio=0.21), [0.5, 1, 1, 1, 1]),  # a step in part is a whole one
        (Schedule("linear"), [1, 0.8, 0.6, 0.4, 0.2]),
        (Schedule("linear", warmup_ratio=0.2, min_ratio=0.5), [1, 1, 0.875, 0.75, 0.625]),
        (Schedule("cosine"), [0.5 * (1 + math.cos(math.pi * n / 5)) for n in range(5)]),
    ],
)
def test_factors_of_five_steps(schedule, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=2.0)
    scheduler = schedule.build(optimizer, 5)
    rates = []
    for _ in range(5):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2.0 * factor for factor in expected])


def test_a_group_that_is_added_during_the_run_follows_the_schedule_from_its_own_rate():
    """Linear over 4 steps: behind step k each group has 1 - k/4 of its own rate."""
    first, second = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    optimizer = torch.optim.SGD([first], lr=2.0)
    scheduler = Schedule("linear").build(optimizer, 4)
    rates = []
    for step in range(4):
        if step == 1:
            optimizer.add_param_group({"params": [second], "lr": 0.8})
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr())
    assert [of for pair in rates for of in pair] == pytest.approx([1.5, 1.0, 0.4, 0.5, 0.2, 0.0, 0.0])
    scheduler.move_to(2)
    assert scheduler.get_last_lr() == pytest.approx([1.0, 0.4])


def test_a_rate_that_a_program_writes_into_a_group_is_its_own_from_then_on():
    """Linear over 4 steps, 1 - k/4 behind step k; a constant schedule used to take the rate back after one step."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": lr} for lr in (2.0, 0.8, 1.0)]
    optimizer = torch.optim.SGD(groups)
    scheduler = Schedule("linear").build(optimizer, 4)
    rates = []
    for step in range(4):
        if step == 1:  # where 1.5 and 0.6 are due
            optimizer.param_groups[0]["lr"], optimizer.param_groups[2]["lr"] = 3.0, 0.0
        optimizer.step()
        scheduler.step()
        rates.extend(scheduler.get_last_lr())
    assert rates == pytest.approx([1.5, 0.6, 0.75, 2.0, 0.4, 0.0, 1.0, 0.2, 0.0, 0.0, 0.0, 0.0])


class Thawing(BaseFinetuning):
    """The first layer is trained from the second epoch on, which a limit of two rollouts begins."""

    def freeze_before_training(self, pl_module):
        pl_module.configure_model()
        self.freeze(pl_module.policy.base_model.model.layers[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.policy.base_model.model.layers[0], optimizer, lr=0.01)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_layer_that_is_frozen_at_first_is_trained_from_its_epoch_on(micro_model_dir):
    layers, rates = [], []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            layers.append(module.policy.base_model.model.layers[0].mlp.up_proj.weight.detach().clone())
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    module = build_module(micro_model_dir, Settings(optimizer=functools.partial(torch.optim.SGD, lr=0.1), rollouts=4))
    module.schedule = Schedule("linear")
    loader = Batches(scripted_prompts(), 4).loader()
    trainer(callbacks=[Thawing(), Watch()], limit_train_batches=2).fit(module, loader)
    assert torch.equal(layers[0], layers[1]) and not torch.equal(layers[1], layers[2])
    assert rates[2] == pytest.approx([0.025, 0.025, 0.0025]) and rates[3] == [0.0] * 3


def test_a_layer_that_is_frozen_after_it_was_trained_is_refused(micro_model_dir):
    """A checkpoint would not hold what it has learnt, and a resumed run would have it as it was at first."""

    class Freeze(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.policy.base_model.model.layers[0].requires_grad_(batch_idx == 0)

    module = build_module(micro_model_dir, Settings(rollouts=2))
    with pytest.raises(
        UserError,
        match=r"^\d+ parameters that were trained are frozen now, the first is policy.*layers\.0\..* to 0 instead$",
    ):
        trainer(callbacks=[Freeze()]).fit(module, Batches(scripted_prompts(), 2).loader())
    assert module.rollouts_done == 1


def test_a_checkpoint_of_a_run_that_trained_more_is_refused_in_one_line(micro_model_dir, tmp_path):
    def fit(rollouts, ckpt_path=None):
        module = build_module(micro_model_dir, Settings(optimizer=torch.optim.AdamW, rollouts=rollouts))
        module.configure_model()
        module.policy.base_model.model.layers[0].requires_grad_(ckpt_path is None)
        fitted = trainer()
        fitted.fit(module, Batches(scripted_prompts(), 2).loader(), ckpt_path=ckpt_path, weights_only=True)
        return fitted

    fit(1).save_checkpoint(tmp_path / "all.ckpt")
    with pytest.raises(
        UserError, match=r"^ckpt_path: the checkpoint's optimizer has groups of \[\d+, \d+\] parameters, and this"
    ):
        fit(2, tmp_path / "all.ckpt")


def test_a_position_with_a_group_that_was_added_is_loaded_by_a_run_that_has_not_added_it_yet():
    def made():
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        optimizer = torch.optim.SGD(parameters[:1], lr=1.0)
        return optimizer, Schedule("linear").build(optimizer, 4), parameters[1]

    optimizer, before, added = made()
    optimizer.add_param_group({"params": [added], "lr": 0.4})
    optimizer.step()
    before.step()
    assert before.get_last_lr() == pytest.approx([0.75, 0.3])
    resumed, after, added = made()
    after.load_state_dict(before.state_dict())
    resumed.add_param_group({"params": [added], "lr": 0.4})
    resumed.step()
    after.step()
    assert after.get_last_lr() == pytest.approx([0.5, 0.2])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_rate_falls_once_per_optimizer_step_and_is_zero_behind_the_last(micro_model_dir):
    """Two rollouts of two iterations over two minibatches: 8 steps, half of the rate behind the first four."""
    sgd = functools.partial(torch.optim.SGD, lr=1e-3)
    settings = Settings(optimizer=sgd, rollouts=2, update={"num_iterations": 2, "num_minibatches": 2})
    module = build_module(micro_model_dir, settings)
    module.schedule = Schedule("linear")
    rates = []

    class Rates(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            rates.append(pl_module.last_metrics["lr"])

    trainer(callbacks=[Rates()]).fit(module, Batches(scripted_prompts(), 2).loader())
    assert rates == pytest.approx([5e-4, 0.0])


class Rates(L.Callback):
    """The rate of the first optimizer step, and those after each rollout."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not self.seen:
            self.seen.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.seen.append(pl_module.last_metrics["lr"])


def rates_of(folder, rollouts, minibatches, ckpt_path=None, save=None):
    sgd = functools.partial(torch.optim.SGD, lr=8e-3)
    module = build_module(folder, Settings(optimizer=sgd, rollouts=rollouts, update={"num_minibatches": minibatches}))
    module.schedule = Schedule("linear")
    rates = Rates()
    fit = trainer(callbacks=[rates])
    fit.fit(module, Batches(scripted_prompts(count=4), rollouts).loader(), ckpt_path=ckpt_path)
    if save is not None:
        fit.save_checkpoint(save)
    return rates.seen


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("minibatches", [2, 1, 4])
def test_a_longer_run_resumes_at_its_own_rate_whatever_steps_a_rollout_had(minibatches, micro_model_dir, tmp_path):
    """Half of the way is done; no step has the rate 0 at which the shorter run ended."""
    saved = tmp_path / "saved.ckpt"
    assert rates_of(micro_model_dir, 2, 2, save=saved) == pytest.approx([8e-3, 4e-3, 0.0])
    assert rates_of(micro_model_dir, 4, minibatches, ckpt_path=saved) == pytest.approx([4e-3, 2e-3, 0.0])
