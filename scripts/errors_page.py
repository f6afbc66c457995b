"""Writes docs/errors.md: every mistake of tests/bad_input/cases.py with the line it gets, as seen now.

python scripts/errors_page.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import warnings
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

from hydra.core.global_hydra import GlobalHydra  # noqa: E402

from gspo_lightning import cli  # noqa: E402
from tests.bad_input.cases import CASES, Case  # noqa: E402

HEAD = """# What goes wrong, and what is said

Every mistake below ends `python train.py` with exit code 2 and this one line, before anything is half-written.
`debug=traceback` shows the traceback too. The table is written by `python scripts/errors_page.py`, which makes each
mistake; `pytest tests/program/test_bad_input.py` makes them too and fails where a line differs.
"""


def shown(line: str, folder: Path) -> str:
    """A line as the page has it: without the folder it was seen in, and without what Markdown would read."""
    return line.replace(str(folder), "DIR").replace("|", "\\|").replace("`", "'")


def line_of(case: Case) -> str:
    """Makes the mistake and returns the line."""
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        sys.argv = ["train.py", *case.arguments(folder)]
        sys.path.insert(0, name)
        sys.modules.pop("my_rewards", None)
        screen = io.StringIO()
        quiet = contextlib.redirect_stdout(io.StringIO())
        with contextlib.redirect_stderr(screen), quiet, contextlib.suppress(SystemExit):
            cli.train_main()
        GlobalHydra.instance().clear()
        sys.path.remove(name)
        assert screen.getvalue(), f"{case.name}: nothing was refused"
        return shown(screen.getvalue().splitlines()[-1], folder)


def main() -> None:
    warnings.simplefilter("ignore")
    parts = [HEAD]
    for area, cases in groupby(CASES, key=lambda case: case.area):
        parts.append(f"## {area.capitalize()}\n\n| mistake | line |\n|---|---|\n")
        parts += [f"| {case.what} | `{line_of(case)}` |\n" for case in cases]
        parts.append("\n")
    (ROOT / "docs" / "errors.md").write_text("".join(parts).rstrip() + "\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
