"""`python -m gspo_lightning.report RUN_DIR` draws report.html anew from the files of a run."""

import sys
from pathlib import Path

from gspo_lightning.report import render_report

if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.csv").exists():
        sys.exit("usage: python -m gspo_lightning.report RUN_DIR   (a folder with metrics.csv)")
    print(render_report(Path(sys.argv[1])))
