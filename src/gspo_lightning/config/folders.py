"""Folders that a config names to be written to: made, and tried, before a run begins."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gspo_lightning.errors import UserError


def make_folder(key: str, place: object) -> None:
    """Makes a folder and writes a file without a name in it; what is no path on this machine is left alone.

    Args:
        key: of the config, for the message.
        place: a path; or an address with ``://``, or None.

    Raises:
        UserError: it cannot be made or written to.
    """
    if not isinstance(place, str | os.PathLike) or "://" in str(place):
        return
    try:
        os.makedirs(place, exist_ok=True)
        with tempfile.TemporaryFile(dir=str(place)):
            pass
    except OSError as error:
        raise UserError(f"{key}={place}: cannot write there ({error.strerror}); choose another folder") from error


def is_of_another_run(place: object, run_dir: Path) -> bool:
    """Whether a folder holds the records of a run and is not ``run_dir``; what is no path of a folder does not."""
    if not isinstance(place, str | os.PathLike) or "://" in str(place):
        return False
    folder = Path(place)
    return all((folder / name).is_file() for name in ("config.yaml", "metrics.csv")) and not folder.samefile(run_dir)
