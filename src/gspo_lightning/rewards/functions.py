"""Reward functions that come with the package. None of them ever evaluates what the model wrote."""

from __future__ import annotations

import re
from typing import Any

MAX_CHARACTERS = 20_000
"""A longer completion is judged by its end: an answer is near the end, and no pattern sees megabytes."""

_INTEGER = re.compile(r"(?<![\d.])-?\d{1,3}(?:,\d{3})+(?![\d.]*\d)|-?\d+")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion in either of TRL's forms, at most its last ``MAX_CHARACTERS``."""
    return full_text(completion)[-MAX_CHARACTERS:]


def full_text(completion: str | list[dict[str, Any]]) -> str:
    """The whole text of a completion in either of TRL's forms."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def last_integer(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1 if the last integer of the completion is the row's ``answer``, else 0. Understands ``1,234`` and ``-5``."""
    return [float(_last(_INTEGER, text_of(c)) == _integer(a)) for c, a in zip(completions, answer, strict=True)]


def numeric_match(completions: list[Any], answer: list[Any], tolerance: float = 1e-6, **_: Any) -> list[float]:
    """1 if the last number of the completion is within a relative ``tolerance`` of ``answer``, else 0."""
    rewards = []
    for completion, wanted in zip(completions, answer, strict=True):
        found = _last(_NUMBER, text_of(completion))
        target = float(str(wanted).replace(",", ""))
        rewards.append(float(found is not None and abs(float(found) - target) <= tolerance * max(1.0, abs(target))))
    return rewards


def environment_reward(completions: list[Any], environment_reward: list[float], **_: Any) -> list[float]:
    """What the environment of a dialogue gave for it; see `gspo_lightning.dialogue`."""
    return environment_reward


def exact_match(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1 if the completion is the ``answer``, white space at both ends aside, else 0."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def letter_share(completions: list[Any], letter: list[str], **_: Any) -> list[float]:
    """Share of the completion's characters that are the row's ``letter``: a dense reward for tiny models."""
    texts = [text_of(completion) for completion in completions]
    return [text.count(wanted) / max(1, len(text)) for text, wanted in zip(texts, letter, strict=True)]


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(text)
    return found[-1].replace(",", "") if found else None


def _integer(answer: Any) -> str:
    return str(answer).strip().replace(",", "")
