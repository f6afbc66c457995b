"""What a rollout engine promises, and how it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

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
    own does so by `gspo_lightning.rollout.closing_engine`.
    """

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """``sampling.num_generations`` completions for each prompt, in the order of ``prompts``.

        The caller has put the policy's autocast in place. Completion g of a prompt draws its random numbers from
        ``(seed, prompt.uid, g)`` alone.

        Raises:
            RolloutError: the engine cannot sample from the policy's weights.
        """
        ...


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
