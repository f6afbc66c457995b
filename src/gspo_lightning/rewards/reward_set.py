"""Calling reward functions, checking what they return, and combining them.

A reward function has TRL's signature, ``(prompts, completions, completion_ids, **columns) -> list[float | None]``,
plain or ``async``, so that one written for TRL runs unchanged. Lists have one entry per completion, the completions
of a prompt side by side; columns of the dataset row are repeated. A conversational prompt comes with
conversational completions, ``[{"role": "assistant", "content": text}]``, a plain one with strings. None means "does
not apply".
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gspo_lightning.advantages import combine_rewards
from gspo_lightning.errors import UserError
from gspo_lightning.types import Completion, Prompt

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]


@dataclass(frozen=True)
class RewardSpec:
    """One reward function, its weight in the sum, and how long one call may take."""

    function: RewardFunction
    weight: float = 1.0
    timeout_s: float | None = None
    """The run stops if a call takes longer. The call itself is not killed: it runs in this process."""


class RewardSet:
    """Scores rollouts with one or several functions, which run side by side."""

    def __init__(
        self,
        functions: dict[str, RewardSpec],
        combine: Literal["weighted_sum", "normalize_then_sum"] = "weighted_sum",
    ) -> None:
        if not functions:
            raise UserError("reward.functions is empty; give at least one reward function")
        self.functions = functions
        self.how = combine
        self.names = tuple(functions)
        self.weights = torch.tensor([spec.weight for spec in functions.values()], dtype=torch.float64)

    def __call__(self, prompts: list[Prompt], completions: list[list[Completion]]) -> Tensor:
        """Rewards ``(B, G, K)`` float64, NaN where a function does not apply.

        Raises:
            UserError: a function raised, took too long, or returned something else than one finite number or None per
                completion; names the function and the row.
        """
        arguments = call_arguments(prompts, completions)
        uids = [prompt.uid for prompt, group in zip(prompts, completions, strict=True) for _ in group]
        with ThreadPoolExecutor(max_workers=len(self.functions), thread_name_prefix="reward") as pool:
            calls = {name: pool.submit(call, spec.function, arguments) for name, spec in self.functions.items()}
            columns = [
                checked(name, _result(name, future, self.functions[name].timeout_s), uids)
                for name, future in calls.items()
            ]
        table = torch.tensor(columns, dtype=torch.float64).T
        return table.reshape(len(prompts), -1, len(columns))

    def required_columns(self) -> dict[str, str]:
        """Columns a row must have -> what needs them: parameters without a default of the reward functions."""
        given = {"prompts", "completions", "completion_ids"}
        return {
            parameter.name: f"reward function {name}"
            for name, spec in self.functions.items()
            for parameter in inspect.signature(spec.function).parameters.values()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            and parameter.name not in given
        }

    def combine(self, by_function: Tensor) -> Tensor:
        """``(B, G, K)`` -> ``(B, G)`` as configured, for training."""
        return combine_rewards(by_function, self.weights, self.how)

    def weighted_sum(self, by_function: Tensor) -> Tensor:
        """``(B, G, K)`` -> ``(B, G)`` by weight alone, for validation, where a group may be a single completion."""
        return combine_rewards(by_function, self.weights)


def call_arguments(prompts: list[Prompt], completions: list[list[Completion]]) -> dict[str, list[Any]]:
    """TRL's keyword arguments: one entry per completion, columns of the row repeated."""
    rows = [(prompt, completion) for prompt, group in zip(prompts, completions, strict=True) for completion in group]
    arguments: dict[str, list[Any]] = {
        "prompts": [prompt.prompt for prompt, _ in rows],
        "completions": [
            c.text if isinstance(p.prompt, str) else [{"role": "assistant", "content": c.text}] for p, c in rows
        ],
        "completion_ids": [completion.token_ids.tolist() for _, completion in rows],
    }
    names = {name for prompt in prompts for name in prompt.sample} - {"prompt", *arguments}
    for name in sorted(names):
        arguments[name] = [prompt.sample.get(name) for prompt, _ in rows]
    return arguments


def call(function: RewardFunction, arguments: dict[str, list[Any]]) -> Any:
    """Calls with the arguments the function takes; awaits it if it is asynchronous."""
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        known = {p.name for p in parameters}
        arguments = {name: value for name, value in arguments.items() if name in known}
    result = function(**arguments)
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def _result(name: str, future: Future[Any], timeout_s: float | None) -> Any:
    try:
        return future.result(timeout_s)
    except FutureTimeoutError as error:
        if future.done():
            raise UserError(f"reward function {name} raised {type(error).__name__}: {error}") from error
        raise UserError(f"reward function {name} took longer than its timeout_s={timeout_s}") from error
    except Exception as error:
        raise UserError(f"reward function {name} raised {type(error).__name__}: {error}") from error


def checked(name: str, values: Any, uids: list[str]) -> list[float]:
    """The values as floats, None as NaN; refuses everything else, naming function and row."""
    if not isinstance(values, Sequence | Tensor) or isinstance(values, str) or len(values) != len(uids):
        got = f"{len(values)} values" if isinstance(values, Sequence | Tensor) else type(values).__name__
        raise UserError(f"reward function {name} must return a list of {len(uids)} numbers or None, not {got}")
    numbers = []
    for uid, value in zip(uids, values, strict=True):
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if value is None:
            numbers.append(math.nan)
        elif isinstance(value, Real) and math.isfinite(value):
            numbers.append(float(cast(float, value)))
        else:
            raise UserError(f"reward function {name} returned {value!r} for row {uid}; return a finite number or None")
    return numbers
