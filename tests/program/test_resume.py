"""A run goes on from a good checkpoint of ours or says why not."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.optim import PagedAdamW8bit
from lightning.pytorch.callbacks import Callback, timer
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gspo_lightning.callbacks import GracefulStop, RolloutCheckpoint
from gspo_lightning.callbacks.time_limit import TimeLimit
from gspo_lightning.config.build import build_trainer
from gspo_lightning.data.files import read_file
from gspo_lightning.errors import UserError
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.program.resume import find_checkpoint, goes_on, is_whole, run_folder
from gspo_lightning.program.training_run import TrainingRun
from gspo_lightning.rollout import EngineUnavailableError, ReplayEngine
from gspo_lightning.training.run_state import keep_settings
from gspo_lightning.training.schedule import Schedule
from tests.conf.test_every_key import run as in_process
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer


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
    assert "starting a new run" in capsys.readouterr().out
    assert find_checkpoint(None, run_dir) is None


def test_a_path_from_the_home_folder_is_found_and_one_of_nobody_is_refused(run_dir, monkeypatch):
    """A shell does not expand it within ckpt_path=~/..., nor does a config."""
    last = run_dir / "checkpoints" / "last.ckpt"
    monkeypatch.setenv("HOME", str(run_dir))
    assert find_checkpoint("~/checkpoints/last.ckpt", run_dir) == last
    assert goes_on("~/checkpoints/last.ckpt", last) and not goes_on("~/checkpoints/previous.ckpt", last)
    with pytest.raises(UserError, match=r"^ckpt_path=~nobody-here/last\.ckpt: there is no such checkpoint$"):
        find_checkpoint("~nobody-here/last.ckpt", run_dir)
    (run_dir / "completions.jsonl").touch()
    assert ReplayEngine("~").run == run_dir
    for ask, line in (
        (resolve_model, "model folder '~nobody-here/x.jsonl' does not exist"),
        (read_file, "~nobody-here/x.jsonl: cannot read the file"),
    ):
        with pytest.raises(UserError, match=f"^{line}"):
            ask("~nobody-here/x.jsonl")


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
    with pytest.raises(UserError, match="last.ckpt: damaged, and there is no good checkpoint next to it"):
        find_checkpoint("auto", run_dir)


KEPT = ("rollout-999999.ckpt", "rollout-1000000.ckpt", "best.ckpt", "rollout-x.ckpt")


@pytest.fixture
def kept_dir(run_dir):
    for name in KEPT:
        shutil.copy(run_dir / "checkpoints" / "last.ckpt", run_dir / "checkpoints" / name)
    return run_dir


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"PK"), Path.unlink])
def test_what_keep_last_and_keep_best_have_kept_is_taken_before_a_run_starts_over(damage, explicit, kept_dir, capsys):
    folder = kept_dir / "checkpoints"
    asked = str(folder / "last.ckpt") if explicit else "auto"
    damage(folder / "last.ckpt")
    for worse, taken in zip(("previous.ckpt", KEPT[1], KEPT[0]), (KEPT[1], KEPT[0], KEPT[2]), strict=True):
        damage(folder / worse)
        assert find_checkpoint(asked, kept_dir) == folder / taken
        assert capsys.readouterr().out.splitlines()[-1] == f"ckpt_path={asked}: resuming from {folder / taken}"


def test_a_damaged_one_that_was_named_gives_way_to_none_and_the_line_names_a_good_one(kept_dir):
    folder = kept_dir / "checkpoints"
    for name in (KEPT[0], "last.ckpt"):
        (folder / name).write_bytes(b"PK")
    with pytest.raises(UserError) as error:
        find_checkpoint(str(folder / KEPT[0]), kept_dir)
    assert str(error.value) == f"ckpt_path={folder / KEPT[0]}: damaged; {folder / 'previous.ckpt'} is not"


def test_a_pickle_payload_is_refused_and_never_run(tmp_path, monkeypatch):
    path = tmp_path / "evil.ckpt"
    torch.save({"gspo_lightning": {}, "x": Payload()}, path)
    monkeypatch.setattr(os, "getcwd", lambda: pytest.fail("the payload ran"))
    with pytest.raises(UserError, match="holds pickled Python objects"):
        find_checkpoint(str(path), tmp_path)


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_the_folder_of_a_run_is_not_called_damaged(name, run_dir):
    with pytest.raises(UserError) as error:
        find_checkpoint(str(run_dir / name), run_dir)
    last = run_dir / "checkpoints" / "last.ckpt"
    assert str(error.value) == f"ckpt_path={run_dir / name}: is a folder, not a checkpoint; name {last}"


def test_a_sharded_checkpoint_without_its_index_is_damaged(run_dir):
    (run_dir / "last.ckpt").mkdir()
    with pytest.raises(UserError, match="last.ckpt: damaged, and there is no good checkpoint next to it"):
        find_checkpoint(str(run_dir / "last.ckpt"), run_dir)


def test_the_records_lie_two_folders_above_a_checkpoint_wherever_it_is_named_from(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(run_dir / "checkpoints")
    for name in ("last.ckpt", "../checkpoints/last.ckpt", str(run_dir / "checkpoints" / "last.ckpt")):
        assert run_folder(Path(name)) == run_dir
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "checkpoints").symlink_to(run_dir / "checkpoints")  # on a larger disk
    assert run_folder(linked / "checkpoints" / "last.ckpt") == linked


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

    def on_train_epoch_end(self, trainer, *_):
        self.limit = trainer.limit_val_batches


def test_a_limit_of_time_is_that_of_one_process(micro_model_dir, tmp_path, monkeypatch):
    """Jobs of a Slurm chain with the same limit each go on; the second would end before its first rollout otherwise."""
    clock, done, ckpt_path = SixSeconds(monkeypatch), [], None
    limited = {"_target_": "lightning.Trainer", "accelerator": "cpu", "max_time": "00:00:00:10"}
    for _ in range(3):
        module = build_module(micro_model_dir, Settings(rollouts=9))
        plain = {"trainer": limited, "validation": {"every_n_rollouts": None}, "logger": None}
        checkpoint = RolloutCheckpoint(tmp_path, every_n_rollouts=100)
        trainer = build_trainer(plain, [clock, checkpoint])
        batches = Batches(scripted_prompts(), batches=9).loader()
        trainer.fit(module, batches, ckpt_path=ckpt_path, weights_only=True)
        done.append(module.rollouts_done)
        assert clock.limit == 0  # saved at once, not behind a validation that nobody has asked for
        ckpt_path = checkpoint.last
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
    run.trainer, run.plain = SimpleNamespace(fit=fit, is_global_zero=True, loggers=[]), {"logger": None}
    run.run_dir, run.lock, run.checkpoint = run_dir, None, SimpleNamespace(last=last, saved_at=saved_at)
    run.stop = GracefulStop(run.checkpoint, grace_s=60)
    with pytest.raises(EngineUnavailableError) as error:
        run.execute()
    assert str(error.value) == f"nobody is left; {saved}, resume with ckpt_path={last}"


def test_a_command_goes_on_by_auto_or_by_naming_what_the_run_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    last = tmp_path / "run" / "last.ckpt"
    names = ("auto", "run/last.ckpt", str(last), "run/rollout-000010.ckpt", "other/last.ckpt", None)
    assert [goes_on(name, last) for name in names] == [True, True, True, False, False, False]


RULES = {"betas": (0.5, 0.75), "eps": 1e-8, "fused": True}


def fitted(folder, rollouts, ckpt_path=None, **optimizer):
    """The module and the trainer of a run with two optimizer steps per rollout."""
    settings = Settings(
        optimizer=functools.partial(torch.optim.AdamW, **RULES, **optimizer),
        rollouts=rollouts,
        update={"num_minibatches": 2},
    )
    module, runs = build_module(folder, settings), trainer()
    runs.fit(module, Batches(scripted_prompts(), rollouts).loader(), ckpt_path=ckpt_path, weights_only=True)
    return module, runs


def settings_of(runs):
    """Rate, decay and the rest of both groups: matrices, and vectors that do not decay."""
    groups = runs.optimizers[0].param_groups
    return [{name: group[name] for name in ("lr", "initial_lr", "weight_decay", *RULES)} for group in groups]


def test_settings_of_the_optimizer_hold_from_where_a_run_goes_on(micro_model_dir, tmp_path):
    _, first = fitted(micro_model_dir, 2, lr=0.25, weight_decay=0.125)
    first.save_checkpoint(tmp_path / "2.ckpt")
    module, second = fitted(micro_model_dir, 3, tmp_path / "2.ckpt", lr=0.0, weight_decay=0.5)
    expected = {"lr": 0.0, "initial_lr": 0.0, **RULES}
    assert settings_of(second) == [{**expected, "weight_decay": 0.5}, {**expected, "weight_decay": 0.0}]
    assert module.last_metrics["lr"] == 0.0
    saved = torch.load(tmp_path / "2.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())
    assert {int(state["step"]) for state in second.optimizers[0].state.values()} == {6}  # the moments went on


def test_a_group_that_was_added_later_keeps_the_settings_that_it_was_saved_with():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters[:1], lr=0.5)
    keep_settings(optimizer, functools.partial(torch.optim.SGD, lr=0.5))
    optimizer.add_param_group({"params": parameters[1:], "lr": 0.01})
    saved = optimizer.state_dict()
    for group, rate in zip(saved["param_groups"], (0.25, 0.03125), strict=True):
        group["lr"] = rate
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.03125]


@pytest.mark.parametrize("flag", ["amsgrad", "maximize"])
def test_a_flag_that_the_state_was_not_saved_with_is_refused(flag):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    saved = torch.optim.AdamW(parameters, lr=0.5).state_dict()
    for value in (False, True):
        optimizer = torch.optim.AdamW(parameters, lr=0.5, **{flag: value})
        keep_settings(optimizer, functools.partial(torch.optim.AdamW, lr=0.5, **{flag: value}))
        line = f"^optimizer.{flag}=True: the checkpoint was saved with False, which decides how its states go on; keep"
        with pytest.raises(UserError, match=line) if value else contextlib.nullcontext():
            optimizer.load_state_dict(saved)


def test_another_rate_stands_where_the_schedule_does():
    """Linear from 0.25 over 8 steps, 4 of them done: 0.125. With 0.5 from there on: 0.25, and 0 at the end."""
    linear = Schedule("linear")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    keep_settings(optimizer, functools.partial(torch.optim.SGD, lr=0.5))
    schedule = linear.build(optimizer, 8)
    group = {**optimizer.state_dict()["param_groups"][0], "lr": 0.125, "initial_lr": 0.25}
    optimizer.load_state_dict({"state": {}, "param_groups": [group]})
    schedule.load_state_dict({**schedule.state_dict(), "base_lrs": [0.25], "last_epoch": 4})
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 * 3 / 8


def test_settings_hold_where_the_states_are_split_over_ranks():
    """trainer=fsdp loads the optimizer by torch.distributed.checkpoint."""
    model = torch.nn.Linear(2, 1)
    first = torch.optim.AdamW(model.parameters(), lr=0.25, weight_decay=0.125)
    model(torch.ones(2)).sum().backward()
    first.step()
    second = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.0)
    keep_settings(second, functools.partial(torch.optim.AdamW, lr=0.5, weight_decay=0.0))
    set_optimizer_state_dict(model, second, get_optimizer_state_dict(model, first))
    (group,) = second.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)
    assert all(int(state["step"]) == 1 for state in second.state.values())


class Paged(PagedAdamW8bit):
    """On a CPU nothing is paged; here what would be on a GPU says so."""

    def get_state_buffer(self, p, dtype=torch.float32):
        buffer = super().get_state_buffer(p, dtype)
        buffer.is_paged = self.is_paged and p.numel() >= 1e5
        return buffer

    def prefetch_state(self, p):
        pass


def stepped(kind, lr=0.25):
    """An optimizer after a step on three parameters: states are paged from 100,000 numbers."""
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((320, 320), (99_999,), (100_000,))]
    optimizer = kind(parameters, lr=lr, weight_decay=0.125)
    for p in parameters:
        p.grad = torch.linspace(-1.0, 1.0, p.numel()).view(p.shape)
    optimizer.step()
    return optimizer


def paged(optimizer):
    return [
        tuple(getattr(state[name], "is_paged", False) for name in ("state1", "state2", "absmax1"))
        for state in optimizer.state.values()
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_paged", [True, False])
def test_states_that_were_paged_are_paged_again_once_they_are_loaded(is_paged, micro_model_dir):
    first, second = stepped(Paged), stepped(Paged)
    before = [(is_paged,) * 2 + (False,), (False,) * 3, (is_paged,) * 2 + (False,)]
    second.load_state_dict(first.state_dict())
    for state in second.state.values():  # as Lightning moves them to a device
        state.update({name: value.clone() for name, value in state.items() if name != "step"})
    assert paged(second) == [(False,) * 3] * 3
    second.is_paged = is_paged
    alone = [state["state1"] for state in second.state.values()][1]
    module = build_module(micro_model_dir, Settings())
    module._trainer = SimpleNamespace(
        optimizers=[second], lr_scheduler_configs=[], should_stop=False, callbacks=[], num_training_batches=1,
        check_val_every_n_epoch=None, enable_validation=False,
    )  # fmt: skip
    module.on_train_start()
    assert paged(second) == before
    for ours, theirs in zip(second.state.values(), first.state.values(), strict=True):
        assert ours.keys() == theirs.keys() and ours["state1"].dtype == torch.uint8
        assert all(torch.equal(ours[name], value) for name, value in theirs.items() if name != "step")
    assert [state["state1"] for state in second.state.values()][1] is alone


@pytest.mark.filterwarnings("ignore")
def test_settings_hold_where_an_optimizer_loads_in_its_own_way():
    """bitsandbytes calls none of torch's hooks."""
    first, second = stepped(PagedAdamW8bit), stepped(PagedAdamW8bit, lr=0.5)
    second.param_groups[0]["weight_decay"] = 0.0
    keep_settings(second, functools.partial(PagedAdamW8bit, lr=0.5, weight_decay=0.0))
    second.load_state_dict(first.state_dict())
    (group,) = second.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)
    assert all(state["step"] == 1 for state in second.state.values())


