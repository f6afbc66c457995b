"""The protocol of a rollout engine, and its errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

from gspo_lightning.distributed.ranks import world_size
from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Prompt, Rollout, SamplingParams


class RolloutError(RuntimeError):
    """No rollout can be sampled. The weights are those of the last whole rollout, so the run saves them and ends."""


class EngineUnavailableError(RolloutError):
    """No rollout server is left that can sample: each is dead, hangs or answers nonsense."""


class WeightSyncError(RolloutError):
    """The engine does not run the policy's weights; what it sampled would silently be off-policy."""


class RolloutEngine(Protocol):
    """Samples completions from the current policy.

    An engine that holds memory, processes or files also has a method ``close()``, which releases them; one that holds
    nothing needs none. ``train.py`` and ``evaluate.py`` call it when a run ends, also after an error; your own program
    can use `gspo_lightning.rollout.closing_engine`. `EngineTraits` are what else the program reads from an engine.
    """

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """``sampling.num_generations`` completions for each prompt, in the order of ``prompts``.

        The caller has entered the policy's autocast context. Completion g of a prompt draws its random numbers from
        ``(seed, prompt.uid, g)`` alone.

        Raises:
            RolloutError: the engine cannot sample from the policy's weights.
        """
        ...


@dataclass(frozen=True)
class EngineTraits:
    """What the program reads from an engine besides completions: optional attributes with the names of these fields.

    An engine that forwards its calls to another, its attribute ``engine``, has the traits of that one.
    """

    samples_on: Literal["every_rank", "first_rank"] = "every_rank"
    """Where weights are needed and the engine's files are: "first_rank" if rank 0 samples for all."""
    staleness: int = 0
    """1 if the next rollout is to be sampled while this one trains (`gspo_lightning.training.one_step_off`)."""
    environments: Any = None
    """`gspo_lightning.dialogue.Environments` of an engine that samples dialogues. One that has the attribute, also as
    None, is given those of the config (``environment=``)."""
    max_concurrent: int = 0
    """Completions decoded at a time in this process, by our decoders: `gspo_lightning.rollout.check` tries them before
    the first rollout. 0 if another process decodes."""


def within(engine: Any) -> Iterator[Any]:
    """The engine, then the one that it forwards its calls to (its attribute ``engine``), and so on."""
    while engine is not None:
        yield engine
        engine = getattr(engine, "engine", None)


def traits(engine: RolloutEngine) -> EngineTraits:
    """The traits that an engine declares, and defaults for the rest."""
    found: dict[str, Any] = {}
    for inner in within(engine):
        found = {t.name: getattr(inner, t.name) for t in fields(EngineTraits) if hasattr(inner, t.name)} | found
    return EngineTraits(**found)


def close_engine(engine: RolloutEngine) -> None:
    """Calls ``close()`` of the engine, or of the first one `within` it that has it."""
    for inner in within(engine):
        if (close := getattr(inner, "close", None)) is not None:
            close()
            return


@contextlib.contextmanager
def closing_engine(engine: RolloutEngine) -> Iterator[None]:
    """Closes the engine at the end, so that the next run of this process finds its GPU and its shared memory free."""
    try:
        yield
    except BaseException:
        # The error that ended the run must be shown, not a failure to close after it. One of several ranks has to tell
        # the others first, and its process ends anyway.
        if world_size() == 1:
            with contextlib.suppress(Exception):
                close_engine(engine)
        raise
    close_engine(engine)
