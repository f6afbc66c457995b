"""Token ids -> what a completion says: to its reader, and in a channel of its own to itself.

The harmony format of gpt-oss writes messages into channels, ``<|channel|>analysis<|message|>...<|end|>`` before
``<|start|>assistant<|channel|>final<|message|>...<|return|>``. The reader gets the ``final`` channel alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")


def answer_and_thinking(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> tuple[str, str]:
    """The text of a completion, decoded without special tokens, and what stands in other channels before it.

    Args:
        tokenizer: of the policy. Without the special tokens of harmony there is nothing but text.
        token_ids: sampled after ``<|start|>assistant``, if it is harmony.

    Returns:
        ``(answer, thinking)``. In harmony the answer is the ``final`` channel, and empty where the completion was cut
        before it; messages of all other channels, tool calls among them, are the thinking, one below the other. A
        completion without any message of this form is text.
    """
    messages = list(_messages(tokenizer, token_ids)) if _speaks_harmony(tokenizer) else []
    if not messages:
        return _decode(tokenizer, token_ids), ""
    # A message without a channel is for the reader.
    answer = [text for channel, text in messages if channel in ("", "final")]
    return "".join(answer), "\n".join(text for channel, text in messages if channel not in ("", "final"))


def _messages(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Channel and text of each message, by special tokens: text that only looks like them is text."""
    channel, message = _id(tokenizer, _CHANNEL), _id(tokenizer, _MESSAGE)
    ends = {_id(tokenizer, end) for end in _ENDS} | {None}
    header: list[int] = []
    content: list[int] | None = None
    for token in [*token_ids, None]:  # what was cut ends here
        if content is None:
            if token == message:
                content = []
            elif token is not None:
                header.append(token)
        elif token in ends:
            yield _channel(tokenizer, header, channel), _decode(tokenizer, content)
            header, content = [], None
        else:
            content.append(token)  # type: ignore[arg-type]


def _channel(tokenizer: PreTrainedTokenizerBase, header: list[int], mark: int | None) -> str:
    """The first word after the mark; a message to a tool, and to nobody's channel, is commentary."""
    if mark in header:
        return (_decode(tokenizer, header[header.index(mark) + 1 :]).split() or [""])[0]
    return "commentary" if "to=" in _decode(tokenizer, header) else ""


@lru_cache(maxsize=4)
def _speaks_harmony(tokenizer: PreTrainedTokenizerBase) -> bool:
    return None not in (_id(tokenizer, _CHANNEL), _id(tokenizer, _MESSAGE))


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """None where the vocabulary does not have it."""
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found == tokenizer.unk_token_id else found


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))