@pytest.mark.filterwarnings("ignore")
def test_a_finished_run_that_is_started_again_keeps_its_time_and_speed(tmp_path):
    in_process(tmp_path, "logger=none", "export.enabled=false", "max_rollouts=1")
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["RunRecorder"]
    in_process(tmp_path, "logger=none", "export.enabled=false", "max_rollouts=1", "ckpt_path=auto")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["wall_s"] > state["seconds"] > 0
    tokens = summary["train_tokens"] + summary["rollout_tokens"]
    assert summary["tokens_per_s"] == pytest.approx(tokens / summary["wall_s"])


def test_checkpoints_that_were_set_aside_are_not_taken_for_those_of_the_folder(run_dir):
    (run_dir / "checkpoints").rename(run_dir / "checkpoints.old")
    with pytest.raises(
        UserError, match=r"the records of that run lie next to it as \*\.old; move them and checkpoints"
    ):
        find_checkpoint(str(run_dir / "checkpoints.old" / "last.ckpt"), run_dir)


def test_auto_says_how_to_resume_what_a_run_that_saved_nothing_has_set_aside(run_dir, capsys):
    old = (run_dir / "checkpoints").rename(run_dir / "checkpoints.old")
    assert find_checkpoint("auto", run_dir) is None
    assert capsys.readouterr().out == (
        f"ckpt_path=auto: no checkpoint in {run_dir / 'checkpoints'}; starting a new run. {old} is of an earlier run; "
        "to resume that one, move it and the records *.old to a new folder, without .old, and give that as "
        "hydra.run.dir\n"
    )


