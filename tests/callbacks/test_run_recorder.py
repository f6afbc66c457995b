"""The recorder: what it writes, and that a resumed run leaves the records of one that was never stopped."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gspo_lightning.callbacks import RunRecorder, files
from gspo_lightning.callbacks import recorder as recorder_module
from gspo_lightning.callbacks.recorder import completion_entries, to_json
from tests.callbacks.fakes import OTHER_RANK, TRAINER, FakeModule, contents, play, scored_rollout, start


def test_a_completion_is_recorded_with_its_rewards_by_name_advantage_and_length():
    first, second = completion_entries(3, scored_rollout(3))
    assert first == {
        "step": 3,
        "uid": "task:3",
        "prompt": "Yes or no?",
        "completion": "yes 3",
        "rewards": {"right": 1.0, "short": 0.5},
        "reward": 1.5,
        "advantage": 0.75,
        "finish_reason": "stop",
        "tokens": 3,
    }
    assert (second["finish_reason"], second["tokens"], second["advantage"]) == ("length", 4, -0.75)
    assert json.loads(to_json(second))["rewards"] == {"right": 0.25, "short": None}


def test_a_row_per_rollout_with_validation_columns_where_a_validation_followed(tmp_path):
    play(start(tmp_path), 1, 3)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,val/accuracy,reward/mean,completion/mean_tokens,late",
        "0,0.0,,,",
        f"1,,{1 / 3!r},3.0,",
        f"2,0.2,{2 / 3!r},4.0,",
        "3,,1.0,5.0,0.001",
    ]
    steps = [json.loads(line)["step"] for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 2, 2, 3, 3]
    before, after = (json.loads((tmp_path / f"validation_{when}.json").read_text()) for when in ("before", "after"))
    assert (before["step"], before["samples"][0]["completion"]) == (0, "c0")
    assert (after["step"], after["metrics"]) == (2, {"val/accuracy": 0.2})


@pytest.mark.parametrize("same_folder", [True, False])
@pytest.mark.parametrize("checkpoint", [1, 2, 3, 5])
def test_a_resumed_run_leaves_the_bytes_of_one_never_stopped(checkpoint, same_folder, tmp_path):
    play(start(tmp_path / "whole"), 1, 6)
    states = play(start(tmp_path / "cut"), 1, 5)
    target = tmp_path / ("cut" if same_folder else "new")
    target.mkdir(exist_ok=True)
    resumed = RunRecorder(target, resume_dir=tmp_path / "cut")
    resumed.load_state_dict(states[checkpoint])
    play(resumed, checkpoint + 1, 6)
    assert contents(target) == contents(tmp_path / "whole")


def test_the_files_never_hold_less_than_the_state_says(tmp_path):
    recorder = start(tmp_path)
    for step in range(1, 7):
        state = play(recorder, step, step)[step]
        assert len((tmp_path / "metrics.csv").read_text().splitlines()) - 1 == state["rows"] == step + 1
        assert (tmp_path / "completions.jsonl").stat().st_size == state["completions_bytes"]


def test_a_checkpoint_written_right_after_a_resume_counts_what_was_taken_over(tmp_path):
    states = play(start(tmp_path), 1, 4)
    resumed = RunRecorder(tmp_path)
    resumed.load_state_dict(states[2])
    assert resumed.state_dict() == states[2]
    resumed.on_train_start(TRAINER, FakeModule())
    assert {**resumed.state_dict(), "seconds": 0} == {**states[2], "seconds": 0}


def test_the_time_of_the_runs_before_counts_as_their_tokens_do(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(recorder_module.time, "perf_counter", lambda: clock.now)
    first = RunRecorder(tmp_path)
    clock.now = 103.0  # set-up and the validation before
    first.on_train_start(TRAINER, FakeModule())
    clock.now = 110.0
    state = first.state_dict()
    clock.now = 115.0  # lost with the process, as its tokens are
    assert (state["seconds"], first.seconds) == (7.0, 12.0)
    clock.now = 200.0
    resumed = RunRecorder(tmp_path)
    resumed.load_state_dict({"rows": 0, "completions_bytes": 0, "seconds": 7.0})
    clock.now = 220.0
    resumed.on_train_start(TRAINER, FakeModule())
    clock.now = 222.0
    assert resumed.seconds == 9.0


def test_damaged_records_of_the_run_before_are_said_in_one_line_and_the_rest_is_kept(tmp_path):
    states = play(start(tmp_path / "old"), 1, 3)
    (tmp_path / "old" / "metrics.csv").write_text("step,reward/mean\n0,\n1,0.5\n")
    path = tmp_path / "old" / "completions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[: len(lines[0]) + 5])
    (tmp_path / "new").mkdir()
    resumed = RunRecorder(tmp_path / "new", resume_dir=tmp_path / "old")
    resumed.load_state_dict(states[3])
    with pytest.warns(UserWarning) as caught:
        play(resumed, 4, 4)
    (message,) = (str(warning.message) for warning in caught)
    assert (
        "metrics.csv has 2 of 4 rows" in message
        and f"completions.jsonl has {len(lines[0])} of" in message
        and "\n" not in message
    )
    rows = (tmp_path / "new" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "0", "1", "4"]
    entries = [json.loads(line) for line in (tmp_path / "new" / "completions.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 4, 4]


def test_another_rank_writes_nothing_and_leaves_the_old_records_alone(tmp_path):
    states = play(start(tmp_path), 1, 4)
    before = contents(tmp_path)
    other = RunRecorder(tmp_path)
    other.load_state_dict(states[1])
    other.on_train_start(OTHER_RANK, FakeModule())
    other.on_train_batch_end(OTHER_RANK, FakeModule().at(2), None, None, 0)
    other.on_validation_end(OTHER_RANK, FakeModule().at(2))
    assert contents(tmp_path) == before


def test_a_new_run_in_a_used_folder_keeps_the_old_records_aside(tmp_path):
    play(start(tmp_path), 1, 4)
    old = contents(tmp_path)
    play(start(tmp_path), 1, 1)
    play(start(tmp_path / "fresh"), 1, 1)
    assert contents(tmp_path) == contents(tmp_path / "fresh")
    assert {name: (tmp_path / f"{name}.old").read_bytes() for name in old} == old


@pytest.mark.parametrize("goes_on", [False, True])
def test_the_summary_of_a_run_that_ended_does_not_stand_for_one_that_has_not(goes_on, tmp_path):
    """A sweep would take its accuracy for that of a job that was stopped, and so would a comparison."""
    states = play(start(tmp_path), 1, 1)
    (tmp_path / "summary.json").write_text("{}")
    recorder = start(tmp_path)
    if goes_on:
        recorder.load_state_dict(states[1])
    play(recorder, 2, 2)
    assert not (tmp_path / "summary.json").exists() and (tmp_path / "summary.json.old").read_text() == "{}"


def checkpoint_of(folder, text):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "last.ckpt").write_text(text)


def saved(folder):
    return {path.parent.name: path.read_text() for path in sorted(folder.glob("checkpoints*/last.ckpt"))}


def test_a_new_run_in_a_used_folder_sets_the_old_checkpoints_aside_before_it_begins(tmp_path):
    """Killed before its first checkpoint, it would go on from the weights of the other run by ``ckpt_path=auto``."""
    for number in ("1", "2"):  # what was set aside before gives way
        checkpoint_of(tmp_path, number)
        RunRecorder(tmp_path, begins_anew=True).on_validation_start(OTHER_RANK, FakeModule())
        assert saved(tmp_path)["checkpoints"] == number
        RunRecorder(tmp_path, begins_anew=True).on_validation_start(TRAINER, FakeModule())
        assert saved(tmp_path) == {"checkpoints.old": number}
    (tmp_path / "checkpoints").mkdir()  # empty: nothing to keep
    RunRecorder(tmp_path, begins_anew=True).on_validation_start(TRAINER, FakeModule())
    assert saved(tmp_path) == {"checkpoints.old": "2"} and (tmp_path / "checkpoints").is_dir()


def test_a_validation_alone_moves_no_checkpoints_and_a_training_does_once(tmp_path):
    """A program of one's own may validate first and go on from them then."""
    checkpoint_of(tmp_path, "1")
    recorder = RunRecorder(tmp_path)
    recorder.on_validation_start(TRAINER, FakeModule())
    assert saved(tmp_path) == {"checkpoints": "1"}
    recorder.on_train_start(TRAINER, FakeModule())
    assert saved(tmp_path) == {"checkpoints.old": "1"}
    checkpoint_of(tmp_path, "2")  # its own
    recorder.on_train_start(TRAINER, FakeModule())
    assert saved(tmp_path) == {"checkpoints": "2", "checkpoints.old": "1"}


