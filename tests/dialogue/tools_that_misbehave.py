"""Tools of users that hang, end their process, print, or return what is no text; importable by another process."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image


def nap(seconds: float) -> str:
    """Sleeps.

    Args:
        seconds: how long
    """
    time.sleep(seconds)
    return "awake"


def wait_for(mine: str, other: str) -> int:
    """Makes a file, waits for another and returns the number of its process.

    Args:
        mine: path of the file
        other: path of the other one
    """
    Path(mine).touch()
    while not Path(other).exists():
        time.sleep(0.01)
    return os.getpid()


def leave(code: int) -> str:
    """Exits, as a script would.

    Args:
        code: of the exit
    """
    sys.exit(code)


def crash(code: int) -> str:
    """Ends the process.

    Args:
        code: of the exit
    """
    os._exit(code)


def shout(word: str) -> None:
    """Prints.

    Args:
        word: what
    """
    print(word)


def sort(numbers: list[int]) -> list[int]:
    """Sorts, in place.

    Args:
        numbers: which
    """
    numbers.sort()
    return numbers


def draw(size: int) -> list[Any]:
    """Makes images.

    Args:
        size: of their sides
    """
    return [Image.new("RGB", (size, size))]


def measure() -> list[Any]:
    """Returns what JSON does not know."""
    return [{3}]


class Counter:
    """Counts what it was asked."""

    def reset(self, row: dict[str, Any], seed: int) -> None:
        self.count, self.row = 0, row

    def count_up(self, seconds: float) -> int:
        """Adds one, and then sleeps.

        Args:
            seconds: how long
        """
        self.count += 1
        time.sleep(seconds)
        return self.count

    def break_object(self) -> str:
        """Leaves a lock in the object."""
        self.lock = threading.Lock()
        return "broken"

    def reward(self) -> float:
        return float(self.count)


class Locked(Counter):
    """Has what no other process can get."""

    def reset(self, row: dict[str, Any], seed: int) -> None:
        super().reset(row, seed)
        self.lock = threading.Lock()


class Half(Counter):
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> Any:
        return int, ("x",)