def test_a_run_does_not_export_over_the_model_that_it_starts_from(micro_model_dir, tmp_path):
    shutil.copytree(micro_model_dir, tmp_path / "model")
    with pytest.raises(UserError, match="this run would overwrite the model it starts from; choose another hydra.run"):
        in_process(tmp_path, f"model.path={tmp_path}/model", "logger=none")
    assert (tmp_path / "model" / "model.safetensors").exists()


class Validated(Callback):
    """After which rollouts validations ran."""

    def __init__(self):
        self.after = []

    def on_validation_start(self, trainer, pl_module):
        self.after.append(pl_module.rollouts_done)


def test_a_run_that_was_resumed_without_a_rollout_left_validates_after_the_same_rollouts(micro_model_dir, tmp_path):
    """The batch that it reads before it ends is no rollout."""
    validated, ckpt_path = Validated(), None
    for rollouts in (2, 2, 7):
        module = build_module(micro_model_dir, Settings(rollouts=rollouts))
        module.validator.update = lambda *_: None
        batches = Batches(scripted_prompts(), batches=9).loader()
        runner = trainer(limit_val_batches=1, val_check_interval=3, check_val_every_n_epoch=None, callbacks=[validated])
        runner.fit(module, batches, batches, ckpt_path=ckpt_path, weights_only=True)
        ckpt_path = tmp_path / f"{rollouts}.ckpt"
        runner.save_checkpoint(ckpt_path)
    assert validated.after == [2, 3, 6, 7]