@pytest.mark.parametrize(("folder", "name"), [("run", "checkpoints"), ("new", "checkpoints.old")])
def test_a_run_that_goes_on_keeps_its_own_checkpoints_and_sets_those_of_a_third_aside(folder, name, tmp_path):
    states = play(start(tmp_path / "run"), 1, 2)
    checkpoint_of(tmp_path / folder, "kept")
    resumed = RunRecorder(tmp_path / folder, resume_dir=tmp_path / "run")
    resumed.on_validation_start(TRAINER, FakeModule())
    assert saved(tmp_path / folder) == {"checkpoints": "kept"}
    resumed.load_state_dict(states[2])
    play(resumed, 3, 3)
    assert saved(tmp_path / folder) == {name: "kept"}


def texts(folder, end=""):
    """The records as text, and what its checkpoints hold."""
    names = ("metrics.csv", "completions.jsonl", "validation_before.json", "validation_after.json", "summary.json")
    found = {name: (folder / (name + end)).read_text() for name in names if (folder / (name + end)).exists()}
    return {**found, "checkpoints": saved(folder).get("checkpoints" + end)}


def finished(folder, last, mark):
    states = play(start(folder), 1, last)
    checkpoint_of(folder, mark)
    (folder / "summary.json").write_text(mark)
    return states


