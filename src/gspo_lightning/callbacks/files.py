"""Files that are whole at every moment, whatever kills the process."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

from gspo_lightning.errors import UserError
from gspo_lightning.how_to_resume import WHERE_IT_IS


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` in one step; nothing of it stays if it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()  # it would keep the disk full
        raise


def replace_file(path: Path, content: str) -> None:
    """Replaces ``path`` by ``content`` (UTF-8) in one step.

    A lone surrogate, which byte-level tokenizers can decode to, is written as a backslash escape.
    """
    with _replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace"))


def replace_end(path: Path, start: int, content: str) -> None:
    """Replaces what follows the first ``start`` bytes of ``path`` by ``content`` (UTF-8), in one step."""
    with _replacing(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
        shutil.copyfileobj(old, new)
        new.seek(start)
        new.truncate()
        new.write(content.encode("utf-8", "backslashreplace"))


def copy_prefix(source: Path, target: Path, size: int) -> int:
    """Makes ``target`` the whole lines in the first ``size`` bytes of ``source``, which may be the same file.

    Returns the bytes kept: fewer than ``size`` if the source is shorter, or was cut within a line.

    Raises:
        FileNotFoundError: there is no source.
    """
    kept = _whole_lines(source, size)
    if target.exists() and source.samefile(target):
        os.truncate(target, kept)
        return kept
    with _replacing(target) as temporary, source.open("rb") as old, temporary.open("wb") as new:
        shutil.copyfileobj(old, new)
        new.truncate(kept)
    return kept


def _whole_lines(path: Path, size: int) -> int:
    """The bytes of the lines that end within the first ``size`` bytes."""
    end = min(size, path.stat().st_size)
    with path.open("rb") as file:
        while end > 0:
            start = max(0, end - (1 << 16))
            file.seek(start)
            if (last := file.read(end - start).rfind(b"\n")) >= 0:
                return start + last + 1
            end = start
    return 0


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def second_name(path: Path, target: Path) -> None:
    """Gives a file, or a folder with its files, another name; copies it only if a file cannot have two names."""
    if path.is_dir():
        shutil.copytree(path, target, copy_function=_link_or_copy)
    else:
        _link_or_copy(path, target)


def keep_copy(path: Path, target: Path) -> None:
    """Gives a checkpoint a second name in place of what has that name: a kill leaves the old or the new one.

    For a folder perhaps none. It is copied only if a file cannot have two names.
    """
    temporary, aside = (target.with_name(f".{target.name}.{end}") for end in ("tmp", "old"))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    try:
        second_name(path.resolve(), temporary)
    except BaseException:
        remove(temporary)  # a partial copy would keep the disk full
        raise
    flush_checkpoint(temporary)
    if target.is_dir() or (target.exists() and temporary.is_dir()):  # it cannot be replaced in one step
        remove(aside)
        os.replace(target, aside)
    os.replace(temporary, target)
    flush_to_disk(target.parent)
    remove(aside)
    remove(temporary)  # os.replace does nothing if both are names of one file


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def flush_checkpoint(path: Path) -> None:
    """Waits until a checkpoint is on the disk: a file, or a folder with its files."""
    flush_to_disk(*(path.iterdir() if path.is_dir() else ()), path)


_FOLDERS_STAY = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.EIO}
"""Errors of file systems that cannot flush a folder: vboxsf, CIFS and SMB, Windows' drives in WSL, FUSE."""


def flush_to_disk(*paths: Path) -> None:
    """Waits until the files (or folders) are on the disk; paths that do not exist are skipped.

    A folder that its file system cannot flush is left to the system, which writes the names of its files soon.

    Raises:
        OSError: a file cannot be flushed, or the disk is full.
    """
    for path in paths:
        if not path.exists():
            continue
        try:
            _flush(path)
        except OSError as error:
            if not (path.is_dir() and error.errno in _FOLDERS_STAY):
                raise
            if error.errno == errno.EIO:  # shares give it where they cannot; a local disk only when it fails
                warnings.warn(
                    f"{path}: the file system could not flush it ({error.strerror}); is the disk failing?", stacklevel=2
                )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Place:
    """Remembers a folder, to tell it from another one that has its name later.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # An open folder keeps its number, also on file systems that give numbers as files are used.
        self._descriptor = os.open(folder, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._is_told = self._is_here()  # a file system that gives a folder two numbers cannot tell

    def _is_here(self) -> bool:
        return os.path.samestat(os.fstat(self._descriptor), os.stat(self.folder))

    def check(self) -> None:
        """Refuses a folder that has taken the place of this one; one that is missing is left to who writes to it.

        Raises:
            UserError: says what became of the folder, and how to resume the run.
        """
        if self._is_told and self.folder.is_dir() and not self._is_here():
            raise UserError(
                f"{self.folder} is not the folder that this run wrote to any more: that one was moved or removed; "
                f"{WHERE_IT_IS}"
            )
