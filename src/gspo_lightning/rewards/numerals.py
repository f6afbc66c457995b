"""Converts numbers and letters of all scripts to the characters that the patterns expect."""

from __future__ import annotations

import re
import string
import unicodedata

GROUPED = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2}){1,20},\d{3})(?!\d)"
"""Pattern of grouped digits in the result of `plain_groups`: ``1,234,567``, or in India ``12,34,567``."""

_DIGIT = re.compile(r"(?![0-9])\d")
_DASH = re.compile("(?<![\\w)\\]}])[\N{EN DASH}\N{HYPHEN}\N{NON-BREAKING HYPHEN}](?=\\.?\\d)")
"""A dash that is a minus, not one that joins two parts, as in ``3–5``, ``2019‑2020`` and ``GPT‑4``."""
_MINUS = "\N{MINUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{SMALL HYPHEN-MINUS}"
_INVISIBLE = "\u061c\u200b\u200e\u200f\u2060\ufeff\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Marks of the writing direction, and characters without width."""
_CHARACTERS = str.maketrans(
    {"\N{FULLWIDTH PLUS SIGN}": "+", "\N{FULLWIDTH FULL STOP}": "."}
    | {"\N{ARABIC DECIMAL SEPARATOR}": ".", "\N{ARABIC THOUSANDS SEPARATOR}": ","}
    | {"\N{FULLWIDTH PERCENT SIGN}": "%", "\N{FULLWIDTH YEN SIGN}": "\N{YEN SIGN}"}
    | dict.fromkeys(_MINUS, "-")
    | dict.fromkeys(_INVISIBLE, "")
)
_NARROW = "\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}\N{FIGURE SPACE}'\N{RIGHT SINGLE QUOTATION MARK}"
_BETWEEN_GROUPS = re.compile(rf"(?<=\d)(?:[{_NARROW}]|\\,|,\\!)(?=\d{{3}}(?!\d))")
_LETTERS = str.maketrans(
    {chr(0xFEE0 + ord(letter)): letter for letter in string.ascii_letters} | dict.fromkeys(_INVISIBLE, "")
)
_LATEX_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")


def plain_numerals(text: str) -> str:
    """The text with decimal digits of all scripts, signs and decimal points as in ASCII, without invisible marks."""
    if text.isascii():
        return text
    text = _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text.translate(_CHARACTERS))
    return _DASH.sub("-", text)


def plain_groups(text: str) -> str:
    """`plain_numerals` with commas between groups of digits, for narrow spaces, apostrophes and LaTeX separators."""
    return _LATEX_COMMA.sub(",", _BETWEEN_GROUPS.sub(",", plain_numerals(text)))


def plain_letters(text: str) -> str:
    """The text with full-width Latin letters in ASCII, without invisible marks."""
    return text.translate(_LETTERS)
