"""What a constructor raises is a line that says something, also if the exception says nothing."""

from __future__ import annotations

import sys

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from gspo_lightning.config import checks
from gspo_lightning.config.build import build, build_callbacks, build_module, build_trainer
from gspo_lightning.config.types import check_calls
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.types import SamplingParams
from tests.conf.test_groups import resolved


def asserts(*args, **settings):
    raise AssertionError


def looks_up(*args, **settings):
    return settings["share"]


def refuses(*args, **settings):
    raise ValueError("share must be\nat least 1")


def named(function):
    return f"{__name__}.{function.__name__}"


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (asserts, f"{__name__}.asserts raised AssertionError"),
        (looks_up, f"{__name__}.looks_up raised KeyError: 'share'"),
        (refuses, "share must be at least 1"),
    ],
)
def test_what_a_constructor_raises_is_a_line_that_is_never_empty(function, line):
    with pytest.raises(UserError) as refused:
        build({"_target_": "builtins.dict", "inner": {"_target_": named(function)}})
    assert str(refused.value) == line


def test_so_it_is_for_the_optimizer_the_trainer_and_an_import(tmp_path, monkeypatch):
    plain = resolved("experiment=micro")
    plain["optimizer"] = {"_target_": named(asserts), "_partial_": True}
    with pytest.raises(UserError) as refused:
        checks.check(plain)
    assert str(refused.value) == f"optimizer: {named(asserts)} rejects its settings (AssertionError)"
    plain = resolved("experiment=micro")
    plain["trainer"]["_target_"] = named(asserts)
    with pytest.raises(UserError) as refused:
        build_trainer(plain, [])
    assert str(refused.value) == "trainer: AssertionError"
    (tmp_path / "asserts_when_imported.py").write_text("raise AssertionError\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as refused:
        check_calls({"_target_": "asserts_when_imported.Thing"}, "callbacks.mine")
    assert str(refused.value) == ("callbacks.mine._target_: cannot import asserts_when_imported.Thing (AssertionError)")
    sys.modules.pop("asserts_when_imported", None)


def test_tasks_that_slurm_was_asked_for_in_another_way_are_one_line(monkeypatch):
    for name, value in (("SLURM_JOB_NAME", "train"), ("SLURM_NTASKS", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    with pytest.raises(UserError, match=r"^Slurm: You set `--ntasks=2` .* Use `--ntasks-per-node=2` instead\.$"):
        build_trainer(resolved("experiment=micro"), [])


def test_the_folder_of_a_logger_is_made_also_in_the_home_folder_before_anything_is_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    plain = resolved("experiment=micro", "logger=tensorboard", "logger.tensorboard.save_dir='~/curves'")
    (logger,) = build_trainer(plain, []).loggers
    assert logger.save_dir == str(tmp_path / "curves") and (tmp_path / "curves").is_dir()
    assert not list((tmp_path / "curves").iterdir()) and not (tmp_path / "~").exists()
    (tmp_path / "taken").touch()
    plain["logger"]["tensorboard"]["save_dir"] = "taken/curves"
    line = r"^logger\.tensorboard\.save_dir=taken/curves: cannot write there \(Not a directory\); choose another fol"
    with pytest.raises(UserError, match=line):
        build_trainer(plain, [])


class NoCallback:
    """What forgot to be a callback."""


@pytest.mark.parametrize(("section", "kind"), [("callbacks", "callback"), ("logger", "logger")])
def test_what_is_no_callback_and_no_logger_is_refused_by_its_key(section, kind):
    plain = resolved("experiment=micro")
    plain[section] = {"mine": {"_target_": f"{__name__}.NoCallback"}}
    with pytest.raises(UserError, match=f"^{section}.mine creates a NoCallback, which is no {kind} of Lightning; let"):
        build_trainer(plain, build_callbacks(plain))


def test_the_resolved_config_of_a_run_does_not_send_another_run_into_its_folder(tmp_path):
    """TensorBoard's events of both would be one curve."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.yaml").touch()
    plain = resolved("experiment=micro", "logger=tensorboard", f"logger.tensorboard.save_dir={first}")
    build_trainer(plain, [], second)  # no run has recorded anything in that one
    (first / "metrics.csv").touch()
    build_trainer(plain, [], tmp_path / "second" / ".." / "first")
    with pytest.raises(UserError, match="first is the folder of another run, .*save_dir=.{hydra:runtime.output_dir}'$"):
        build_trainer(plain, [], second)


def test_an_optimizer_that_is_made_before_there_are_parameters_is_told_so():
    plain = resolved("experiment=micro")
    plain["optimizer"] = {"_target_": "torch.optim.SGD", "lr": 0.1}
    with pytest.raises(UserError, match="'params'.; the parameters are given later: add optimizer._partial_=true$"):
        checks.check(plain)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "_partial_": True, "T_max": 10},
        {"_target_": "hydra.utils.get_method", "path": f"{__name__}.refuses"},
    ],
)
def test_a_scheduler_of_torch_in_the_place_of_a_schedule_is_refused_with_the_module(node):
    plain = resolved("experiment=micro")
    plain["scheduler"] = node
    with pytest.raises(UserError, match="^scheduler: it is no Schedule, whose build"):
        build_module(plain)


def test_hydra_itself_makes_the_objects_of_our_groups_for_a_project_of_ones_own():
    with initialize_config_module("gspo_lightning.conf", version_base="1.3"):
        cfg = compose("train", ["experiment=micro", "rollout.stop=[x]", "reward=[letters,soft_overlong]"])
    rewards, objective, update = (instantiate(cfg[name]) for name in ("reward", "objective", "update"))
    sampling = SamplingParams(**{name: value for name, value in cfg["rollout"].items() if name != "engine"})
    assert rewards.names == ("letter_share", "soft_overlong") and update.num_minibatches == 2
    assert objective.max_completion_length == sampling.max_completion_length == 12
    module = GSPOModule(
        instantiate(cfg["model"]),
        rewards,
        objective=objective,
        sampling=sampling,
        optimizer=instantiate(cfg["optimizer"]),
        schedule=instantiate(cfg["scheduler"]),
        max_rollouts=1,
    )
    assert module.sampling.stop == ("x",)
