"""GSPO and GRPO fine-tuning of language and vision-language models on Lightning.

Public names are imported on first use, so that ``import gspo_lightning`` costs nothing and the number of threads can
still be set before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AdvantageEstimator": "gspo_lightning.advantages",
    "Completion": "gspo_lightning.types",
    "GSPOModule": "gspo_lightning.module",
    "Objective": "gspo_lightning.objective",
    "PackedBatch": "gspo_lightning.packing",
    "Policy": "gspo_lightning.policy.model",
    "PolicyLoader": "gspo_lightning.policy.load",
    "PolicyLoss": "gspo_lightning.types",
    "Prompt": "gspo_lightning.types",
    "PromptBatch": "gspo_lightning.types",
    "PromptDataModule": "gspo_lightning.data",
    "RewardSet": "gspo_lightning.rewards",
    "Rollout": "gspo_lightning.types",
    "SamplingParams": "gspo_lightning.types",
    "Schedule": "gspo_lightning.schedule",
    "ScoredRollout": "gspo_lightning.types",
    "TransformersEngine": "gspo_lightning.rollout",
    "UpdateSettings": "gspo_lightning.update",
    "UserError": "gspo_lightning.errors",
    "ValidationSettings": "gspo_lightning.validation",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
