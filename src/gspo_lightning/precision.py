"""Contexts of code on which the precision of the model must not act: users' functions, and vLLM in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def dtype_of_new_tensors(dtype: torch.dtype) -> Iterator[None]:
    """Context in which torch makes numbers into tensors of this dtype, where bf16-true has set another for all threads.

    What reward functions and environments compute with torch would be rounded to it. Not those of a rollout that is
    sampled ahead: the update runs at the same time.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Context in which products are in the dtype of their operands."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
