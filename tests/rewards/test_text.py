"""Rewards of tags, numbers, choices and length, by hand; hostile text for every built-in that reads text."""

from __future__ import annotations

import time

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.rewards import (
    LengthTarget,
    MathVerify,
    MultipleChoice,
    SoftOverlong,
    TagFormat,
    TaggedNumber,
    exact_match,
    last_integer,
    numeric_match,
)
from gspo_lightning.rewards.code import extract_code
from gspo_lightning.rewards.mathematics import math_equal
from tests.rewards.test_functions import NASTY

BOTH = "<REASONING>r</REASONING><SOLUTION>5</SOLUTION>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOTH, 2.0),
        ("<REASONING>r</REASONING>5", 1.0),
        (BOTH + "<SOLUTION>6</SOLUTION>", 1.0),
        (BOTH + "<SOLUTION>", 1.0),
        ("</SOLUTION>5<SOLUTION>", 0.0),
        ("5", 0.0),
        ("", 0.0),
        ("\n" * 50 + "x" * 50, -2.0),
        ("\n" * 49 + "x" * 51, 0.0),
        ("addCriterion" * 20 + "12345", -2.0),
        ("\n" * len(BOTH) + BOTH, 0.0),
    ],
)
def test_tag_format(text, expected):
    assert TagFormat()([text]) == [expected]
    assert TagFormat()([[{"role": "assistant", "content": text}]]) == [expected]


def test_tag_format_of_other_tags_and_scores():
    reward = TagFormat("think", "answer", reasoning_score=0.25, solution_score=0.5)
    assert reward(["<think>a</think><answer>1</answer>", BOTH]) == [0.75, 0.0]


@pytest.mark.parametrize(
    ("block", "answer", "right"),
    [
        ("5.0", "5", 2),
        (" 5 ", 5, 2),
        ("1,234", "1234.0", 2),
        ("-.5", "-0.5", 2),
        ("1e3", "1000", 2),
        ("−5", "-5", 2),
        ("-5", "−5", 2),
        ("5 or 6", "5", 0),
        ("five", "5", 0),
        ("5/1", "5", 0),
        ("", "5", 0),
        ("1e999", "5", 0),
        ("nan", "5", 0),
        ("5.00001", "5", 0),
        ("5.000001", "5", 2),
    ],
)
def test_tagged_number_compares_numbers(block, answer, right):
    assert TaggedNumber()([f"so <SOLUTION>{block}</SOLUTION>"], [answer]) == [right]


def test_tagged_number_needs_one_block_and_does_not_apply_to_words():
    assert TaggedNumber()(["5", "<SOLUTION>5</SOLUTION><SOLUTION>5</SOLUTION>"], ["5", "5"]) == [0.0, 0.0]
    assert TaggedNumber()(["<SOLUTION>x</SOLUTION>"], ["a word"]) == [None]


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B. A cat is an animal.", "B"),
        ("A cat is an animal.", None),
        ("I think the answer is D because A is wrong.", "D"),
        ("Answer: (A)", "A"),
        ("The answer is A. No, the answer is B.", "B"),
        (r"so \boxed{C}", "C"),
        ("answer is Because", None),
        ("**Answer:** B", "B"),
        ("**Answer**: B", "B"),
        (r"so \boxed{\text{B}}", "B"),
        (r"\boxed{\mathrm{(C)}}", "C"),
        ("Final Answer: $B$", "B"),
        ("Answer: `D`", "D"),
        ("Answer：B", "B"),
        ("The answer is: **B**", "B"),
        ("The answer is option B.", "B"),
        ("The correct answer: option C", "C"),
        ("A) Paris is wrong because of that.\n\n**Answer:** B", "B"),
        ("A) Paris is wrong.\nAnswer: none of these", None),
        (r"A. It is \boxed{7}", "A"),
        ("The answer is B, because answer choice A is wrong.", "B"),
        ("The answer is B. Answer option C ignores friction.", "B"),
        ("The answer is:\n\n(B) Paris\n\nAnswer A is wrong.", "B"),
        ("## Answer\r\n\r\nB\r\n\r\nAnswer A is wrong.", "B"),
        ("The answer is **option B**.", "B"),
        ("**Answer**\n\n**Option (B)**", "B"),
        (r"\boxed{\text{Option B}}", "B"),
        ("Answer B", "B"),
        ("A is too small, so the correct option is **(C)** 42.", "C"),
        ("The correct choice: B", "B"),
        ("Option A is not the correct option.", None),
        ("B. Paris is the capital. The correct answer is Paris.", "B"),
        ("**B) Paris**\n\nThe answer is Paris because it is.", "B"),
        ("C. The answer is below.", "C"),
        ("The answer is 'B'.", "B"),
        ("A's answer", None),
        ("B\n\nParis is the capital.", "B"),
        ("B \nExplanation: A is wrong.", "B"),
        ("B - Paris", "B"),
        ("B – Paris", "B"),
        ('"B"', "B"),
        ("$B$", "B"),
        (r"\(B\)", "B"),
        (r"The answer is \(\mathrm{B}\).", "B"),
        ("The correct answer to this question is: **B**", "B"),
        ("The answer to question 3 is (B) Paris. A is wrong.", "B"),
        ("The answer for A and C is zero. So the answer is D", "D"),
        ("The answer to the question is Paris.", None),
        ("The answer to this question. It is B", None),
        ("A-frames are houses.", None),
        ('"A" is a vowel', None),
        ("D'Artagnan\n", None),
        ("E", None),
        ("", None),
    ],
)
def test_multiple_choice(text, choice):
    assert [MultipleChoice()([text], [c])[0] for c in "ABCD"] == [float(c == choice) for c in "ABCD"]


