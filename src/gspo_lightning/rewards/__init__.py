"""Rewards: the protocol, the set that calls and combines them, and the functions that come with the package."""

from gspo_lightning.rewards.by_task import ForTasks
from gspo_lightning.rewards.functions import exact_match, last_integer, letter_share, numeric_match
from gspo_lightning.rewards.reward_set import RewardSet, RewardSpec

__all__ = ["ForTasks", "RewardSet", "RewardSpec", "exact_match", "last_integer", "letter_share", "numeric_match"]
