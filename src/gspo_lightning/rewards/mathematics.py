"""Judges mathematical answers by math-verify (https://github.com/huggingface/Math-Verify), with a time limit.

sympy computes what it reads: ``9^9^9^9`` never ends. So the comparison runs in a separate process, which gets
``item_timeout_s`` per completion and is killed if it takes longer; that completion counts as wrong.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from math_verify import parse, verify
from math_verify.grader import get_pct_val

from gspo_lightning.errors import UserError, check_time_limit
from gspo_lightning.rewards.functions import full_text, spoken
from gspo_lightning.rewards.numerals import GROUPED
from gspo_lightning.rewards.quantities import is_one_number, plain_quantities
from gspo_lightning.rewards.text import check_tag, single_block
from gspo_lightning.rewards.worker import Worker, WorkerError, WorkerTimeoutError

MAX_ANSWER_CHARACTERS = 2_000
"""Of a longer text only the end is read."""
_MAX_NESTING = 50
_OF_PERCENT = re.compile("[%％]|percent|pct", re.IGNORECASE)
_PERCENT = re.compile(r"(?<=[\d}])(?:[\s~]|\\[,;:! ])*\\?%(?=\$|[\s.]*[},)\]\\])")
"""The sign of percent in a box or at the end of a formula, of which math-verify reads nothing, or a part."""
_STOP = re.compile(r"(?<=[\w)}\]])\.(?=\$|\s*(?:\}|\\[)\]]))")
_OPERATOR = r"(?:[=≈<>+*/]|\\(?:approx|leq?|geq?|times|cdot|div)(?![a-z]))"
_OPERAND = re.compile(rf"{_OPERATOR}\s*(?:\\?\$)?-?{GROUPED}|{GROUPED}(?=(?:\.\d+)?\s*(?:{_OPERATOR}|-|\\[,;:]))")
"""A number that is no list: math-verify reads two in ``x = 1,234``."""
_DELIMITED = re.compile(r"\$[^$]*\$|\\boxed|\\\(|\\\[")

# It warns at each call that its timeouts are off; here a process bounds it.
logging.getLogger("math_verify").setLevel(logging.ERROR)


@dataclass
class MathVerify:
    r"""1 if the completion's answer is mathematically equal to the row's ``answer``, else 0.

    Reads ``\boxed{}``, LaTeX and plain numbers as math-verify does, from the end of the completion. A row's answer, and
    the content of the tag, is read as a whole, like the content of a box; a number among words is read as the number,
    in the words and digits of any language.

    Args:
        tag: read the answer from the one block of this tag; None: from the whole text.
        item_timeout_s: seconds for one completion; afterwards it counts as wrong.
    """

    tag: str | None = None
    item_timeout_s: float = 0.5

    def __post_init__(self) -> None:
        if self.tag is not None:
            check_tag("MathVerify.tag", self.tag)
        check_time_limit("MathVerify.item_timeout_s", self.item_timeout_s)
        self._worker = Worker(math_equal)

    def __getstate__(self) -> dict[str, Any]:
        return {"tag": self.tag, "item_timeout_s": self.item_timeout_s}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def start(self) -> None:
        """Starts the process, which loads sympy in the background."""
        self._worker.start()

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()

    def __call__(self, completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
        """One reward per completion.

        Raises:
            UserError: math-verify finds nothing in a row's ``answer``.
        """
        return [self._score(spoken(full_text(c)), str(a)) for c, a in zip(completions, answer, strict=True)]

    def _score(self, text: str, answer: str) -> float:
        found = text if self.tag is None else single_block(text, self.tag)
        if not found:
            return 0.0
        found = found[-MAX_ANSWER_CHARACTERS:].encode(errors="replace").decode().replace("\x00", "")
        if _nesting(found) > _MAX_NESTING:
            return 0.0
        try:
            right = self._worker(found, answer, self.tag is not None, timeout_s=self.item_timeout_s)
        except WorkerTimeoutError:
            self._worker.start()
            return 0.0
        except WorkerError:
            return 0.0  # an answer that makes sympy raise or run out of memory is not right
        if right is None:
            raise UserError(f"MathVerify: math-verify finds no answer in the row's answer {answer[:60]!r}")
        return float(right)


def math_equal(text: str, answer: str, is_answer: bool = False) -> bool | None:
    """Whether the text's answer equals ``answer``; None if there is none in ``answer``. The caller limits its time.

    Args:
        text: of the completion.
        answer: the right answer.
        is_answer: whether the text is an answer and nothing else, as ``answer`` is.
    """
    # The sign of percent stands for nothing or for a hundredth, but on both sides for the same: 1% is not 100%.
    for percent in ("", "/100") if _OF_PERCENT.search(text + answer) else ("",):
        golds = _readings(answer, percent)
        if not golds:
            return None
        found = _readings(text, percent) if is_answer else [_parsed(text, percent)]
        if any(verify(gold, one, timeout_seconds=None) for gold in golds for one in found):
            return True
    return False


def _readings(answer: str, percent: str) -> list[list[Any]]:
    """The possible readings of a text that is an answer as a whole.

    Without delimiters math-verify looks for plain numbers first and takes a part for the whole: 3 of ``3\\sqrt{2}``.
    """
    answer = answer.strip("*_`\t\n ")  # of Markdown
    if _DELIMITED.search(answer):
        readings = [_parsed(answer, percent)]
    else:
        plain = [_parsed(answer, percent)] if is_one_number(answer) else []
        readings = [*plain, _parsed(rf"\boxed{{{answer}}}", percent)]
    return [reading for reading in readings if reading]


def _parsed(text: str, percent: str) -> list[Any]:
    """What math-verify finds in a text, with nothing or ``/100`` for the sign of percent."""
    text = _OPERAND.sub(lambda operand: operand[0].replace(",", ""), plain_quantities(text))
    text = _STOP.sub("", _PERCENT.sub(percent, text)).replace(r"\%", "%")
    # Its own timeouts are signals, which cannot interrupt one long multiplication.
    found = parse(text, parsing_timeout=None)
    if percent:
        return [one.doit() if get_pct_val(one) is not None else one for one in found]
    return [get_pct_val(one, one) for one in found]


def _nesting(text: str) -> int:
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, abs(depth))
    return deepest
