"""Calls reward functions, checks what they return, and combines their rewards.

A reward function has TRL's signature, ``(prompts, completions, completion_ids, **columns) -> list[float | None]``,
plain or ``async``, so that one written for TRL runs unchanged. Lists have one entry per completion, the completions
of a prompt next to each other; columns of the dataset row are repeated. A conversational prompt comes with
conversational completions, ``[{"role": "assistant", "content": text}]`` (for gpt-oss with its other channels under
``thinking``), a plain one with strings. None means "does not apply".
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from gspo_lightning.advantages import combine_rewards
from gspo_lightning.errors import UserError, check_choice, check_time_limit
from gspo_lightning.precision import dtype_of_new_tensors
from gspo_lightning.rewards.by_task import ForTasks, object_of, unwrapped
from gspo_lightning.rewards.calling import (
    RECORDED,
    Caller,
    EventLoop,
    Log,
    RewardFunctionError,
    TrainerState,
    required_parameters,
)
from gspo_lightning.rewards.worker import Worker, WorkerError, WorkerTimeoutError
from gspo_lightning.screen import counted
from gspo_lightning.types import Completion, Metrics, Prompt
from gspo_lightning.users_code import LARGEST, finite_number, keeps_state

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]


@dataclass(frozen=True)
class RewardSpec:
    """One reward function, its weight in the sum, and how long one call may take."""

    function: RewardFunction
    weight: float = 1.0
    timeout_s: float | None = None
    """With a limit the function runs in its own warm process, which is killed if a call takes longer, and the run
    stops. Without one it runs in a thread of the trainer."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UserError(f"weight={self.weight} of a reward function must be a finite number")
        if abs(self.weight) > LARGEST:
            raise UserError(f"weight={self.weight} of a reward function must be at most {LARGEST:g} in size")
        if self.timeout_s is not None:
            check_time_limit("RewardSpec.timeout_s", self.timeout_s, "; null means no limit")


