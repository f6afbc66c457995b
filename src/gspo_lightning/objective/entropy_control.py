"""Adaptive entropy control: the weight of the entropy bonus follows the entropy that is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from gspo_lightning.objective.objective import Objective


@dataclass
class EntropyControl:
    """The weight from optimizer step to optimizer step (Skywork-OR1, arXiv 2505.22312).

    The bonus acts in a step if the entropy of the step before was at most ``objective.entropy_target``. Every step
    whose entropy is at most that raises the weight by ``entropy_coef_delta``, and every other lowers it, within
    ``entropy_coef_min`` and ``entropy_coef_max``. The first step has no step before it, and no bonus. A resumed run
    goes on with the weight that it had, whatever ``entropy_coef`` is.
    """

    coefficient: float | None = None
    """None before the first step with a target, which begins with ``objective.entropy_coef``."""
    entropy: float = math.inf
    """Of the last step, in nats per token; infinite before the first."""

    def at_this_step(self, objective: Objective) -> Objective:
        """The objective with the weight of the next step; the same without a target."""
        if objective.entropy_target is None:
            return objective
        if self.coefficient is None:
            self.coefficient = objective.entropy_coef
        acts = self.entropy <= objective.entropy_target
        return replace(objective, entropy_coef=_bounded(objective, self.coefficient) if acts else 0.0)

    def observe(self, objective: Objective, entropy: float) -> None:
        """Takes in the mean entropy of a step, over all ranks, in nats per token; one that is not finite is ignored."""
        if objective.entropy_target is None or not math.isfinite(entropy):
            return
        self.entropy = entropy
        delta = objective.entropy_coef_delta
        before = objective.entropy_coef if self.coefficient is None else self.coefficient
        moved = before + (delta if entropy <= objective.entropy_target else -delta)
        self.coefficient = _bounded(objective, moved)

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient, "entropy": self.entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes in the result of `state_dict`."""
        self.coefficient, self.entropy = state["coefficient"], state["entropy"]


def _bounded(objective: Objective, coefficient: float) -> float:
    return min(max(coefficient, objective.entropy_coef_min), objective.entropy_coef_max)
