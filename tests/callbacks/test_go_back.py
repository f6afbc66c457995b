"""A run that goes on in its own folder: from an earlier checkpoint, or without a rollout left."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from gspo_lightning.callbacks import RolloutCheckpoint, RunRecorder
from gspo_lightning.callbacks.checkpoint_files import go_back
from gspo_lightning.program.resume import find_checkpoint
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Killed(BaseException):
    """Raised where a kill would come; nothing of ours catches it."""


class KillIn(Callback):
    """Kills in a rollout, counted from one."""

    def __init__(self, rollout):
        self.rollout = rollout

    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.rollouts_done + 1 == self.rollout:
            raise Killed


class RestoresLate(SingleDeviceStrategy):
    """Restores after its setup, as FSDP2 does."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


def run(model, folder, ckpt_path=None, kill_in=0, **changes):
    """Six rollouts, saved every two; returns the weights, the steps of the rows and the bytes of the completions."""
    recorder, checkpoint = RunRecorder(folder), RolloutCheckpoint(folder / "checkpoints", 2, keep_last=3)
    module = build_module(model, Settings(rollouts=6))
    runner = trainer(callbacks=[KillIn(kill_in), recorder, checkpoint], **changes)
    runner.fit(module, Batches(scripted_prompts(), 9).loader(), ckpt_path=ckpt_path, weights_only=True)
    with (folder / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    return weights(module), steps, (folder / "completions.jsonl").read_bytes()


def done(path):
    return torch.load(path, weights_only=True)["gspo_lightning"]["rollouts_done"]


@pytest.mark.parametrize(("name", "back", "before"), [("rollout-000002.ckpt", 2, 6), ("previous.ckpt", 4, 4)])
def test_a_run_that_went_back_and_was_killed_goes_on_from_there_and_loses_no_records(
    name, back, before, micro_model_dir, tmp_path
):
    folder = tmp_path / "checkpoints"
    expected, expected_steps, expected_completions = run(micro_model_dir, tmp_path)
    with pytest.raises(Killed):
        run(micro_model_dir, tmp_path, folder / name, kill_in=back + 2)
    found = find_checkpoint("auto", tmp_path)
    assert found == folder / "last.ckpt" and done(found) == back and done(folder / "previous.ckpt") == before
    trained, steps, completions = run(micro_model_dir, tmp_path, found)
    assert torch.equal(trained, expected) and completions == expected_completions
    assert steps == expected_steps == [1, 2, 3, 4, 5, 6]
    names = ["last.ckpt", "previous.ckpt", *(f"rollout-00000{n}.ckpt" for n in (2, 4, 6))]
    assert sorted(path.name for path in folder.iterdir()) == names


@pytest.mark.parametrize("way", ["late", "by a link"])
def test_a_run_goes_back_whenever_it_is_restored_and_by_whatever_path(way, micro_model_dir, tmp_path):
    run(micro_model_dir, tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    (tmp_path / "link").symlink_to(tmp_path)
    folder, changes = (tmp_path, {"strategy": RestoresLate("cpu")}) if way == "late" else (tmp_path / "link", {})
    with pytest.raises(Killed):
        run(micro_model_dir, tmp_path, folder / "checkpoints" / "rollout-000002.ckpt", kill_in=3, **changes)
    assert (done(last), done(last.with_name("previous.ckpt"))) == (2, 6)


def test_a_run_without_a_rollout_left_leaves_its_checkpoints_as_they_are(micro_model_dir, tmp_path):
    """Callbacks such as `EMAWeightAveraging` put other weights into the module at the end."""
    run(micro_model_dir, tmp_path)
    files = {path.name: path.stat().st_ino for path in (tmp_path / "checkpoints").iterdir()}
    run(micro_model_dir, tmp_path, tmp_path / "checkpoints" / "last.ckpt")
    assert {path.name: path.stat().st_ino for path in (tmp_path / "checkpoints").iterdir()} == files


@pytest.mark.parametrize("of", ["run", "other"])
def test_only_a_checkpoint_of_the_same_run_becomes_its_newest(of, tmp_path):
    for folder in ("run", "other"):
        (tmp_path / folder / "checkpoints").mkdir(parents=True)
        for name in ("last.ckpt", "rollout-000002.ckpt"):
            (tmp_path / folder / "checkpoints" / name).write_text(f"{folder} {name}")
    recorder, callback = RunRecorder(tmp_path / "run"), RolloutCheckpoint(tmp_path / "run" / "checkpoints", 2)
    earlier = tmp_path / of / "checkpoints" / "rollout-000002.ckpt"
    callback.on_fit_start(SimpleNamespace(callbacks=[recorder, callback], ckpt_path=str(earlier)), None)
    recorder.before_cut()
    assert callback.last.read_text() == ("run rollout-000002.ckpt" if of == "run" else "run last.ckpt")


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("name", ["rollout-000002.ckpt", "previous.ckpt", "last.ckpt"])
def test_the_one_that_a_run_goes_on_from_becomes_the_newest(name, kind, tmp_path):
    for path, text in (("last.ckpt", "4"), ("previous.ckpt", "3"), ("rollout-000002.ckpt", "2")):
        file = tmp_path / path
        if kind == "folder":
            file.mkdir()
            file /= "rank0"
        file.write_text(text)
    go_back(tmp_path / "last.ckpt", tmp_path / name, tmp_path / "previous.ckpt")
    texts = {p.name: (p / "rank0" if p.is_dir() else p).read_text() for p in tmp_path.iterdir()}
    last, previous = {"rollout-000002.ckpt": "24", "previous.ckpt": "33", "last.ckpt": "43"}[name]
    assert texts == {"last.ckpt": last, "previous.ckpt": previous, "rollout-000002.ckpt": "2"}


def test_where_a_kill_has_left_only_the_previous_one_it_stays(tmp_path):
    """A folder has no second name, so for a moment there is no ``last.ckpt``."""
    for name in ("previous.ckpt", "rollout-000002.ckpt"):
        (tmp_path / name).mkdir()
    go_back(tmp_path / "last.ckpt", tmp_path / "rollout-000002.ckpt", tmp_path / "previous.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt", "rollout-000002.ckpt"]
