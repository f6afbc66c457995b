"""Ratios, losses, KL and aggregation: the mathematics, in pure torch."""

from gspo_lightning.objective.loss_refusals import Finding
from gspo_lightning.objective.losses import LOSSES, Clip, LossFunction, LossInputs, LossSpec
from gspo_lightning.objective.objective import Objective
from gspo_lightning.objective.refusals import check_objective

__all__ = ["LOSSES", "Clip", "Finding", "LossFunction", "LossInputs", "LossSpec", "Objective", "check_objective"]