def begun(folder, last=0):
    """A run from the start that is killed after rollout ``last``, before it saves anything."""
    recorder = RunRecorder(folder, begins_anew=True)
    recorder.on_validation_start(TRAINER, FakeModule())
    recorder.on_validation_end(TRAINER, FakeModule())
    play(recorder, 1, last)


def test_resuming_into_the_folder_of_another_run_keeps_all_that_one_recorded_however_often_it_is_tried(tmp_path):
    states = finished(tmp_path / "a", 4, "a")
    finished(tmp_path / "b", 3, "b")
    before = texts(tmp_path / "b")
    assert len(before) == 6
    for _ in range(2):  # killed before it saves, and again
        resumed = RunRecorder(tmp_path / "b", resume_dir=tmp_path / "a")
        resumed.load_state_dict(states[4])
        play(resumed, 5, 5)
        assert texts(tmp_path / "b", ".old") == before
        steps = [row.split(",")[0] for row in (tmp_path / "b" / "metrics.csv").read_text().splitlines()]
        assert steps == ["step", "0", "1", "2", "3", "4", "5"] and texts(tmp_path / "b")["checkpoints"] is None


@pytest.mark.parametrize("half_saved", [False, True])
def test_a_run_that_saved_nothing_does_not_take_the_place_of_the_one_it_set_aside(half_saved, tmp_path):
    """Started by mistake, killed, and put right by ``ckpt_path=auto``, which begins anew."""
    finished(tmp_path, 4, "a")
    before = texts(tmp_path)
    begun(tmp_path, 2)
    if half_saved:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / ".last.ckpt.tmp").write_text("half of")
    begun(tmp_path, 1)
    assert texts(tmp_path, ".old") == before
    assert [row.split(",")[0] for row in texts(tmp_path)["metrics.csv"].splitlines()] == ["step", "0", "1"]


