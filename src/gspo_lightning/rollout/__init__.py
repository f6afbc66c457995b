"""Rollout engines: who samples the completions."""

from gspo_lightning.rollout.engine import (
    EngineTraits,
    EngineUnavailableError,
    RolloutEngine,
    RolloutError,
    WeightSyncError,
    closing_engine,
)
from gspo_lightning.rollout.replay import ReplayEngine
from gspo_lightning.rollout.transformers_engine import TransformersEngine
from gspo_lightning.rollout.vllm_engine import VLLMEngine
from gspo_lightning.rollout.vllm_server import VLLMServerEngine

__all__ = [
    "EngineTraits",
    "EngineUnavailableError",
    "ReplayEngine",
    "RolloutEngine",
    "RolloutError",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServerEngine",
    "WeightSyncError",
    "closing_engine",
]
