"""Copies and checks of what users' reward functions and environments receive and return. Imports no torch."""

from __future__ import annotations

import asyncio
import math
from numbers import Real
from typing import Any, cast

from gspo_lightning.errors import UserError

RAISED = (Exception, SystemExit, asyncio.CancelledError)
"""Exceptions that users' code may raise and an error line must name; Ctrl-C is not among them."""


def copied(value: Any) -> Any:
    """``value`` with new lists, dicts, tuples and sets all the way down, so that changing the copy leaves it unchanged.

    Pictures, tensors and other objects are shared. A list that occurs in two places becomes two.
    """
    kind = type(value)
    if kind is dict:
        return {key: copied(item) for key, item in value.items()}
    if kind is list:
        # Most items are numbers or strings, and token ids come by the million: no call for those.
        return [copied(item) if type(item) in _CONTAINERS else item for item in value]
    if kind is tuple:
        return tuple(map(copied, value))
    return set(value) if kind is set else value


_CONTAINERS = frozenset({dict, list, set, tuple})


def keeps_state(part: Any, name: str) -> bool:
    """Whether a part of a user's own has a state that checkpoints hold: ``state_dict`` and ``load_state_dict``.

    Args:
        part: an object with a state of its own, or without one.
        name: of the part in the message.

    Raises:
        UserError: it has only one of the two methods.
    """
    found = [method for method in ("state_dict", "load_state_dict") if callable(getattr(part, method, None))]
    if len(found) == 1:
        (missing,) = {"state_dict", "load_state_dict"} - set(found)
        raise UserError(
            f"{name} ({type(part).__name__}) has {found[0]} but no {missing}; give it both, and its state is saved in "
            "checkpoints and restored on a resume, or neither"
        )
    return bool(found)


def finite_number(value: Any) -> float | None:
    """``value`` as a float; None if it is not one finite number (plain, of NumPy, or a tensor of one element)."""
    if not isinstance(value, Real) and hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError, TypeError):
            return None
    if not isinstance(value, Real):
        return None
    try:
        number = float(cast(float, value))
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
