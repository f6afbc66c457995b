"""Numbers among words and with units, in any language, prepared for math-verify, which knows only Latin letters."""

from __future__ import annotations

import re
import unicodedata

from gspo_lightning.rewards.numerals import plain_groups


def _either_form(patterns: str) -> str:
    """One pattern for all given ones, with accented letters composed or not."""
    forms = [form for pattern in patterns.split() for form in (pattern, unicodedata.normalize("NFD", pattern))]
    return "|".join(dict.fromkeys(forms))


_LETTER = "ж"
"""Stands for a letter of a script in which nobody writes variables: of any but Latin and Greek."""
_OTHER = "_"
"""Stands for a letter that changes the number: of a numeral (万, 만), or a variable of Russian or Arabic schools."""
_VARIABLES = "хуХУسصع"
_OF_MATHEMATICS = re.compile(
    r"[ªº\u02b0-\u02ff\u0370-\u03ff\u1d00-\u1dbf\u1f00-\u1fff\u2070-\u214f\uff21-\uff5a\U0001d400-\U0001d7ff]"
)
"""Greek letters, superscripts, and Latin letters in other shapes."""
_GREEK_WORD = re.compile("[\u0370-\u03ff\u1f00-\u1fff]{4,}")
_SYLLABLES = "십 백 천 만 억 조(?!각) 경(?!기) ร้อย พัน(?!ธ) หมื่น แสน ล้าน"
_WORDS = (
    "सौ ह(?:ज़?|\u095b)ार लाख करो(?:ड़?|\u095c) अरब শত(?!া) হাজার লাখ লক্ষ কোটি நூறு ஆயிரம் லட்சம் கோடி వేలు లక్షలు కోట్లు "
    "مئة مائة ألفا? الف آلاف مليون ملايين مليارا? هزار میلیون میلیارد ہزار لاکھ کروڑ מאות אלף אלפים מיליון מיליארד "
    "тыс тысяч[аи]? тисяч[аі]? млн млрд трлн миллион(?:а|ов)? миллиард(?:а|ов)? мільйон(?:и|ів)? мільярд(?:и|ів)? "
    "χίλια χιλιάδες εκατομμύρι[οα] δισεκατομμύρι[οα] nghìn ngàn triệu tỷ tỉ"
)
_MULTIPLE = re.compile(
    rf"(?<=\d)[\s~]*+(?:{_either_form(_SYLLABLES)}|[^\W\d]{{0,3}}半(?![径徑])|(?:{_either_form(_WORDS)})(?!\w))",
    re.IGNORECASE,
)
"""Numerals that multiply the number before them (Unicode has only the Chinese ones), or add a half to it."""
_ALONE = re.compile(rf"(?<!{_LETTER}){_LETTER}(?!{_LETTER})")
_CURRENCY = "$€£¥₹₩₽₪₫₺₴"
_JOINT = re.compile(
    rf"(?<=\d)(?={_LETTER})|(?<=[{_LETTER}：])(?=[\d{_CURRENCY}])|(?<={_LETTER}{_LETTER})(?=[-+]\d)|(?<=：)(?=[-+]\d)"
)
"""A place at which a number and a word touch."""
_UNIT_IN_BRACES = re.compile(rf"(?<=\d)[ ~]*(?P<unit>{_LETTER}[{_LETTER}/]*)(?=\}})")
_NUMBER = re.compile(
    rf"(?:[a-z{_LETTER}.,:;：，。\s]*[\s,])?[-+]?[{_CURRENCY}]?[-+]?(?:\d{{1,3}}(?:[,\s]\d{{3}})+|\d+)?(?:\.\d+)?(?:/\d+)?",
    re.IGNORECASE,
)
"""Words, and a number or a fraction after them."""
_UNIT = re.compile(
    rf"(?:\\?%|[°²³{_CURRENCY}])?"
    r"(?:(?:(?<=[°²³])|[\s~]|(?=\\(?:text|mathrm))|(?=（))"
    rf"(?>[a-z{_LETTER}']{{2,}}|[mgshlvwjcf{_LETTER}]|\\(?:text|mathrm)\{{[^}}]*\}}"
    rf"|[(（][a-z{_LETTER} ,.'-]+[)）]|\^\{{?-?\d\}}?|[/·.,，%{_CURRENCY}°²³*\s~])*+)?[.。]?",
    re.IGNORECASE,
)
"""What may follow the number: a sign of currency, a unit, words; no letter that is a variable, and no other number.

Atomic and possessive: adjacent letters are one word, because there would be 2^n ways to split n of them.
"""


def plain_quantities(text: str) -> str:
    r"""The text with plain numerals, and a space between words of other scripts and a number: ``42 元`` for ``42元``.

    In formulas they stay together, except for a unit after a number in braces: ``\boxed{42\text{元}}``.
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
    """Whether the answer is one number, apart from words and a unit."""
    answer = _folded(plain_quantities(answer))
    found = _NUMBER.match(answer)
    return found is not None and _UNIT.fullmatch(answer[found.end() :]) is not None


def _folded(text: str) -> str:
    """The text, equally long, with ``_LETTER`` for letters of other scripts and Latin ones without their accents."""
    if text.isascii():
        return text
    folded = ""
    words = _MULTIPLE.sub(lambda numeral: _OTHER * len(numeral[0]), text)
    for character in _GREEK_WORD.sub(lambda word: _LETTER * len(word[0]), words):
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
