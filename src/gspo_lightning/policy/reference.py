"""A frozen reference that follows the policy."""

from __future__ import annotations

import torch

from gspo_lightning.policy.model import Policy


@torch.no_grad()
def move_reference(reference: Policy, policy: Policy, alpha: float) -> None:
    """``reference = alpha * policy + (1 - alpha) * reference``, in place (TR-DPO, arXiv 2404.09656)."""
    for theirs, ours in zip(reference.parameters(), policy.parameters(), strict=True):
        theirs.lerp_(ours.to(theirs), alpha)
