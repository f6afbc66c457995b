"""Tiny random vision-language models and prompts with images for them; the padded forward as the other way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from gspo_lightning.policy.attention import attention_implementation, register
from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Prompt
from tests.support import use_plain_norms

IMAGE, VIDEO, START, END, VOCABULARY = 95, 96, 97, 98, 100
_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_VISION = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
FAMILIES: dict[str, Any] = {
    "qwen2_vl": (
        Qwen2VLForConditionalGeneration, Qwen2VLConfig,
        {**_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig,
        {**_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16,
         "fullatt_block_indexes": [1], "tokens_per_second": 2},
    ),
    "qwen3_vl": (
        Qwen3VLForConditionalGeneration, Qwen3VLConfig,
        {**_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64,
         "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    ),
}  # fmt: skip


def small_config(special_ids: dict[str, int], tower: int = 32) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of two layers for SmolLM2's tokenizer; draws nothing but seeds torch for who draws the weights.

    Args:
        special_ids: of the placeholders, as `gspo_lightning.policy.tiny_vlm` has them.
        tower: width of the vision half.
    """
    ids = {f"{token.strip('<|>').replace('_pad', '')}_token_id": number for token, number in special_ids.items()}
    torch.manual_seed(0)
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        vision_config={"depth": 2, "hidden_size": tower, "intermediate_size": tower, "num_heads": 2,
                       "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 112},
        tie_word_embeddings=True, **ids,
    )  # fmt: skip


class NoTokenizer:
    """Stands for the tokenizer of models that have none."""

    eos_token_id = 1
    unk_token_id = None

    def convert_tokens_to_ids(self, token: str) -> None:
        return None

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


def vision_model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model of the family, weights large enough for context to matter."""
    model_class, config_class, vision = FAMILIES[family]
    text = {**_TEXT, "rope_parameters": _ROPE, **({"head_dim": 16} if family == "qwen3_vl" else {})}
    torch.manual_seed(0)
    config = config_class(text_config=text, vision_config=vision, **_IDS, tie_word_embeddings=False)
    model = model_class(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def vision_policy(family: str, dtype: torch.dtype = torch.float64, *, train_vision: bool = True) -> Policy:
    """A random model of the family in our attention."""
    register()
    model = vision_model(family, dtype)
    model.set_attn_implementation(attention_implementation("auto", has_vision=True))
    model.model.visual.requires_grad_(train_vision)
    model.generation_config.eos_token_id = 1
    if dtype == torch.float64:
        use_plain_norms(model)
    return Policy(model.train(), NoTokenizer(), has_vision=True)  # type: ignore[arg-type]


def image_prompt(uid: str, *parts: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> Prompt:
    """``parts``: an int for so many tokens of text, ``(h, w)`` for an image of that grid, ``(t, h, w)`` for a video."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[Tensor] = []
    types: list[Tensor] = []
    grids: dict[int, list[list[int]]] = {1: [], 2: []}
    pixels: dict[int, list[Tensor]] = {1: [], 2: []}
    for part in parts:
        if isinstance(part, int):
            ids.append(torch.randint(3, 90, (part,), generator=generator))
            types.append(torch.zeros(part, dtype=torch.long))
            continue
        kind = len(part) - 1
        grid = [1, *part] if kind == 1 else list(part)
        patches = grid[0] * grid[1] * grid[2]
        count = patches // 4
        ids.append(torch.tensor([START, *[IMAGE if kind == 1 else VIDEO] * count, END]))
        types.append(torch.tensor([0, *[kind] * count, 0]))
        grids[kind].append(grid)
        pixels[kind].append(torch.randn(patches, 3 * 2 * 4 * 4, generator=generator).to(dtype))
    mm_inputs: dict[str, Tensor] = {}
    for kind, (name, grid_name) in ((1, ("pixel_values", "image_grid_thw")),
                                    (2, ("pixel_values_videos", "video_grid_thw"))):  # fmt: skip
        if grids[kind]:
            mm_inputs |= {name: torch.cat(pixels[kind]), grid_name: torch.tensor(grids[kind])}
    if mm_inputs:
        mm_inputs["mm_token_type_ids"] = torch.cat(types)
    return Prompt(uid, "", torch.cat(ids), {}, mm_inputs)


def padded_vision_logprobs(policy: Policy, groups: list[tuple[Prompt, list[Tensor]]]) -> Tensor:
    """The textbook way: each completion its own padded row with all images of its prompt, the model's own forward."""
    rows = [(prompt, completion) for prompt, completions in groups for completion in completions]
    width = max(len(p.input_ids) + len(c) for p, c in rows)
    ids, mask, types = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    media: dict[str, list[Tensor]] = {}
    for row, (prompt, completion) in enumerate(rows):
        length = len(prompt.input_ids) + len(completion)
        ids[row, :length] = torch.cat([prompt.input_ids, completion])
        mask[row, :length] = 1
        for name, value in prompt.mm_inputs.items():
            if name == "mm_token_type_ids":
                types[row, : len(value)] = value
            else:
                media.setdefault(name, []).append(value)
    model: Any = policy.base_model
    model.model.rope_deltas = None
    kwargs = {name: torch.cat(values) for name, values in media.items()}
    logits = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, **kwargs).logits
    log_p = torch.log_softmax(logits, dim=-1)
    chosen = []
    for row, (prompt, completion) in enumerate(rows):
        start = len(prompt.input_ids) - 1
        chosen.append(log_p[row, start : start + len(completion)].gather(1, completion[:, None]).squeeze(1))
    return torch.cat(chosen)