class RewardSet:
    """Scores rollouts with one or several functions, which run in parallel."""

    def __init__(
        self,
        functions: dict[str, RewardSpec],
        combine: Literal["weighted_sum", "normalize_then_sum"] = "weighted_sum",
    ) -> None:
        if not functions:
            raise UserError("reward.functions is empty; give at least one reward function")
        check_choice("reward.combine", combine, ("weighted_sum", "normalize_then_sum"))
        _check_entries(functions)
        self.functions = functions
        self.how = combine
        self.names = tuple(functions)
        self.weights = torch.tensor([spec.weight for spec in functions.values()], dtype=torch.float64)
        self.trainer_state = TrainerState()
        self.log = Log()
        """The values that the functions logged in the last call."""
        self.dtype = torch.get_default_dtype()
        """Of new tensors in users' functions, also where the precision of the Trainer sets another one."""
        self._workers: dict[str, Worker] = {}
        self._loops = {name: EventLoop() for name in functions}
        for name, spec in functions.items():
            has_state = keeps_state(object_of(spec.function), f"reward function {name}")
            if has_state and spec.timeout_s is not None:
                raise UserError(
                    f"reward function {name} has a state (state_dict) and timeout_s={spec.timeout_s}: its process "
                    "would keep the state from the checkpoints; set timeout_s to null, or take state_dict and "
                    "load_state_dict away"
                )
            if spec.timeout_s is not None:
                try:
                    self._workers[name] = Worker(Caller(spec.function))
                except UserError as error:
                    raise UserError(f"reward function {name} has a timeout_s, but {error}") from error

    def __call__(self, prompts: list[Prompt], completions: list[list[Completion]]) -> Tensor:
        """Rewards ``(B, G, K)`` float64, NaN where a function does not apply.

        Raises:
            UserError: a function raised, took too long, or returned anything but one finite number or None per
                completion, or one that its weight makes too large, or no function applies to a completion; names the
                function and the row.
        """
        arguments = call_arguments(prompts, completions)
        uids = [prompt.uid for prompt, group in zip(prompts, completions, strict=True) for _ in group]
        self._start()
        workers = ThreadPoolExecutor(len(self.functions), thread_name_prefix="reward", **_on_this_gpu())
        with dtype_of_new_tensors(self.dtype), workers as pool:
            calls = {name: pool.submit(self._call, name, arguments, uids) for name in self.names}
            try:
                results = {name: _result(name, future) for name, future in calls.items()}
            except BaseException:
                for worker in self._workers.values():
                    worker.kill()  # else leaving the pool would wait for it
                raise
        self.log = merged_log([log for _, log in results.values()], len(uids))
        columns = [checked(name, values, uids) for name, (values, _) in results.items()]
        table = torch.tensor(columns, dtype=torch.float64).T
        self._refuse_nothing(table, uids)
        self._refuse_overflow(table, uids)
        return table.reshape(len(prompts), -1, len(columns))

    def _refuse_nothing(self, table: Tensor, uids: list[str]) -> None:
        """Refuses completions to which no function applies; one of weight 0 only records, unless all of them do."""
        counts = [name for name, weight in zip(self.names, self.weights.tolist(), strict=True) if weight] or self.names
        applies = ~table[:, [self.names.index(name) for name in counts]].isnan()
        for uid, any_does in zip(uids, applies.any(dim=1).tolist(), strict=True):
            if not any_does:
                kind = "reward function" if len(counts) == len(self.names) else "reward function with a weight"
                raise UserError(
                    f"row {uid}: no {kind} applies to a completion ({', '.join(counts)} returned None); "
                    "add one that does, or leave the row out"
                )

    def _refuse_overflow(self, table: Tensor, uids: list[str]) -> None:
        """Refuses rewards ``(N, K)`` that their weights make too large, as `checked` does rewards without one."""
        if beyond := ((table * self.weights).abs() > LARGEST).nonzero().tolist():
            row, function = beyond[0]
            name, reward = self.names[function], table[row, function].item()
            raise UserError(
                f"reward function {name} returned {reward:g} for row {uids[row]}, times its weight="
                f"{self.functions[name].weight:g} beyond {LARGEST:g}: the spread of a group overflows there; lower the "
                "weight"
            )

    def _start(self) -> None:
        """Starts processes in the caller's thread: Linux ends them with the thread that started them."""
        for name, spec in self.functions.items():
            if name in self._workers:
                self._workers[name].start()
            elif hasattr(own := unwrapped(spec.function), "start"):
                own.start()

    def _call(self, name: str, arguments: dict[str, list[Any]], uids: list[str]) -> tuple[Any, Log]:
        spec = self.functions[name]
        caller = Caller(spec.function, self._loops[name])
        if name not in self._workers:
            return caller(arguments, uids, self.trainer_state)
        given = (caller.accepted(arguments), uids, self.trainer_state, spec.timeout_s)
        return cast("tuple[Any, Log]", self._workers[name](*given, timeout_s=spec.timeout_s))

    def logged_metrics(self) -> Metrics:
        """Values logged in the last call by ``log_metric``, as (sum, count) under ``reward_log/``."""
        return {
            f"reward_log/{name}": (torch.tensor(values, dtype=torch.float64).sum(), torch.tensor(float(len(values))))
            for name, values in self.log.metrics.items()
        }

    def check(self) -> None:
        """Refuses, before anything is loaded, functions that cannot run on this machine or need what none is given."""
        for name, spec in self.functions.items():
            function = spec.function.function if isinstance(spec.function, ForTasks) else spec.function
            if "prompt" in required_parameters(function):  # as in TRL, where every row has that column too
                raise UserError(f"reward function {name}: it is never given prompt; name the parameter prompts")
            if hasattr(own := unwrapped(spec.function), "check"):
                try:
                    own.check()
                except UserError as error:
                    raise UserError(f"reward function {name}: {error}") from error

    def close(self) -> None:
        """Ends all processes and event loops; a later call starts them again."""
        for worker in self._workers.values():
            worker.close()
        for loop in self._loops.values():
            loop.close()
        for spec in self.functions.values():
            if hasattr(own := unwrapped(spec.function), "close"):
                own.close()

    def required_columns(self) -> dict[str, str | dict[str, str]]:
        """Columns a row must have -> what needs them: parameters without a default of the reward functions.

        A column that only functions of `ForTasks` need maps to a dict: task -> what needs it in the rows of that task.
        """
        everywhere: dict[str, str | dict[str, str]] = {}
        by_task: dict[str, dict[str, str]] = {}
        for name, spec in self.functions.items():
            everywhere |= dict.fromkeys(required_parameters(spec.function), f"reward function {name}")
            if isinstance(spec.function, ForTasks):
                for column in required_parameters(spec.function.function):
                    by_task.setdefault(column, {}).update(dict.fromkeys(spec.function.tasks, f"reward function {name}"))
        return by_task | everywhere

    def combine(self, by_function: Tensor) -> Tensor:
        """``(B, G, K)`` -> ``(B, G)`` as configured, for training."""
        return combine_rewards(by_function, self.weights, self.how)

    def weighted_sum(self, by_function: Tensor) -> Tensor:
        """``(B, G, K)`` -> ``(B, G)`` by weight alone, for validation, where a group may be a single completion."""
        return combine_rewards(by_function, self.weights)


_OF_THE_SUM = ("mean", "std")
"""Names under ``reward/`` of metrics of the combined rewards."""


