"""Exceptions that end a run by more than one part of it, and what exceptions of other code mean."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

_WORDS = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDA Error: out of memory",
    "[CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 'out of memory'",
    "Cuda failure 2 'out of memory'",
    "Failed to CUDA calloc",
    "Failed to CUDA malloc",
)
"""Messages of the CPU's allocator, and of libraries and kernels that allocate by themselves (the third: vLLM, the last
four: NCCL)."""

LONGEST_S = 10**6
"""Largest time limit in seconds: poll counts milliseconds in 32 bits."""


class UserError(Exception):
    """A mistake in a config, a dataset row, a model folder or a reward function.

    The message is one line that names the key, row or file and the fix. The command line prints it
    without a traceback and exits with code 2.
    """


class NonFiniteGradientError(RuntimeError):
    """Raised after too many consecutive non-finite gradients; none of them reached the weights."""


def reason(error: BaseException) -> str:
    """What an exception of someone else's code says, in one line that is never empty.

    A message that says nothing by itself (none at all, or the key of a KeyError) has the name of its type.
    """
    said = " ".join(str(error).split())
    if said and not isinstance(error, KeyError):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def named_reason(error: BaseException) -> str:
    """The type of an exception of someone else's code and, if it has any, its text, in one line."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; only those by torch's own allocator for GPUs have a class."""
    import torch  # late: the process of a reward function has no need of it

    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _WORDS)


def check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    """Refuses, in a program without a config, a word that would be taken for another one.

    Args:
        key: the setting.
        value: what it is set to.
        choices: what it may be.

    Raises:
        UserError: it is none of these.
    """
    if value not in choices:
        raise UserError(f"{key}={value!r}: there is no such choice; choose {', '.join(choices)}")


def check_time_limit(key: str, seconds: float, more: str = "") -> None:
    """Refuses a limit that no wait can have.

    Args:
        key: the setting.
        seconds: what it is set to.
        more: what follows in the line.

    Raises:
        UserError: it is not above 0 and at most `LONGEST_S`.
    """
    if not 0 < seconds <= LONGEST_S:
        raise UserError(f"{key}={seconds} must be above 0 and at most {LONGEST_S}{more}")


def whole_number(key: str, value: Any, least: int = 0) -> int:
    """A count as Python's own int, also one of NumPy.

    Raises:
        UserError: it is no whole number, or less than ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise UserError(f"{key}={value!r} must be a whole number, at least {least}")
    return number
