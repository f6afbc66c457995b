"""A reward function for some tasks of a mixture."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from gspo_lightning.errors import UserError
from gspo_lightning.rewards.calling import SERVICES
from gspo_lightning.screen import counted


def object_of(function: Callable[..., Any]) -> Any:
    """The object that a reward function is, is a method of, or hands its calls to: the one that may have a state."""
    function = unwrapped(function)
    if isinstance(function, ForTasks):
        return object_of(function.function)
    return function.__self__ if inspect.ismethod(function) else function


def unwrapped(function: Callable[..., Any]) -> Any:
    """The function without its `functools.partial`: what has methods ``check``, ``start`` and ``close`` if any has."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


class ForTasks:
    """Calls ``function`` only for the completions of the named tasks; for all others it does not apply (None).

    The function gets shorter lists, as if the other tasks did not exist; it must not use ``log_extra``.

    Args:
        function: with the signature of every reward function.
        tasks: names in ``data.task.tasks`` of a `Mixture`.
    """

    def __init__(self, function: Callable[..., Any], tasks: list[str]) -> None:
        if not tasks:
            raise UserError("reward.functions: ForTasks with an empty list of tasks never applies; name a task")
        self.function, self.tasks = function, frozenset(tasks)
        parameters = inspect.signature(function).parameters.values()
        open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        self._accepted = None if open_ended else {parameter.name for parameter in parameters}

    def __getattr__(self, name: str) -> Any:
        # These methods are the function's; when unpickling, attributes are requested before __init__ has run.
        if name in ("check", "start", "close") and "function" in self.__dict__:
            return getattr(unwrapped(self.function), name)
        raise AttributeError(name)

    def __call__(
        self, task: list[str | None], **columns: Any
    ) -> list[float | None] | Coroutine[Any, Any, list[float | None]]:
        """One reward per completion, None for those of other tasks; to be awaited if the function's are."""
        mine = [number for number, name in enumerate(task) if name in self.tasks]
        if not mine:
            return [None] * len(task)
        columns["task"] = task
        accepted = columns.keys() if self._accepted is None else self._accepted & columns.keys()
        values = self.function(
            **{
                name: columns[name] if name in SERVICES else [columns[name][number] for number in mine]
                for name in accepted
            }
        )
        if inspect.isawaitable(values):
            return _awaited(values, mine, len(task))
        return _placed(values, mine, len(task))


async def _awaited(values: Awaitable[Sequence[float | None]], places: list[int], size: int) -> list[float | None]:
    return _placed(await values, places, size)


def _placed(values: Sequence[float | None], places: list[int], size: int) -> list[float | None]:
    """``size`` values: these at their places, and None elsewhere."""
    if len(values) != len(places):
        raise ValueError(f"returned {counted(len(values), 'value')} for {counted(len(places), 'completion')}")
    result: list[float | None] = [None] * size
    for place, value in zip(places, values, strict=True):
        result[place] = value
    return result
