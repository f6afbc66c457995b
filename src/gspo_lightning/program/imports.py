"""Imports at the start of a program without Python's search for cycles, which finds none there.

Torch, transformers and Lightning make a million objects that stay. Every so many new ones Python looks through all of
them for cycles that nobody uses any more, and once more when it ends: a quarter of the time from the start of a program
to its work. Looks at them in the middle of training find nothing either.
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
