"""Imports at the start of a program without Python's search for cycles, which finds little there.

Torch, transformers and Lightning make half a million objects that stay. Every so many new ones Python looks through all
of them for cycles that nobody uses any more, and once more when it ends. That was a quarter of the time of a short
program, for 8 MB that it found.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def objects_that_stay() -> Iterator[None]:
    """Around imports: what they make is never looked through for cycles. A program that had that off keeps to it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
