"""A run goes on from a good checkpoint of ours or says why not."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, timer

from gspo_lightning.build import build_trainer
from gspo_lightning.callbacks.time_limit import TimeLimit
from gspo_lightning.errors import UserError
from gspo_lightning.resume import find_checkpoint, goes_on, is_whole
from gspo_lightning.rollout import EngineUnavailableError
from gspo_lightning.training_run import TrainingRun
from tests.training import Batches, Settings, build_module, scripted_prompts


class Payload:
    """What a pickle may hold: a call."""

    def __reduce__(self):
        return os.getcwd, ()


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for number, name in enumerate(("previous.ckpt", "last.ckpt")):
        torch.save({"gspo_lightning": {"rollouts_done": number}, "w": torch.arange(50_000.0)}, folder / name)
    return tmp_path


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def test_auto_takes_the_newest_and_a_folder_without_any_starts_afresh(run_dir, tmp_path, capsys):
    assert find_checkpoint("auto", run_dir) == run_dir / "checkpoints" / "last.ckpt"
    assert find_checkpoint("auto", tmp_path / "new") is None
    assert "starting afresh" in capsys.readouterr().out
    assert find_checkpoint(None, run_dir) is None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_checkpoint_cut_short_gives_way_to_the_one_before(share, explicit, run_dir, capsys):
    last = run_dir / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: int(share * last.stat().st_size)])
    found = find_checkpoint(str(last) if explicit else "auto", run_dir)
    assert found == run_dir / "checkpoints" / "previous.ckpt"
    assert f"{last} is damaged" in capsys.readouterr().out


def test_any_flipped_bit_of_the_weights_is_found(run_dir):
    last = run_dir / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    start = content.index(torch.arange(50_000.0).numpy().tobytes())
    for offset in (0, 777, 100_001, 199_999):
        flip(last, start + offset)
        assert not is_whole(last)
        last.write_bytes(content)
    assert is_whole(last)


def test_without_a_good_one_the_line_says_so(run_dir):
    for file in (run_dir / "checkpoints").iterdir():
        file.write_bytes(b"PK")
    with pytest.raises(UserError, match="last.ckpt: damaged, and there is no good checkpoint beside it"):
        find_checkpoint("auto", run_dir)


def test_a_pickle_payload_is_refused_and_never_run(tmp_path, monkeypatch):
    path = tmp_path / "evil.ckpt"
    torch.save({"gspo_lightning": {}, "x": Payload()}, path)
    monkeypatch.setattr(os, "getcwd", lambda: pytest.fail("the payload ran"))
    with pytest.raises(UserError, match="holds pickled Python objects"):
        find_checkpoint(str(path), tmp_path)


def test_a_file_of_something_else_and_a_missing_file_are_named(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="weights.pt: is not a checkpoint of gspo_lightning"):
        find_checkpoint(str(path), tmp_path)
    with pytest.raises(UserError, match="nothing.ckpt: there is no such checkpoint"):
        find_checkpoint(str(tmp_path / "nothing.ckpt"), tmp_path)


@pytest.mark.parametrize(("change", "there"), [("missing", "none"), ("shape", r"\(3,\)")])
def test_the_checkpoint_of_another_model_is_refused_and_says_which_weight(change, there, micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    module.configure_model()
    state = module.state_dict()
    name = max(name for name, _ in module.named_parameters())
    state[name] = torch.zeros(3)
    if change == "missing":
        del state[name]
    with pytest.raises(UserError, match=rf"another model or adapter: 1 trained .*{name} .*there {there}"):
        module.on_load_checkpoint({"state_dict": state, "gspo_lightning": {}})


class SixSeconds(Callback):
    """A rollout takes that long on a clock that the test reads."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_start(self, *_):
        self.now += 6.0


def test_a_limit_of_time_is_that_of_one_process(micro_model_dir, tmp_path, monkeypatch):
    """Jobs of a Slurm chain with the same limit each go on; the second would end before its first rollout otherwise."""
    clock, done, ckpt_path = SixSeconds(monkeypatch), [], None
    limited = {"_target_": "lightning.Trainer", "accelerator": "cpu", "max_time": "00:00:00:10", "limit_val_batches": 0}
    for job in range(3):
        module = build_module(micro_model_dir, Settings(rollouts=9))
        plain = {"trainer": limited, "validation": {"every_n_rollouts": None}, "logger": None}
        trainer = build_trainer(plain, [clock])
        batches = Batches(scripted_prompts(), batches=9).loader()
        trainer.fit(module, batches, ckpt_path=ckpt_path, weights_only=True)
        done.append(module.rollouts_done)
        ckpt_path = tmp_path / f"{job}.ckpt"
        trainer.save_checkpoint(ckpt_path)
    assert done == [2, 4, 6]


def test_a_checkpoint_that_holds_the_time_of_lightnings_timer_starts_the_clock_anew():
    limit = TimeLimit("00:00:00:10")
    assert limit.state_key == timer.Timer().state_key  # else Lightning warns that a callback is missing
    limit.load_state_dict({"time_elapsed": {"train": 12.0}})
    assert limit.time_remaining() == 10.0 and limit.state_dict() == {}


@pytest.mark.parametrize(
    ("saved_at", "saved"), [(2, "saved"), (1, "an earlier rollout is saved"), (None, "an earlier rollout is saved")]
)
def test_a_lost_engine_says_whether_the_last_rollout_is_saved(saved_at, saved, run_dir):
    """Where one of several ranks may be alone with the error, nothing is written."""

    def fit(*_, **__):
        raise EngineUnavailableError("nobody is left")

    run, last = object.__new__(TrainingRun), run_dir / "checkpoints" / "last.ckpt"
    run.ckpt_path, run.datamodule, run.module = last, None, SimpleNamespace(rollouts_done=2)
    run.trainer, run.checkpoint = SimpleNamespace(fit=fit), SimpleNamespace(last=last, saved_at=saved_at)
    with pytest.raises(EngineUnavailableError) as error:
        run.execute()
    assert str(error.value) == f"nobody is left; {saved}, go on with ckpt_path={last}"


def test_a_command_goes_on_by_auto_or_by_naming_what_the_run_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "run" / "last.ckpt"
    names = ("auto", "run/last.ckpt", str(last), "run/rollout-000010.ckpt", "other/last.ckpt", None)
    assert [goes_on(name, last) for name in names] == [True, True, True, False, False, False]
