"""A policy on fake tensors (torch's `FakeTensorMode`), which have shapes but no memory, to estimate memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.integrations import moe

from gspo_lightning.errors import UserError
from gspo_lightning.packing import PackedBatch
from gspo_lightning.policy.adapter import add_lora, check_adapter
from gspo_lightning.policy.attention import attention_implementation, register
from gspo_lightning.policy.lean import lighten
from gspo_lightning.policy.load import DTYPES, PolicyLoader
from gspo_lightning.policy.model import Policy, without_adapter
from gspo_lightning.policy.packable import can_pack, may_pack
from gspo_lightning.policy.reading import load_config
from gspo_lightning.policy.vision import packs_images, vision_parts


def fake_policy(loader: PolicyLoader) -> Policy:
    """The policy on tensors without memory; to be called under `FakeTensorMode`.

    Raises:
        UserError: the architecture cannot be packed.
    """
    register()
    config = load_config(loader.path)
    model = _without_weights(loader) if may_pack(config) else None
    if model is None or not can_pack(without_adapter(model)):
        raise UserError(
            f"dry_run=true: models of type {config.model_type} run padded, which cannot be estimated; remove "
            "dry_run=true"
        )
    _make_fake(model)
    return Policy(model, None, has_vision=packs_images(config))


def saved_bytes(policy: Policy, packed: PackedBatch, precision: str) -> float:
    """Bytes that autograd keeps of a training forward, without parameters but with their casts to bfloat16."""
    own = {parameter.untyped_storage()._cdata for parameter in policy.parameters()}
    seen: dict[int, int] = {}
    # Kept tensors must live until they are counted: the address of a freed storage may be used again.
    alive: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    mixed = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), mixed, _products_of_experts_without_memory():
        policy(replace(packed, prompts=()))
    return float(sum(seen.values()))


def _without_weights(loader: PolicyLoader) -> nn.Module:
    """The model as `PolicyLoader.load` builds it, adapter included, on the meta device."""
    config = load_config(loader.path)
    _override(config, loader.overrides)
    vision = packs_images(config)
    kind: Any = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    attention = attention_implementation("sdpa", vision)
    with torch.device("meta"):
        model = kind.from_config(
            config, attn_implementation=attention, dtype=DTYPES[loader.dtype], trust_remote_code=False
        ).train()
        if not loader.compile:
            lighten(model, recomputed=loader.gradient_checkpointing, check=False)
        if loader.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not loader.train_vision:
            for part in vision_parts(model).values():
                part.requires_grad_(False)
        if loader.lora is None:
            return model
        wrapped = add_lora(model, loader.lora, loader.train_vision)
        if loader.lora.adapter is not None:
            check_adapter(wrapped, loader.lora)
        return wrapped


def _override(config: Any, overrides: dict[str, Any]) -> None:
    """Sets what `from_pretrained` would; entries of a nested config are set one by one."""
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(getattr(config, name, None), PreTrainedConfig):
            _override(getattr(config, name), value)
        else:
            setattr(config, name, value)


def _make_fake(model: nn.Module) -> None:
    """Replaces meta tensors by fake ones; tied ones stay tied, which moving the module would not ensure."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), fresh)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


@contextmanager
def _products_of_experts_without_memory() -> Iterator[None]:
    """Makes experts use transformers' own grouped product, which keeps the same tensors: torch's supports tensors
    without memory only in bfloat16. (In float64 the policy uses a loop, which keeps some percent more.)
    """
    can_use = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda *_: False
    try:
        yield
    finally:
        moe._can_use_grouped_mm = can_use
