"""Rollout engines: who samples the completions."""

from gspo_lightning.rollout.engine import RolloutEngine
from gspo_lightning.rollout.transformers_engine import TransformersEngine

__all__ = ["RolloutEngine", "TransformersEngine"]