def test_multiple_choice_in_a_tag():
    assert MultipleChoice(tag="SOLUTION")(["A. no <SOLUTION>B</SOLUTION>", "A"], ["B", "A"]) == [1.0, 1.0]
    assert MultipleChoice(tag="SOLUTION")(["<SOLUTION>\nOption B</SOLUTION>"], ["B"]) == [1.0]
    with pytest.raises(UserError, match="the answer 'E' is not one of ABCD"):
        MultipleChoice()(["A"], ["E"])


def test_soft_overlong_is_eq_13_of_dapo():
    """L_max 10, L_cache 4: 0 up to 6, then (6 - |y|) / 4, -1 above 10."""
    lengths = [0, 5, 6, 7, 8, 9, 10, 11, 99]
    assert SoftOverlong(10, 4)([[0] * n for n in lengths]) == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    # The paper's lengths, where nothing is said: no punishment up to 16384 of 20480.
    assert SoftOverlong(20480)([[0] * n for n in (16384, 18432, 20480)]) == [0, -0.5, -1]
    assert SoftOverlong(4)([[0] * n for n in (3, 4)]) == [0, -1]
    # The bounds themselves are allowed: a slope over the whole length, and a length of one token.
    assert SoftOverlong(4, 4)([[0] * n for n in (0, 1, 4)]) == [0, -0.25, -1]
    assert SoftOverlong(1)([[], [0], [0, 0]]) == [0, -1, -1]


