"""Calls a reward function as TRL does; used by the trainer's threads and by worker processes, so it needs no torch."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from gspo_lightning.errors import UserError
from gspo_lightning.users_code import RAISED, copied

SEARCH_S = 1.0
"""Seconds spent on finding the row that made a function raise."""


class RewardFunctionError(Exception):
    """A reward function raised; the message names the error and the row."""


@dataclass(frozen=True)
class TrainerState:
    """The ``trainer_state`` that functions written for TRL read; steps are rollouts."""

    global_step: int = 0
    max_steps: int = 0

    @property
    def epoch(self) -> float:
        """Share of the run that is done, in [0, 1]; a stream of prompts has no epochs."""
        return self.global_step / max(1, self.max_steps)


@dataclass
class Log:
    """Values that functions report through TRL's ``log_metric`` and ``log_extra``."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Adds a number; the numbers of one rollout are averaged."""
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Adds a column, one value per completion, to the recorded completions."""
        self.columns[column] = list(values)


SERVICES = frozenset({"trainer_state", "log_metric", "log_extra"})
"""Arguments that are not lists with one entry per completion."""
GIVEN = SERVICES | {"prompts", "completions", "completion_ids", "environment_reward", "policy_tokens"}
"""Arguments that the program gives; all others are columns of the dataset."""


RECORDED = frozenset((
    "step", "uid", "prompt", "completion", "rewards", "reward", "advantage", "finish_reason", "tokens", "thinking",
    "messages", "turn_rewards", "turn_advantages", "token_ids", "sampler_logprobs",
))  # fmt: skip
"""Columns that the recorded completions have anyway, and `Log.log_extra` cannot add."""


def required_parameters(function: Callable[..., Any]) -> list[str]:
    """Columns that a function requires: its parameters without a default."""
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        and parameter.name not in GIVEN
    ]


class EventLoop:
    """The event loop of all calls of a function: a client, a connection or a lock that it keeps belongs to one loop.

    It is made by the first call that needs it, and may be used from one thread after another.
    """

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def __reduce__(self) -> tuple[type[EventLoop], tuple[()]]:
        """Copies, and worker processes, have loops of their own."""
        return EventLoop, ()

    def __del__(self) -> None:
        if self._runner is not None:
            with contextlib.suppress(Exception):
                self._runner.get_loop().close()

    def run(self, result: Awaitable[Any]) -> Any:
        """What the awaitable gives."""
        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(_awaited(result))

    def close(self) -> None:
        """Cancels what still runs and closes the loop; a later call makes a new one."""
        runner, self._runner = self._runner, None
        if runner is not None:  # in another thread: that of a notebook has a running loop
            with ThreadPoolExecutor(1) as pool:
                pool.submit(runner.close).result()


@dataclass(frozen=True)
class Caller:
    """A reward function in the form in which it is called, here or in a worker process."""

    function: Callable[..., Any]
    loop: EventLoop = field(default_factory=EventLoop)

    def accepted(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the function takes."""
        parameters = inspect.signature(self.function).parameters.values()
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return arguments
        known = {p.name for p in parameters}
        return {name: value for name, value in arguments.items() if name in known}

    def __call__(
        self, arguments: dict[str, Any], uids: list[str], state: TrainerState, limit_s: float = math.inf
    ) -> tuple[Any, Log]:
        """Calls the function; returns its result and what it logged.

        Args:
            arguments: by name.
            uids: of the rows.
            state: for functions that read ``trainer_state``.
            limit_s: seconds after which the caller stops waiting, also for the row of an error.

        Raises:
            RewardFunctionError: it raised; names the row, found by calling it again row by row.
        """
        log, start = Log(), time.monotonic()
        try:
            return self._call(arguments, state, log), log
        except RAISED as error:  # a function that exits must not end the run silently
            took = time.monotonic() - start
            # The last call of the search may begin at its end and take as long as this one.
            where = self._row(arguments, uids, state, min(SEARCH_S, 0.9 * limit_s - 2 * took))
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise RewardFunctionError(f"{what} ({where})") from error

    def _call(self, arguments: dict[str, Any], state: TrainerState, log: Log) -> Any:
        given = {"trainer_state": state, "log_metric": log.log_metric, "log_extra": log.log_extra}
        # Copies: functions run in parallel on one rollout, and one must not change the lists of the others.
        result = self.function(**copied(self.accepted({**arguments, **given})))
        return self.loop.run(result) if inspect.isawaitable(result) else result

    def _row(self, arguments: dict[str, Any], uids: list[str], state: TrainerState, search_s: float) -> str:
        start = time.monotonic()
        for number, uid in enumerate(uids):
            if time.monotonic() - start > search_s:
                return f"one of the rows {uid} to {uids[-1]}"
            try:
                self._call({name: [values[number]] for name, values in arguments.items()}, state, Log())
            except RAISED:  # this row makes it raise
                return f"row {uid}"
        return f"in the batch of rows {uids[0]} to {uids[-1]}, but on none of them alone"


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result
