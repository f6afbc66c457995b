"""Everything the package imports is declared, pinned and consistent."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

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
