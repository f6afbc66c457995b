"""The vision half of a policy: features of images once per prompt, and the inputs of the language half.

The language model is called directly, with embeddings that hold the features at the placeholders of the prompts.
A placeholder that the policy itself samples in a completion is an ordinary token: in decoding as in training. (The
models' own forward counts placeholders by token value and would refuse such a completion.)

While the tower is frozen its features are kept as long as the prompt object lives, which is one rollout: generation,
old, reference and all training passes share them. Those of a held-out prompt, which lives as long as the run, are
forgotten when its validation is done (`Vision.forget`). A tower that trains is forwarded in every pass, over the
prompts of the pass at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gspo_lightning.errors import UserError
from gspo_lightning.packing import SharedPrefixLayout
from gspo_lightning.types import Prompt

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Model types whose positions and features this module knows."""

PIXELS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}
TOKEN_TYPE = {"image": 1, "video": 2}
"""Value of ``mm_token_type_ids`` at the placeholders of a modality; 0 is text."""


def has_vision(config: Any) -> bool:
    """Whether a model of this config reads images."""
    return getattr(config, "vision_config", None) is not None


def packs_images(config: Any) -> bool:
    """Whether images of a model of this config can be packed: positions and features are known. Others run padded."""
    return has_vision(config) and config.model_type in FAMILIES


def vision_parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What a model has besides its language model and its head, by name: the tower, the projector."""
    decoder = model.get_decoder()
    body = getattr(model, "model", None)  # a language model may have another name for it
    if body is None or decoder is body or not has_vision(model.config):
        return {}
    return {name: part for name, part in body.named_children() if part is not decoder}


@dataclass(frozen=True)
class Features:
    """The tower's output for the images, or the videos, of one prompt."""

    tokens: Tensor
    """``(placeholders, H)``: replaces the placeholders' embeddings."""
    deepstack: tuple[Tensor, ...] = ()
    """Of the same shape, added after the first decoder layers (Qwen3-VL)."""


