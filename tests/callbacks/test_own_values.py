"""``metrics.csv`` has what a subclass or a callback logs itself, in the row of its rollout, whoever comes first."""

from __future__ import annotations

import csv

import lightning as L
import pytest
import torch

from gspo_lightning import cli
from gspo_lightning.callbacks import RolloutCheckpoint, RunRecorder
from gspo_lightning.module import GSPOModule
from tests.conf.test_groups import given
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Logging(L.Callback):
    """Logs before, within and after the update of a rollout, and in a validation."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.log("mine/start", float(pl_module.rollouts_done))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.log("mine/step", 0.5 + pl_module.rollouts_done)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.rollouts_done % 2:
            pl_module.log("mine/odd", torch.tensor(8.0))
        self.log_dict({"reward/mean": -1.0, "mine/end": pl_module.rollouts_done**2})

    def on_validation_epoch_end(self, trainer, pl_module):
        self.log("mine/held_out", 0.25)

    saved: list[str] = []
    """What the table had when a checkpoint was saved."""

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        for callback in trainer.callbacks:
            if isinstance(callback, RunRecorder):
                self.saved.append(rows(callback.run_dir)[-1]["mine/end"])

    def on_train_epoch_end(self, trainer, pl_module):
        self.log("mine/run", 3.0)


class Own(GSPOModule):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("own/both", 1.5, on_step=True, on_epoch=True, batch_size=4)

    def on_train_batch_end(self, *_):
        self.log("own/last", 10.0 * self.rollouts_done)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("first", [True, False], ids=["the recorder first", "the recorder last"])
def test_each_value_is_in_the_row_of_its_rollout_and_nowhere_else(first, micro_model_dir, tmp_path):
    module = build_module(micro_model_dir, Settings(rollouts=3))
    module.__class__ = Own
    recorder, logging = RunRecorder(tmp_path), Logging()
    callbacks = [recorder, logging] if first else [logging, recorder]
    runner = trainer(callbacks=callbacks, limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None)
    held_out = Batches(scripted_prompts(generations=1)).loader()
    runner.fit(module, Batches(scripted_prompts(), 3).loader(), held_out)
    table = rows(tmp_path)
    assert [row["step"] for row in table] == ["1", "2", "3"]
    found = {name: [row[name] for row in table] for name in table[0] if name.startswith(("mine/", "own/"))}
    assert found == {
        "mine/start": ["0.0", "1.0", "2.0"],
        "mine/step": ["0.5", "1.5", "2.5"],
        "mine/odd": ["8.0", "", "8.0"],
        "mine/end": ["1.0", "4.0", "9.0"],
        "mine/held_out": ["", "0.25", "0.25"],  # the last validation is that of the end
        "mine/run": ["", "", "3.0"],
        "own/both": ["1.5", "1.5", "1.5"],
        "own/last": ["10.0", "20.0", "30.0"],
    }
    assert all(float(row["reward/mean"]) > 0 for row in table)  # a name of ours keeps our value


def test_a_value_that_comes_after_the_checkpoint_is_not_lost_with_it(micro_model_dir, tmp_path):
    """That of the module's last hook is added to a row which the checkpoint has counted."""
    module = build_module(micro_model_dir, Settings(rollouts=2))
    module.__class__ = Own
    trainer(callbacks=[Logging(), RunRecorder(tmp_path), RolloutCheckpoint(tmp_path / "checkpoints", 1)]).fit(
        module, Batches(scripted_prompts(), 2).loader()
    )
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["RunRecorder"]
    assert state["rows"] == 2 and [row["own/last"] for row in rows(tmp_path)] == ["10.0", "20.0"]


def command(folder, *overrides):
    cfg = given(
        "experiment=micro", "logger=none", "print_config=false", "export.enabled=false", "data.prompts_per_rollout=4",
        "data.task.num_validation=2", "checkpoint.every_n_rollouts=1", "validation.every_n_rollouts=2",
        f"module._target_={__name__}.Own", f"+callbacks.mine._target_={__name__}.Logging", *overrides, run_dir=folder,
    )  # fmt: skip
    cli._train(cfg)


def test_a_resumed_run_has_the_values_of_one_never_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Logging, "saved", [])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command(whole, "max_rollouts=3")
    assert Logging.saved == ["1.0", "4.0", "9.0"]  # a kill right after a checkpoint loses nothing of its rollout
    command(cut, "max_rollouts=1")
    command(cut, "max_rollouts=3", f"ckpt_path={cut}/checkpoints/last.ckpt")
    ours = [
        [{k: v for k, v in row.items() if k.startswith(("mine/", "own/"))} for row in rows(f)] for f in (whole, cut)
    ]
    ours[1][1] |= {"mine/run": "", "mine/held_out": ""}  # of the run that ended there
    assert ours[0] == ours[1] and ours[0][0]["mine/held_out"] == "0.25" and ours[0][2]["own/last"] == "20.0"
