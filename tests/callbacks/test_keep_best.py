"""``checkpoint.keep_best``: the checkpoint after the highest validation stays, through kills, ties and moves."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.callbacks import RolloutCheckpoint
from gspo_lightning.callbacks.best import Best, metrics_of
from gspo_lightning.errors import UserError
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.training.validation import ValidationSettings, Validator
from gspo_lightning.types import SamplingParams
from tests.conf.test_every_key import run as in_process
from tests.scripted import Batches, Settings, build_module, scripted_prompts, scripted_reward, trainer

VALUES = {2: 0.25, 4: 0.5, 6: 0.5, 8: 0.25, 10: 0.75}
"""Rises, stays, falls, rises."""
BEST = {2: 2, 4: 4, 6: 4, 8: 4, 10: 10}
"""Rollouts done -> the best so far: the first of equals."""


class Trainer:
    """Writes the rollout into a file, or into the folder of several ranks."""

    is_global_zero, should_stop, sanity_checking, limit_val_batches = True, False, False, 1.0
    state = SimpleNamespace(fn="fit")
    strategy = SimpleNamespace(barrier=lambda name: None)

    def __init__(self, module, kind):
        self.module, self.kind = module, kind

    def save_checkpoint(self, path):
        if self.kind == "folder":
            path.mkdir()
            path = path / "rank0"
        path.write_text(str(self.module.rollouts_done))


def content(path):
    return (path / "rank0" if path.is_dir() else path).read_text()


def play(folder, kind, every=2, values=VALUES, **settings):
    """Yields the rollouts done after each rollout and its validation."""
    module = SimpleNamespace(rollouts_done=0, max_rollouts=10)
    runner, checkpoint = Trainer(module, kind), RolloutCheckpoint(folder, every, 2, **settings)
    for module.rollouts_done in range(1, 11):
        checkpoint.on_train_batch_end(runner, module, None, None, 0)
        if module.rollouts_done in values:
            module.last_validation = {"val/accuracy": values[module.rollouts_done]}
            checkpoint.on_validation_end(runner, module)
            yield module.rollouts_done


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("every", [2, 100])
@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_the_first_of_the_highest_stays(links, every, kind, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")  # exFAT, and many network and FUSE mounts

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    kept = {done: content(tmp_path / "best.ckpt") for done in play(tmp_path, kind, every, keep_best="val/accuracy")}
    assert kept == {done: str(best) for done, best in BEST.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_one_best_stays_beside_the_last_and_is_on_the_disk_once(kind, tmp_path):
    for done in play(tmp_path, kind, keep_last=2, keep_best="val/accuracy"):
        if done == 8:
            break
    names = {path.name: content(path) for path in tmp_path.iterdir()}
    assert names == {
        "last.ckpt": "8", "previous.ckpt": "6", "best.ckpt": "4", "rollout-000006.ckpt": "6", "rollout-000008.ckpt": "8",
    }  # fmt: skip
    assert len({path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}) == 3


@pytest.mark.parametrize("keep_best", [None, "val/accuracy"])
def test_a_rollout_that_is_due_and_the_best_is_saved_once(keep_best, tmp_path):
    """A second time would make it the checkpoint before, too."""
    previous = tmp_path / "previous.ckpt"
    found = {done: previous.exists() and content(previous) for done in play(tmp_path, "file", keep_best=keep_best)}
    assert found == {2: False, 4: "2", 6: "4", 8: "6", 10: "8"}


def test_without_it_there_is_no_best(tmp_path):
    assert list(play(tmp_path, "file")) == list(VALUES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert RolloutCheckpoint(tmp_path, 1).state_dict() == {}


def test_second_names_are_given_by_the_first_rank_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    assert list(play(tmp_path, "file", keep_last=2, keep_best="val/accuracy")) == list(VALUES)
    assert [path.name for path in tmp_path.iterdir()] == [".last.ckpt.tmp"]  # which the first would rename


def test_a_value_that_is_no_number_is_never_the_best(tmp_path):
    values = {2: math.nan, 4: -0.5, 6: math.nan, 8: -0.75}
    kept = {}
    for done in play(tmp_path, "file", values=values, keep_best="val/accuracy"):
        kept[done] = (tmp_path / "best.ckpt").exists() and content(tmp_path / "best.ckpt")
    assert kept == {2: False, 4: "4", 6: "4", 8: "4"}


class Killed(BaseException):
    """What nothing catches."""


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("at", range(4))
def test_a_kill_at_any_step_leaves_the_old_or_the_new_and_never_half(at, kind, tmp_path, monkeypatch):
    """Steps: before the second name, before the old one goes, before the new one comes, after it."""
    for done in play(tmp_path, kind, keep_best="val/accuracy"):
        if done == 2:
            break
    Trainer(SimpleNamespace(rollouts_done=4), kind).save_checkpoint(tmp_path / "new.ckpt")
    best, steps = Best("val/accuracy", tmp_path / "best.ckpt", "RolloutCheckpoint"), iter(range(99))

    def killed(call):
        def step(*args, **kwargs):
            if next(steps) == at:
                raise Killed
            return call(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", killed(os.link))
        patch.setattr(os, "replace", killed(os.replace))
        try:
            best.keep(tmp_path / "new.ckpt")
        except Killed:
            assert not (tmp_path / "best.ckpt").exists() or content(tmp_path / "best.ckpt") == "2"
            assert (tmp_path / "best.ckpt").exists() or kind == "folder"
        else:
            assert content(tmp_path / "best.ckpt") == "4"
    best.keep(tmp_path / "new.ckpt")
    assert content(tmp_path / "best.ckpt") == "4"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------- with Lightning's loops


def fit(model, folder, rollouts=10, ckpt_path=None, every=3, values=VALUES, metric="val/accuracy", **changes):
    """A run whose validations give `VALUES`; the callback, and the trainer and the module."""
    module = build_module(model, Settings(rollouts=rollouts))
    module.validator.update = lambda *_: None
    module.validator.compute = lambda _: {"val/accuracy": values.get(module.rollouts_done, 1.0)}
    saving = RolloutCheckpoint(folder, every, 2, keep_best=metric)
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None, **changes}
    runner, batches = trainer(callbacks=[saving], **settings), Batches(scripted_prompts(), 10)
    runner.fit(module, batches.loader(), batches.loader(), ckpt_path=ckpt_path, weights_only=True)
    return saving, runner, module


@pytest.fixture(scope="module")
def whole(micro_model_dir, tmp_path_factory):
    """Of a run that was never stopped: rollouts done -> its best checkpoint then."""
    kept = {}
    for done in (4, 8, 10):
        folder = tmp_path_factory.mktemp("whole")
        fit(micro_model_dir, folder, done)
        kept[done] = folder / "best.ckpt"
    return kept


def read(path):
    return torch.load(path, weights_only=True)


def assert_same_best(path, expected):
    ours, theirs = read(path), read(expected)
    assert ours["gspo_lightning"]["rollouts_done"] == theirs["gspo_lightning"]["rollouts_done"]
    assert ours["callbacks"]["RolloutCheckpoint"] == theirs["callbacks"]["RolloutCheckpoint"]
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())


def test_a_checkpoint_knows_the_best_and_the_best_goes_on_as_any_other(whole, micro_model_dir, tmp_path):
    best = read(whole[8])
    assert best["gspo_lightning"]["rollouts_done"] == 4
    assert best["callbacks"]["RolloutCheckpoint"] == {"metric": "val/accuracy", "value": 0.5, "rollout": 4}
    saving, _, module = fit(micro_model_dir, tmp_path, ckpt_path=whole[8])
    assert module.rollouts_done == 10 and saving.best.facts() == {
        "best_metric": "val/accuracy", "best_value": 0.75, "best_rollout": 10,
    }  # fmt: skip
    assert_same_best(tmp_path / "best.ckpt", whole[10])


@pytest.mark.parametrize("moment", ["before the write", "before the name", "after the name"])
@pytest.mark.parametrize("at", [4, 10])
def test_a_run_killed_at_a_new_best_ends_with_the_same_best(at, moment, whole, micro_model_dir, tmp_path, monkeypatch):
    where = {"before the write": "is_higher", "before the name": "keep", "after the name": "keep"}[moment]
    method = getattr(Best, where)

    def killed(self, *args):
        rollout = args[1] if where == "is_higher" else self.found["rollout"]
        if rollout != at:
            return method(self, *args)
        if moment == "after the name":
            method(self, *args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Best, where, killed)
        with pytest.raises(Killed):
            fit(micro_model_dir, tmp_path)
    stood = read(tmp_path / "best.ckpt")["gspo_lightning"]["rollouts_done"]
    assert stood == (at if moment == "after the name" else 2 if at == 4 else 4)
    fit(micro_model_dir, tmp_path, 8 if at == 4 else 10, ckpt_path=tmp_path / "last.ckpt")
    assert_same_best(tmp_path / "best.ckpt", whole[8 if at == 4 else 10])


def test_a_run_that_goes_on_elsewhere_brings_the_best_along(whole, micro_model_dir, tmp_path):
    fit(micro_model_dir, tmp_path, 8, ckpt_path=whole[8].with_name("last.ckpt"))
    assert (tmp_path / "best.ckpt").samefile(whole[8])


def test_a_best_that_is_gone_is_counted_anew_and_the_line_says_so(whole, micro_model_dir, tmp_path):
    shutil.copy(whole[4].with_name("last.ckpt"), tmp_path / "last.ckpt")
    start = read(tmp_path / "last.ckpt")
    start["callbacks"]["RolloutCheckpoint"] = {"metric": "val/accuracy", "value": 0.5, "rollout": 2}
    torch.save(start, tmp_path / "last.ckpt")
    (tmp_path / "best.ckpt").write_bytes(b"PK")
    with pytest.warns(UserWarning, match=r"best.ckpt of rollout 2 \(val/accuracy=0.5\) is neither in"):
        fit(micro_model_dir, tmp_path / "new", 8, ckpt_path=tmp_path / "last.ckpt")
    assert read(tmp_path / "new" / "best.ckpt")["gspo_lightning"]["rollouts_done"] == 6


FOUND = {"metric": "val/accuracy", "value": 0.5, "rollout": 4}


def stored(path, done=4, **found):
    torch.save(
        {"gspo_lightning": {"rollouts_done": done}, "callbacks": {"RolloutCheckpoint": {**FOUND, **found}}}, path
    )


@pytest.mark.parametrize(
    ("write", "taken"),
    [
        (stored, True),
        (lambda path: stored(path, done=5), False),
        (lambda path: stored(path, value=0.75), False),
        (lambda path: torch.save({"gspo_lightning": {"rollouts_done": 4}}, path), False),
        (lambda path: torch.save({"state_dict": {}}, path), False),
        (lambda path: torch.save({"callbacks": path}, path), False),
        (lambda path: path.write_bytes(b""), False),
        (lambda path: path.mkdir(), False),
        (lambda path: None, False),
    ],
    ids=[
        "it",
        "of another rollout",
        "of another run",
        "of no best",
        "of another program",
        "of objects",
        "empty",
        "a folder",
        "none",
    ],
)
@pytest.mark.parametrize("name", ["run/best.ckpt", "before/last.ckpt", "before/best.ckpt"])
def test_only_the_checkpoint_that_was_the_best_is_taken_for_it(name, write, taken, tmp_path, recwarn):
    for folder in ("run", "before"):
        (tmp_path / folder).mkdir()
    write(tmp_path / name)
    best = Best("val/accuracy", tmp_path / "run" / "best.ckpt", "RolloutCheckpoint")
    nothing = {"best_metric": "val/accuracy", "best_value": None, "best_rollout": None}
    assert best.facts() == nothing
    best.load(FOUND)
    strategy = SimpleNamespace(broadcast=lambda found: found)
    runner = SimpleNamespace(is_global_zero=True, strategy=strategy, ckpt_path=str(tmp_path / "before" / "last.ckpt"))
    best.take_over(runner)
    lines = [line for line in map(str, (w.message for w in recwarn)) if "starts over" in line]
    if taken:
        assert best.found == FOUND and not lines and (tmp_path / "run" / "best.ckpt").samefile(tmp_path / name)
    else:
        assert best.facts() == nothing and len(lines) == 1
    assert best.is_higher({"val/accuracy": 0.5}, 6) is not taken  # the first of equals stays


def test_what_another_metric_found_best_does_not_count(whole, micro_model_dir, tmp_path):
    start = read(whole[8].with_name("last.ckpt"))
    start["callbacks"]["RolloutCheckpoint"] = {"metric": "val/reward", "value": 0.5, "rollout": 8}
    torch.save(start, tmp_path / "start.ckpt")
    fit(micro_model_dir, tmp_path / "new", 9, ckpt_path=tmp_path / "start.ckpt", values={9: 0.125})
    assert read(tmp_path / "new" / "best.ckpt")["gspo_lightning"]["rollouts_done"] == 9


def test_a_validation_that_is_not_due_counts_and_one_outside_of_the_run_does_not(micro_model_dir, tmp_path):
    saving, runner, module = fit(
        micro_model_dir, tmp_path, 5, values={2: 0.25, 4: 0.25, 5: 0.5}, num_sanity_val_steps=1
    )
    assert saving.best.found == {"metric": "val/accuracy", "value": 0.5, "rollout": 5}
    module.validator.compute = lambda _: {"val/accuracy": 1.0}
    runner.validate(module, Batches(scripted_prompts(), 1).loader(), verbose=False)
    assert saving.best.found["value"] == 0.5
    assert read(tmp_path / "best.ckpt")["callbacks"]["RolloutCheckpoint"] == saving.best.found


def test_what_no_validation_measures_is_refused_at_the_first(micro_model_dir, tmp_path):
    with pytest.raises(UserError) as error:
        fit(micro_model_dir, tmp_path, metric="val/acuracy", num_sanity_val_steps=1)
    assert str(error.value) == (
        "checkpoint.keep_best=val/acuracy: validation does not measure it; it measures val/accuracy"
    )
    assert not (tmp_path / "last.ckpt").exists()


def test_a_metric_that_later_validations_lack_is_refused_too_and_others_that_are_no_better_are_not_named(tmp_path):
    best = Best("val/reward", tmp_path / "best.ckpt", "RolloutCheckpoint")
    with pytest.raises(UserError, match="does not measure it; it measures val/accuracy, val/pass@4$"):
        best.is_higher({"val/accuracy": 0.5, "val/mean_tokens": 9.0, "val/pass@4": 1.0}, 2)
    assert best.found == {}


def test_a_validation_before_the_first_rollout_of_a_run_is_looked_at_and_does_not_count(tmp_path):
    module = SimpleNamespace(rollouts_done=0, max_rollouts=10, last_validation={"val/accuracy": 0.5})
    runner, checkpoint = Trainer(module, "file"), RolloutCheckpoint(tmp_path, 2, 2, keep_best="val/accuracy")
    checkpoint.on_validation_end(runner, module)
    runner.sanity_checking, module.rollouts_done = True, 4  # of a run that goes on
    checkpoint.on_validation_end(runner, module)
    assert checkpoint.best.found == {} and not list(tmp_path.iterdir())
    module.rollouts_done, module.last_validation = 0, {"val/reward": 1.0}
    with pytest.raises(UserError, match="it measures val/reward$"):
        checkpoint.on_validation_end(runner, module)


def test_a_trainer_that_validates_nothing_is_refused(micro_model_dir, tmp_path):
    module, saving = build_module(micro_model_dir, Settings()), RolloutCheckpoint(tmp_path, 1, keep_best="val/reward")
    with pytest.raises(UserError, match=r"RolloutCheckpoint\(keep_best=val/reward\) needs validations during the run"):
        trainer(callbacks=[saving]).fit(module, Batches(scripted_prompts()).loader())


def test_the_names_that_a_config_may_give_are_those_of_a_validation():
    rewards = RewardSet({"scripted": RewardSpec(scripted_reward)})
    measured = Validator(ValidationSettings(3), rewards, SamplingParams(num_generations=2, max_completion_length=4), 0)
    assert metrics_of(3) == [name for name in measured.names if name != "val/mean_tokens"]


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_goes_on_after_its_last_rollout_counts_the_validation_that_is_left(tmp_path):
    common = ["logger=none", "export.enabled=false", "max_rollouts=1", "validation.every_n_rollouts=9"]
    in_process(tmp_path, *common)
    in_process(tmp_path, *common, "ckpt_path=auto", "checkpoint.keep_best=val/reward")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best_rollout"] == 1 and summary["best_value"] == summary["val_reward_after"]
    assert (tmp_path / "checkpoints" / "best.ckpt").samefile(tmp_path / "checkpoints" / "last.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_going_on_from_the_best_for_no_further_rollout_exports_it(tmp_path):
    """By a value that never changes, the first rollout is the best."""
    common = ["logger=none", "validation.every_n_rollouts=1", "validation.threshold=9", "scheduler=constant"]
    last = in_process(tmp_path / "run", *common, "max_rollouts=2", "checkpoint.keep_best=val/accuracy")
    best = f"ckpt_path={tmp_path}/run/checkpoints/best.ckpt"
    exported = in_process(tmp_path / "best", *common, "max_rollouts=1", best)["weights"]
    assert exported == in_process(tmp_path / "one", *common, "max_rollouts=1")["weights"] != last["weights"]
