"""Reward for code that passes tests. The code runs in the sandbox; the tests' answers never enter it."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from gspo_lightning.errors import UserError
from gspo_lightning.rewards.functions import full_text, spoken
from gspo_lightning.rewards.sandbox import Isolation, Limits, SandboxError, Session, session
from gspo_lightning.rewards.sandbox_checks import check_limits, require

MAX_CODE_CHARACTERS = 50_000
_CALL, _PROGRAM = {"call", "args", "expected"}, {"input", "output"}
_INFO = re.compile(r"\s*(?:\w+|\{\s*\.?(?:python|py)\b[^}]*\}|(?:python|py)[\d.]*(?:\s+[^\s=].*)?)\s*", re.IGNORECASE)
"""Text that may follow an opening fence: one word, or more for Python: ``python run``, ``{python}``."""
_PYTHON = re.compile(r"\s*\{?\s*\.?(?:python|py)[\d.]*(?!\w)", re.IGNORECASE)


def extract_code(text: str) -> str | None:
    """The last block fenced by three backticks that names Python; None if it is empty or too long.

    If none names it, the last block (after the code there may be others, of its output or of a shell), or all of a text
    without a fence. What is thought (`spoken`) is left out before.

    The last block may lack its closing fence, as completions are cut and models forget it, if it names its language or
    is the only one. A block may be indented as a whole, as in a list.
    """
    text = spoken(text)
    parts = text.split("```")
    blocks = [block for block in parts[1:-1:2] if _without_info(block).strip()]
    if len(parts) % 2 == 0 and (rest := _without_info(parts[-1])).strip():
        says_language = rest != parts[-1]
        blocks += [parts[-1]] if says_language or not blocks else []
    blocks = [block for block in blocks if _names_python(block)] or blocks
    code = _dedented(_without_info(blocks[-1])) if blocks else text if len(parts) == 1 else ""
    return code if code.strip() and len(code) <= MAX_CODE_CHARACTERS else None


def _without_info(block: str) -> str:
    info, _, rest = block.partition("\n")
    return rest if _INFO.fullmatch(info[:200]) else block


def _names_python(block: str) -> bool:
    return _without_info(block) != block and _PYTHON.match(block) is not None


def _dedented(code: str) -> str:
    """The code without the indentation of all its lines; as it is if its first line has none."""
    return textwrap.dedent(code) if code.lstrip("\r\n")[0] in " \t" else code


def same(found: Any, wanted: Any, tolerance: float) -> bool:
    """Whether two JSON values are equal, numbers within a relative tolerance. ``True`` is not ``1``."""
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    if isinstance(found, float) or isinstance(wanted, float):
        if not (isinstance(found, int | float) and isinstance(wanted, int | float)):
            return False
        try:
            return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:
            return False
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(same(f, w, tolerance) for f, w in zip(found, wanted, strict=True))
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k], tolerance) for k in wanted)
    return type(found) is type(wanted) and found == wanted


@dataclass(frozen=True)
class CodeTests:
    """Share of the row's ``tests`` that the completion's code passes, or all or nothing.

    A test is ``{"call": "add", "args": [1, 2], "expected": 3}`` (a function of the code, JSON values) or
    ``{"input": "1 2", "output": "3"}`` (the code as a program, which must end with exit status 0; outputs are compared
    without white space at line ends and at the end). All calls of a row share one process and one wall clock; every
    program has its own. Tests written as ``assert`` are not supported: they would run in the process of the code they
    judge, which could fake them.

    Args:
        partial: the reward is the share of tests passed (true), or 1 only if all pass (false), where the first failure
            decides and the other tests do not run.
        failure: reward of code that is missing, does not run, or passes no test.
        tolerance: relative, for numbers.
        workers: number of sandboxes at the same time.
        sandbox: ``bubblewrap``, or ``unsafe`` for a plain process, which can read and delete what the trainer can.
        limits: of one sandbox.
    """

    partial: bool = False
    failure: float = 0.0
    tolerance: float = 1e-9
    workers: int = 2
    sandbox: Isolation = "bubblewrap"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"CodeTests.workers={self.workers} must be at least 1")
        if not self.tolerance >= 0:
            raise UserError(f"CodeTests.tolerance={self.tolerance} must be at least 0")
        if not (math.isfinite(self.failure) and self.failure < 1):
            raise UserError(f"CodeTests.failure={self.failure} must be finite and below 1, the reward of correct code")
        check_sandbox("CodeTests", self.sandbox)

    def check(self) -> None:
        """Refuses to run if the sandbox cannot isolate, or the system's limits are lower than those set."""
        check_limits(self.limits)
        require(self.sandbox)

    def __call__(self, completions: list[Any], tests: list[Any], **_: Any) -> list[float]:
        """One reward per completion."""
        self.check()
        tests = [checked_tests(row, number) for number, row in enumerate(tests)]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._score, completions, tests))

    def _score(self, completion: Any, tests: Sequence[dict[str, Any]]) -> float:
        code = extract_code(full_text(completion))
        if code is None:
            return self.failure
        with closing(self._verdicts(code, tests)) as verdicts:  # ends the sandbox if not all of them are read
            passed = sum(verdicts if self.partial else takewhile(bool, verdicts))
        if passed == 0 or (passed < len(tests) and not self.partial):
            return self.failure
        return passed / len(tests)

    def _verdicts(self, code: str, tests: Sequence[dict[str, Any]]) -> Generator[bool, None, None]:
        """Whether the code passes each test, one after the other; ends early if the sandbox ends."""
        for test in tests:
            if "input" in test:
                yield self._runs(code, test)
        calls = [test for test in tests if "call" in test]
        if not calls:
            return
        try:
            with session(code, "functions", self.limits, self.sandbox) as process:
                if "error" in process.receive() or "ready" not in process.receive():
                    return
                for test in calls:
                    yield self._answers(process, test)
        except SandboxError:
            return  # tests passed before the code broke a limit still count

    def _answers(self, process: Session, test: dict[str, Any]) -> bool:
        try:
            return same(process.call(test["call"], *test["args"]), test["expected"], self.tolerance)
        except (SandboxError, RecursionError):
            return False

    def _runs(self, code: str, test: dict[str, Any]) -> bool:
        try:
            with session(code, "program", self.limits, self.sandbox) as process:
                return lines(process.run(str(test["input"]))) == lines(str(test["output"]))
        except SandboxError:
            return False


