"""Finds prompts in whose text special tokens of the model are written, such as those of a chat template."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from gspo_lightning.data.columns import parts_of
from gspo_lightning.types import Prompt


class WrittenMarks:
    """Counts conversations with special tokens in their text; plain prompts may be written in a template's marks.

    Args:
        tokenizer: reads such a text as the token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._mark = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self._rows: dict[str, str] = {}
        """uid -> the first mark in it."""

    def look_at(self, prompt: Prompt) -> None:
        """Notes the prompt if it has one."""
        if isinstance(prompt.prompt, str):
            return
        for message in prompt.prompt:
            texts = [part.get("text") for part in parts_of(message)] or [message.get("content")]
            for text in texts:
                if isinstance(text, str) and (found := self._mark.search(text)):
                    self._rows.setdefault(prompt.uid, found[0])

    def line(self) -> str | None:
        """A warning about the prompts that were noted; None if there are none."""
        if not self._rows:
            return None
        uid, mark = next(iter(self._rows.items()))
        return (
            f"{len(self._rows)} of the prompts that were checked have special tokens in their text, the first {mark} "
            f"(row {uid}); the model sees the tokens, not the text: take them out, or set "
            "data.task.conversational=false if the rows of a file are written in a chat template already"
        )
