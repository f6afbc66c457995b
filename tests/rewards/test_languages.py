"""Answers in the words, digits and punctuation of other languages than English."""

from __future__ import annotations

import ast
import subprocess
import sys
import unicodedata

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.rewards import MultipleChoice
from gspo_lightning.rewards.mathematics import math_equal


@pytest.mark.parametrize(
    "answer",
    [
        "42元", "42 元", "42厘米", "42公里/小时", "42 см", "42 рублей", "42км/ч", "42 м", "42м²", "42 años", "42 élèves",
        "42 Äpfel", "42 ευρώ", "42 रुपये", "42개", "42 시간", "42 ชั่วโมง", "٤٢ يوما", "٤٢", "４２", "约42元", "第42题",
        "Ответ: 42.", "答案：42", "42（约）", "42 (约)", "￥42", "42 ₽", "42。", "42 %", "42％", "42 kΩ", "42 µm", "42\N{RIGHT-TO-LEFT MARK}",
    ],
)  # fmt: skip
def test_math_reads_a_number_with_a_unit_of_any_language(answer: str) -> None:
    for text in (r"\boxed{42}", "The answer is 42.", f"答案是{answer}"):
        assert math_equal(text, answer) is True, text
    assert math_equal(r"\boxed{43}", answer) is math_equal(r"\boxed{4}", answer) is False
    assert math_equal("42", answer, is_answer=True) is math_equal(answer, "42", is_answer=True) is True


@pytest.mark.parametrize(
    "answer",
    ["2х", "2 у", "2س", "2万", "2ⁿ", "2𝑥", "2ｘ", "2 πr", "2 ωt", "2或3", "2 или 3", "2元3角", "x2", "2 x"],
)
def test_a_letter_that_is_a_variable_or_a_numeral_is_no_unit(answer: str) -> None:
    assert math_equal(r"\boxed{2}", answer) is False
    assert math_equal("2", answer, is_answer=True) is False
    assert math_equal(rf"\boxed{{{answer}}}", answer) is True


@pytest.mark.parametrize(
    "answer",
    [
        "5만 원", "5만원", "5 만 원", "5천", "5백만", "5십", "5조", "5경", "5억 3천만", "5半", "5年半", "5 時間半", "5 सौ", "5 हज़ार", "5 हजार", "5 लाख",
        "5 लाख रुपये", "5 करोड़", "5 লক্ষ", "5 কোটি", "5 லட்சம்", "5 ล้านบาท", "5 แสน", "5 ألف", "5 ملايين", "5 میلیون", "5 کروڑ", "5 אלף",
        "5 тысяч", "5 Тысяч рублей", "5 тыс. рублей", "5 млн", "5 миллионов", "5 χιλιάδες", "5 triệu đồng", "5 nghìn", "5 tỷ",
    ],
)  # fmt: skip
def test_a_numeral_behind_a_number_is_no_unit(answer: str) -> None:
    for form in (unicodedata.normalize("NFC", answer), unicodedata.normalize("NFD", answer)):
        for text in (r"\boxed{5}", r"\boxed{0.5}", r"\boxed{5.5}"):
            assert math_equal(text, form) is False
            assert math_equal(text, rf"\boxed{{{form}}}") is False
        assert math_equal("5", form, is_answer=True) is False
        assert math_equal(rf"\boxed{{{form}}}", form) is True


@pytest.mark.parametrize("answer", ["5조각", "5경기", "5 सौर", "5 শতাংশ", "5 พันธุ์", "半径是5", "5개만", "5 (半径)"])
def test_a_word_that_only_begins_like_a_numeral_is_one(answer: str) -> None:
    assert math_equal(r"\boxed{5}", answer) is True


