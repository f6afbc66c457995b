"""The policy's weights as a rollout engine loads them: hub names, nothing merged in place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from gspo_lightning.errors import UserError
from gspo_lightning.packing.flash import SWITCH
from gspo_lightning.policy.model import Policy

_LAYER = re.compile(r"^(.*?\.)?(layers?|blocks|h)\.\d+\.")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def refuse_merging(quantised: bool, lora_sync: str | None) -> None:
    """Refuses to add an adapter to copies of quantised weights.

    Raises:
        UserError: names the key.
    """
    if quantised and lora_sync == "merged":
        raise UserError(
            "rollout.engine.lora_sync=merged cannot add the adapter to a quantised base (model.quantization); set "
            "rollout.engine.lora_sync=adapter, or model.quantization=null"
        )


def check_base(policy: Policy, lora_sync: str) -> None:
    """Refuses or warns if the policy's base is quantised: an engine reads its own base from the model's folder.

    Where that folder holds the quantised weights, both have the same ones.

    Raises:
        UserError: see `refuse_merging`; or an adapter on experts is to be merged.
    """
    quantised = bool(getattr(policy.base_model, "is_quantized", False))
    refuse_merging(quantised, lora_sync)
    if lora_sync == "merged" and any(type(module).__name__ == "ParamWrapper" for module in policy.modules()):
        raise UserError(
            "rollout.engine.lora_sync=merged does not know adapters on the stacked weights of experts; set "
            "rollout.engine.lora_sync=adapter, or model.lora.target_modules without experts"
        )
    if quantised and not getattr(getattr(policy.base_model, "hf_quantizer", None), "pre_quantized", False):
        warnings.warn(
            "the policy's base is quantised (model.quantization), and the engine samples from the weights as their "
            "folder holds them: sampler_mismatch/abs_mean shows the difference, and mismatch= makes up for it",
            stacklevel=2,
        )


def trained_parameters(policy: Policy) -> Iterator[Tensor]:
    """Parameters that the optimizer changes: all weights, or the adapter's."""
    return (parameter for parameter in policy.parameters() if parameter.requires_grad)


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number that changes with any bit of the tensors or with their order (exact integer sums, so repeatable)."""
    running = RunningChecksum()
    for tensor in tensors:
        running.add(tensor)
    return running.total


class RunningChecksum:
    """`checksum` of the tensors so far."""

    def __init__(self) -> None:
        self.total = self._count = 0

    def add(self, tensor: Tensor) -> None:
        """Adds the next tensor."""
        flat = tensor.detach().contiguous().view(-1)
        size = flat.element_size()
        # Eight bytes at a time if the size allows: nothing to convert, and overflow only drops carries.
        whole = flat.numel() * size % 8 == 0
        if whole and flat.storage_offset() * size % 8:
            flat = flat.clone()
        bits = flat.view(torch.int64 if whole else _BITS[size])
        weighted = (2 * self._count + 1) * int(bits.sum(dtype=torch.int64))
        self.total, self._count = (self.total + weighted) % 2**64, self._count + 1


def weight_parts(policy: Policy, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Every weight under its hub name, in ``dtype``: first those outside the layers, then layer by layer, so that a
    caller that takes them one after the other never holds the model a second time.

    An adapter is added to copies, the base is only read. Tied weights appear once, under the name of the input
    embedding. A float32 policy and ``dtype`` float32 share memory: use a part before the next optimizer step.
    """
    by_layer: dict[str, list[str]] = {"": []}
    for name, _ in policy.base_model.named_parameters():
        if ".lora_" not in name:
            layer = _LAYER.search(name)
            by_layer.setdefault(layer[0] if layer else "", []).append(name)
    for names in by_layer.values():
        yield _part(policy, names, dtype)


def named_weights(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """`weight_parts`, weight by weight."""
    for part in weight_parts(policy, dtype):
        yield from part.items()


@torch.no_grad()
def _part(policy: Policy, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
    part = {name.replace(".base_layer.", "."): _weight(policy, name).to(dtype) for name in names}
    # For some models the hub has other names and divides a layer's weights differently.
    reverted: dict[str, Tensor] = revert_weight_conversion(policy.base_model, part)
    return reverted


def _weight(policy: Policy, name: str) -> Tensor:
    value = policy.base_model.get_parameter(name).detach()
    if ".base_layer." in name and name.endswith(".weight"):
        layer = policy.base_model.get_submodule(name.partition(".base_layer.")[0])
        with SWITCH, torch.autocast(value.device.type, enabled=False):  # which would round the product
            value = value + layer.get_delta_weight("default").to(value.dtype)
    return value


def save_weights(policy: Policy, dtype: torch.dtype, folder: Path) -> int:
    """Writes `weight_parts` to ``folder``, one safetensors file each; returns the checksum of all."""

    def written() -> Iterator[Tensor]:
        for number, part in enumerate(weight_parts(policy, dtype)):
            part = {name: value.cpu().contiguous() for name, value in sorted(part.items())}
            save_file(part, folder / f"{number:05}.safetensors")
            yield from part.values()

    folder.mkdir()
    return checksum(written())


def load_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights that `save_weights` has written, in its order, one tensor in memory at a time.

    All files are opened before the first is read, so removing the folder then does no harm.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(f, framework="pt")) for f in sorted(folder.glob("*.safetensors"))]
        for file in opened:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


def save_adapter(policy: Policy, folder: Path) -> Path:
    """The adapter alone, in peft's format."""
    policy.model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
    return folder


def adapter_rank(policy: Policy) -> int:
    """Rank of the LoRA adapter."""
    return int(_adapter_config(policy).r)


def adapter_scale(policy: Policy) -> float:
    """Factor that the product of the LoRA matrices is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA)."""
    config = _adapter_config(policy)
    return float(config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))


def _adapter_config(policy: Policy) -> Any:
    return policy.model.peft_config["default"]  # type: ignore[index]
