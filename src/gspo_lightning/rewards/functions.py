"""Reward functions that come with the package. None of them executes text of the model."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from numbers import Real
from typing import Any

from gspo_lightning.errors import UserError
from gspo_lightning.rewards.numerals import GROUPED, plain_groups

MAX_CHARACTERS = 20_000
"""Of a longer completion only the end is read: an answer is near the end, and patterns must not search megabytes."""

_INTEGER = re.compile(rf"(?<![\d.])-?{GROUPED}(?![\d.]*\d)|-?\d+")
_NUMBER = re.compile(rf"-?(?:(?:{GROUPED}|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\w))?")
_WHOLE_NUMBER = re.compile(rf"([-+]?)({GROUPED}|\d+)(?:\.0*)?")
_THOUGHT = (("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"))
_ONE_NUMBER = re.compile(rf"[-+]?(?:{GROUPED}|\d{{1,400}})?(?:\.\d{{0,400}})?(?:[eE][-+]?\d{{1,3}})?")


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """What a completion says, in either of TRL's forms and as `spoken` has it, at most its last ``MAX_CHARACTERS``."""
    return spoken(full_text(completion))[-MAX_CHARACTERS:]


def full_text(completion: str | list[dict[str, Any]]) -> str:
    """The whole text of a completion in either of TRL's forms."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def spoken(text: str) -> str:
    """The text without what is thought in it: after the last ``</think>``, and before a ``<think>`` that is left open.

    So for the marks of Seed-OSS and of Mistral. Takes linear time.
    """
    for begin, end in _THOUGHT:
        text = text.rpartition(end)[2].partition(begin)[0]
    return text


def is_missing(value: Any) -> bool:
    """Whether a value cannot be an answer: None, NaN of any kind (an empty cell of a table) or blank text."""
    if isinstance(value, str):
        return not value.strip()
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' own
        return True
    return isinstance(value, Real | Decimal) and bool(value != value)


def number(text: Any) -> float | None:
    """The number that a string is (``5``, ``5.0``, ``1,234``, ``-.5``, ``1e3``), white space aside; None if it is none.

    Digits may be of any script.
    """
    text = plain_groups(str(text)).strip()
    if len(text) > 1000 or not any(c in "0123456789" for c in text) or _ONE_NUMBER.fullmatch(text) is None:
        return None
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def last_integer(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1 if the last integer of the completion is the row's ``answer``, else 0.

    Understands ``1,234``, ``-5``, leading zeros and the digits of any script; an answer may be written ``18.0``.

    Raises:
        UserError: a row's ``answer`` is not a whole number.
    """
    rewards = []
    for completion, wanted in zip(completions, answer, strict=True):
        if (target := _whole_number(wanted)) is None:
            raise UserError(f"last_integer: the row's answer {str(wanted)[:60]!r} is not a whole number")
        found = _last(_INTEGER, text_of(completion))
        rewards.append(float(found is not None and _whole_number(found) == target))
    return rewards


def numeric_match(completions: list[Any], answer: list[Any], tolerance: float = 1e-6, **_: Any) -> list[float]:
    """1 if the last number of the completion is within a relative ``tolerance`` of ``answer``, else 0.

    Raises:
        UserError: a row's ``answer`` is not a number.
    """
    rewards = []
    for completion, wanted in zip(completions, answer, strict=True):
        if (target := number(wanted)) is None:
            raise UserError(f"numeric_match: the row's answer {str(wanted)[:60]!r} is not a number")
        found = _last(_NUMBER, text_of(completion))
        rewards.append(float(found is not None and abs(float(found) - target) <= tolerance * max(1.0, abs(target))))
    return rewards


def environment_reward(completions: list[Any], environment_reward: list[float], **_: Any) -> list[float]:
    """The reward that the environment gave for each dialogue; see `gspo_lightning.dialogue`."""
    return environment_reward


def exact_match(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1 if the completion is the ``answer``, white space at both ends aside, else 0.

    Raises:
        UserError: a row's ``answer`` is blank: an empty completion would be right.
    """
    if any(map(is_missing, answer)):
        raise UserError("exact_match: the row's answer is blank, null or NaN")
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def letter_share(completions: list[Any], letter: list[str], **_: Any) -> list[float]:
    """Share of the completion's characters that are the row's ``letter``: a dense reward for tiny models."""
    texts = [text_of(completion) for completion in completions]
    return [text.count(wanted) / max(1, len(text)) for text, wanted in zip(texts, letter, strict=True)]


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.findall(plain_groups(text))
    return found[-1].replace(",", "") if found else None


def _whole_number(value: Any) -> str | None:
    """The digits of a whole number, after a minus if negative; a string, as ``int`` refuses thousands of digits."""
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    found = _WHOLE_NUMBER.fullmatch(plain_groups(text).strip())
    if found is None:
        return None
    digits = found[2].replace(",", "").lstrip("0") or "0"
    return "-" + digits if found[1] == "-" and digits != "0" else digits
