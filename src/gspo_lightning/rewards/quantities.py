"""A number among words and with a unit, in any language: what math-verify, which knows Latin letters, must be told."""

from __future__ import annotations

import re
import unicodedata

from gspo_lightning.rewards.numerals import plain_groups

_LETTER = "ж"
"""Stands for a letter of a script in which nobody writes variables: of any but Latin and Greek."""
_OTHER = "_"
"""Stands for a letter that changes the number: a numeral (万), or a variable of Russian or Arabic schools."""
_VARIABLES = "хуХУسصع"
_OF_MATHEMATICS = re.compile(
    r"[ªº\u02b0-\u02ff\u0370-\u03ff\u1d00-\u1dbf\u1f00-\u1fff\u2070-\u214f\uff21-\uff5a\U0001d400-\U0001d7ff]"
)
"""Greek letters, superscripts, and Latin letters in other shapes."""
_GREEK_WORD = re.compile("[\u0370-\u03ff\u1f00-\u1fff]{4,}")
_ALONE = re.compile(rf"(?<!{_LETTER}){_LETTER}(?!{_LETTER})")
_CURRENCY = "$€£¥₹₩₽₪₫₺₴"
_JOINT = re.compile(
    rf"(?<=\d)(?={_LETTER})|(?<=[{_LETTER}：])(?=[\d{_CURRENCY}])|(?<={_LETTER}{_LETTER})(?=[-+]\d)|(?<=：)(?=[-+]\d)"
)
"""Where a number and a word touch."""
_UNIT_IN_BRACES = re.compile(rf"(?<=\d)[ ~]*(?P<unit>{_LETTER}[{_LETTER}/]*)(?=\}})")
_NUMBER = re.compile(
    rf"(?:[a-z{_LETTER}.,:;：，。\s]*[\s,])?[-+]?[{_CURRENCY}]?[-+]?(?:\d{{1,3}}(?:[,\s]\d{{3}})+|\d+)?(?:\.\d+)?(?:/\d+)?",
    re.IGNORECASE,
)
"""Words, and a number or a fraction behind them."""
_UNIT = re.compile(
    rf"(?:\\?%|[°²³{_CURRENCY}])?"
    r"(?:(?:(?<=[°²³])|[\s~]+|(?=\\(?:text|mathrm))|(?=（))"
    rf"(?:[a-z{_LETTER}']{{2,}}|{_LETTER}|[mgshlvwjcf](?![a-z])|\\(?:text|mathrm)\{{[^}}]*\}}"
    rf"|[(（][a-z{_LETTER} ,.'-]+[)）]|\^\{{?-?\d\}}?|[/·.,，%{_CURRENCY}°²³*\s~])*)?[.。]?",
    re.IGNORECASE,
)
"""What may follow it: a sign of currency, a unit, words; no letter that is a variable, and no other number."""


def plain_quantities(text: str) -> str:
    r"""The text with plain numerals, and a space between words of other scripts and a number: ``42 元`` for ``42元``.

    In formulas they stay together, but for a unit behind a number in braces: ``\boxed{42\text{元}}``.
    """
    text = plain_groups(text)
    folded = _folded(text)
    joints = {joint.start(): (joint.start(), " ") for joint in _JOINT.finditer(folded) if not _in_formula(text, joint)}
    for unit in _UNIT_IN_BRACES.finditer(folded):
        joints[unit.start()] = unit.end(), rf"\text{{{text[unit.start('unit') : unit.end()]}}}"
    pieces, end = [], 0
    for start, (following, new) in sorted(joints.items()):
        pieces += [text[end:start], new]
        end = following
    return "".join([*pieces, text[end:]])


def _in_formula(text: str, joint: re.Match[str]) -> bool:
    head = text[: joint.start()]
    pairs = (("{", "}"), (r"\(", r"\)"), (r"\[", r"\]"))
    return head.count("$") % 2 == 1 or any(head.count(opening) > head.count(closing) for opening, closing in pairs)


def is_one_number(answer: str) -> bool:
    """Whether a number is all there is, but for words and a unit."""
    answer = _folded(plain_quantities(answer))
    found = _NUMBER.match(answer)
    return found is not None and _UNIT.fullmatch(answer[found.end() :]) is not None


def _folded(text: str) -> str:
    """As many characters, with ``_LETTER`` for letters of other scripts and Latin ones without their accents."""
    if text.isascii():
        return text
    folded = ""
    for character in _GREEK_WORD.sub(lambda word: _LETTER * len(word[0]), text):
        folded += character if character.isascii() else _fold(character, folded[-1:])
    return _ALONE.sub(lambda alone: _OTHER if text[alone.start()] in _VARIABLES else _LETTER, folded)


def _fold(character: str, previous: str) -> str:
    if unicodedata.category(character).startswith("M"):  # of the letter before it
        return previous if previous.isalpha() else character
    if character in "µΩ\N{OHM SIGN}":
        return "o"
    base = unicodedata.normalize("NFD", character)[0]
    if not character.isalpha() or _OF_MATHEMATICS.match(character):
        return character
    if unicodedata.numeric(character, None) is not None:
        return _OTHER
    return base if base.isascii() else _LETTER