@pytest.mark.parametrize("left", ["checkpoint", "summary"])
def test_a_run_that_saved_or_ended_takes_the_place_of_an_older_one_whole(left, tmp_path):
    finished(tmp_path, 4, "a")
    begun(tmp_path)
    if left == "checkpoint":
        checkpoint_of(tmp_path, "b")
    else:  # it ended, and its checkpoints were removed to make room
        (tmp_path / "summary.json").write_text("b")
    second = texts(tmp_path)
    begun(tmp_path)
    old = texts(tmp_path, ".old")
    assert {**old, "checkpoints": second["checkpoints"]} == second  # no completions.jsonl of the first
    assert old["checkpoints"] == ("b" if left == "checkpoint" else "a")


@pytest.mark.parametrize("kill_at", range(6))
def test_a_kill_while_records_are_set_aside_loses_none_of_them(kill_at, tmp_path, monkeypatch):
    finished(tmp_path, 4, "a")
    before, real, moved = texts(tmp_path), os.replace, []

    def replace_or_die(*paths):
        if len(moved) == kill_at:
            raise KeyboardInterrupt
        moved.append(paths)
        real(*paths)

    monkeypatch.setattr(recorder_module.os, "replace", replace_or_die)
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path)
    monkeypatch.undo()
    begun(tmp_path, 1)
    assert texts(tmp_path, ".old") == before


def test_nothing_is_recorded_before_the_checkpoint_of_a_resumed_run_is_loaded(tmp_path):
    play(start(tmp_path), 1, 2)
    before = contents(tmp_path)
    RunRecorder(tmp_path, resume_dir=tmp_path).on_validation_end(TRAINER, FakeModule())
    assert contents(tmp_path) == before


def test_a_sanity_check_of_the_trainer_is_not_the_validation_before(tmp_path):
    RunRecorder(tmp_path).on_validation_end(SimpleNamespace(is_global_zero=True, sanity_checking=True), FakeModule())
    assert contents(tmp_path) == {}


def test_the_records_are_on_the_disk_before_a_checkpoint_can_count_them(tmp_path, monkeypatch):
    recorder, synced = start(tmp_path), []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    play(recorder, 1, 1)
    names = (tmp_path / "metrics.csv", tmp_path / "completions.jsonl", tmp_path)
    assert synced == [path.stat().st_ino for path in names]


@pytest.mark.parametrize("name", ["EINVAL", "EBADF", "EACCES", "EPERM", "ENOTSUP", "EIO"])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_where_folders_cannot_be_flushed_the_run_goes_on_and_a_file_that_cannot_be_flushed_is_told(
    call, name, tmp_path, monkeypatch
):
    """As vboxsf, CIFS and SMB answer; a full disk is told for folders too."""
    file, real, number = tmp_path / "file", getattr(os, call), getattr(errno, name)
    file.touch()
    refused, flushed = {tmp_path.stat().st_ino}, []

    def answers(what, *rest):
        inode = os.stat(what).st_ino
        if inode in refused:
            raise OSError(number, os.strerror(number))
        flushed.append(inode)
        return real(what, *rest)

    monkeypatch.setattr(files.os, call, answers)
    files.flush_to_disk(file, tmp_path, tmp_path / "missing")
    assert flushed == [file.stat().st_ino]
    number = errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        files.flush_to_disk(tmp_path)
    refused, number = {file.stat().st_ino}, getattr(errno, name)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        files.flush_to_disk(file)


def test_lone_surrogates_line_breaks_images_and_infinities_stay_valid_json_on_one_line(tmp_path):
    recorder, module = start(tmp_path), FakeModule().at(1)
    scored = scored_rollout(1, text="a\udc80\nb\u2028ü")
    image = [{"role": "user", "content": [{"type": "image", "image": object()}]}]
    module.last_scored = replace(scored, prompts=[replace(scored.prompts[0], prompt=image)])
    scored.rewards[0, 0] = float("inf")
    module.validation_samples = [{"completion": "\udc80"}]
    recorder.on_train_batch_end(TRAINER, module, None, None, 0)
    recorder.on_validation_end(TRAINER, module)
    first, _, end = (tmp_path / "completions.jsonl").read_bytes().split(b"\n")
    entry = json.loads(first)
    assert entry["completion"] == "a\udc80\nb\u2028ü 1" and entry["reward"] is None and end == b""
    assert entry["prompt"][0]["content"][0]["image"] == "<object>"
    assert json.loads((tmp_path / "validation_after.json").read_text())["samples"] == [{"completion": "\udc80"}]