def test_length_target():
    assert LengthTarget(10, 4)([[0] * n for n in (10, 9, 12, 14, 99, 0)]) == [1.0, 0.75, 0.5, 0.0, 0.0, 0.0]
    assert LengthTarget(1, 1)([[0] * n for n in (0, 1, 2)]) == [0.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def math():
    reward = MathVerify()
    reward(["1"], ["1"])  # the process is up
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def patient():
    """On a machine that is busy half a second may not suffice for what is right."""
    reward = MathVerify(item_timeout_s=20.0)
    yield reward
    reward.close()


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1),
        (r"$x = 3$ and \boxed{\frac{2}{4}}", r"\frac12", 1),
        ("The answer is 1,234.", "1234", 1),
        (r"\boxed{x^2 + 2x + 1}", "$(x+1)^2$", 1),
        (r"\boxed{0.51}", "0.5", 0),
        ("no idea", "0.5", 0),
        (r"\boxed{3}", r"3\sqrt{2}", 0),
        (r"\boxed{2}", r"2\pi r", 0),
        (r"\boxed{\frac12}", r"5\frac{1}{2}", 0),
        (r"\boxed{1024}", "2^{10}", 1),
        (r"\boxed{6}", "5 or 6", 0),
        (r"\boxed{2, 3}", "2,3", 1),
        (r"\boxed{2.3}", "2,3", 0),
        ("18", "18 dollars", 1),
        (r"\boxed{18}", "The answer is $18.", 1),
        ("−3", "-3", 1),
        (r"\boxed{-3}", "−3", 1),
        ("3", "-3", 0),
        (r"\boxed{y + x}", "x+y", 1),
        ("so it is 0.25", "25%", 1),
        (r"\boxed{60}", "60 km/h", 1),
        (r"\boxed{60\text{ km/h}}", "60 km/h", 1),
        (r"\boxed{9.8}", "9.8 m/s^2", 1),
        (r"\boxed{20}", "20 miles/hour", 1),
        (r"\boxed{25}", "25 cm²", 1),
        (r"\boxed{12}", "12 cm^2", 1),
        (r"\boxed{25}", "25°C", 1),
        (r"\boxed{5}", "5€", 1),
        (r"\boxed{5}", "₹5", 1),
        (r"\boxed{1000}", "1 000", 1),
        (r"\boxed{25}", "25 (approximately)", 1),
        (r"\boxed{5}", r"5~\text{m}", 1),
        (r"\boxed{10}", r"10\%", 1),
        ("The answer is 10%.", r"10\%", 1),
        (r"\boxed{2}", "2 x", 0),
        (r"\boxed{2}", r"2 \pi r", 0),
        (r"\boxed{2}", "2(n-1)", 0),
        (r"\boxed{5}", "5 o'clock", 1),
        (r"\boxed{3}", "3 - x", 0),
        (r"\boxed{2}", "2n(n+1)", 0),
        (r"\boxed{6}", "6!", 0),
        (r"\boxed{50\%}", "50", 1),
        (r"\boxed{50 \%}", "0.5", 1),
        (r"\boxed{50\%}", r"\frac{1}{2}", 1),
        (r"\boxed{0.5}", r"50\%", 1),
        (r"so $x = -50\%$.", "-0.5", 1),
        (r"\(50\%\)", "0.5", 1),
        (r"\boxed{5}", r"50\%", 0),
        (r"\boxed{50\%}", "5000", 0),
        (r"\boxed{33\frac{1}{3}\%}", r"33\frac13\%", 1),
        (r"\boxed{12\frac{1}{3}\%}", r"33\frac{1}{3}\%", 0),
        (r"\boxed{\frac{1}{300}}", r"33\frac{1}{3}\%", 0),
        (r"\boxed{1\%}", r"100\%", 0),
        (r"\boxed{0.5\%}", r"50\%", 0),
        (r"\boxed{100\%}", r"1\%", 0),
        ("It is 1%.", "100%", 0),
        (r"It is 1\%.", r"100\%", 0),
        ("2 percent", r"200\%", 0),
        ("It is 12.5%.", "12.5", 1),
        ("It is 12.5%.", "0.125", 1),
        ("$50$%", r"50\%", 1),
        (r"\boxed{50\,\%}", "50", 1),
        (r"\[ x = 50\% \]", "0.5", 1),
        (r"\boxed{50\%\text{ of them}}", "50", 1),
        (r"\boxed{30\%, 20\%}", r"10\%, 20\%", 0),
        (r"\boxed{(10\%, 20\%)}", "(0.1,0.2)", 1),
        (r"\boxed{42.}", "42", 1),
        (r"\(42.\)", "42", 1),
        (r"\[ \frac{1}{2}. \]", "0.5", 1),
        (r"\[ x = 2\pi. \]", r"2\pi", 1),
        (r"$(1, 2).$", "(1,2)", 1),
        (r"so $1,500.50 + 1,500.5 = 3,001$", "3001", 1),
        (r"\[ \$4{,}000 - \$1{,}000 = \$3{,}000. \]", "3000", 1),
        (r"\boxed{x = -1,234,567}", "-1234567", 1),
        (r"$6,000 \div 2 = 3,000$", "3000", 1),
        (r"\boxed{1,234 \, \text{m/s}}", "1234", 1),
        (r"\boxed{(1,234)}", "(1, 234)", 1),
        (r"\boxed{x = 1, 2}", "1,2", 1),
        (r"$\boxed{-1,234. }$", "-1234", 1),
        (r"\boxed{42.}", "4", 0),
    ],
)
def test_math(text, answer, right, patient):
    assert patient([text], [answer]) == [right]


@pytest.mark.parametrize(
    "answer",
    [
        r"\frac{1}{2}", "x^2+1", "(1,2)", r"10\%", r"3\sqrt{2}", r"11\sqrt2", "x=5", r"2\text{ cm}", "[0,1)", r"\text{(A)}",
        r"90^\circ", "1,234", "-5", "42.", r"12.5\%", r"33\frac{1}{3}\%", r"5\frac{1}{2}", r"\$18.90", r"\{1,2,3\}", r"\text{Monday}", "A", "2^{10}",
        r"(-\infty,2]\cup[3,\infty)", "3/4", "0.5", ".5", "12 cm", "y=2x+3", r"\pm 2", "2,3", "x+y", "6!", "1e5", r"2\pi r",
        "5-2i", "025", "10_2", "1:2", "7.0", r"x \le 3", "3x - 1", "2n(n+1)", "5 or 6", "18 dollars", "25%", "1,234.56",
        "no solution", r"\log_2 3", r"\sqrt[3]{2}", r"0.\overline{3}", r"\frac{5\pi}{6}\text{ radians}",
    ],
)  # fmt: skip
def test_an_answer_of_mathematics_is_right_for_itself_in_a_box_and_in_a_tag(answer):
    assert math_equal(rf"So the answer is $\boxed{{{answer}}}$.", answer) is True
    assert math_equal(answer, answer, is_answer=True) is True
    assert math_equal("7919", answer, is_answer=True) is False


