"""`module` of a config names `GSPOModule` or a subclass, whose own arguments are its keys, in every command."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from gspo_lightning import GSPOModule, cli
from gspo_lightning.config import checks, targets
from gspo_lightning.config.build import build_module
from gspo_lightning.config.own_module import SET_BY
from gspo_lightning.errors import UserError
from tests.conf.test_groups import given, resolved

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SHORT = [
    "experiment=micro", "logger=none", "print_config=false", "export.enabled=false", "max_rollouts=1",
    "data.prompts_per_rollout=4", "data.task.num_validation=2",
]  # fmt: skip


class Weighted(GSPOModule):
    """Notes with which weight it was made, and adds it to the loss."""

    made: list[float] = []

    def __init__(self, *args, weight: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = weight
        self.made.append(weight)

    def auxiliary_loss(self, minibatch):
        return self.weight * (1 + 0 * self.policy.output_weight.sum())


class Named(Weighted):
    """Adds an argument and gives that of its base."""

    def __init__(self, *args, label: str = "none", **kwargs):
        super().__init__(*args, weight=0.5, **kwargs)
        self.label = label


class Closed(GSPOModule):
    """Has no place for what the other sections set."""

    def __init__(self, policy_loader, rewards, share: float = 0.5):
        raise AssertionError("it must not be called")


class Raising(GSPOModule):
    """Fails over its own argument."""

    def __init__(self, *args, share: float = 2.0, **kwargs):
        raise ValueError(f"share={share}\nis too much")


def target(cls):
    return f"module._target_={cls.__module__}.{cls.__qualname__}"


WEIGHTED = [target(Weighted), "+module.weight=0.25"]


def command(main, *overrides, folder):
    main(given(*SHORT, *overrides, run_dir=folder))


@pytest.fixture(autouse=True)
def nothing_made(monkeypatch):
    monkeypatch.setattr(Weighted, "made", [])


def test_every_argument_of_the_module_has_a_key():
    assert list(SET_BY) == list(inspect.signature(GSPOModule).parameters)


def test_a_subclass_is_made_with_its_own_arguments_and_those_of_the_other_sections():
    plain = resolved(*SHORT, *WEIGHTED, "rollout.num_generations=5", "seed=7")
    checks.check(plain)
    module = build_module(plain)
    assert type(module) is Weighted and module.weight == 0.25
    assert (module.sampling.num_generations, module.seed) == (5, 7)
    named = build_module(resolved(*SHORT, target(Named), "+module.label=mine"))
    assert (type(named), named.label, named.weight) == (Named, "mine", 0.5)
    assert type(build_module(resolved(*SHORT))) is GSPOModule


def test_a_run_trains_it(tmp_path, capsys):
    command(cli._train, *WEIGHTED, folder=tmp_path)
    header, *rows = (line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines())
    assert float(rows[-1][header.index("loss/auxiliary")]) == 0.25
    assert (
        f"module:\n  _target_: {Weighted.__module__}.Weighted\n  weight: 0.25\n"
        in (tmp_path / "config.yaml").read_text()
    )


def test_an_evaluation_measures_with_it_and_a_dry_run_makes_it(tmp_path, capsys):
    command(cli._evaluate, *WEIGHTED, folder=tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text())["config"]["module"]["weight"] == 0.25
    assert Weighted.made == [0.25]
    command(cli._train, *WEIGHTED, "dry_run=true", folder=tmp_path)
    assert Weighted.made == [0.25, 0.25]


def test_a_sweep_goes_over_its_arguments(tmp_path, monkeypatch, capsys):
    sweep = ["+module.weight=0.5,2.0", "dry_run=true", f"hydra.sweep.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *SHORT, target(Weighted), *sweep])
    try:
        cli.train_main()
    finally:
        GlobalHydra.instance().clear()
    assert Weighted.made == [0.5, 2.0]


HERE = Weighted.__module__


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([target(Weighted)], "module.weight: is missing; give it a value"),
        ([target(Weighted), "+module.weight=much"], "module.weight='much' has the wrong type; expected a number"),
        ([target(Weighted), "+module.wieght=1"], f"module.wieght: {HERE}.Weighted has no such setting; it has weight"),
        ([target(Named), "+module.lable=a"], f"module.lable: {HERE}.Named has no such setting; it has label, weight"),
        (
            [*WEIGHTED, "+module.objective=null"],
            "module.objective: objective sets this argument of every module; change that instead",
        ),
        (
            [*WEIGHTED, "+module.sampling=null"],
            "module.sampling: rollout sets this argument of every module; change that instead",
        ),
        ([*WEIGHTED, "+module._args_=[1]"], f"module._args_: {HERE}.Weighted has no such setting; it has weight"),
        (
            [target(Closed)],
            f"module: {HERE}.Closed.__init__ got an unexpected keyword argument 'objective'; let it take **kwargs and "
            "give them to super().__init__",
        ),
        (
            [f"module._target_={HERE}.target"],
            f"module._target_={HERE}.target is no subclass of gspo_lightning.GSPOModule; name one",
        ),
        (["module._target_=no_file.Own"], "module._target_: cannot import no_file.Own (No module named 'no_file')"),
        (["module=mine"], "module='mine' must be a section with _target_"),
        (["~module"], "module: is missing; give it a value"),
    ],
)
def test_what_cannot_be_the_module_is_refused_before_anything_is_made(overrides, line):
    with pytest.raises(UserError) as refused:
        checks.check(resolved(*SHORT, *overrides))
    assert str(refused.value) == line and Weighted.made == []


def test_what_its_constructor_raises_is_one_line():
    plain = resolved(*SHORT, target(Raising))
    checks.check(plain)
    with pytest.raises(UserError) as refused:
        build_module(plain)
    assert str(refused.value) == f"module: {HERE}.Raising could not be made (ValueError: share=2.0 is too much)"


def test_a_subclass_of_an_installed_package_needs_its_name_in_the_environment_variable(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "their_modules"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import gspo_lightning\nclass Theirs(gspo_lightning.GSPOModule): ...\n")
    monkeypatch.syspath_prepend(str(package.parent))
    plain = resolved(*SHORT, "module._target_=their_modules.Theirs")
    with pytest.raises(
        UserError, match=r"^module._target_=their_modules.Theirs is not on the list of what a config may"
    ):
        checks.check(plain)
    monkeypatch.setattr(targets, "_BY_THE_USER", ("their_modules",))
    checks.check(plain)
    assert type(build_module(plain)).__name__ == "Theirs"


def test_the_example_of_the_documentation_keeps_its_start_when_a_run_goes_on(tmp_path, capsys):
    """The start is taken before a checkpoint is loaded: a resumed run is pulled to where the whole run began."""
    own = ["module._target_=examples.auxiliary_loss.AnchoredModule", "+module.anchor_weight=1000", "optimizer.lr=0.1"]
    own += ["export.enabled=true", "checkpoint.every_n_rollouts=1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command(cli._train, *own, "max_rollouts=2", folder=whole)
    command(cli._train, *own, folder=cut)
    command(cli._train, *own, "max_rollouts=2", f"ckpt_path={cut}/checkpoints/last.ckpt", folder=cut)
    weights = [Path(folder, "model", "model.safetensors").read_bytes() for folder in (whole, cut)]
    assert weights[0] == weights[1]
