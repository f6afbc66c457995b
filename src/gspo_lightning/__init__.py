"""GSPO and GRPO fine-tuning of language and vision-language models on Lightning.

Public names are imported on first use, so that ``import gspo_lightning`` costs nothing and the number of threads can
still be set before torch is loaded. docs/api.md lists them with their documentation.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gspo_lightning.advantages import AdvantageEstimator as AdvantageEstimator
    from gspo_lightning.data import (
        PromptDataModule as PromptDataModule,
    )
    from gspo_lightning.data import (
        RowsTask as RowsTask,
    )
    from gspo_lightning.data import (
        Task as Task,
    )
    from gspo_lightning.data import (
        make_prompt as make_prompt,
    )
    from gspo_lightning.dialogue import (
        Environment as Environment,
    )
    from gspo_lightning.dialogue import (
        Environments as Environments,
    )
    from gspo_lightning.dialogue import (
        Reply as Reply,
    )
    from gspo_lightning.dialogue import (
        Tools as Tools,
    )
    from gspo_lightning.errors import UserError as UserError
    from gspo_lightning.module import GSPOModule as GSPOModule
    from gspo_lightning.objective import LossInputs as LossInputs
    from gspo_lightning.objective import LossSpec as LossSpec
    from gspo_lightning.objective import Objective as Objective
    from gspo_lightning.packing import (
        PackedBatch as PackedBatch,
    )
    from gspo_lightning.packing import (
        linear_logprobs as linear_logprobs,
    )
    from gspo_lightning.packing import (
        pack as pack,
    )
    from gspo_lightning.packing import (
        plan_micro_batches as plan_micro_batches,
    )
    from gspo_lightning.pass_at_k import PassAtK as PassAtK
    from gspo_lightning.policy.load import LoraSettings as LoraSettings
    from gspo_lightning.policy.load import PolicyLoader as PolicyLoader
    from gspo_lightning.policy.model import Policy as Policy
    from gspo_lightning.reinforce_plus_plus import ReinforcePlusPlus as ReinforcePlusPlus
    from gspo_lightning.rewards import RewardSet as RewardSet
    from gspo_lightning.rewards import RewardSpec as RewardSpec
    from gspo_lightning.rollout import RolloutEngine as RolloutEngine
    from gspo_lightning.rollout import TransformersEngine as TransformersEngine
    from gspo_lightning.rollout import VLLMEngine as VLLMEngine
    from gspo_lightning.rollout import VLLMServerEngine as VLLMServerEngine
    from gspo_lightning.rollout import closing_engine as closing_engine
    from gspo_lightning.training.schedule import Schedule as Schedule
    from gspo_lightning.training.update import Minibatch as Minibatch
    from gspo_lightning.training.update import UpdateSettings as UpdateSettings
    from gspo_lightning.training.validation import ValidationSettings as ValidationSettings
    from gspo_lightning.types import (
        Completion as Completion,
    )
    from gspo_lightning.types import (
        PolicyLoss as PolicyLoss,
    )
    from gspo_lightning.types import (
        Prompt as Prompt,
    )
    from gspo_lightning.types import (
        PromptBatch as PromptBatch,
    )
    from gspo_lightning.types import (
        Rollout as Rollout,
    )
    from gspo_lightning.types import (
        SamplingParams as SamplingParams,
    )
    from gspo_lightning.types import (
        ScoredRollout as ScoredRollout,
    )

__version__ = "0.1.0"

_PUBLIC = {
    "AdvantageEstimator": "gspo_lightning.advantages",
    "Completion": "gspo_lightning.types",
    "Environment": "gspo_lightning.dialogue",
    "Environments": "gspo_lightning.dialogue",
    "GSPOModule": "gspo_lightning.module",
    "LoraSettings": "gspo_lightning.policy.load",
    "LossInputs": "gspo_lightning.objective",
    "LossSpec": "gspo_lightning.objective",
    "Minibatch": "gspo_lightning.training.update",
    "Objective": "gspo_lightning.objective",
    "PackedBatch": "gspo_lightning.packing",
    "PassAtK": "gspo_lightning.pass_at_k",
    "Policy": "gspo_lightning.policy.model",
    "PolicyLoader": "gspo_lightning.policy.load",
    "PolicyLoss": "gspo_lightning.types",
    "Prompt": "gspo_lightning.types",
    "PromptBatch": "gspo_lightning.types",
    "PromptDataModule": "gspo_lightning.data",
    "ReinforcePlusPlus": "gspo_lightning.reinforce_plus_plus",
    "Reply": "gspo_lightning.dialogue",
    "RewardSet": "gspo_lightning.rewards",
    "RewardSpec": "gspo_lightning.rewards",
    "Rollout": "gspo_lightning.types",
    "RolloutEngine": "gspo_lightning.rollout",
    "RowsTask": "gspo_lightning.data",
    "SamplingParams": "gspo_lightning.types",
    "Schedule": "gspo_lightning.training.schedule",
    "ScoredRollout": "gspo_lightning.types",
    "Task": "gspo_lightning.data",
    "Tools": "gspo_lightning.dialogue",
    "TransformersEngine": "gspo_lightning.rollout",
    "UpdateSettings": "gspo_lightning.training.update",
    "UserError": "gspo_lightning.errors",
    "VLLMEngine": "gspo_lightning.rollout",
    "VLLMServerEngine": "gspo_lightning.rollout",
    "ValidationSettings": "gspo_lightning.training.validation",
    "closing_engine": "gspo_lightning.rollout",
    "linear_logprobs": "gspo_lightning.packing",
    "make_prompt": "gspo_lightning.data",
    "pack": "gspo_lightning.packing",
    "plan_micro_batches": "gspo_lightning.packing",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
