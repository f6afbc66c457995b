"""Paths as users write them in settings and rows."""

from __future__ import annotations

import os
from pathlib import Path


def from_home(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` as the home folder. An unknown ``~user`` stays, where `Path.expanduser` would raise."""
    return Path(os.path.expanduser(path))
