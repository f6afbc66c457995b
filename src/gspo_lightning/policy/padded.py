"""The fall-back for architectures that packing does not know: each completion is a padded row through the model itself.

Only the model's own forward and `generate` are used: logits come from the model with all that its head does to them,
and images are passed as its processor made them, once per completion. This is exact, but computes prompts and
images once per completion. `gspo_lightning.policy.check` chooses it, with a warning.

The model's own forward puts features wherever it finds a placeholder, so after a prompt with images a completion must
have none: the policy's distribution is that of the model without placeholders, in sampling as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gspo_lightning.errors import UserError
from gspo_lightning.packing import PackedBatch, logits_logprobs
from gspo_lightning.types import Prompt

PLACEHOLDERS = tuple(f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index"))
"""Names in configs of the tokens that features replace."""

NEVER = -1e4
"""A logit whose token has probability 0 in every dtype; not minus infinity, since 0 times that is NaN."""

IMAGES_TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2}
"""Relative L2 distance of logits; 0.1 in narrower dtypes. A prompt that saw its completion was off by 0.25 or more."""

CAUSES = (ValueError, TypeError, RuntimeError, LookupError, AttributeError)
"""What a model raises at inputs that it does not know."""
_checked: WeakSet[PreTrainedModel] = WeakSet()


def padded_logprobs(
    model: PreTrainedModel, packed: PackedBatch, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """The result of `Policy.forward`, from padded rows: one forward of the model per group.

    Groups differ in their images, and models differ in how they batch images of several prompts; completions of
    one prompt have the same ones.
    """
    row, first = packed.input_ids[0], 0
    # In an unpacked sequence a completion begins right after its prompt, so its positions are those of the layout.
    predictors = packed.layout.positions[packed.predictor_index]
    outputs = []
    for number, (group, places) in enumerate(zip(packed.layout.groups, packed.layout.prompt_places(), strict=True)):
        lengths, start = group.completion_lengths, int(places[-1]) + 1
        prompt, parts = row[places], row[start : start + sum(lengths)].split(lengths)
        owner = packed.prompts[number] if packed.prompts else None
        mine = (packed.sequence_index >= first) & (packed.sequence_index < first + len(lengths))
        logits = padded_logits(model, prompt, parts, owner)
        chosen = logits[packed.sequence_index[mine] - first, predictors[mine]]
        if owner is not None and owner.mm_inputs:
            chosen = without_placeholders(chosen, model)
        outputs.append(logits_logprobs(chosen, packed.target_ids[mine], temperature, with_entropy))
        first += len(lengths)
    logprobs, entropy = zip(*outputs, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def without_placeholders(logits: Tensor, model: PreTrainedModel) -> Tensor:
    """``(..., V)`` logits under which no placeholder is ever drawn."""
    ids = _placeholder_ids(model).to(logits.device)
    return logits.index_fill(-1, ids[ids < logits.shape[-1]], NEVER)


def _placeholder_ids(model: PreTrainedModel) -> Tensor:
    found = {getattr(model.config, name, None) for name in PLACEHOLDERS}
    return torch.tensor([token for token in found if isinstance(token, int) and token >= 0], dtype=torch.long)


def repeated_media(
    media: dict[str, Tensor], rows: int, width: int, device: torch.device, completion_type: int = 0
) -> dict[str, Tensor]:
    """The vision inputs of one prompt for ``rows`` rows of it, each ``width`` tokens long.

    Inputs with a value per token continue after the prompt: ``..._type_ids`` with ``completion_type``, and the mask of
    what a token sees of the images (Mllama) with that of the last token. All others are repeated along their first
    dimension, which counts images or patches.
    """
    out = {}
    for name, value in media.items():
        if name.endswith("type_ids"):
            tokens = value.new_full((rows, width), completion_type)
            tokens[:, : value.shape[-1]] = value
            out[name] = tokens.to(device)
        elif name == "cross_attention_mask":
            last = value[:, -1:].repeat_interleave(width - value.shape[1], dim=1)
            out[name] = torch.cat([torch.cat([value, last], dim=1)] * rows).to(device)
        else:
            out[name] = torch.cat([value] * rows).to(device)
    return out


@torch.no_grad()
def check_images(model: PreTrainedModel, prompt: Prompt) -> None:
    """Compares, once per model that passes, what follows a prompt with images in padded rows and in the prompt alone.

    An architecture may have inputs that are not extended correctly, or a prompt that attends to what comes after it.

    Raises:
        UserError: they differ, or the model fails at the padded rows; names the row.
    """
    if model in _checked:
        return
    device = model.get_input_embeddings().weight.device
    ids = prompt.input_ids.to(device)
    text = ids[~torch.isin(ids, _placeholder_ids(model).to(device))]
    parts = [text[-3:], text[-1:]]
    kind = model.config.model_type
    try:
        model._validate_model_kwargs(dict(prompt.mm_inputs))  # as `generate` will
        with torch.autocast(device.type, enabled=False):
            alone, padded = (
                padded_logits(model, ids, rows, prompt)[:, len(ids) - 1].double() for rows in ([ids[:0]], parts)
            )
    except torch.OutOfMemoryError:
        raise
    except CAUSES as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise UserError(f"row {prompt.uid}: models of type {kind} cannot be trained on images ({cause})") from error
    distance = ((padded - alone).norm(dim=1) / (alone - alone.mean()).norm()).max().item()
    if not distance <= IMAGES_TOLERANCE.get(model.dtype, 0.1):
        raise UserError(
            f"row {prompt.uid}: models of type {kind} cannot be trained on images: the logits at the end of the "
            f"prompt, with and without a completion, differ by {distance:.1e}"
        )
    _checked.add(model)


def padded_logits(model: PreTrainedModel, ids: Tensor, parts: Sequence[Tensor], prompt: Prompt | None) -> Tensor:
    """``(n, tokens, V)`` logits of the model on one right-padded row for each of n completions of a prompt.

    Args:
        model: the whole model, with its head.
        ids: ``(P,)`` tokens of the prompt, on the model's device.
        parts: tokens of each completion; may be empty.
        prompt: has the vision inputs; None for a prompt of text.

    Raises:
        UserError: the model rejects the images; names the row.
    """
    width = len(ids) + max(map(len, parts))
    rows = ids.new_full((len(parts), width), padding_id(model))
    mask = torch.zeros_like(rows)
    for row, part in enumerate(parts):
        length = len(ids) + len(part)
        rows[row, :length] = torch.cat([ids, part])
        mask[row, :length] = 1
    media: dict[str, Any] = {}
    if prompt is not None:
        # In PaliGemma, 0 is the prompt, which attends to all of itself, and 1 what follows; in others, 0 is text.
        completion_type = int(model.config.model_type == "paligemma")
        media = repeated_media(prompt.mm_inputs, len(parts), width, ids.device, completion_type)
    try:
        return model(input_ids=rows, attention_mask=mask, use_cache=False, **media).logits
    except ValueError as error:
        if prompt is None or not media:
            raise
        raise UserError(f"row {prompt.uid}: the model rejects its images ({error})") from error


def padding_id(model: PreTrainedModel) -> int:
    """A token for padding, which is masked but must not be a placeholder of images."""
    config: Any = model.config.get_text_config()
    padding = config.pad_token_id
    return padding if isinstance(padding, int) and 0 <= padding < config.vocab_size else 0
