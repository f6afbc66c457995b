"""Compare runs: `python scripts/compare.py multirun/<day>/<time>` prints a table and writes comparison.html there."""

import sys

from gspo_lightning.report.compare import main

if __name__ == "__main__":
    sys.exit(main())
