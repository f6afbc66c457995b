"""Who may import what (docs/design.md): the mathematics knows no framework, and Hydra stays at the door."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "gspo_lightning"
ALLOWED = {
    "lightning": [
        "module.py", "cli.py", "callbacks/*", "distributed/*", "program/*", "config/build.py", "data/datamodule.py",
        "policy/check.py", "policy/load.py", "training/rollout_update.py",
    ],
    "transformers": ["policy/*", "rollout/*", "dialogue/*", "data/*", "rewards/*", "cli.py"],
    "hydra": ["cli.py", "config/*", "program/*", "migrate/*", "report/*", "data/preview.py"],
}  # fmt: skip


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    packages = {name.split(".")[0] for name in plain}
    packages |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    return {"hydra" if name == "omegaconf" else name for name in packages}


def test_frameworks_are_imported_where_the_table_allows_it_and_nowhere_else():
    files = {path.relative_to(SOURCE).as_posix(): imported(path) for path in SOURCE.rglob("*.py")}
    for library, allowed in ALLOWED.items():
        users = {file for file, names in files.items() if library in names}
        assert {file for file in users if not any(fnmatch(file, pattern) for pattern in allowed)} == set()
        assert all(any(fnmatch(file, pattern) for file in users) for pattern in allowed), "a rule that nobody uses"


def test_what_ranks_have_in_common_does_not_know_what_they_do():
    above = "module|cli|training|program|callbacks|config|report"
    files = (SOURCE / "distributed").glob("*.py")
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert "from gspo_lightning.types import Metrics" in lines
    assert [line for line in lines if re.match(rf"\s*(from|import) gspo_lightning\.({above})\b", line)] == []


def test_the_mathematics_brings_no_framework_along():
    code = (
        "import sys, gspo_lightning.objective, gspo_lightning.packing, gspo_lightning.advantages; "
        "print(*sorted({'torch', 'lightning', 'transformers', 'hydra', 'omegaconf'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "torch\n"


def test_what_lightning_keeps_private_is_used_in_one_file():
    def private(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        return {
            name for name in named | {n.value for n in nodes if isinstance(n, ast.Constant)} if str(name)[:1] == "_"
        }

    home = SOURCE / "lightning_private.py"
    names = private(home)
    assert names == {
        "_trainer", "_current_fx_name", "_start_method", "_results", "_terminate_all",
        "_check_on_train_epoch_end", "_should_save_on_train_epoch_end", "_train_time_interval",
        "_compiler_ctx", "_average_model", "_latest_update_step", "_latest_update_epoch", "_swap_models",
    }  # fmt: skip
    assert {path.name: private(path) & names for path in SOURCE.rglob("*.py") if private(path) & names} == {
        home.name: names
    }
