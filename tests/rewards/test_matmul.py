"""The rewards of the matrix multiplication task, part by part."""

from __future__ import annotations

import math
import random

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.rewards import Limits, MatmulReward
from gspo_lightning.rewards.matmul import REFERENCE, error_of, matrices
from tests.rewards.test_sandbox import needs_isolation

LOOPS = "def matmul(a, b):\n    return [[sum(a[i][k] * b[k][j] for k in range(len(b))) for j in range(len(b[0]))] for i in range(len(a))]\n"


def parts(code, **settings):
    logged = {}
    reward = MatmulReward(speed_size=8, speed_repeats=1, limits=Limits(wall_s=3, cpu_s=1, memory_mb=128), **settings)
    (total,) = reward([f"```python\n{code}\n```"], log_metric=logged.__setitem__)
    values = [logged[f"matmul_{name}"] for name in ("runs", "imports", "correct", "speed")]
    assert total == pytest.approx(sum(values), abs=1e-12)
    return values


@needs_isolation
def test_right_code():
    runs, imports, correct, speed = parts(LOOPS)
    assert (runs, imports, correct) == (1.0, 1.0, 3.0)
    assert -3.0 <= speed <= 3.0


@needs_isolation
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import numpy\n" + LOOPS, [-2.0, -20.0, -3.0, 0.0]),
        ("def f():\n    from torch import nn\n" + LOOPS, [1.0, -20.0, 3.0, None]),
        ("import math, os.path\n" + LOOPS, [1.0, 1.0, 3.0, None]),
        ("def matmul(a, b): return 1 / 0", [-2.0, 1.0, -3.0, 0.0]),
        ("def other(a, b): pass", [-2.0, 1.0, -3.0, 0.0]),
        ("def matmul(a, b", [-2.0, 0.0, -3.0, 0.0]),
        ("while True: pass", [-2.0, 1.0, -3.0, 0.0]),
        ("def matmul(a, b): return [[0.0] * len(b[0]) for _ in a]", [1.0, 1.0, -3.0, 0.0]),
        ("def matmul(a, b): return a", [1.0, 1.0, -3.0, 0.0]),
        (LOOPS + "exact = matmul\ndef matmul(a, b): return [[x + 1e-7 for x in r] for r in exact(a, b)]", [1.0, 1.0, 2.0, None]),
        (LOOPS + "exact = matmul\ndef matmul(a, b): return [[x + 1e-4 for x in r] for r in exact(a, b)]", [1.0, 1.0, 1.0, None]),
        (LOOPS + "exact, n = matmul, 0\ndef matmul(a, b):\n    global n\n    n += 1\n    return exact(a, b) if n < 5 else a", [1.0, 1.0, 3.0, -3.0]),
        ("import sys\nsys.stdlib_module_names = frozenset(['numpy'])\nimport numpy", [-2.0, -20.0, -3.0, 0.0]),
    ],
)  # fmt: skip
def test_each_part(code, expected):
    for found, wanted in zip(parts(code), expected, strict=True):
        assert wanted is None or found == wanted


@needs_isolation
def test_slower_code_is_worth_less_and_the_clip_holds():
    slow = (
        LOOPS.replace("def matmul", "import time\ndef slow")
        + "def matmul(a, b):\n    time.sleep(0.3)\n    return slow(a, b)"
    )
    assert parts(slow)[3] == -3.0
    assert parts(slow, speed_clip=0.5)[3] == -0.5


@pytest.mark.parametrize(
    ("reference_s", "time_s", "expected"),
    [(2.0, 0.5, 2.0), (1.0, 1.0, 0.0), (1.0, 4.0, -2.0), (100.0, 1.0, 3.0), (1.0, 100.0, -3.0)],
)
def test_speed_is_the_binary_logarithm_of_the_ratio_of_times(reference_s, time_s, expected, monkeypatch):
    reward = MatmulReward()
    monkeypatch.setattr(MatmulReward, "_time", lambda *_: time_s)
    assert reward._speed(None, random.Random(0), reference_s) == expected


@needs_isolation
def test_the_reference_is_right():
    assert parts(REFERENCE)[:3] == [1.0, 1.0, 3.0]


def test_what_is_no_matrix_of_numbers_has_infinite_error():
    a, b = matrices(random.Random(0), (2, 3, 2))
    for claim in (None, 1, [], [[1, 2]], [[1], [2]], [["1", "2"], ["3", "4"]], [[True, 1], [1, 1]], [[math.nan] * 2] * 2, [[10**400, 1], [1, 1]]):  # fmt: skip
        assert error_of(claim, a, b) == math.inf


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"function": "a b"}, "MatmulReward.function"),
        ({"ladder": [[1e-3, 1.0], [1e-6, 2.0]]}, "MatmulReward.ladder"),
        ({"ladder": []}, "MatmulReward.ladder"),
        ({"speed_size": 0}, "speed_size"),
        ({"sandbox": "none"}, "MatmulReward.sandbox"),
    ],
)
def test_bad_settings_are_refused_by_name(bad, text):
    with pytest.raises(UserError, match=text):
        MatmulReward(**bad)
