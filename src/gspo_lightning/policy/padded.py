"""The fall-back for architectures that packing does not know: every completion a padded row through the model itself.

Nothing of the model is assumed but its own forward and `generate`: logits come from the model with all that its head
does to them, and pictures go in as its processor made them, once per completion. It is exact, and it computes prompts
and pictures as often as there are completions. `gspo_lightning.policy.check` chooses it, and says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gspo_lightning.errors import UserError
from gspo_lightning.packing import PackedBatch, logits_logprobs
from gspo_lightning.types import Prompt


def padded_logprobs(
    model: PreTrainedModel, packed: PackedBatch, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """What `Policy.forward` gives, from padded rows: one forward of the model per group.

    Groups differ in their pictures, and models differ in how they batch pictures of several prompts; completions of
    one prompt have the same ones.
    """
    row, start, first = packed.input_ids[0], 0, 0
    # In an unpacked sequence a completion begins right behind its prompt, so its positions are those of the layout.
    predictors = packed.layout.positions[packed.predictor_index]
    outputs = []
    for number, group in enumerate(packed.layout.groups):
        lengths = group.completion_lengths
        prompt, *parts = row[start : start + group.num_tokens].split([group.prompt_length, *lengths])
        media = packed.prompts[number].mm_inputs if packed.prompts else {}
        mine = (packed.sequence_index >= first) & (packed.sequence_index < first + len(lengths))
        logits = _forward(model, prompt, parts, media, packed.prompts[number : number + 1])
        chosen = logits[packed.sequence_index[mine] - first, predictors[mine]]
        outputs.append(logits_logprobs(chosen, packed.target_ids[mine], temperature, with_entropy))
        start, first = start + group.num_tokens, first + len(lengths)
    logprobs, entropy = zip(*outputs, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def repeated_media(media: dict[str, Tensor], rows: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """The vision inputs of one prompt for so many rows of it, each ``width`` tokens long.

    What has a value per token (``..._type_ids``) goes on with zeros; all else is repeated along its first dimension,
    which counts pictures or patches.
    """
    out = {}
    for name, value in media.items():
        if name.endswith("type_ids"):
            tokens = value.new_zeros(rows, width)
            tokens[:, : value.shape[-1]] = value
            out[name] = tokens.to(device)
        else:
            out[name] = torch.cat([value] * rows).to(device)
    return out


def _forward(
    model: PreTrainedModel, prompt: Tensor, parts: Sequence[Tensor], media: dict[str, Tensor], names: Sequence[Prompt]
) -> Tensor:
    width = len(prompt) + max(map(len, parts))
    ids = prompt.new_full((len(parts), width), padding_id(model))
    mask = torch.zeros_like(ids)
    for row, part in enumerate(parts):
        length = len(prompt) + len(part)
        ids[row, :length] = torch.cat([prompt, part])
        mask[row, :length] = 1
    inputs: dict[str, Any] = repeated_media(media, len(parts), width, ids.device)
    try:
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits
    except ValueError as error:
        if not media:
            raise
        raise UserError(f"row {names[0].uid}: the model refuses its pictures ({error})") from error


def padding_id(model: PreTrainedModel) -> int:
    """A token for padded places; what they hold is masked, but it must not be a placeholder of pictures."""
    config: Any = model.config.get_text_config()
    padding = config.pad_token_id
    return padding if isinstance(padding, int) and 0 <= padding < config.vocab_size else 0
