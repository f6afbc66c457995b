"""Finds the checkpoint that a run resumes from, and checks that it is whole, free of code and of this package."""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from pathlib import Path

import torch

from gspo_lightning.callbacks.checkpoint_files import all_numbered
from gspo_lightning.distributed.sharded_checkpoint import INDEX, REST, is_whole_folder
from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home

AUTO = "auto"


def find_checkpoint(ckpt_path: str | None, run_dir: Path, *, sharded: bool = False) -> Path | None:
    """The checkpoint to resume from; None to start afresh.

    Args:
        ckpt_path: None, a file, or ``auto``: the newest good one of ``run_dir``, or a fresh start if it has none.
        run_dir: the run's folder.
        sharded: whether the run splits its weights over ranks (trainer=fsdp).

    If ``last.ckpt`` is damaged or missing, ``previous.ckpt`` next to it is used, then the newest good one of
    ``checkpoint.keep_last``, then ``best.ckpt``, and lines say so.

    Raises:
        UserError: the file does not exist, there is no good one, it holds code or is not a checkpoint of this package,
            or only one of the two runs splits its weights over ranks.
    """
    if ckpt_path is None:
        return None
    if not ckpt_path.strip():
        raise UserError("ckpt_path is empty; name a checkpoint, or leave it out to start afresh")
    if ckpt_path == AUTO:
        newest = run_dir / "checkpoints" / "last.ckpt"
        if not any(file.exists() for file in _candidates(newest)):
            print(
                f"ckpt_path=auto: no checkpoint in {newest.parent}; starting a new run{_set_aside(run_dir)}", flush=True
            )
            return None
    else:
        newest = from_home(ckpt_path)
        if not any(file.exists() for file in _candidates(newest)):
            raise UserError(f"ckpt_path={ckpt_path}: there is no such checkpoint")
        _refuse_folder(newest)
        if newest.parent.name == "checkpoints.old":
            raise UserError(
                f"ckpt_path={ckpt_path}: the records of that run lie next to it as *.old; move them and "
                "checkpoints.old to a new folder, without .old, and resume from there"
            )
    good = _first_good(newest)
    _refuse_foreign(good)
    if good.is_dir() != sharded:
        kind, way = (
            ("in parts, one per rank", "trainer=fsdp")
            if good.is_dir()
            else ("in one file", "trainer=ddp or trainer=default")
        )
        raise UserError(f"ckpt_path={good}: was saved {kind}; resume with {way}, on any number of devices")
    if ckpt_path == AUTO or good != newest:
        print(f"ckpt_path={ckpt_path}: resuming from {good}", flush=True)
    return good


def _set_aside(run_dir: Path) -> str:
    """What else could be meant: the run that another one, stopped before it had saved anything, has set aside."""
    old = run_dir / "checkpoints.old"
    if not (old.is_dir() and any(old.iterdir())):
        return ""
    return (
        f". {old} is of an earlier run; to resume that one, move it and the records *.old to a new folder, without "
        ".old, and give that as hydra.run.dir"
    )


def _refuse_folder(path: Path) -> None:
    """Refuses a run folder or its checkpoints folder; a sharded checkpoint is a folder too, with files of its own."""
    if not path.is_dir() or path.suffix == ".ckpt" or any((path / name).exists() for name in (INDEX, REST)):
        return
    inside = path if path.name == "checkpoints" else path / "checkpoints"
    raise UserError(f"ckpt_path={path}: is a folder, not a checkpoint; name {inside / 'last.ckpt'}")


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that saved ``checkpoint``, as an absolute path.

    Links are not followed: a run's ``checkpoints`` may lie on another disk than its records.
    """
    return Path(os.path.abspath(checkpoint)).parent.parent


def _candidates(newest: Path) -> list[Path]:
    return [newest, *_others(newest)] if newest.name == "last.ckpt" else [newest]


def _others(path: Path) -> list[Path]:
    """The checkpoints that a run keeps in the folder of ``path``, without that one, in the order of resuming."""
    kept = reversed(all_numbered(path.parent).values())
    return [
        file
        for file in (*map(path.with_name, ("last.ckpt", "previous.ckpt")), *kept, path.with_name("best.ckpt"))
        if file != path and file.exists()
    ]


def _first_good(newest: Path) -> Path:
    for file in filter(Path.exists, _candidates(newest)):
        if _is_good(file):
            return file
        print(f"warning: {file} is damaged (cut short, or bits have changed)", flush=True)
    line = f"ckpt_path={newest}: damaged, and there is no good checkpoint next to it; start over"
    if newest.name != "last.ckpt" and (other := next(filter(_is_good, _others(newest)), None)) is not None:
        line = f"ckpt_path={newest}: damaged; {other} is not"
    raise UserError(line)


def _is_good(path: Path) -> bool:
    """Whether a checkpoint is whole.

    Raises:
        UserError: it holds code.
    """
    try:
        return is_whole_folder(path) if path.is_dir() else is_whole(path)
    except pickle.UnpicklingError as error:
        raise _holds_code(path) from error


def is_whole(path: Path) -> bool:
    """Whether every record of a checkpoint matches the checksum that was written with it.

    ``torch.save`` writes a zip archive with a CRC-32 of each record; ``torch.load`` does not compare them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError):
        return False


def _refuse_foreign(path: Path) -> None:
    """Refuses what is no checkpoint of this package; loads only the structure, tensors stay on the disk."""
    file = path / REST if path.is_dir() else path
    try:
        checkpoint = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise _holds_code(path) from error
    if not isinstance(checkpoint, dict) or "gspo_lightning" not in checkpoint:
        raise UserError(f"ckpt_path={path}: is not a checkpoint of gspo_lightning; name the last.ckpt of a run")


def _holds_code(path: Path) -> UserError:
    return UserError(f"ckpt_path={path}: holds pickled Python objects, which could run code; refused")


def goes_on(ckpt_path: str | None, last: Path) -> bool:
    """Whether the same command, run again, resumes from what this run saves.

    Args:
        ckpt_path: the setting.
        last: path of the checkpoint that the run saves.
    """
    if ckpt_path is None or ckpt_path == AUTO:
        return ckpt_path == AUTO
    return from_home(ckpt_path).absolute() == last.absolute()
