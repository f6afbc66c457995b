"""`train.py` that counts what it does to names in a folder, and can be killed before one of them.

counting.py <folder> <number of the one to be killed before, 0 for none> <file for the count> <arguments of train.py>
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])  # where train.py is

from gspo_lightning import cli

WRITES = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")


def count_writes(folder: str, kill_at: int, counted: str) -> None:
    """From now on the count is kept in a file; SIGKILL comes before the write of that number."""
    count, process = 0, os.getpid()

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not (opens or event in WRITES) or folder not in str(arguments[0]) or os.getpid() != process:
            return
        count += 1
        if count == kill_at:
            os.kill(process, signal.SIGKILL)
        os.pwrite(file, f"{count:9d}".encode(), 0)

    file = os.open(counted, os.O_WRONLY | os.O_CREAT)
    sys.addaudithook(before)


if __name__ == "__main__":
    _, folder, kill_at, counted, *arguments = sys.argv
    count_writes(folder, int(kill_at), counted)
    sys.argv = ["train.py", *arguments]
    cli.train_main()
