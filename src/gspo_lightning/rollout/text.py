"""Token ids -> the text of a completion: the answer to its reader, and the thinking in separate channels.

The harmony format of gpt-oss writes messages into channels, ``<|channel|>analysis<|message|>...<|end|>`` before
``<|start|>assistant<|channel|>final<|message|>...<|return|>``. The reader gets only the ``final`` channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_CHANNEL, _MESSAGE = "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")


def answer_and_thinking(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> tuple[str, str]:
    """The answer of a completion, decoded without special tokens, and the text of its other channels.

    Args:
        tokenizer: the policy's. Without the special tokens of harmony, all of a completion is the answer.
        token_ids: the completion; in harmony, sampled after ``<|start|>assistant``.

    Returns:
        ``(answer, thinking)``. In harmony the answer is the ``final`` channel, empty if the completion was cut off
        before it; messages of all other channels, tool calls among them, are the thinking, separated by newlines. A
        completion without any message of this form is all answer.
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
    for token in [*token_ids, None]:  # None ends a message that was cut off
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
    """The first word after the mark; without a mark, commentary for a message to a tool and else empty."""
    if mark in header:
        return (_decode(tokenizer, header[header.index(mark) + 1 :]).split() or [""])[0]
    return "commentary" if "to=" in _decode(tokenizer, header) else ""


@lru_cache(maxsize=4)
def _speaks_harmony(tokenizer: PreTrainedTokenizerBase) -> bool:
    return None not in (_id(tokenizer, _CHANNEL), _id(tokenizer, _MESSAGE))


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """Id of the token; None if the vocabulary does not have it."""
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found == tokenizer.unk_token_id else found


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))
