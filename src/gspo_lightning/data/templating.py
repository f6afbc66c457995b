"""From a dataset row to token ids, by the model's own chat template."""

from __future__ import annotations

import re
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gspo_lightning.errors import UserError
from gspo_lightning.types import Messages

_OURS = frozenset({"conversation", "tokenize", "add_generation_prompt", "return_dict", "return_tensors", "truncation"})


def encode_prompt(
    prompt: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any] | None = None,
    where: str = "prompt",
) -> Tensor:
    """``(P,)`` int64 token ids of a prompt.

    Messages go through the chat template, up to where the assistant's turn begins; a plain string is
    tokenised with the special tokens the tokenizer itself adds. Whatever the template adds, such as a default
    system prompt, stays.

    Raises:
        UserError: there is no chat template, or it refuses the messages; the message begins with ``where``.
    """
    if isinstance(prompt, str):
        return torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.long)
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: the prompt is a conversation, but the tokenizer has no chat template; use plain "
            "prompts (data.task.conversational=false for rows of a file) or a model that has one"
        )
    try:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False, **(template_kwargs or {})
        )
    except TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses the prompt: {error}") from error
    return torch.tensor(ids, dtype=torch.long)


def check_template_kwargs(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> None:
    """Refuses options that the chat template would ignore: templates do not complain of unknown ones.

    Raises:
        UserError: names the option that the template never reads, or that is not for the user to set.
    """
    template = tokenizer.chat_template or ""
    text = "\n".join(template.values()) if isinstance(template, dict) else template
    for name in template_kwargs:
        if name in _OURS:
            raise UserError(f"data.chat_template_kwargs.{name} is set by the program; remove it")
        if not re.search(rf"\b{re.escape(name)}\b", text):
            raise UserError(
                f"data.chat_template_kwargs.{name} has no effect: the chat template never reads it; remove it"
            )
