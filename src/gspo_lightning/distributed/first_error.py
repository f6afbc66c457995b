"""With several ranks, makes the error of the first rank that fails the last line on the screen."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from gspo_lightning.errors import is_out_of_memory
from gspo_lightning.how_to_resume import resume_line

NAME = ".first_error.json"
_LOST = ("closed by peer", "reset by peer", "gloo/transport", "Socket Timeout", "NCCL", "TCPStore")
_PREFIX = "gspo_lightning_"
KEPT_S = 3600.0
"""Seconds for which a note is kept after its run folder is gone."""
WAIT_S = 10.0
"""Seconds to wait for the note of a failed rank."""
DIED = (
    "another rank died without an error message (killed, out of memory, or on a GPU after waiting for the others "
    "longer than trainer.strategy.timeout?)"
)
# Noted early: when an error arrives, Lightning has already taken its environment variables back.
_rank: int | None = None
_last: Path | None = None


def join(folder: Path, rank: int, ranks: int, last: Path | None = None) -> None:
    """Registers this process as rank ``rank`` of ``ranks``; rank 0 removes the note of an earlier run.

    Args:
        folder: of the run.
        rank: of this process.
        ranks: number of ranks.
        last: where the run saves its newest checkpoint; None if it saves nothing.
    """
    global _rank, _last
    _rank, _last = rank if ranks > 1 else None, last
    if rank == 0:
        forget(folder)
        _forget_old()


def several_ranks() -> bool:
    """Whether this process is one of several that work together."""
    return _rank is not None


def is_first_rank() -> bool:
    """Whether this process is the only one, or rank 0."""
    return not _rank


def lost_a_rank(error: BaseException) -> bool:
    """Whether the error is only the loss of another rank, and not memory that a sum over ranks could not get."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


def forget(folder: Path) -> None:
    """Removes the note."""
    for path in _places(folder):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def record(folder: Path, line: str, code: int) -> bool:
    """Notes the error of this rank, unless another rank was first.

    Returns:
        Whether it is news: False if another rank has noted, and printed, the same line. Each rank has its own dataset
        rows, so lines that differ only in the row count as the same.
    """
    content = {"rank": _rank or 0, "line": line, "code": code, "time": time.time()}
    for path in _places(folder):
        try:
            _write(path, json.dumps(content))
        except FileExistsError:
            noted = _noted(folder, 1.0)
            return noted is None or _without_row(noted["line"]) != _without_row(line)
        except OSError:
            continue  # a full disk, or the folder is gone
        return True
    return True  # nowhere to note it: the screen has it


def read(folder: Path) -> dict[str, Any] | None:
    """The note, or None if there is none."""
    for path in _places(folder):
        with contextlib.suppress(OSError, ValueError):
            note: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return note
    return None


def is_own(note: dict[str, Any]) -> bool:
    """Whether this rank wrote the note."""
    return bool(note["rank"] == (_rank or 0))


def first(folder: Path, wait_s: float = WAIT_S) -> tuple[str, int]:
    """The line and the exit code of the first error; `DIED` and 1 if none is noted within ``wait_s``."""
    return told(_noted(folder, wait_s))


def told(note: dict[str, Any] | None) -> tuple[str, int]:
    """The line and the exit code of a note; without a note, those of a rank that has died."""
    if note is not None:
        return f"rank {note['rank']}: {note['line']}", int(note["code"])
    return (DIED if _last is None else f"{DIED}; {resume_line(_last)}"), 1


def leave(folder: Path) -> None:
    """Moves the note out of a folder that will be removed: other ranks may still read it."""
    inside, outside = _places(folder)
    if inside.exists():
        with contextlib.suppress(OSError):
            shutil.move(inside, outside)


def leave_nothing(folder: Path) -> None:
    """Removes the folder that Hydra made, if the run was refused or ended before it did anything."""
    left = {path.name for path in folder.rglob("*")}
    if is_first_rank() and left <= {"config.yaml", ".hydra", NAME}:
        leave(folder)
        with contextlib.suppress(OSError):
            (folder / "config.yaml").unlink(missing_ok=True)
            folder.rmdir()


def _without_row(line: str) -> str:
    return line.partition(" (row ")[0]


def _forget_old() -> None:
    """Removes old notes among the temporary files: nobody reads them any more."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*{NAME}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()


def _places(folder: Path) -> tuple[Path, Path]:
    """Paths of the note: in the run folder, which all nodes see; if that is full or gone, among the temporary files."""
    name = hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]
    return folder / NAME, Path(tempfile.gettempdir()) / f"{_PREFIX}{name}{NAME}"


def _write(path: Path, content: str) -> None:
    """Creates a file with this content, or leaves none."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
    except OSError:  # a full disk may have room for a name without content
        path.unlink(missing_ok=True)
        raise


def _noted(folder: Path, wait_s: float) -> dict[str, Any] | None:
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        if (note := read(folder)) is not None:
            return note
        time.sleep(0.05)
    return None
