"""Rewards that read text: tags, numbers inside tags, multiple choice. None of them executes text of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gspo_lightning.errors import UserError
from gspo_lightning.rewards.functions import full_text, number, spoken, text_of
from gspo_lightning.rewards.numerals import plain_letters


def blocks(text: str, tag: str) -> list[str]:
    """The text between each ``<tag>`` and the next ``</tag>``, in time linear in the length of the text."""
    parts = text.split(f"<{tag}>")[1:]
    return [part[:end] for part in parts if (end := part.find(f"</{tag}>")) >= 0]


def single_block(text: str, tag: str) -> str | None:
    """The one block of a tag, or None if there is none, a second one, or a tag without its partner."""
    if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
        return None
    found = blocks(text, tag)
    return found[0] if found else None


def check_tag(key: str, tag: str) -> None:
    """Refuses a string that is no name of a tag."""
    if not tag or re.search(r"[<>/\s]", tag):
        raise UserError(f"{key}={tag!r} is not the name of a tag; give it without angle brackets, such as answer")


def check_finite(owner: str, **values: float) -> None:
    """Refuses scores that are not finite numbers."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{owner}.{name}={value} must be a finite number")


@dataclass(frozen=True)
class TagFormat:
    """Rewards exactly one reasoning block and exactly one solution block; text that is mostly filler is penalised.

    Args:
        reasoning: name of the reasoning tag: ``REASONING`` means ``<REASONING>...</REASONING>``.
        solution: name of the solution tag.
        reasoning_score: for exactly one reasoning block.
        solution_score: for exactly one solution block.
        degenerate_score: added if at least ``degenerate_frac`` of the characters are filler.
        degenerate_frac: share of filler, in (0, 1].
        filler: strings that count as filler, such as line feeds.
    """

    reasoning: str = "REASONING"
    solution: str = "SOLUTION"
    reasoning_score: float = 1.0
    solution_score: float = 1.0
    degenerate_score: float = -2.0
    degenerate_frac: float = 0.5
    filler: Sequence[str] = ("\n", "addCriterion")

    def __post_init__(self) -> None:
        check_tag("TagFormat.reasoning", self.reasoning)
        check_tag("TagFormat.solution", self.solution)
        if self.reasoning == self.solution:
            raise UserError(f"TagFormat.solution={self.solution!r} is the reasoning tag too; give two different tags")
        if not 0 < self.degenerate_frac <= 1:
            raise UserError(f"TagFormat.degenerate_frac={self.degenerate_frac} must be above 0 and at most 1")
        if isinstance(self.filler, str) or not all(self.filler):
            raise UserError(f"TagFormat.filler={self.filler!r} must be a list of non-empty strings")
        check_finite(
            "TagFormat",
            reasoning_score=self.reasoning_score,
            solution_score=self.solution_score,
            degenerate_score=self.degenerate_score,
        )

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        """One score per completion."""
        return [self._score(full_text(completion)) for completion in completions]

    def _score(self, text: str) -> float:
        score = 0.0
        if single_block(text, self.reasoning) is not None:
            score += self.reasoning_score
        if single_block(text, self.solution) is not None:
            score += self.solution_score
        rest = text
        for filler in self.filler:
            rest = rest.replace(filler, "")
        if text and len(text) - len(rest) >= self.degenerate_frac * len(text):
            score += self.degenerate_score
        return score


@dataclass(frozen=True)
class TaggedNumber:
    """Rewards the row's ``answer`` in the one block of a tag, compared as numbers: ``5.0`` is ``5``.

    Args:
        tag: name of the tag.
        right: reward if the number is right, else 0.
        tolerance: relative to the answer, absolute below 1.
    """

    tag: str = "SOLUTION"
    right: float = 2.0
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        check_tag("TaggedNumber.tag", self.tag)
        check_finite("TaggedNumber", right=self.right, tolerance=self.tolerance)
        if self.tolerance < 0:
            raise UserError(f"TaggedNumber.tolerance={self.tolerance} must be at least 0")

    def __call__(self, completions: list[Any], answer: list[Any], **_: Any) -> list[float | None]:
        """One reward per completion; None (does not apply) if the row's answer is no number."""
        return [self._score(spoken(full_text(c)), number(a)) for c, a in zip(completions, answer, strict=True)]

    def _score(self, text: str, target: float | None) -> float | None:
        if target is None:
            return None
        block = single_block(text, self.tag)
        found = None if block is None or len(block) > 10_000 else number(block)
        right = found is not None and abs(found - target) <= self.tolerance * max(1.0, abs(target))
        return self.right if right else 0.0


