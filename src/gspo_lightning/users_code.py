"""Copies and checks of what users' functions and environments receive and return; calls of tools. Imports no torch."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import pickle
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Literal, cast

from gspo_lightning.errors import UserError, named_reason

RAISED = (Exception, SystemExit, asyncio.CancelledError)
"""Exceptions that users' code may raise and an error line must name; Ctrl-C is not among them."""
LARGEST = 1e100
"""Largest reward: the squares of larger ones, of which the spread of a group is made, may be no numbers."""


def copied(value: Any) -> Any:
    """``value`` with new lists, dicts, tuples and sets all the way down, so that changing the copy leaves it unchanged.

    Images, tensors and other objects are shared. A list that occurs in two places becomes two.
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


_INSTALLED = {"site-packages", "dist-packages"}
_LIBRARIES = (os.path.realpath(sysconfig.get_path("stdlib")), os.path.dirname(os.path.realpath(__file__)))


def raised_in(error: BaseException) -> str | None:
    """An error that came out of a user's file, in one line with the innermost place there; None if none took part.

    Args:
        error: as it is caught: what its traceback holds lies below whoever catches it.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = os.path.realpath(frame.f_code.co_filename)
        is_library = any(os.path.commonpath([file, library]) == library for library in _LIBRARIES)
        if os.path.isfile(file) and not is_library and _INSTALLED.isdisjoint(file.split(os.sep)):
            return f"{frame.f_code.co_qualname} ({os.path.basename(file)}:{line}) raised {named_reason(error)}"
    return None


Outcome = Literal["said", "failed", "refused"]
"""What a call of a tool came to: what the tool says, an error that the model is told, or one that ends the run."""


class _NoText(Exception):
    """A tool returned what is no text and cannot be written as such."""


def call_tool(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Outcome, str]:
    """Calls a tool; its result as text: a string as it is, anything else as JSON.

    Args:
        function: the tool.
        arguments: by name; the tool may change them.
    """
    try:
        result = function(**arguments)
        if not inspect.isawaitable(result):
            return "said", result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=_plain)
    except _NoText as error:
        return "refused", str(error)
    except RAISED as error:
        return "failed", f"{type(error).__name__}: {error}"
    if inspect.iscoroutine(result):
        result.close()  # else Python warns that nobody awaited it
    return "refused", "returned something to await, but nothing awaits it; make it a plain function"


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy, torch and pandas as Python's own: printed, a long one is mostly dots."""
    if type(value).__module__.startswith("PIL."):
        raise _NoText("returned an image, but the policy is shown text alone; return a description")
    return value.tolist() if hasattr(value, "tolist") else str(value)


class ToolCalls:
    """Calls tools in a `gspo_lightning.rewards.worker.Worker`, which is sent this object.

    Args:
        tools: functions, and the classes of the objects whose methods are called.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]]) -> None:
        self.tools = tuple(tools)

    def __call__(self, number: int, method: str, owner: Any, arguments: dict[str, Any]) -> tuple[Outcome, str, Any]:
        """What `call_tool` returns, and the owner as the call left it.

        Args:
            number: index of the tool.
            method: name of the method, if the tool is a class.
            owner: the object of that class; None for a function.
            arguments: by name.
        """
        outcome, text = call_tool(self.tools[number] if owner is None else getattr(owner, method), arguments)
        try:
            pickle.dumps(owner)
        except Exception as error:  # noqa: BLE001  (whatever pickling a user's object raises is told)
            return "refused", f"left its object with what cannot be sent from its process ({error})", None
        return outcome, text, owner