def test_a_tag_holds_an_answer_as_a_whole():
    assert math_equal("3", r"3\sqrt{2}", is_answer=True) is False
    assert math_equal(r"3\sqrt{2}", "3", is_answer=True) is False
    assert math_equal("The answer is 5.", "5", is_answer=True) is True
    assert math_equal(r"$x = 5$", "5", is_answer=True) is True
    for text in ("**5**", "5 (five)", "5 m²", "`5`", "5 apples"):
        assert math_equal(text, "5", is_answer=True) is True, text
    assert math_equal("So, 3/4 of them", "3/4", is_answer=True) is True


def test_math_reads_a_tag_and_refuses_a_row_without_an_answer(math):
    tagged = MathVerify(tag="answer")
    try:
        assert tagged(["7 <answer>5</answer>", "5"], ["5", "5"]) == [1.0, 0.0]
        with pytest.raises(UserError, match="finds no answer in the row's answer ''"):
            tagged(["<answer>5</answer>"], [""])
    finally:
        tagged.close()


ANSWERS = [
    (last_integer, "It is 4.", "4"),
    (numeric_match, "It is 4.5.", "4.5"),
    (exact_match, "yes", "yes"),
    (TaggedNumber("answer", right=1.0), "<answer>4</answer>", "4"),
    (MultipleChoice(), "B", "B"),
    (MultipleChoice(tag="answer"), "<answer>B</answer>", "B"),
]
THOUGHT = r"yes 4 or 4.5? The answer is B, \boxed{4}. <answer>4</answer> <answer>B</answer> 4.5 4"


@pytest.mark.parametrize(("reward", "text", "answer"), ANSWERS)
def test_what_is_thought_is_no_answer(reward, text, answer):
    other = text.translate(str.maketrans("4yB", "7nA"))
    for thought in ("<think>{}</think>", "{}</think>", "<seed:think>{}</seed:think>", "[THINK]{}[/THINK]"):
        assert reward([thought.format(THOUGHT) + f"\n\n{text}"], answer=[answer]) == [1.0]
        assert reward([thought.format(THOUGHT) + f"\n\n{other}"], answer=[answer]) == [0.0]
        assert reward([thought.format(THOUGHT) * 2], answer=[answer]) == [0.0]
    assert reward([f"<think>{THOUGHT}"], answer=[answer]) == [0.0]
    assert reward([f"{text}\n<think>{THOUGHT}"], answer=[answer]) == [1.0]


def test_what_is_thought_is_no_answer_of_mathematics(patient):
    texts = [r"<think>\boxed{4}</think>It is 5.", r"<think>\boxed{5}</think>It is 4.", r"<think>\boxed{4}", "4</think>"]
    assert patient(texts, ["4"] * 4) == [0.0, 1.0, 0.0, 0.0]


