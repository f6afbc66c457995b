"""Saving the policy so that plain transformers and peft load it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from gspo_lightning.errors import UserError
from gspo_lightning.policy.model import Policy


def export_policy(policy: Policy, folder: Path, *, merge_lora: bool, image_size: dict[str, int] | None = None) -> Path:
    """Writes weights (safetensors), config, tokenizer and image processor into ``folder``.

    A LoRA policy is saved as its adapter, or, with ``merge_lora``, folded into a copy of the weights: the policy
    itself is never merged, because merging and unmerging drifts. If whole weights are saved, an adapter that an earlier
    export left there is removed: transformers would load it on top of them.

    Args:
        policy: whole, not split over ranks.
        folder: made if it does not exist.
        merge_lora: see above.
        image_size: ``size`` of the image processor, if the images in training had other limits than its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = policy.model
    if policy.has_adapter and merge_lora:
        if getattr(policy.base_model, "is_quantized", False):
            raise UserError(
                "export.merge_lora=true: folded into weights of 4 or 8 bits, the adapter would be rounded away; export "
                "the adapter alone (export.merge_lora=false)"
            )
        _detach_states(model)
        with torch.no_grad():
            model = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    _save(model, folder)
    if not policy.has_adapter or merge_lora:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).unlink(missing_ok=True)
    policy.tokenizer.save_pretrained(folder)
    if (processor := policy.processor) is not None:
        if image_size is not None:
            processor = copy.deepcopy(processor)
            processor.image_processor.size = image_size
        processor.save_pretrained(folder)
    _let_others_read(folder)
    return folder


def _let_others_read(folder: Path) -> None:
    """Gives weights the permissions of the other files: safetensors lets nobody but the owner read what it writes."""
    mode = (folder / "tokenizer_config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        if file.stat().st_mode != mode:  # file systems without permissions of files refuse to change them
            file.chmod(mode)


def _detach_states(model: torch.nn.Module) -> None:
    """Cuts what layers keep of the last forward (RecurrentGemma) from its graph, with which it could not be copied."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                setattr(module, name, value.detach())


def _save(model: Any, folder: Path) -> None:
    """``model.save_pretrained``, also with settings of ``generate`` that transformers loads and refuses to save.

    Such as a temperature without ``do_sample``, which many models were published with: they are written as they are.
    """
    own: Any = model.generation_config if isinstance(model, PreTrainedModel) else None  # an adapter has none
    try:
        if own is not None:
            own.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(folder)
        finally:
            model.generation_config = own
        own.to_json_file(folder / "generation_config.json")
    else:
        model.save_pretrained(folder)
