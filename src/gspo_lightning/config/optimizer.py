"""Refuses settings of the optimizer and its schedule, before there is a model."""

from __future__ import annotations

from typing import Any

import torch

from gspo_lightning.config.build import build
from gspo_lightning.config.effects import no_effect
from gspo_lightning.config.targets import LOOKUPS
from gspo_lightning.errors import UserError, reason
from gspo_lightning.training.guarded_step import parameter_groups


def check_optimizer(node: dict[str, Any], *, on_gpu: bool) -> None:
    """Its constructor knows what it accepts, and can be asked before there is a model; torch's can take a step, too.

    Others' steps may need a GPU, as those of torch do with ``capturable``, or several ranks.
    """
    if str(node.get("_target_")).startswith("bitsandbytes.optim.Paged") and not torch.cuda.is_available():
        raise UserError(
            "optimizer: a paged optimizer moves its state between GPU and CPU memory, and there is no GPU here; use "
            "optimizer=adamw_8bit"
        )
    probe = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    try:
        optimizer = build(node)(parameter_groups(probe))
        if str(node.get("_target_")).startswith("torch.optim.") and not (on_gpu and node.get("capturable")):
            for parameter in probe:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    except Exception as error:  # whatever a constructor or a step of the user's own raises
        is_made = not node.get("_partial_") and node.get("_target_") not in LOOKUPS
        hint = "; the parameters are given later: add optimizer._partial_=true" if is_made else ""
        raise UserError(f"optimizer: {node.get('_target_')} rejects its settings ({reason(error)}){hint}") from error
    if not all(parameter.isfinite().all() for parameter in probe):
        raise UserError(f"optimizer: a step of {node.get('_target_')} with these settings makes weights infinite")


def check_schedule(plain: dict[str, Any]) -> None:
    """Refuses a lowest rate where the rate is constant."""
    scheduler = plain["scheduler"]
    if scheduler.get("name") == "constant" and scheduler.get("min_ratio"):
        no_effect(
            f"scheduler.min_ratio={scheduler['min_ratio']} has no effect with scheduler.name=constant; remove it, or "
            "set scheduler=cosine or linear",
            plain,
        )
