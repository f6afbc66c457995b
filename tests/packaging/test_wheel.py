"""What a user who installs the package gets."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from a copy of the tree, so that no build folder is left in it or taken from it."""
    tree = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    out = tree / "out"
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    result = subprocess.run([*command, "-w", str(out), str(tree)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (file,) = out.glob("gspo_lightning-*.whl")
    return zipfile.ZipFile(file)


def test_the_wheel_carries_every_config(wheel: zipfile.ZipFile) -> None:
    configs = {f"gspo_lightning/conf/{file.relative_to(ROOT / 'conf')}" for file in ROOT.glob("conf/**/*.yaml")}
    assert configs, "the tree has no configs"
    assert configs <= set(wheel.namelist())
    assert "gspo_lightning/conf/__init__.py" in wheel.namelist()


def test_the_wheel_carries_every_module_and_the_type_marker(wheel: zipfile.ZipFile) -> None:
    modules = {str(file.relative_to(ROOT / "src")) for file in ROOT.glob("src/gspo_lightning/**/*.py")}
    missing = modules - set(wheel.namelist())
    assert not missing, f"add their packages to [tool.setuptools] packages: {sorted(missing)}"
    assert "gspo_lightning/py.typed" in wheel.namelist()


def test_the_wheel_carries_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert folders == {"gspo_lightning", "gspo_lightning-0.1.0.dist-info"}


def test_the_wheel_states_licence_python_and_commands(wheel: zipfile.ZipFile) -> None:
    info = "gspo_lightning-0.1.0.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.11" in metadata
    systems = [line for line in metadata.splitlines() if "Operating System" in line]
    assert systems == ["Classifier: Operating System :: POSIX :: Linux", "Classifier: Operating System :: MacOS"]
    assert b"Apache License" in wheel.read(f"{info}/licenses/LICENSE")
    commands = configparser.ConfigParser()
    commands.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(commands["console_scripts"]) == {
        "gspo-train": "gspo_lightning.program.commands:train",
        "gspo-eval": "gspo_lightning.program.commands:evaluate",
    }
