"""From a message of the environment to the tokens between two turns of the policy.

The policy's own tokens are never rendered and tokenised anew: only what the chat template puts behind an assistant's
turn is.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gspo_lightning.errors import UserError

_TURN = "ASSISTANT-TURN"
_MESSAGE = "MESSAGE-OF-THE-ENVIRONMENT"


def continuation(
    tokenizer: PreTrainedTokenizerBase,
    message: dict[str, Any],
    template_kwargs: dict[str, Any],
    has_end: bool,
    eos: tuple[int, ...],
    plain: bool = False,
) -> list[int]:
    """Token ids from behind a turn of the policy to where its next turn begins.

    Args:
        tokenizer: with the chat template.
        message: what the environment says.
        template_kwargs: for the chat template.
        has_end: whether the turn has its end token; if not, it is added here, as context.
        eos: the policy's end tokens.
        plain: the prompt is a string without a template: the text of the message follows as it is.

    Raises:
        UserError: the chat template refuses the message or leaves it out, or does not end a turn with one of ``eos``.
    """
    if plain:
        return list(tokenizer(str(message["content"]), add_special_tokens=False)["input_ids"])
    behind = _behind_turn(tokenizer, message, template_kwargs)
    if str(message["content"]).strip() not in behind:
        known = message | {"content": _MESSAGE}  # the words themselves may be written in another way, such as JSON
        if _MESSAGE not in _behind_turn(tokenizer, known, template_kwargs):
            raise UserError(
                f"the chat template leaves out what a message of role {message['role']} says; use another environment, "
                "or a model whose template knows that role"
            )
    for token in eos:
        end = tokenizer.decode([token])
        if behind.startswith(end):
            ids = tokenizer(behind[len(end) :], add_special_tokens=False)["input_ids"]
            return [*([] if has_end else [token]), *ids]
    raise UserError(
        "the chat template does not end an assistant's turn with an end-of-sequence token of the model, so a dialogue "
        "cannot go on behind it"
    )


def _behind_turn(tokenizer: PreTrainedTokenizerBase, message: dict[str, Any], template_kwargs: dict[str, Any]) -> str:
    """What the chat template writes behind an assistant's turn that the message follows."""
    talk = [{"role": "user", "content": "."}, {"role": "assistant", "content": _TURN}, message]
    try:
        text = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False, **template_kwargs)
    except TemplateError as error:
        raise UserError(f"the chat template refuses a message of role {message['role']}: {error}") from error
    return str(text).rpartition(_TURN)[2].lstrip("\n")
