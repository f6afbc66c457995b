"""Rollouts of several turns: an environment answers the policy, and what it says is context, never trained on."""

from gspo_lightning.dialogue.calculator import Calculator
from gspo_lightning.dialogue.environment import Environment, Environments, Reply
from gspo_lightning.dialogue.guess import GuessTheNumber
from gspo_lightning.dialogue.tools import Tools

__all__ = ["Calculator", "Environment", "Environments", "GuessTheNumber", "Reply", "Tools"]