def _check_entries(functions: Any) -> None:
    """Refuses functions without their `RewardSpec`, and names whose metric would take the place of another."""
    if not isinstance(functions, Mapping):
        raise UserError(
            f"reward.functions is of type {type(functions).__name__}; give a dict of names and RewardSpec(function)"
        )
    for name, spec in functions.items():
        if not hasattr(spec, "function"):  # not isinstance: Hydra wraps a dataclass in a dict, unless _convert_ is all
            raise UserError(
                f"reward.functions.{name} is of type {type(spec).__name__}; give gspo_lightning.rewards.RewardSpec, "
                "whose argument function it is"
            )
        if name in _OF_THE_SUM:
            raise UserError(
                f"reward.functions.{name}: reward/{name} is the metric of all functions together; choose another name"
            )


def _on_this_gpu() -> dict[str, Any]:
    """Arguments of a pool whose threads have the caller's current GPU; a new thread has the first one, on any rank."""
    if not torch.cuda.is_initialized():
        return {}
    return {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)}


def call_arguments(prompts: list[Prompt], completions: list[list[Completion]]) -> dict[str, list[Any]]:
    """TRL's keyword arguments: one entry per completion, columns of the row repeated."""
    rows = [(prompt, completion) for prompt, group in zip(prompts, completions, strict=True) for completion in group]
    arguments: dict[str, list[Any]] = {
        "prompts": [prompt.prompt for prompt, _ in rows],
        "completions": [c.text if isinstance(p.prompt, str) else _messages(c) for p, c in rows],
        "completion_ids": [completion.token_ids.tolist() for _, completion in rows],
        "policy_tokens": [completion.num_trained for _, completion in rows],
    }
    if any(c.dialogue is not None for _, c in rows):
        arguments["environment_reward"] = [c.dialogue and c.dialogue.reward for _, c in rows]
    names = {name for prompt in prompts for name in prompt.sample} - {"prompt", *arguments}
    for name in sorted(names):
        arguments[name] = [prompt.sample.get(name) for prompt, _ in rows]
    return arguments


def _messages(completion: Completion) -> list[dict[str, Any]]:
    if completion.dialogue is not None:
        return completion.dialogue.messages
    thinking = {"thinking": completion.thinking} if completion.thinking else {}
    return [{"role": "assistant", **thinking, "content": completion.text}]


_IN_WORKER = f"{RewardFunctionError.__name__}: "


def _result(name: str, future: Future[Any]) -> Any:
    try:
        return future.result()
    except WorkerTimeoutError as error:
        raise UserError(f"reward function {name} took longer than its timeout_s={error} and was stopped") from error
    except (RewardFunctionError, WorkerError) as error:
        raise UserError(f"reward function {name} raised {str(error).removeprefix(_IN_WORKER)}") from error
    except UserError as error:
        raise UserError(f"reward function {name}: {error}") from error


def merged_log(logs: list[Log], rows: int) -> Log:
    """Merges the logs; refuses an extra column that another is named like, or without one value per completion."""
    merged = Log()
    for log in logs:
        for name, values in log.metrics.items():
            merged.metrics.setdefault(name, []).extend(values)
        for column, values in log.columns.items():
            if len(values) != rows:
                raise UserError(
                    f"log_extra({column!r}, ...) got {counted(len(values), 'value')} for {rows} completions"
                )
            if column in RECORDED:
                raise UserError(
                    f"log_extra({column!r}, ...) would be lost: the recorded completions have a column of that name; "
                    "choose another"
                )
            if column in merged.columns:
                raise UserError(f"log_extra({column!r}, ...) is called by two reward functions; rename one column")
            merged.columns[column] = values
    return merged


def checked(name: str, values: Any, uids: list[str]) -> list[float]:
    """The values as floats, None as NaN; refuses everything else, naming function and row."""
    has_length = isinstance(values, Sequence) or getattr(values, "ndim", 0) > 0  # a tensor, an array, a pandas Series
    if not has_length or isinstance(values, str) or len(values) != len(uids):
        got = counted(len(values), "value") if has_length else type(values).__name__
        raise UserError(f"reward function {name} must return a list of {len(uids)} numbers or None, not {got}")
    numbers = []
    for uid, value in zip(uids, values, strict=True):
        number = math.nan if value is None else finite_number(value)
        if number is None:
            raise UserError(f"reward function {name} returned {value!r} for row {uid}; return a finite number or None")
        if abs(number) > LARGEST:
            raise UserError(
                f"reward function {name} returned {value!r} for row {uid}, beyond {LARGEST:g}: the spread of a group "
                "overflows there; return smaller numbers"
            )
        numbers.append(number)
    return numbers
