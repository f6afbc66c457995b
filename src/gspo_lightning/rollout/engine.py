"""What a rollout engine promises, and how it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from gspo_lightning.distributed import world_size
from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Prompt, Rollout, SamplingParams


class RolloutError(RuntimeError):
    """No rollout can be had. The weights are those of the last whole rollout, so the run saves them and ends."""


class EngineUnavailableError(RolloutError):
    """Nothing is left that could sample: every rollout server is dead, hangs or answers nonsense."""


class WeightSyncError(RolloutError):
    """The engine does not run the policy's weights; what it sampled would be off-policy without a word."""


class RolloutEngine(Protocol):
    """Samples completions from the current policy.

    An engine that holds memory, processes or files also has a method ``close()``, which gives them back; one that holds
    nothing needs none. ``train.py`` and ``evaluate.py`` call it when a run ends, also upon an error; a program of your
    own does so by `gspo_lightning.rollout.closing_engine`. `EngineTraits` are what else the program asks of an engine.
    """

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """``sampling.num_generations`` completions for each prompt, in the order of ``prompts``.

        The caller has put the policy's autocast in place. Completion g of a prompt draws its random numbers from
        ``(seed, prompt.uid, g)`` alone.

        Raises:
            RolloutError: the engine cannot sample from the policy's weights.
        """
        ...


@dataclass(frozen=True)
class EngineTraits:
    """What the program asks of an engine besides completions. Each is an attribute of that name, which it may have.

    An engine that passes its calls on to another, its attribute ``engine``, has the traits of that one.
    """

    samples_on: Literal["every_rank", "first_rank"] = "every_rank"
    """Where weights are needed, and files of the engine lie: "first_rank" where rank 0 samples for all."""
    staleness: int = 0
    """1 if the next rollout is to be sampled while this one trains (`gspo_lightning.one_step_off`)."""
    environments: Any = None
    """`gspo_lightning.dialogue.Environments` of an engine that samples dialogues."""
    max_concurrent: int = 0
    """Completions decoded at a time in this process, for ``dry_run``; 0 where another process decodes."""


def traits(engine: RolloutEngine) -> EngineTraits:
    """What an engine says of itself, and defaults for the rest."""
    found: dict[str, Any] = {}
    inner: Any = engine
    while inner is not None:
        found = {t.name: getattr(inner, t.name) for t in fields(EngineTraits) if hasattr(inner, t.name)} | found
        inner = getattr(inner, "engine", None)
    return EngineTraits(**found)


def close_engine(engine: RolloutEngine) -> None:
    """Calls the engine's ``close()``, if it has one."""
    close = getattr(engine, "close", None)
    if close is not None:
        close()


@contextlib.contextmanager
def closing_engine(engine: RolloutEngine) -> Iterator[None]:
    """Closes the engine at the end, so that the next run of this process finds its GPU and its shared memory free."""
    try:
        yield
    except BaseException:
        # What ended the run is what must be read, not what cannot be closed after it. One of several ranks has the
        # others to tell first, and its process ends anyway.
        if world_size() == 1:
            with contextlib.suppress(Exception):
                close_engine(engine)
        raise
    close_engine(engine)
