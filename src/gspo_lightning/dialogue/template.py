"""From the messages of the environment to the tokens between two turns of the policy.

The policy's own tokens are never rendered and tokenised again: only what the chat template puts after an assistant's
turn is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gspo_lightning.errors import UserError

Message = dict[str, Any]
REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError)
"""Exceptions of templates on messages they cannot read; most check nothing and append the content to a string."""

_TURN = "ASSISTANT-TURN"
_MESSAGE = "MESSAGE-OF-THE-ENVIRONMENT"


def continuation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: dict[str, Any],
    has_end: bool,
    eos: tuple[int, ...],
    prompt: str | Sequence[Message] = (),
) -> list[int]:
    """Token ids from the end of a turn of the policy to the beginning of its next turn.

    Args:
        tokenizer: holds the chat template.
        messages: what the environment says: one message, or several in a row, of the same role.
        template_kwargs: arguments of the chat template.
        has_end: whether the turn has its end token; if not, it is added here, as context.
        eos: the policy's end tokens.
        prompt: prompt of the dialogue. If it is a string, no template is used: the texts follow unchanged.

    Raises:
        UserError: the chat template refuses a message or leaves it out, or does not end a turn with one of ``eos``.
    """
    if isinstance(prompt, str):
        text = "".join(str(message["content"]) for message in messages)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    behind = _behind_turn(tokenizer, messages, template_kwargs, prompt)
    if len(messages) > 1 or str(messages[0]["content"]).strip() not in behind:
        # The words themselves may be written in another way, such as JSON, and two messages may say the same.
        marks = [f"{_MESSAGE}-{number}." for number in range(len(messages))]
        known = [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
        rendered = _behind_turn(tokenizer, known, template_kwargs, prompt)
        if not all(mark in rendered for mark in marks):
            raise UserError(
                f"the chat template leaves out what a message of role {messages[0]['role']} says; use another "
                "environment, or a model whose template knows that role"
            )
    for token in eos:
        end = tokenizer.decode([token])
        if behind.startswith(end):
            ids = tokenizer(behind[len(end) :], add_special_tokens=False)["input_ids"]
            return [*([] if has_end else [token]), *ids]
    raise UserError(
        "the chat template does not end an assistant's turn with an end-of-sequence token of the model, so a dialogue "
        "cannot go on after it"
    )


def _behind_turn(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: dict[str, Any],
    prompt: Sequence[Message],
) -> str:
    """What the chat template writes after an assistant's turn that the messages follow.

    The prompt's system message is included only if the template refuses to do without it: some templates write it into
    the newest message of the user, where it would appear a second time.
    """
    talk = [{"role": "user", "content": "."}, {"role": "assistant", "content": _TURN}, *messages]
    system = [first for first in prompt[:1] if first["role"] not in ("user", "assistant")]
    for conversation in (talk, [*system, *talk])[: 1 + len(system)]:
        try:
            text = tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False, **template_kwargs
            )
            return str(text).rpartition(_TURN)[2].lstrip("\n")
        except TemplateError as error:
            refusal = error
    raise UserError(f"the chat template refuses a message of role {messages[0]['role']}: {refusal}") from refusal


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], template_kwargs: dict[str, Any]) -> str:
    """The conversation as the template writes it; empty if it refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs))
    except REFUSALS:
        return ""