def test_words_of_any_length_and_script_are_read_at_once() -> None:
    """In a process that is ended: what tries all ways to cut a word into letters never returns."""
    words = ["километров ", "किलोमीटर ", "キロメートル", "élèves ", "kilometres "]
    code = (
        "from gspo_lightning.rewards.quantities import is_one_number\n"
        f"texts = ['5 ' + word * (20_000 // len(word)) for word in {words!r}]\n"
        "print([(is_one_number(text), is_one_number(text + '= 1')) for text in texts])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ast.literal_eval(done.stdout) == [(True, False)] * len(words)
    assert math_equal("42 километров проехал велосипедист за три часа = 42 км", "42", is_answer=True) is True


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("答案是42。", "42", True),
        ("答案是-5。", "-5", True),
        ("答案是5。", "-5", False),
        ("答：共有12只，每只3元。", "3", True),
        (r"所以$x=3$。", "3", True),
        (r"\boxed{42元}", "42", True),
        (r"\boxed{42 км/ч}", "42", True),
        (r"\boxed{5或6}", "6", False),
        ("$5或6$", "6", False),
        (r"\boxed{٤٢}", "42", True),
        (r"\boxed{1\,234}", "1234", True),
        (r"\boxed{-5}", "－5度", True),
        (r"\boxed{1234}", "1,234元", True),
        (r"\boxed{3/4}", "3/4元", True),
        (r"\boxed{甲}", "甲", True),
        (r"\boxed{乙}", "甲", False),
    ],
)
def test_math_reads_completions_of_other_scripts(text: str, answer: str, right: bool) -> None:
    assert math_equal(text, answer) is right


def choice(reward: MultipleChoice, text: str) -> str | None:
    right = [letter for letter in reward.choices if reward([text], [letter]) == [1.0]]
    assert len(right) <= 1
    return right[0] if right else None


@pytest.mark.parametrize(
    "text",
    [
        "B。", "B，因为A不对", "B、因为", "B：因为", "B．", "（B）", "【B】", "「B」", "Ｂ", "（Ｂ）", "B\N{RIGHT-TO-LEFT MARK}",
        "**Answer: B因为**", "Answer：（B）", "Answer: B。", "Answer: B です", "Answer：Ｂ", "Answer: “B”", r"\boxed{B。}",
        r"\boxed{（B）}", "“B”", "‘B’", "“B”, because", "“B.”",
    ],
)  # fmt: skip
def test_a_choice_is_read_with_chinese_and_japanese_punctuation(text: str) -> None:
    assert choice(MultipleChoice(), text) == "B"
    if text[0] in "B（【「Ｂ“‘":
        assert choice(MultipleChoice(tag="SOLUTION"), f"<SOLUTION>{text}</SOLUTION>") == "B"


@pytest.mark.parametrize(
    "text",
    ["B型血的人", "Bien sûr", "Bébé", "Answer: Bé", "Answer: B2", "Answer: B_x", "A股。", "选项：B或C。", "答案：B"]
    + ["Answer: Cần", "Answer: Bạn hãy chọn A", "Cả A và B", "Answer: Bá", "B\u0301", "D’accord.", "Answer: D’été", "“A” is a vowel"],
)  # fmt: skip
def test_a_letter_of_a_word_is_no_choice_in_other_languages(text: str) -> None:
    for form in ("NFC", "NFD"):
        assert choice(MultipleChoice(), unicodedata.normalize(form, text)) is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["答案", "答案是"], "答案：B"),
        (["答案", "答案是"], "A不对。正确答案是 B。"),
        (["答案", "答案是"], "**答案：B**，因为A不对"),
        (["答えは"], "答えはBです"),
        (["ответ"], "Ответ: B"),
        (["antwort"], "Antwort: **B**"),
        (["réponse"], "A. non. Réponse : B"),
        (["answer", "(答)"], "(答) B"),
    ],
)
def test_the_word_for_answer_may_be_of_another_language(words: list[str], text: str) -> None:
    assert choice(MultipleChoice(answer_words=words), text) == "B"


def test_choices_of_other_alphabets() -> None:
    assert choice(MultipleChoice(choices="甲乙丙丁", answer_words=["答案是"]), "答案是乙。") == "乙"
    assert choice(MultipleChoice(choices="甲乙丙丁", answer_words=["答案是"]), "答案是乙方") is None
    assert MultipleChoice()(["B"], ["Ｂ"]) == MultipleChoice(choices="ＡＢＣ")(["B"], ["Ｂ"]) == [1.0]
    for words in ("答案", [], [""], [1], [None]):
        with pytest.raises(UserError, match=r"MultipleChoice\.answer_words=.* must be a list of words"):
            MultipleChoice(answer_words=words)
