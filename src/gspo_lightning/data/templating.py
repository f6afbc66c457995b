"""From a dataset row to token ids, by the model's own chat template."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gspo_lightning.types import Messages


def encode_prompt(
    prompt: str | Messages, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None
) -> Tensor:
    """``(P,)`` int64 token ids of a prompt.

    Messages go through the chat template, up to where the assistant's turn begins; a plain string is tokenised with
    the special tokens the tokenizer itself adds.
    """
    if isinstance(prompt, str):
        return torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.long)
    ids = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=False, **(template_kwargs or {})
    )
    return torch.tensor(ids, dtype=torch.long)
