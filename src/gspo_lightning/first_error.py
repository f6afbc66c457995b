"""Several ranks: one fails, the others lose it, and the last line on the screen is still the first error."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

NAME = ".first_error.json"
_LOST = ("closed by peer", "reset by peer", "gloo/transport", "Socket Timeout", "NCCL", "TCPStore")
WAIT_S = 10.0
"""A rank that fails may take so long to say why."""
DIED = "another rank died without a word (killed, or out of memory?); the last checkpoint stands"
_rank: int | None = None
# Noted early: when an error arrives, Lightning has already taken its environment variables back.


def join(folder: Path, rank: int, ranks: int) -> None:
    """This process is rank ``rank`` of a run of ``ranks``; an error of an earlier run in its folder is forgotten."""
    global _rank
    _rank = rank if ranks > 1 else None
    if rank == 0:
        forget(folder)


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return _rank is not None


def is_first_rank() -> bool:
    """Whether this process is the only one, or rank 0."""
    return not _rank


def lost_a_rank(error: BaseException) -> bool:
    """Whether the error is only that another rank has gone."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def forget(folder: Path) -> None:
    """Removes the note."""
    (folder / NAME).unlink(missing_ok=True)


def record(folder: Path, line: str, code: int) -> None:
    """Notes the error of this rank, unless another was first."""
    content = {"rank": _rank or 0, "line": line, "code": code}
    try:
        descriptor = os.open(folder / NAME, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except OSError:
        return  # another was first, or there is nowhere to note it: the screen has it
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)


def first(folder: Path, wait_s: float = WAIT_S) -> tuple[str, int]:
    """The line and the exit code of whatever failed first; `DIED` and 1 if nothing says so within ``wait_s``."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        try:
            found = json.loads((folder / NAME).read_text())
        except (OSError, ValueError):
            time.sleep(0.05)
        else:
            return f"rank {found['rank']}: {found['line']}", int(found["code"])
    return DIED, 1
