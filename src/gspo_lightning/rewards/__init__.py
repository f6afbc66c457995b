"""Rewards: the protocol, the set that calls and combines them, and the functions that come with the package.

Public names are imported on first use: a worker process that scores text needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "CodeTests": "code",
    "ForTasks": "by_task",
    "LengthTarget": "length",
    "Limits": "sandbox",
    "MathVerify": "mathematics",
    "MatmulReward": "matmul",
    "MultipleChoice": "text",
    "RewardModel": "reward_model",
    "RewardSet": "reward_set",
    "RewardSpec": "reward_set",
    "SoftOverlong": "length",
    "TagFormat": "text",
    "TaggedNumber": "text",
    "environment_reward": "functions",
    "exact_match": "functions",
    "last_integer": "functions",
    "letter_share": "functions",
    "numeric_match": "functions",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"gspo_lightning.rewards.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
