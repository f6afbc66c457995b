"""Tools with a time limit: they run in processes of their own, which are killed if a call takes too long."""

from __future__ import annotations

import inspect
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gspo_lightning.dialogue.calls import CallError
from gspo_lightning.errors import UserError
from gspo_lightning.rewards.worker import Worker, WorkerError, WorkerTimeoutError
from gspo_lightning.users_code import Outcome, ToolCalls


class LimitedTools:
    """Calls tools as `gspo_lightning.users_code.call_tool` does, in a process for each call that runs at a time.

    A process stays warm, and all dialogues use it.

    Args:
        tools: functions and classes, importable by name.
        timeout_s: seconds one call may take.

    Raises:
        UserError: a tool cannot be sent to another process.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], timeout_s: float) -> None:
        for tool in tools:
            try:
                Worker(tool)
            except UserError as error:
                raise UserError(
                    f"environment.timeout_s={timeout_s}: {tool.__name__} has a limit, but {error}"
                ) from error
        self.timeout_s = timeout_s
        self.tools = ToolCalls(tools)
        self.idle: deque[Worker] = deque()
        """Processes that run no call; where there is none, one is made: there are never more than calling threads."""

    def __reduce__(self) -> tuple[type[LimitedTools], tuple[Sequence[Callable[..., Any]], float]]:
        """Copies have processes of their own."""
        return LimitedTools, (self.tools.tools, self.timeout_s)

    def check(self, things: Sequence[Any]) -> None:
        """Refuses objects that cannot be sent to the process.

        Raises:
            UserError: names the class.
        """
        for thing in things:
            try:
                pickle.dumps(thing)
            except Exception as error:  # whatever pickling a user's object raises
                raise UserError(
                    f"environment.timeout_s={self.timeout_s}: an object of {type(thing).__name__} cannot be sent to "
                    f"another process ({error}); keep that out of it, or set environment.timeout_s to null"
                ) from error

    def call(self, name: str, number: int, thing: Any, arguments: dict[str, Any]) -> tuple[Outcome, str, Any]:
        """What the call came to, its text, and the function or the object as the call left it.

        Args:
            name: of the tool.
            number: index of the function or class in the tools.
            thing: the function, or the object of the class.
            arguments: by name.

        Raises:
            CallError: the call took too long, or ended its process; the object is as before.
            UserError: the process cannot load the tools.
        """
        owner = None if inspect.isroutine(thing) else thing
        try:
            with self._worker() as worker:
                outcome, text, left = worker(number, name, owner, arguments, timeout_s=self.timeout_s)
        except WorkerTimeoutError as error:
            raise CallError(f"{name} took longer than its timeout_s={self.timeout_s} and was stopped") from error
        except WorkerError as error:
            raise CallError(str(error)) from error
        except UserError as error:
            raise UserError(f"environment.timeout_s={self.timeout_s}: a tool has a limit, but {error}") from error
        return outcome, text, thing if owner is None else left

    @contextmanager
    def _worker(self) -> Iterator[Worker]:
        """A process that nobody else uses meanwhile."""
        try:
            worker = self.idle.pop()  # atomic, unlike a look at the length before
        except IndexError:
            worker = Worker(self.tools)
        try:
            yield worker
        finally:
            self.idle.append(worker)
