"""Weights in 4 or 8 bits: those asked for, those in a folder, and refusals of what cannot work."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, Mxfp4Config

from gspo_lightning.errors import UserError

_NOT_QUANTISED = ["visual", "vision_tower", "vision_model", "multi_modal_projector", "lm_head"]


def quantization_arguments(quantization: str | None, lora: Any, path: str, config: Any) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a quantised base; empty for any other.

    Args:
        quantization: ``nf4``, ``int8`` or None.
        lora: the adapter's settings, or None.
        path: path of the model, for messages.
        config: the model's config, which says how the weights are stored.

    Raises:
        UserError: such a base cannot be made, or would have nothing to train.
    """
    check_quantization(quantization, lora)
    if is_mxfp4(config):
        if quantization is not None:
            raise UserError(
                f"model.quantization={quantization}: the experts of {config.model_type} are not layers that "
                "bitsandbytes can quantise; set it to null (its MXFP4 weights are trained on in bfloat16)"
            )
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    if getattr(config, "quantization_config", None) and lora is None:
        raise UserError(
            f"model.path={path} holds quantised weights, which cannot be trained; add an adapter: lora=language"
        )
    return {} if quantization is None else {"quantization_config": _bitsandbytes(quantization)}


def _bitsandbytes(quantization: str) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_QUANTISED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=_NOT_QUANTISED,
    )


def is_mxfp4(config: Any) -> bool:
    """Whether the weights are stored in MXFP4, as gpt-oss is published; MXFP4 kernels have no backward."""
    quantization = getattr(config, "quantization_config", None) or {}
    return dict(quantization).get("quant_method") == "mxfp4"


def check_quantization(quantization: str | None, lora: Any) -> None:
    """Refuses a quantised base if it cannot work.

    Raises:
        UserError: there is no GPU for 8 bits, or no adapter to train.
    """
    if quantization is None:
        return
    if quantization == "int8" and not torch.cuda.is_available():
        raise UserError("model.quantization=int8 needs a GPU, and there is none here; nf4 runs on a CPU too")
    if lora is None:
        raise UserError(f"model.quantization={quantization} leaves no weight to train; add an adapter: lora=language")


def keep_packing(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights at the first forward in evaluation mode on a CPU.

    After repacking, its backward and its dequantisation still read the old layout: gradients are silently wrong.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def say_nothing_of_casts() -> None:
    """Silences the line that bitsandbytes logs at every product of an 8-bit layer whose input is not in float16.

    Here none is, and there are several such layers per layer of a model, each called for every token that is decoded.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
