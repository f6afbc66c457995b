"""Arguments of the scripts that measure, checked before they do: a measurement takes minutes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def results_file(text: str) -> Path:
    """The path of a JSON file of results that can be written, for argparse; makes its folder.

    One that is there must hold a JSON object: what was measured before stays in it.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot make its folder ({error.strerror})") from error
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: cannot write there")
    if path.exists():
        try:
            is_ours = isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        except (OSError, ValueError):
            is_ours = False
        if not is_ours:
            raise argparse.ArgumentTypeError(f"{text} is there and holds no results; name another file, or remove it")
    return path


def read_results(path: Path, *keys: str) -> dict[str, Any]:
    """What an earlier measurement wrote; empty if there is none. Ends the script if a key is missing."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if missing := [key for key in keys if key not in found]:
        sys.exit(f"error: {path} has no {missing[0]}: it is of another measurement; name another file with --out")
    return found


def quickstart_model() -> str:
    """The folder of the bundled model that is measured; ends the script if it cannot be made, whose line says why."""
    command = [sys.executable, "-m", "gspo_lightning.policy.bundled", "smollm2-135m-instruct"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip()


def peers_python(root: Path) -> Path:
    """The Python that has TRL (``GSPO_PEERS_VENV``, else ``.venv-peers``), whether it is there or not."""
    return Path(os.environ.get("GSPO_PEERS_VENV", root / ".venv-peers")) / "bin" / "python"
