"""Errors of the disk, or of a folder that is gone, as one line that says how the run goes on."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from gspo_lightning.errors import UserError
from gspo_lightning.how_to_resume import WHERE_IT_IS, can_resume

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.ESTALE})
"""Errors of the run's own files only: a reward function may meet them anywhere."""
_IN_THE_WAY = frozenset({errno.EEXIST, errno.ENOTDIR, errno.EISDIR})
"""A file where the run has a folder, or the other way round: of its own files only, too."""
_REMEDIES: dict[int | None, str] = {
    errno.EROFS: "make it writable",
    errno.EIO: "look after the disk",
    **dict.fromkeys(_IN_THE_WAY, "move away what is there"),
}


def disk_error(path: Path, error: BaseException) -> UserError | None:
    """The line for a disk that is full or not to be written to, or a folder that is gone; None for any other error.

    torch's writer raises a RuntimeError of its own that has lost the reason, so the disk is asked; that of safetensors
    has the number in its text.

    Args:
        path: the checkpoint that could not be written, or the folder of the run.
        error: what was raised.
    """
    folder = path.parent if path.suffix == ".ckpt" else path
    if (line := _gone(folder, error)) is not None:
        return line
    number, where = getattr(error, "errno", None), getattr(error, "filename", None) or path
    if isinstance(error, SafetensorError) and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    is_own = folder.absolute() in (Path(where).absolute(), *Path(where).absolute().parents)
    is_refused = is_own and number in _REFUSED | _IN_THE_WAY
    reason = os.strerror(number) if number is not None and (number in _DISK or is_refused) else None
    if reason is None and isinstance(error, RuntimeError):
        if "inline_container" in str(error):
            reason = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free"
        elif found := re.match(r"File (.+) cannot be opened", str(error)):
            reason, where, is_refused = "it cannot be opened", found[1], True
    if reason is None:
        return None
    saved = path if path.suffix == ".ckpt" else path / "checkpoints" / "last.ckpt"
    remedy = _REMEDIES.get(number, "make it writable" if is_refused else "free some space")
    stands = f"{remedy} and resume with ckpt_path={saved}" if can_resume(saved) else "nothing has been saved yet"
    return UserError(f"cannot write {where} ({reason}); {stands}")


def _gone(folder: Path, error: BaseException) -> UserError | None:
    """The line for a run whose folder, or the one with its checkpoints, is not where it was any more."""
    is_missing = getattr(error, "errno", None) in (errno.ENOENT, errno.ENOTDIR)
    by_torch = isinstance(error, RuntimeError) and re.match(r"Parent directory .+ does not exist", str(error))
    if folder.is_dir() or not (is_missing or by_torch):
        return None
    run = folder.parent if folder.name == "checkpoints" else folder
    gone = folder if run.is_dir() else run
    return UserError(f"{gone} is gone: it was moved or removed while the run wrote to it; {WHERE_IT_IS}")