CODE = "def f():\n    return 1\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (CODE, CODE),
        (f"```\n{CODE}```", "\n" + CODE),
        (f"so\n```python\n{CODE}```\nDone.", CODE),
        (f"``` python\n{CODE}```", CODE),
        (f"```Python3.11\n{CODE}```", CODE),
        (f'```python title="a.py"\n{CODE}```', CODE),
        (f"```python run\r\n{CODE}```", CODE),
        (f"```{{python}}\n{CODE}```", CODE),
        (f"```{{.python .numberLines}}\n{CODE}```", CODE),
        ("```py = 3\nx = py\n```", "py = 3\nx = py\n"),
        ("```x = 1\ny = x\n```", "x = 1\ny = x\n"),
        (f"so\n```python\n{CODE}", CODE),
        (f"```python\nbad\n``` no:\n```python\n{CODE}", CODE),
        (f"```python\n{CODE}```\n```", CODE),
        (f"```python\n{CODE}```\n```\nThis function works by adding.", CODE),
        (f"```python\n{CODE}```\n\nExample output:\n```\n5", CODE),
        (f"```python\n{CODE}``` trailing ```python", CODE),
        (f"```python\n{CODE}```\n```python\n", CODE),
        (f"<think>```\nno\n``` or ```no</think>\n```python\n{CODE}```", CODE),
        (f"<think>```no```</think>{CODE}", CODE),
        (f"<think>```python\n{CODE}```", None),
        (f"```python\n{CODE}```\nOutput:\n```\n1\n```", CODE),
        (f"```python\n{CODE}```\nRun it:\n```bash\npython f.py\n```\n```text\n1\n```", CODE),
        (f"```py\nbad\n```\nNo:\n```Python3\n{CODE}```\n```\n>>> f()\n1", CODE),
        (f"```\nf()\n```\n```\n{CODE}```", "\n" + CODE),
        (f"```pycon\n>>> f()\n```\n```\n{CODE}```", "\n" + CODE),
        ("1. So:\n   ```python\n   def f():\n       return 1\n   ```\n2. Done.", CODE),
        ("```python\n\n  x = 1\n\n  y = 2\n```", "\nx = 1\n\ny = 2\n"),
        ('```python\nx = """\n  \n"""\n```', 'x = """\n  \n"""\n'),
        ("``````", None),
        ("", None),
    ],
)
def test_code_is_the_last_block_of_python_or_else_the_last_that_holds_any(text, code):
    assert extract_code(text) == code


HOSTILE = [
    *NASTY,
    "$9^{9^{9^9}}$",
    r"\boxed{99999999!}",
    "<SOLUTION>" * 100_000,
    "<SOLUTION>" + "9" * 10**6 + "</SOLUTION>",
]
HOSTILE += [
    "answer" + " " * 10**6 + "is",
    "\\boxed{((((((((( option(((((((((" * 10**5,
    "\\frac{" * 100_000,
    "`" * 10**6,
    "{" * 10**6,
    "1e" * 10**5,
    "٣" * 10**5,
]
READERS = [TagFormat(), TaggedNumber(), MultipleChoice(), MultipleChoice(tag="SOLUTION")]


def seconds_to_refuse(math, text):
    start = time.monotonic()
    assert math([text], ["7"]) == [0.0]
    return time.monotonic() - start


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_gets_a_reward_at_once(text, math):
    start = time.process_time()
    for reward in READERS:
        (value,) = reward([text], answer=["A" if isinstance(reward, MultipleChoice) else "7"])
        assert value in (0.0, -2.0) or (value == 1.0 and "</SOLUTION>" in text)
    extract_code(text)
    # Half a second on a machine of its own. What these texts are made for takes minutes.
    assert time.process_time() - start < 3.0
    assert min(seconds_to_refuse(math, text) for _ in range(2)) < 3.0


def test_a_completion_that_computes_for_ever_is_ended_and_the_next_is_judged(math):
    assert math(["$9^{9^{9^9}}$", r"\boxed{7}", "9**9**9**9", r"\boxed{7}"], ["7"] * 4) == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: TagFormat(reasoning="<think>"), "TagFormat.reasoning"),
        (lambda: TagFormat("a", "a"), "TagFormat.solution"),
        (lambda: TagFormat(degenerate_frac=0.0), "TagFormat.degenerate_frac"),
        (lambda: TagFormat(filler=("",)), "TagFormat.filler"),
        (lambda: TagFormat(solution_score=float("nan")), "TagFormat.solution_score"),
        (lambda: TaggedNumber(tag=""), "TaggedNumber.tag"),
        (lambda: TaggedNumber(tolerance=-1.0), "TaggedNumber.tolerance"),
        (lambda: MultipleChoice(choices="AA"), "MultipleChoice.choices"),
        (lambda: MultipleChoice(tag="a b"), "MultipleChoice.tag"),
        (lambda: MathVerify(item_timeout_s=0.0), "MathVerify.item_timeout_s"),
        (lambda: SoftOverlong(10, 11), "SoftOverlong.cache_tokens"),
        (lambda: SoftOverlong(10, 0), "SoftOverlong.cache_tokens"),
        (lambda: SoftOverlong(0, 1), "SoftOverlong.max_tokens"),
        (lambda: LengthTarget(0, 1), "LengthTarget.target_tokens"),
        (lambda: LengthTarget(1, 0), "LengthTarget.tolerance_tokens"),
    ],
)
def test_bad_settings_are_refused_by_name(build, text):
    with pytest.raises(UserError) as caught:
        build()
    assert text in str(caught.value)
