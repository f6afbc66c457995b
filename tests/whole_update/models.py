"""Tiny random models that see images or have experts, in folders, and prompts with images for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gspo_lightning.policy.micro import build_micro_tokenizer
from gspo_lightning.types import Prompt
from tests.vision.models import FAMILIES, VOCABULARY, image_prompt, vision_model
from tests.whole_update.case import Case
from tests.whole_update.padded_models import PADDED, padded_model, padded_prompt

SEEING = tuple(FAMILIES)
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")
KINDS = SEEING + MIXTURES

WINDOW = 5
"""Shorter than most prompts with their completions."""

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
    # The config asks for the loss of the router, as published ones may; no part of it is trained here.
    "output_router_logits": True,
}  # fmt: skip


def build(kind: str, folder: Path) -> None:
    """Writes the model with the micro model's tokenizer; weights are large enough for context and routes to matter."""
    build_micro_tokenizer().save_pretrained(folder)
    if kind in SEEING:
        vision_model(kind).save_pretrained(folder)
        return
    if kind in PADDED:
        padded_model(kind).save_pretrained(folder)
        return
    torch.manual_seed(0)
    model = _mixture(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("bias"):
                # Experts of gpt-oss are (expert, in, out), all other matrices (..., out, in).
                inputs = parameter.shape[1] if kind == "gpt_oss" and parameter.ndim == 3 else parameter.shape[-1]
                parameter.normal_(std=inputs**-0.5)
            elif "norm" not in name:  # biases and sinks
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)


def _mixture(kind: str) -> Any:
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **experts, head_dim=8))
    if kind == "mixtral":
        return MixtralForCausalLM(
            MixtralConfig(**_SIZES, num_local_experts=4, intermediate_size=24, sliding_window=WINDOW)
        )
    return GptOssForCausalLM(
        GptOssConfig(
            **_SIZES, num_local_experts=4, intermediate_size=24, head_dim=8, sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )  # fmt: skip


def seen_prompt(case: Case, uid: str, number: int) -> Prompt:
    """Text with no image, with one, with several of different sizes, or with a video; drawn apart from all else."""
    random = Random(f"images {case.seed} {number}")
    if case.model in PADDED:
        return padded_prompt(case.model, uid, random)
    sizes = [(2, 2), (2, 4), (4, 2), (4, 6)]
    video = (1 if case.model == "qwen3_vl" else 2, 4, 2)  # Qwen3-VL writes a time stamp before every frame
    parts: list[Any] = [random.choice([1, 3])]
    for medium in random.choice([[], [0], [0], [0, 0], [0, 0, 0], [video], [video, 0]]):
        parts += [medium or random.choice(sizes), random.choice([1, 2])]
    if random.random() < 0.2 and len(parts) > 1:
        parts.pop()  # the prompt ends with an image
    return replace(image_prompt(uid, *parts, seed=1000 * case.seed + number), prompt="")
