"""The forms in which models write calls of tools, and which of them a chat template writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gspo_lightning.dialogue import calls
from gspo_lightning.dialogue.calls import CallError, Schemas
from gspo_lightning.dialogue.template import rendered
from gspo_lightning.errors import UserError

_KEY = "environment.call_form"
_ASKED, _SAID = "QUESTION-OF-THE-USER.", "ANSWER-OF-THE-MODEL"
_QUESTION = {"role": "user", "content": _ASKED}
_NAME, _ARGUMENTS = "name_of_a_tool", {"argument": "value of the argument"}
_SCHEMAS: Schemas = {_NAME: {"function": {"parameters": {"properties": {"argument": {"type": "string"}}}}}}
_ID = "a1b2c3d4e"
"""Mistral's templates refuse ids of another length."""


@dataclass(frozen=True)
class Form:
    """How calls are written: one parser."""

    calls: Callable[[str], list[str]]
    """The text of each call of a turn; none: the turn is an answer."""
    read: Callable[[str, Schemas], tuple[str, dict[str, Any]]]
    """Name and arguments of a call; raises `CallError`."""
    mark: str
    """A text that no other form has: a prompt with it says that calls are to be written so."""
    tokens: tuple[str, ...]
    """Tokens that a turn is decoded with, although they may be special tokens of the vocabulary."""
    call_id: Callable[[str], str | None] | None = None
    """The id that the model gave to a call; None as a field: results name no call."""


FORMS = {
    "mistral": Form(
        calls.mistral_calls,
        calls.read_mistral,
        "[TOOL_CALLS]",
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"),
        calls.mistral_id,
    ),
    "glm": Form(
        calls.tagged_calls,
        calls.read_glm,
        "<arg_key>",
        ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "xml": Form(calls.xml_calls, calls.read_xml, "<function=", ("<tool_call>", "</tool_call>")),
    "json": Form(calls.json_calls, calls.read_json, "<tool_call>", ("<tool_call>", "</tool_call>")),
}
"""By the name that ``environment.call_form`` gives them; a prompt is searched for their marks in this order."""


def form_of(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any], wanted: str | None = None) -> Form:
    """The form in which the chat template writes a call of an earlier turn, or else asks for calls.

    Args:
        tokenizer: holds the chat template.
        template_kwargs: arguments of the chat template, ``tools`` among them.
        wanted: name of a form, which is then not looked for.

    Raises:
        UserError: calls are written or asked for in no form that is read.
    """
    if wanted is not None:
        return FORMS[wanted]
    for system in ((), ({"role": "system", "content": "."},)):  # some templates want one
        for message in _messages():
            turn = _turn_of(tokenizer, [*system, _QUESTION], message, template_kwargs)
            form = next((form for form in FORMS.values() if _reads(form, turn)), None)
            if form is not None:
                return form
            if _NAME in turn:
                raise UserError(
                    f"{_KEY}: the model's chat template writes a call as {turn.strip()[:200]!r}, in none of the forms "
                    f"that are read; use another model, or name the form that your prompts ask for: {', '.join(FORMS)}"
                )
    asked = rendered(tokenizer, [_QUESTION], template_kwargs)
    for form in FORMS.values():
        if form.mark in asked:
            return form
    raise UserError(
        f"{_KEY}: the model's chat template does not say how calls are written; name the form that your prompts ask "
        f"for: {', '.join(FORMS)}"
    )


def _messages() -> list[dict[str, Any]]:
    """An assistant's turn with a call; templates take the arguments as a mapping, some as JSON text."""
    return [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": _ID, "function": {"name": _NAME, "arguments": arguments}}],
        }
        for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS))
    ]


def _turn_of(
    tokenizer: PreTrainedTokenizerBase,
    before: list[dict[str, Any]],
    message: dict[str, Any],
    template_kwargs: dict[str, Any],
) -> str:
    """What the template writes as the words of the message; empty if it refuses it."""
    plain = rendered(tokenizer, [*before, {"role": "assistant", "content": _SAID}], template_kwargs)
    header, _, end = plain.rpartition(_ASKED)[2].partition(_SAID)
    turn = rendered(tokenizer, [*before, message], template_kwargs).rpartition(_ASKED)[2]
    return turn.removeprefix(header).removeprefix(header.rstrip()).removesuffix(end)


def _reads(form: Form, turn: str) -> bool:
    try:
        return [form.read(call, _SCHEMAS) for call in form.calls(turn)] == [(_NAME, _ARGUMENTS)]
    except CallError:
        return False