class Tiny(L.LightningModule):
    """Counts rollouts under a real Trainer; the counter travels with the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)
        self.fake, self.rollouts_done = FakeModule(), 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["fake"], name)

    def training_step(self, batch, index):
        self.optimizers().step()
        self.rollouts_done += 1
        self.fake.at(self.rollouts_done)

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["done"] = self.rollouts_done

    def on_load_checkpoint(self, checkpoint):
        self.rollouts_done = checkpoint["done"]

    def train_dataloader(self):
        return DataLoader(torch.zeros(6, 1))

    def val_dataloader(self):
        return DataLoader(torch.zeros(1, 1))


def lightning_run(folder, steps, resume_dir=None):
    folder.mkdir(exist_ok=True)
    recorder = RunRecorder(folder, resume_dir=resume_dir)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=2,
        callbacks=[recorder],
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=1,
    )
    module = Tiny()
    if resume_dir is None:
        trainer.validate(module, verbose=False)
    trainer.fit(module, ckpt_path=resume_dir and resume_dir / "last.ckpt", weights_only=True)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_under_a_real_trainer_a_resumed_run_leaves_the_bytes_of_one_never_stopped(tmp_path):
    lightning_run(tmp_path / "whole", 5)
    lightning_run(tmp_path / "cut", 3).save_checkpoint(tmp_path / "cut" / "last.ckpt")
    with (tmp_path / "cut" / "completions.jsonl").open("a") as file:
        file.write('{"step": 4, "half a l')
    lightning_run(tmp_path / "new", 5, resume_dir=tmp_path / "cut")
    assert contents(tmp_path / "new") == contents(tmp_path / "whole")
    rows = (tmp_path / "new" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "0", "1", "2", "3", "4", "5"]


def test_numbers_of_numpy_and_torch_that_a_reward_logs_are_recorded_as_numbers():
    values = [np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor(2.5), torch.tensor(math.nan), np.array(7)]
    assert json.loads(to_json(values)) == [0.5, 3, True, 2.5, None, 7]
    others = [np.longdouble(1), torch.empty((), device="meta"), torch.ones(1), np.ones(2), 1j]
    kinds = ["<longdouble>", "<Tensor>", "<Tensor>", "<ndarray>", "<complex>"]
    assert json.loads(to_json(others)) == kinds


def test_a_long_image_in_base64_is_its_kind_and_length_in_a_line_and_whole_in_a_document():
    address = "data:image/png;base64," + "A" * 300
    escaped = "data:image/png%3Bbase64%2C" + "A" * 300
    kept = ["data:image/png;base64,QQ==", "data: " + "words, " * 60, "data:" + "x" * 300]
    content = {"prompt": [{"content": [{"image": address}, {"image": escaped}]}], "kept": kept}
    line = json.loads(to_json(content))
    assert [part["image"] for part in line["prompt"][0]["content"]] == [
        "<data:image/png, 322 characters>",
        "<data:image/png, 326 characters>",
    ]
    assert line["kept"] == kept
    assert json.loads(to_json(content, indent=1)) == content  # thumbnails, which the report shows


@pytest.mark.parametrize("write", ["replace_file", "replace_end", "copy_prefix"])
def test_a_file_that_cannot_be_written_leaves_nothing_that_keeps_the_disk_full(write, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file, other = tmp_path / "file", tmp_path / "other"
    file.write_bytes(b"1\n2\n")
    monkeypatch.setattr(os, "replace", fail)
    arguments = {"replace_file": (file, "3\n"), "replace_end": (file, 2, "3\n"), "copy_prefix": (file, other, 4)}
    with pytest.raises(OSError, match="No space left"):
        getattr(files, write)(*arguments[write])
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_bytes() == b"1\n2\n"
