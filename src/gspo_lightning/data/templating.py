"""From a dataset row to token ids, by the model's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gspo_lightning.data.columns import checked_prompt
from gspo_lightning.dialogue.functions import template_tools
from gspo_lightning.dialogue.template import REFUSALS, rendered
from gspo_lightning.errors import UserError
from gspo_lightning.types import Messages, Prompt

_MARK = "TEXT-OF-A-PART"
_WRITTEN_OUT = re.compile(rf"""["']text["']: ?["']{_MARK}""")
_OURS = frozenset({"conversation", "tokenize", "add_generation_prompt", "return_dict", "return_tensors", "truncation"})


def encode_prompt(
    prompt: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any] | None = None,
    where: str = "prompt",
) -> Tensor:
    """``(P,)`` int64 token ids of a prompt.

    Messages go through the chat template, up to where the assistant's turn begins; a plain string is
    tokenised with the special tokens the tokenizer itself adds, unless it begins with BOS, but without an EOS at
    its end. Whatever the template adds, such as a default system prompt, stays. Text in parts is joined if the
    template reads no parts.

    Raises:
        UserError: there is no chat template, it refuses the messages, or the text has a lone surrogate; the message
            begins with ``where``.
    """
    refuse_surrogates(prompt, where)
    if isinstance(prompt, str):
        # A text in a template's marks begins with its BOS; the tokenizer of Llama 3 would add a second one.
        bos = tokenizer.bos_token
        has_bos = bos is not None and prompt.startswith(bos)
        ids = tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]
        if has_added_eos(ids, prompt, tokenizer):
            ids = ids[:-1]
        return torch.tensor(ids, dtype=torch.long)
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: the prompt is a conversation, but the tokenizer has no chat template; use plain "
            "prompts (data.task.conversational=false for rows of a file) or a model that has one"
        )
    try:
        ids = tokenizer.apply_chat_template(
            with_joined_text(prompt, tokenizer, template_kwargs),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            **(template_kwargs or {}),
        )
    except REFUSALS as error:
        raise UserError(f"{where}: the model's chat template rejects the prompt: {error}") from error
    return torch.tensor(ids, dtype=torch.long)


def has_added_eos(ids: Sequence[int] | Tensor, text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer put an EOS after a text that has none, as ``add_eos_token`` asks for.

    That is for supervised training; nothing would continue such a prompt.
    """
    eos = tokenizer.eos_token
    return len(ids) > 1 and eos is not None and int(ids[-1]) == tokenizer.eos_token_id and not text.endswith(eos)


def with_joined_text(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any] | None = None
) -> Messages:
    """The conversation with contents that have only text parts joined to strings, if the template reads no parts."""
    if not any(_is_text_in_parts(message) for message in messages):
        return messages
    if _reads_parts(messages, tokenizer, template_kwargs or {}):
        return messages
    return [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if _is_text_in_parts(message)
        else message
        for message in messages
    ]


def _is_text_in_parts(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )


def _reads_parts(messages: Messages, tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> bool:
    """Whether the template renders the last part's text, and does not write the list out as Python or JSON.

    Tried with the conversation itself: some templates refuse others. How the template formats the parts does not
    matter (some put each on its own line, or trim it).
    """
    last = [{"type": "text", "text": _MARK}]
    marked = [
        {**message, "content": message["content"][:-1] + last} if _is_text_in_parts(message) else message
        for message in messages
    ]
    text = rendered(tokenizer, marked, template_kwargs)
    return _MARK in text and not _WRITTEN_OUT.search(text)


def refuse_surrogates(prompt: str | Messages, where: str) -> None:
    """Refuses text with half a character (a lone surrogate, such as ``\\ud800`` of a JSON file): it has no tokens.

    Raises:
        UserError: the message begins with ``where``.
    """
    contents = [prompt] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        try:
            str(text).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise UserError(
                f"{where}: the prompt has {half}, an unpaired surrogate; fix the text or remove the row"
            ) from error


def make_prompt(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, uid: str, template_kwargs: dict[str, Any] | None = None
) -> Prompt:
    """Makes a `Prompt` of a row, for custom loaders; `PromptDataModule` does this for tasks.

    Args:
        row: has ``prompt``, a string or a list of messages; its other columns go to the reward functions.
        tokenizer: the policy's.
        uid: permanent name of the row; sampling seeds derive from it.
        template_kwargs: for the chat template.

    Raises:
        UserError: the row has no ``prompt``, or it is empty or no conversation, or the chat template refuses it.
    """
    if "prompt" not in row:
        raise UserError(f"row {uid}: there is no column 'prompt'; the row has {', '.join(row)}")
    prompt = checked_prompt(row["prompt"], f"row {uid}")
    ids = encode_prompt(prompt, tokenizer, template_kwargs, f"row {uid}")
    return Prompt(uid=uid, prompt=prompt, input_ids=ids, sample=row)


def with_schemas(template_kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options of the chat template with a JSON schema in place of each function, or name of one, in ``tools``.

    Raises:
        UserError: a function is no tool; the line begins with the key.
    """
    if "tools" not in template_kwargs:
        return template_kwargs
    return {**template_kwargs, "tools": template_tools(template_kwargs["tools"], "data.chat_template_kwargs.tools")}


def check_template_kwargs(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> None:
    """Refuses options that the chat template would ignore: templates do not report unknown ones.

    Raises:
        UserError: names the option that the template never reads, or that the program itself sets, or says that the
            template shows no tools.
    """
    _check_tools(tokenizer, template_kwargs)
    template = tokenizer.chat_template or ""
    text = "\n".join(template.values()) if isinstance(template, dict) else template
    for name in template_kwargs:
        if name in _OURS:
            raise UserError(f"data.chat_template_kwargs.{name} is set by the program; remove it")
        if not re.search(rf"\b{re.escape(name)}\b", text):
            raise UserError(
                f"data.chat_template_kwargs.{name} has no effect: the chat template never reads it; remove it"
            )


def _check_tools(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> None:
    """Renders a message with the tools and without: a template may read them for nothing, or for another role alone."""
    if not template_kwargs.get("tools"):
        return
    if not tokenizer.chat_template:
        raise UserError(
            "data.chat_template_kwargs.tools: the tokenizer has no chat template to show the tools; use a model "
            "that has one, such as Qwen3 or Llama 3.1"
        )
    user = {"role": "user", "content": "."}
    # Some templates show tools only if there is a system message.
    pairs = [
        [rendered(tokenizer, talk, {**template_kwargs, "tools": tools}) for tools in (template_kwargs["tools"], None)]
        for talk in ([user], [{"role": "system", "content": "."}, user])
    ]
    # A template that refuses both wants other messages: the prompts show whether it takes them.
    tried = [shown == hidden for shown, hidden in pairs if shown]
    if tried and all(tried):
        raise UserError(
            "data.chat_template_kwargs.tools: the model's chat template shows no tools; use a model whose template "
            "does, such as Qwen3 or Llama 3.1"
        )
