"""What a checkpoint says of weights that it leaves out: those of a frozen base and of the reference."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from gspo_lightning.distributed.ranks import rank
from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home
from gspo_lightning.rollout.weights import adapter_scale

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule


def base_state(module: GSPOModule) -> dict[str, Any]:
    """The model that they are read from, its quantization, and the factor of a LoRA adapter on them."""
    loader, folder = module.policy_loader, from_home(module.policy_loader.path)
    path = str(folder.resolve()) if folder.is_dir() else loader.path
    return {"model.path": path, "model.quantization": loader.quantization, "scale": _scale(module)}


def check_base(module: GSPOModule, saved: dict[str, Any]) -> None:
    """Compares with the result of `base_state` in a checkpoint.

    Raises:
        UserError: the adapter has another factor, with which its weights are another model.
    """
    own = base_state(module)
    if saved["scale"] != own["scale"] and None not in (saved["scale"], own["scale"]):
        raise UserError(
            f"model.lora.alpha: the checkpoint's adapter is multiplied by {saved['scale']:g}, and this run's by "
            f"{own['scale']:g}; keep alpha, r and use_rslora of that run"
        )
    if rank() or not _leaves_out(module):
        return
    for key in ("model.path", "model.quantization"):
        if saved[key] != own[key]:
            warnings.warn(
                f"ckpt_path: that run had {key}={saved[key]}, and this one has {own[key]}, from which the weights come "
                "that no checkpoint holds: frozen ones, and those of the reference",
                stacklevel=2,
            )


def _leaves_out(module: GSPOModule) -> bool:
    policy: Any = module.policy
    reference_stays = bool(module.references) and not module.reference_moves
    return reference_stays or not all(p.requires_grad for p in policy.parameters())


def _scale(module: GSPOModule) -> float | None:
    """That of a LoRA adapter; None without one."""
    policy: Any = module.policy
    config = getattr(policy.model, "peft_config", {}).get("default")
    return adapter_scale(policy) if hasattr(config, "lora_alpha") else None