class Told(Callback):
    """What reward functions are told of the run in validations: rollouts done, and of how many."""

    def __init__(self):
        self.states = []

    def on_validation_batch_start(self, trainer, pl_module, *_):
        state = pl_module.rewards.trainer_state
        self.states.append((state.global_step, state.max_steps))


def test_rewards_are_told_the_same_in_the_last_validation_of_a_run_that_was_resumed_after_its_last_rollout(
    micro_model_dir, tmp_path
):
    """A kill may come between the last checkpoint and the validation after it."""
    told = [Told(), Told()]
    for ckpt_path, callback in zip((None, tmp_path / "2.ckpt"), told, strict=True):
        module = build_module(micro_model_dir, Settings(rollouts=2))
        module.validator.update = lambda *_: None
        batches = Batches(scripted_prompts(), batches=9).loader()
        runner = trainer(limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[callback])
        if ckpt_path is None:
            runner.validate(module, batches, verbose=False)
        runner.fit(module, batches, batches, ckpt_path=ckpt_path, weights_only=True)
        if ckpt_path is not None:
            runner.validate(module, batches, verbose=False)
        runner.save_checkpoint(tmp_path / "2.ckpt")
    assert [callback.states for callback in told] == [[(0, 2), (2, 2)], [(2, 2)]]
