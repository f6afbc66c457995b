"""Rewards of the task "write a fast matrix multiplication in plain Python", always in the sandbox.

The recipe is that of the gpt-oss-20b notebook for GSPO: the code runs, imports nothing outside the standard library, is
right on random matrices (a ladder of the maximum error), and is fast compared with a reference.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gspo_lightning.errors import UserError
from gspo_lightning.rewards.code import check_sandbox, extract_code
from gspo_lightning.rewards.functions import full_text
from gspo_lightning.rewards.sandbox import Isolation, Limits, SandboxError, Session, session
from gspo_lightning.rewards.sandbox_checks import check_limits, require

Matrix = list[list[float]]
SHAPES = ((1, 1, 1), (2, 3, 4), (7, 5, 6), (16, 16, 16))
"""Shapes (n, k, m) of the products that decide whether code is right."""
PARTS = ("runs", "imports", "correct", "speed")
REFERENCE = """
def matmul(a, b):
    columns = list(zip(*b))
    return [[sum(x * y for x, y in zip(row, column)) for column in columns] for row in a]
"""


@dataclass(frozen=True)
class MatmulReward:
    """Sum of four parts, each logged as ``reward_log/matmul_<part>``.

    *runs*: ``runs`` if the code defines ``function`` and multiplies one pair of matrices, else ``fails``.
    *imports*: ``own_imports`` if every imported module is of the standard library, else ``foreign_import``.
    *correct*: the score of the first step ``[maximum error, score]`` of ``ladder`` that the largest absolute error over
    all products does not exceed, else ``wrong``. Entries are uniform in [-1, 1].
    *speed*: ``log2(reference time / time)`` clipped to ``speed_clip`` on both sides, for right code only. The trainer
    measures call and answer, for the reference as for the candidate, so the time includes the transport.

    The matrices follow from ``seed`` and the code, and their products never enter the sandbox.
    """

    function: str = "matmul"
    runs: float = 1.0
    fails: float = -2.0
    own_imports: float = 1.0
    foreign_import: float = -20.0
    ladder: Sequence[Sequence[float]] = ((1e-9, 3.0), (1e-6, 2.0), (1e-3, 1.0))
    wrong: float = -3.0
    speed_size: int = 64
    speed_repeats: int = 3
    speed_clip: float = 3.0
    seed: int = 0
    sandbox: Isolation = "bubblewrap"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_sandbox("MatmulReward", self.sandbox)
        if not self.function.isidentifier():
            raise UserError(f"MatmulReward.function={self.function!r} is not the name of a function")
        if self.speed_size < 1 or self.speed_repeats < 1 or not self.speed_clip >= 0:
            raise UserError("MatmulReward: speed_size and speed_repeats must be at least 1 and speed_clip at least 0")
        bounds = [step[0] for step in self.ladder if len(step) == 2]
        if not bounds or len(bounds) < len(self.ladder) or bounds != sorted(set(bounds)):
            raise UserError(f"MatmulReward.ladder={self.ladder} must be [maximum error, score] pairs, errors ascending")

    def check(self) -> None:
        """Refuses to run if the sandbox cannot isolate, or the system's limits are lower than those set."""
        check_limits(self.limits)
        require(self.sandbox)

    def __call__(self, completions: list[Any], log_metric: Callable[[str, float], None], **_: Any) -> list[float]:
        """One reward per completion."""
        self.check()
        reference = self._time_of_reference()
        # One at a time: in parallel they would disturb each other's timing.
        with ThreadPoolExecutor(1) as pool:
            table = list(pool.map(lambda c: self._parts(extract_code(full_text(c)), reference), completions))
        for number, part in enumerate(PARTS):
            log_metric(f"matmul_{part}", sum(row[number] for row in table) / max(1, len(table)))
        return [sum(row) for row in table]

    def _parts(self, code: str | None, reference_s: float) -> tuple[float, float, float, float]:
        runs, imports, correct, speed = self.fails, 0.0, self.wrong, 0.0
        if code is None:
            return runs, imports, correct, speed
        draw = random.Random(hashlib.sha256(f"{self.seed} {code}".encode(errors="replace")).digest())
        try:
            with session(code, "functions", self.limits, self.sandbox) as process:
                # The first message is the runner's own: it is sent before the code runs.
                seen = process.receive()
                if "foreign" in seen:
                    imports = self.foreign_import if seen["foreign"] else self.own_imports
                if "ready" not in process.receive():
                    return runs, imports, correct, speed
                error = max_error(process, self.function, draw)
                runs = self.runs
                correct = next((score for bound, score in self.ladder if error <= bound), self.wrong)
                if error <= self.ladder[-1][0]:
                    speed = self._speed(process, draw, reference_s)
        except SandboxError:
            pass  # the parts decided before still count
        return runs, imports, correct, speed

    def _speed(self, process: Session, draw: random.Random, reference_s: float) -> float:
        try:
            ratio = reference_s / self._time(process, self.function, draw)
        except SandboxError:
            return -self.speed_clip
        return max(-self.speed_clip, min(self.speed_clip, math.log2(ratio)))

    def _time(self, process: Session, function: str, draw: random.Random) -> float:
        """Shortest of several wall times of a product, each of new matrices; raises if a product is wrong."""
        times = []
        for _ in range(self.speed_repeats):
            a, b = matrices(draw, (self.speed_size,) * 3)
            start = time.perf_counter()
            found = process.call(function, a, b)
            times.append(time.perf_counter() - start)
            if not error_of(found, a, b) <= self.ladder[-1][0]:
                raise SandboxError("wrong product")
        return min(times)

    def _time_of_reference(self) -> float:
        with session(REFERENCE, "functions", self.limits, self.sandbox) as process:
            process.receive(), process.receive()
            return self._time(process, "matmul", random.Random(self.seed))


def matrices(draw: random.Random, shape: tuple[int, int, int]) -> tuple[Matrix, Matrix]:
    """Random matrices (n, k) and (k, m) as lists of lists, uniform in [-1, 1]."""
    n, k, m = shape
    return (
        [[draw.uniform(-1, 1) for _ in range(k)] for _ in range(n)],
        [[draw.uniform(-1, 1) for _ in range(m)] for _ in range(k)],
    )


def max_error(process: Session, function: str, draw: random.Random) -> float:
    """Largest absolute error over products of several shapes; infinite if a result is no matrix of the right shape."""
    error = 0.0
    for shape in SHAPES:
        a, b = matrices(draw, shape)
        error = max(error, error_of(process.call(function, a, b), a, b))
    return error


def error_of(found: Any, a: Matrix, b: Matrix) -> float:
    """Largest absolute error of a claimed product; infinite if it is no finite matrix of the right shape."""
    wanted = np.array(a) @ np.array(b)
    if not isinstance(found, list) or not all(isinstance(row, list) for row in found):
        return math.inf
    if [len(row) for row in found] != [wanted.shape[1]] * wanted.shape[0]:
        return math.inf
    if not all(type(x) in (int, float) for row in found for x in row):
        return math.inf
    try:
        difference = np.abs(np.array(found, dtype=np.float64) - wanted).max()
    except OverflowError:
        return math.inf
    return float(difference) if math.isfinite(difference) else math.inf