class Vision:
    """Reads the vision inputs of prompts for a model of one of ``FAMILIES``.

    Args:
        model: the transformers model, without an adapter around it (its layers may hold one).
        cache_from: the `Vision` of a model with the same frozen tower, whose features are shared.
    """

    def __init__(self, model: PreTrainedModel, cache_from: Vision | None = None) -> None:
        self._body: Any = model.model
        self._config: Any = model.config
        self.calls = 0
        """Forwards of the tower so far."""
        self._positions: WeakKeyDictionary[Prompt, Tensor] = WeakKeyDictionary()
        self._features: WeakKeyDictionary[Prompt, dict[str, Features]] = WeakKeyDictionary()
        if cache_from is not None:
            self._features = cache_from._features

    @property
    def language_model(self) -> Any:
        """The decoder, which takes embeddings."""
        return self._body.language_model

    @property
    def is_frozen(self) -> bool:
        """Whether no parameter of the tower is trained."""
        return not any(parameter.requires_grad for parameter in self._body.visual.parameters())

    # ---------------------------------------------------------------- positions

    def prompt_positions(self, prompt: Prompt) -> Tensor:
        """``(3, P + 1)`` temporal, height and width positions; the last column is where completions begin.

        They are those of one unpacked sequence of the prompt and a token of text.
        """
        if prompt not in self._positions:
            length = len(prompt.input_ids)
            if not prompt.mm_inputs:
                return torch.arange(length + 1).expand(3, -1)
            types = prompt.mm_inputs["mm_token_type_ids"].view(1, -1)
            names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            grids = {name: value for name, value in prompt.mm_inputs.items() if name in names}
            positions, _ = self._body.get_rope_index(
                torch.cat([prompt.input_ids, prompt.input_ids.new_zeros(1)])[None],
                mm_token_type_ids=torch.cat([types, types.new_zeros(1, 1)], dim=1),
                **grids,
            )
            self._positions[prompt] = positions[:, 0]
        return self._positions[prompt]

    def positions(self, layout: SharedPrefixLayout, prompts: Sequence[Prompt]) -> Tensor:
        """``(4, 1, T)`` of a packed row: positions in the sequence, then the three axes."""
        parts = [torch.arange(layout.common).expand(3, -1)]  # text, as prompts with images have nothing in common
        for group, prompt in zip(layout.groups, prompts, strict=True):
            own = self.prompt_positions(prompt)
            parts.append(own[:, layout.common : -1])
            parts.extend(own[:, -1:] + torch.arange(length) for length in group.completion_lengths)
        axes = torch.cat(parts, dim=1).to(layout.device)
        return torch.cat([layout.positions[None], axes])[:, None]

    def probe(self, text: Tensor, generator: torch.Generator) -> Prompt:
        """A prompt of a random image of two by four patches and ``text``, for the first-use check."""
        vision, config = self._config.vision_config, self._config
        merge = vision.spatial_merge_size
        count = 2
        patch = vision.patch_size**2 * vision.temporal_patch_size * getattr(vision, "in_channels", 3)
        ids = torch.tensor([config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id])
        types = torch.zeros(len(ids) + len(text), dtype=torch.long)
        types[1 : 1 + count] = TOKEN_TYPE["image"]
        safe = text[(text != config.image_token_id) & (text != config.video_token_id)]
        inputs = {
            "pixel_values": torch.randn(count * merge**2, patch, generator=generator),
            "image_grid_thw": torch.tensor([[1, merge, count * merge]]),
            "mm_token_type_ids": types[: len(ids) + len(safe)],
        }
        return Prompt("probe", "", torch.cat([ids, safe]), {}, inputs)

    # ---------------------------------------------------------------- features

    def inputs(self, input_ids: Tensor, layout: SharedPrefixLayout, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The arguments of the language model for a packed row ``input_ids`` ``(1, T)`` of these prompts."""
        embeddings = self._body.get_input_embeddings()(input_ids)
        inputs: dict[str, Any] = {"position_ids": self.positions(layout, prompts)}
        features = self._features_of(prompts)
        joined, mask = _join(features, layout, prompts)
        if joined is None:
            return inputs | {"inputs_embeds": embeddings + self.nothing(embeddings)}
        tokens = joined.tokens.to(embeddings.device, embeddings.dtype)
        inputs["inputs_embeds"] = embeddings.masked_scatter(mask[None, :, None], tokens)
        if joined.deepstack:
            inputs |= {"visual_pos_masks": mask[None], "deepstack_visual_embeds": list(joined.deepstack)}
        return inputs

    def forget(self, prompts: Sequence[Prompt] | None = None) -> None:
        """Frees the memory of these prompts' features, None for all; they are computed again if needed."""
        for prompt in list(self._features) if prompts is None else prompts:
            self._features.pop(prompt, None)

    def _features_of(self, prompts: Sequence[Prompt]) -> list[dict[str, Features]]:
        seen = [prompt for prompt in prompts if prompt.mm_inputs]
        if not self.is_frozen:
            fresh = dict(zip(map(id, seen), self._encode(seen), strict=True))
            return [fresh.get(id(prompt), {}) for prompt in prompts]
        missing = [prompt for prompt in dict.fromkeys(seen) if prompt not in self._features]
        with torch.no_grad():
            self._features.update(zip(missing, self._encode(missing), strict=True))
        return [self._features.get(prompt, {}) for prompt in prompts]

    def _encode(self, prompts: Sequence[Prompt]) -> list[dict[str, Features]]:
        """One forward of the tower for all images of the prompts, and one for all videos."""
        found: list[dict[str, Features]] = [{} for _ in prompts]
        for modality, (pixels, grid) in PIXELS.items():
            having = [(n, prompt) for n, prompt in enumerate(prompts) if pixels in prompt.mm_inputs]
            if not having:
                continue
            encode = getattr(self._body, f"get_{modality}_features")
            self.calls += 1
            output = encode(
                torch.cat([prompt.mm_inputs[pixels] for _, prompt in having]).to(self._device),
                torch.cat([prompt.mm_inputs[grid] for _, prompt in having]).to(self._device),
                return_dict=True,
            )
            levels = getattr(output, "deepstack_features", None) or []
            start = 0
            for number, prompt in having:
                here = slice(start, start + len(prompt.mm_inputs[grid]))
                tokens = torch.cat(output.pooler_output[here])
                deepstack = tuple(torch.cat(level[here]) for level in levels)
                found[number][modality] = _checked(Features(tokens, deepstack), prompt, modality)
                start = here.stop
        return found

    def nothing(self, like: Tensor) -> Tensor:
        """Zero, connected to a tower that trains: without images its gradient is 0, on every rank, and not missing."""
        if self.is_frozen or not torch.is_grad_enabled():
            return like.new_zeros(())
        parts = [p.sum() for p in self._body.visual.parameters() if p.requires_grad]
        return torch.stack(parts).sum().to(like.dtype) * 0.0

    @property
    def _device(self) -> torch.device:
        return self.language_model.get_input_embeddings().weight.device


def _checked(features: Features, prompt: Prompt, modality: str) -> Features:
    placeholders = int((prompt.mm_inputs["mm_token_type_ids"] == TOKEN_TYPE[modality]).sum())
    if placeholders != len(features.tokens):
        raise UserError(
            f"row {prompt.uid}: {placeholders} {modality} tokens for {len(features.tokens)} {modality} features; "
            "the processor does not belong to this model"
        )
    return features


def _join(
    features: Sequence[dict[str, Features]], layout: SharedPrefixLayout, prompts: Sequence[Prompt]
) -> tuple[Features | None, Tensor]:
    """The features of a row in the order of its placeholders, and the mask ``(T,)`` of those."""
    mask = torch.zeros(layout.num_tokens, dtype=torch.bool)
    tokens: list[Tensor] = []
    deepstack: list[list[Tensor]] = []
    for own, group, prompt, start in zip(features, layout.groups, prompts, layout.starts(), strict=True):
        if own:
            types = prompt.mm_inputs["mm_token_type_ids"].cpu()
            mask[start : start + group.prompt_length] = types > 0
            tokens.append(_interleave({m: f.tokens for m, f in own.items()}, types))
            levels = zip(*(f.deepstack for f in own.values()), strict=True)
            deepstack.append([_interleave(dict(zip(own, level, strict=True)), types) for level in levels])
    if not tokens:
        return None, mask
    joined = Features(torch.cat(tokens), tuple(torch.cat(level) for level in zip(*deepstack, strict=True)))
    return joined, mask.to(layout.device)


def _interleave(by_modality: dict[str, Tensor], types: Tensor) -> Tensor:
    """Features of images and videos in the order of their placeholders."""
    if len(by_modality) == 1:
        return next(iter(by_modality.values()))
    order = types[types > 0]
    first = next(iter(by_modality.values()))
    out = first.new_zeros(len(order), first.shape[1])
    for modality, tokens in by_modality.items():
        index = (order == TOKEN_TYPE[modality]).nonzero().squeeze(1).to(out.device)
        out = out.index_copy(0, index, tokens)
    return out
