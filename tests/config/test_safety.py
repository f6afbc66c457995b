"""A config cannot call what is not on the list; a page runs nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_lightning.config import targets
from gspo_lightning.config.targets import check_targets
from gspo_lightning.errors import UserError
from gspo_lightning.report import render_report
from tests.report.test_report import write_run

FOREIGN = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "shutil.rmtree",
    "torch.hub.load",
    "torch.load",
    "numpy.load",
    "runpy.run_path",
]
DETOURS = {
    "gspo_lightning.rewards.sandbox._popen": "gspo_lightning.rewards.sandbox._popen",
    "gspo_lightning.rewards.sandbox.os.system": "os",
    "gspo_lightning.program.resume.torch.load": "torch",
    "gspo_lightning.config.build.instantiate": "hydra",
    "gspo_lightning.callbacks.files.shutil.rmtree": "shutil",
    "gspo_lightning.config.build.build": "gspo_lightning.config.build.build",
    "gspo_lightning.cli.build_module": "gspo_lightning.cli.build_module",
    "gspo_lightning.callbacks.files.remove": "gspo_lightning.callbacks.files.remove",
    "gspo_lightning.rewards.sandbox_runner.answer": "gspo_lightning.rewards.sandbox_runner.answer",
    "gspo_lightning.program.redact._WORD.sub": "gspo_lightning.program.redact._WORD.sub",
    "gspo_lightning.module.GSPOModule.load_from_checkpoint": "lightning",
    "gspo_lightning.rewards.sandbox": "gspo_lightning.rewards.sandbox",
    "lightning.pytorch.callbacks.model_checkpoint.os.system": "os",
    "lightning.Trainer.fit": "lightning",
    "torch.optim.lr_scheduler.types.FunctionType": "types",
    "builtins.dict.fromkeys": "builtins.dict.fromkeys",
}
"""Names that begin as those on the list do -> what is missing on it."""


def is_allowed(target, more=()):
    """Whether a config may call what a dotted name leads to, where the user has allowed ``more``."""
    return targets._missing(target, more) is None


@pytest.mark.parametrize("target", FOREIGN)
def test_what_could_do_harm_is_not_on_the_list(target):
    with pytest.raises(UserError, match=rf"optimizer._target_={target} is not on the list .*GSPO_ALLOWED_TARGETS"):
        check_targets({"optimizer": {"_target_": target}})
    with pytest.raises(UserError, match=rf"reward.functions.f.path={target} is not on the list"):
        check_targets({"reward": {"functions": {"f": {"_target_": "hydra.utils.get_method", "path": target}}}})
    with pytest.raises(UserError, match=r"callbacks.0._target_"):
        check_targets({"callbacks": [{"_target_": target}]})


@pytest.mark.parametrize("target", DETOURS)
def test_a_name_on_the_list_does_not_lead_elsewhere(target):
    for node, where in (
        ({"_target_": target}, "_target_"),
        ({"_target_": "hydra.utils.get_object", "path": target}, "path"),
    ):
        with pytest.raises(UserError) as error:
            check_targets({"x": node})
        home = DETOURS[target].split(".")[0]
        defined = "" if home == target.split(".")[0] else f" (it is defined in {home})"
        assert str(error.value) == (
            f"x.{where}={target}{defined} is not on the list of what a config may call; if you trust it, set the "
            f"environment variable GSPO_ALLOWED_TARGETS={DETOURS[target]} (docs/safety.md)"
        )


def test_the_advice_keeps_what_is_allowed_already_and_comes_to_an_end(tmp_path, monkeypatch):
    (tmp_path / "package_a.py").write_text("from package_b import reward\n")
    (tmp_path / "package_b.py").write_text("def reward(): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    start = "is not on the list of what a config may call; if you trust it, set the environment variable "
    for allowed, said in [
        ("", f"f._target_=package_a.reward {start}GSPO_ALLOWED_TARGETS=package_a (docs/safety.md)"),
        ("other", f"f._target_=package_a.reward {start}GSPO_ALLOWED_TARGETS=other,package_a (docs/safety.md)"),
        (
            "other,package_a",
            f"f._target_=package_a.reward (it is defined in package_b) {start}"
            "GSPO_ALLOWED_TARGETS=other,package_a,package_b (docs/safety.md)",
        ),
    ]:
        monkeypatch.setattr(targets, "_BY_THE_USER", tuple(name for name in allowed.split(",") if name))
        with pytest.raises(UserError) as error:
            check_targets({"f": {"_target_": "package_a.reward"}})
        assert str(error.value) == said
    monkeypatch.setattr(targets, "_BY_THE_USER", ("other", "package_a", "package_b"))
    check_targets({"f": {"_target_": "package_a.reward"}})


@pytest.mark.parametrize("node", [{"_args_": ["os.system"]}, {"path": None}, {"path": "x.f", "_args_": ["os.system"]}])
def test_what_is_looked_up_is_named_where_it_is_checked(node):
    with pytest.raises(UserError) as error:
        check_targets({"x": {"_target_": "hydra.utils.get_method", **node}})
    assert str(error.value) == "x.path: hydra.utils.get_method looks up one name; give it as path, not in _args_"


def test_what_libraries_and_users_export_from_elsewhere_stays_allowed(tmp_path, monkeypatch):
    for target in ("torch.optim.Muon", "lightning.pytorch.loggers.CSVLogger", "gspo_lightning.RewardSet",
                   "bitsandbytes.optim.AdamW8bit", "datetime.timedelta", "lightning.Trainer"):  # fmt: skip
        assert is_allowed(target), target
    assert is_allowed("peft.LoraConfig", more=("peft",)) and is_allowed("peft.LoraConfig", more=("peft.LoraConfig",))
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("from ._parts import *\nfrom ._parts import _private\n")
    (tmp_path / "own_package" / "_parts.py").write_text(
        "import functools, os\nfrom subprocess import run\ndef f(scale=1): ...\ndef _private(): ...\n"
        "half = functools.partial(f, scale=0.5)\nclass Reward:\n    def __call__(self): ...\nreward = Reward()\n"
        "number = 3\nshell = functools.partial(run, shell=True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(targets, "_START", str(tmp_path))
    for name in ("f", "_private", "half", "Reward", "reward", "number", "missing", "_parts.f"):
        assert is_allowed(f"own_package.{name}"), name
    for name in ("run", "shell", "os.system", "number.to_bytes", "f.__call__"):
        assert not is_allowed(f"own_package.{name}"), name
    assert is_allowed("own_package.run", more=("subprocess",))


def test_pythons_own_modules_are_never_the_users(monkeypatch):
    monkeypatch.setattr(targets, "_START", str(Path(shutil.__file__).parents[2]))  # as a Python below a home folder
    assert not is_allowed("subprocess.run")


def test_a_refused_target_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "harmful_on_import.py").write_text("raise SystemExit('it was imported')")
    (tmp_path / "work").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UserError, match="GSPO_ALLOWED_TARGETS=harmful_on_import"):
        check_targets({"x": {"_target_": "harmful_on_import.f"}})
    assert "harmful_on_import" not in sys.modules
    assert is_allowed("harmful_on_import.f", more=("harmful_on_import",))


def test_modules_below_the_working_directory_or_on_pythonpath_are_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "somebody_elses.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not is_allowed("my_own_rewards.f")
    monkeypatch.setattr(targets, "_START", str(tmp_path))
    assert is_allowed("my_own_rewards.f") and not is_allowed("somebody_elses.f")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert is_allowed("my_own_rewards.f")
    monkeypatch.setattr(targets, "_START", str(tmp_path / "elsewhere"))
    assert not is_allowed("my_own_rewards.f")
    monkeypatch.setattr(targets, "_PYTHONPATH", (str(tmp_path),))
    assert is_allowed("my_own_rewards.f") and not is_allowed("somebody_elses.f")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</pre><script>document.title = 'the model ran code'</script><img src=x onerror=\"document.title='the model ran code'\">"


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser (apt-get install chromium)")
def test_a_completion_with_a_script_stays_text_in_a_real_browser(tmp_path):
    page = render_report(write_run(tmp_path, EVIL))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=2000", "--dump-dom", f"file://{page}",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "the model ran code" in dom, "the completion is not on the page"
    assert "<title>the model ran code" not in dom and "<script>document" not in dom