_LATIN = "A-Za-zÀ-ɏḀ-ỿ"
_ACCENT = "[\u0300-\u036f]"
"""Combining accent of the letter before it, in text that is not composed."""


@dataclass(frozen=True)
class MultipleChoice:
    r"""1 if the chosen letter is the row's ``answer``, else 0.

    The choice is read from the first of these that exists: the one block of ``tag``; the last ``\boxed{X}``; the last
    "answer is X", "answer to this question is X", "correct option is X" or "Answer: X", in Markdown and LaTeX too
    (``**Answer:** B``, ``\boxed{\text{B}}``); the beginning of a text (``B``, ``(B)``, ``B. because``, or ``B`` alone
    in the first line) that names no answer later. A letter somewhere in a sentence is no choice: "A" is also a word.
    Brackets and punctuation may be those of Chinese and Japanese, and letters full-width.

    Args:
        choices: the letters, such as ``ABCD``.
        tag: name of a tag that holds the choice; None if there is none.
        answer_words: words for "answer" before a colon or the letter, such as ``["答案", "答案是"]``.
    """

    choices: str = "ABCD"
    tag: str | None = None
    answer_words: Sequence[str] = ("answer", "correct option", "correct choice")

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not self.choices.isalpha() or len(set(self.choices)) < len(self.choices):
            raise UserError(f"MultipleChoice.choices={self.choices!r} must be two or more different letters")
        if self.tag is not None:
            check_tag("MultipleChoice.tag", self.tag)
        if isinstance(self.answer_words, str) or not self.answer_words or not all(map(_is_word, self.answer_words)):
            raise UserError(f"MultipleChoice.answer_words={self.answer_words!r} must be a list of words")

    def __call__(self, completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
        """1 or 0 per completion.

        Raises:
            UserError: a row's answer is none of the choices.
        """
        for wanted in answer:
            if plain_letters(str(wanted).strip()) not in set(plain_letters(self.choices)):
                raise UserError(f"MultipleChoice: the answer {str(wanted)[:40]!r} is not one of {self.choices}")
        pairs = zip(completions, answer, strict=True)
        return [float(self._choice(plain_letters(text_of(c))) == plain_letters(str(a).strip())) for c, a in pairs]

    def _choice(self, text: str) -> str | None:
        # Chinese and Japanese have no space after a Latin letter: "B因为".
        alone = rf"(?:(?!\w)|(?<=[A-Za-z])(?![0-9_{_LATIN}]))(?!'\w|’[{_LATIN}]|{_ACCENT})"
        before = r"(?:[\s(\[*_`$\"'（［【〔「『“‘]|\\\(|\\(?:text|mathrm|mathbf|textbf)\{){0,9}"
        letter = f"{before}([{plain_letters(self.choices)}]){alone}"
        named = rf"(?:{before}(?i:option|choice)\b)?{letter}"
        if self.tag is not None and (block := single_block(text, self.tag)) is not None:
            found = re.match(rf"\s{{0,100}}{named}", block)
            return found[1] if found else None
        word = f"(?i:{'|'.join(map(re.escape, self.answer_words))})"
        colon = rf"{word}[*_]{{0,3}}\s{{0,9}}[:：]"
        about = r"(?:\s{1,9}(?i:to|for)\s[^.:\n]{1,80}?)?"
        says = rf"(?:{colon}|{word}[*_]{{0,3}}{about}\s{{1,9}}(?i:is)\b)[*_:]{{0,4}}"
        heading = rf"{word}[*_]{{0,3}}[^\S\n]{{0,9}}\n"
        # Last, as it may be of another choice: "The answer is B. Answer A is wrong."
        for pattern in (rf"\\boxed\{{{named}", rf"(?:{says}|{heading}){named}", f"{word}{letter}"):
            if all_found := re.findall(pattern, text):
                return str(all_found[-1])
        if re.search(colon, text):
            return None
        ends = r"[”’\"'`$]{0,2}(?:\\?[).:\]*,）．。：］】〕」』，、]|[^\S\n]{0,9}(?:[-–—][^\S\n]|\n|\Z))"
        found = re.match(rf"\s{{0,100}}{letter}(?={ends})", text)
        return found[1] if found else None


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and value != ""