def lines(text: str) -> list[str]:
    """Lines without white space at their ends, and without empty ones at the end of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def check_sandbox(owner: str, sandbox: str) -> None:
    """Refuses an unknown kind of isolation."""
    if sandbox not in ("bubblewrap", "unsafe"):
        raise UserError(f"{owner}.sandbox={sandbox!r} must be bubblewrap or unsafe")


def checked_tests(tests: Any, number: int) -> list[dict[str, Any]]:
    """Tests in either known form, without the nulls of the other form, which Arrow adds; refuses all others."""
    if not isinstance(tests, list) or not tests:
        raise UserError(f"tests of row {number} of the batch must be a list of one or more tests")
    return [_checked_test(test, number) for test in tests]


def _checked_test(test: Any, number: int) -> dict[str, Any]:
    if isinstance(test, dict):
        for form, other in ((_CALL, _PROGRAM), (_PROGRAM, _CALL)):
            values = {key: value for key, value in test.items() if key not in other or value is not None}
            if values.keys() == form and any(value is not None for value in values.values()):
                return values if form == _PROGRAM else _checked_call(values, number)
    raise UserError(f"a test of row {number} of the batch must have the keys call, args, expected or input, output")


def _checked_call(test: dict[str, Any], number: int) -> dict[str, Any]:
    """The test of a call as JSON has it, as the sandbox answers: a tuple is a list there."""
    if not isinstance(test["call"], str) or not isinstance(test["args"], list | tuple):
        raise UserError(
            f"a test of row {number} of the batch must have the name of a function as call, and a list as args"
        )
    try:
        values: dict[str, Any] = json.loads(json.dumps(test))
    except (TypeError, ValueError) as error:
        raise UserError(f"args and expected of a test of row {number} of the batch must be JSON ({error})") from error
    return values
