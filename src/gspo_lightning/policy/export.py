"""Saving the policy so that plain transformers and peft load it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from gspo_lightning.errors import UserError
from gspo_lightning.policy.model import Policy


def export_policy(policy: Policy, folder: Path, *, merge_lora: bool) -> Path:
    """Writes weights (safetensors), config, tokenizer and image processor into ``folder``.

    A LoRA policy is saved as its adapter, or, with ``merge_lora``, folded into a copy of the weights: the policy
    itself is never merged, because merging and unmerging drifts. What an earlier export of the other
    kind left there is removed: transformers would load an adapter that lies beside merged weights on top of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = policy.model
    if policy.has_adapter and merge_lora:
        if getattr(policy.base_model, "is_quantized", False):
            raise UserError(
                "export.merge_lora=true: folded into weights of 4 or 8 bits, the adapter would be rounded away; export "
                "the adapter alone (export.merge_lora=false)"
            )
        with torch.no_grad():
            model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    model.save_pretrained(folder)  # type: ignore[operator]
    for other in folder.glob("model*.safetensors*" if policy.has_adapter and not merge_lora else "adapter_*"):
        other.unlink()
    policy.tokenizer.save_pretrained(folder)
    if policy.processor is not None:
        policy.processor.save_pretrained(folder)
    return folder
