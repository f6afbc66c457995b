"""`python -m gspo_lightning.report RUN_DIR` draws report.html again from the files of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from gspo_lightning.errors import UserError
from gspo_lightning.program.redact import masked
from gspo_lightning.report import render_report
from gspo_lightning.screen import escape_what_no_screen_shows


def main(arguments: list[str]) -> int:
    """Prints the path of the report; returns 2, after one line on stderr, if it cannot be drawn."""
    if len(arguments) != 1 or not (Path(arguments[0]) / "metrics.csv").exists():
        print("usage: python -m gspo_lightning.report RUN_DIR   (a folder with metrics.csv)", file=sys.stderr)
        return 2
    escape_what_no_screen_shows()
    try:
        print(render_report(Path(arguments[0])))
    except UserError as error:
        print(f"error: {masked(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: cannot write there ({error.strerror})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
