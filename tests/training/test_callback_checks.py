"""Lightning's callbacks in a run on a stream of prompts, whose only epoch ends with it: they act, or are refused."""

from __future__ import annotations

import re
import warnings
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
)
from torch.utils.data import DataLoader, IterableDataset

from gspo_lightning.data import MicroLetters, PromptDataModule
from gspo_lightning.errors import UserError
from gspo_lightning.types import PromptBatch
from tests.scripted import Settings, build_module, scripted_prompts, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IN_THE_TRAINER = "set val_check_interval=<rollouts> and check_val_every_n_epoch=None in the Trainer"
OURS = "gspo_lightning.callbacks.checkpoint.RolloutCheckpoint"
AFTER_TWO = {"val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory, monkeypatch):
    """Lightning's `ModelCheckpoint` saves where a program was started."""
    monkeypatch.chdir(tmp_path_factory.mktemp("started"))


class Letters(PromptDataModule):
    """The stream of its base, with prompts whose completions are written."""

    def __init__(self, folder, held_out=1):
        super().__init__(MicroLetters(num_validation=held_out), str(folder), 4, 64)

    def batch_at(self, cursor):
        return PromptBatch(scripted_prompts(seed=cursor), cursor + 1)

    def val_dataloader(self):
        return DataLoader([PromptBatch(scripted_prompts(generations=1), 0)], batch_size=None)


def fit(folder, callbacks, data=None, rollouts=5, **changes):
    """Fits, with validations; returns the module and the Trainer."""
    module = build_module(folder, Settings(rollouts=rollouts))
    runner = trainer(callbacks=callbacks, limit_val_batches=1, enable_checkpointing=True, **changes)
    runner.fit(module, datamodule=data or Letters(folder))
    return module


def impatient(**more):
    """Stops at its second look."""
    return EarlyStopping("val/reward", mode="max", patience=1, min_delta=9.0, **more)


def at_epoch_end(metric):
    return (
        f"callbacks: EarlyStopping looks at {metric} at the end of an epoch, which with endless prompts is the end of "
        f"the run; {IN_THE_TRAINER}, and leave check_on_train_epoch_end out"
    )


def best_of(found):
    return (
        f"callbacks: ModelCheckpoint(monitor=val/reward) would save {found}; {IN_THE_TRAINER}, and leave "
        f"save_on_train_epoch_end out; or use every_n_train_steps, or {OURS} with keep_best"
    )


LAST = "the last rollout and not the best"


@pytest.mark.parametrize(
    ("make", "changes", "line"),
    [
        (impatient, {}, at_epoch_end("val/reward")),
        (impatient, {"val_check_interval": 1}, at_epoch_end("val/reward")),  # which Lightning takes for 1.0
        (lambda: EarlyStopping("reward/mean"), {}, at_epoch_end("reward/mean")),
        (lambda: impatient(check_on_train_epoch_end=True), AFTER_TWO, at_epoch_end("val/reward")),
        (
            impatient, {**AFTER_TWO, "limit_val_batches": 0},
            "callbacks: EarlyStopping looks at val/reward after each validation, and none falls inside the run; give "
            f"the Trainer held-out prompts and {IN_THE_TRAINER}",
        ),
        (
            lambda: ModelCheckpoint(train_time_interval=timedelta(seconds=0)), {},
            "callbacks: ModelCheckpoint(train_time_interval) saves nothing where optimization is manual; leave it out, "
            f"or use {OURS}",
        ),
        (
            lambda: ModelCheckpoint(every_n_epochs=2), {},
            "callbacks: ModelCheckpoint(every_n_epochs=2) saves nothing: endless prompts are one epoch; use "
            f"every_n_train_steps, or {OURS}",
        ),
        (lambda: ModelCheckpoint(monitor="val/reward"), {"val_check_interval": 1}, best_of(LAST)),
        (lambda: ModelCheckpoint(monitor="val/reward", save_on_train_epoch_end=True), AFTER_TWO, best_of(LAST)),
        (
            lambda: ModelCheckpoint(monitor="val/reward"), {**AFTER_TWO, "limit_val_batches": 0},
            best_of("nothing, or the last: no validation falls inside the run"),
        ),
        (
            L.Callback, {"check_val_every_n_epoch": 2},
            "trainer.check_val_every_n_epoch=2: endless prompts are one epoch, so no validation would come; "
            f"{IN_THE_TRAINER}",
        ),
    ],
)  # fmt: skip
def test_what_would_wait_in_vain_is_refused_before_the_first_rollout(make, changes, line, micro_model_dir):
    module = build_module(micro_model_dir, Settings(rollouts=5))
    runner = trainer(**{"callbacks": [make()], "limit_val_batches": 1, "enable_checkpointing": True, **changes})
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        runner.fit(module, datamodule=Letters(micro_model_dir))
    assert module.rollouts_done == 0


def test_averages_are_refused_where_the_weights_are_split_and_before_they_are_loaded(micro_model_dir, monkeypatch):
    """As `FSDP2Strategy` splits them; a test of that on two ranks would have nothing else to see."""
    module = build_module(micro_model_dir, Settings())
    monkeypatch.setattr(type(module), "device_mesh", "of two ranks")
    line = "callbacks: EMAWeightAveraging copies whole weights, which trainer=fsdp splits over ranks; leave it out, or use trainer=ddp"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        trainer(callbacks=[EMAWeightAveraging()]).fit(module, datamodule=Letters(micro_model_dir))
    assert module.policy is None


def test_as_the_lines_say_a_run_stops_early_and_its_best_is_kept(micro_model_dir, tmp_path):
    assert fit(micro_model_dir, [impatient()], **AFTER_TWO).rollouts_done == 4
    assert fit(micro_model_dir, [impatient()], **{**AFTER_TWO, "val_check_interval": 1}).rollouts_done == 2
    best = ModelCheckpoint(tmp_path, monitor="val/reward", mode="max", save_top_k=-1)
    fit(micro_model_dir, [best], **AFTER_TWO)  # Lightning also validates at the end
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch=0-step={done}.ckpt" for done in (2, 4, 5)]


def test_what_acts_where_epochs_end_is_left_alone(micro_model_dir, tmp_path):
    """Epochs end by a limit, or with a loader of one's own, which need not know its length."""

    class Passing(IterableDataset):
        def __iter__(self):
            return iter([PromptBatch(scripted_prompts(), 0)])

    class Own(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Passing(), batch_size=None)

        def val_dataloader(self):
            return DataLoader([PromptBatch(scripted_prompts(generations=1), 0)], batch_size=None)

    assert fit(micro_model_dir, [impatient()], limit_train_batches=1).rollouts_done == 2
    assert fit(micro_model_dir, [impatient()], Own()).rollouts_done == 2
    saved = ModelCheckpoint(tmp_path, monitor="val/reward", every_n_epochs=2, save_top_k=-1)
    fit(micro_model_dir, [saved], Own(), check_val_every_n_epoch=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=1-step=2.ckpt", "epoch=3-step=4.ckpt"]


class Thawing(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pl_module.configure_model()

    def finetune_function(self, pl_module, epoch, optimizer):
        pass


def test_a_layer_that_waits_for_an_epoch_that_does_not_come_is_warned_of(micro_model_dir):
    def said(**changes):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(micro_model_dir, [Thawing()], rollouts=1, **changes)
        return [str(w.message) for w in caught if str(w.message).startswith("callbacks: ")]

    assert said() == [
        "callbacks: Thawing unfreezes by epochs, and a stream of prompts is one epoch; limit_train_batches=<rollouts> "
        "in the Trainer ends epochs"
    ]
    assert said(limit_train_batches=1) == []


def test_a_checkpoint_without_a_metric_is_that_of_the_last_rollout(micro_model_dir, tmp_path):
    fit(micro_model_dir, [ModelCheckpoint(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-step=5.ckpt"]


def test_a_backbone_that_the_module_does_not_have_is_not_looked_for(micro_model_dir):
    class Frozen(BackboneFinetuning):
        pass

    module = build_module(micro_model_dir, Settings(rollouts=1))
    for kind in (BackboneFinetuning, Frozen):
        line = (
            f"callbacks: {kind.__name__} freezes an attribute backbone, which GSPOModule does not have; leave it out, "
            "and choose what is trained by PolicyLoader (lora, train_vision, train_language)"
        )
        with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
            trainer(callbacks=[kind()]).fit(module, datamodule=Letters(micro_model_dir))
    module.backbone = torch.nn.Linear(2, 2)
    trainer(callbacks=[BackboneFinetuning()]).fit(module, datamodule=Letters(micro_model_dir))
    assert module.rollouts_done == 1
