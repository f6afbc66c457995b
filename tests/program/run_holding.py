"""Holds the lock of a folder for a minute; prints the process id of a child: run_holding.py <folder>."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from gspo_lightning.program.run_lock import RunLock

if __name__ == "__main__":
    lock = RunLock(Path(sys.argv[1]))
    if child := os.fork():
        print(child, flush=True)
    time.sleep(60)
