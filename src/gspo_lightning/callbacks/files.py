"""Files that are whole at every moment, whatever kills the process."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from pathlib import Path


def replace_file(path: Path, content: str) -> None:
    """Replaces ``path`` by ``content`` (UTF-8) in one step.

    A lone surrogate, which byte-level tokenizers can decode to, is written as a backslash escape.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.encode("utf-8", "backslashreplace"))
    os.replace(temporary, path)


def replace_end(path: Path, start: int, content: str) -> None:
    """Replaces what follows the first ``start`` bytes of ``path`` by ``content`` (UTF-8), in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        shutil.copyfileobj(old, new)
        new.seek(start)
        new.truncate()
        new.write(content.encode("utf-8", "backslashreplace"))
    os.replace(temporary, path)


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
    temporary = target.with_name(f".{target.name}.tmp")
    with source.open("rb") as old, temporary.open("wb") as new:
        shutil.copyfileobj(old, new)
        new.truncate(kept)
    os.replace(temporary, target)
    return kept


def _whole_lines(path: Path, size: int, block: int = 1 << 16) -> int:
    """The bytes of the lines that end within the first ``size`` bytes."""
    end = min(size, path.stat().st_size)
    with path.open("rb") as file:
        while end > 0:
            start = max(0, end - block)
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
