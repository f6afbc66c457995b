"""What passes a test of `CodeTests`: output, exit status, values; and how many tests run."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from gspo_lightning.rewards.sandbox import Session, session
from tests.rewards.test_sandbox import RIGHT, TESTS, judge, needs_isolation


@needs_isolation
def test_a_program_is_judged_by_what_it_prints():
    tests = [{"input": "1 2\n", "output": "3"}, {"input": "5 5\n", "output": "10\n"}]
    code = "print(sum(map(int, input().split())))"
    assert judge(code, tests) == 1.0
    assert judge("print(3)", tests) == -1.0
    assert judge("print(3)", tests, partial=True) == 0.5
    assert judge("print(3)", [{"input": "x" * 3_000_000, "output": "3"}]) == 1.0
    assert judge("while True: print(3)", tests) == -1.0


@needs_isolation
def test_an_answer_is_compared_by_type_and_value():
    def one(expression, expected):
        return judge(f"def f(): return {expression}", [{"call": "f", "args": [], "expected": expected}]) == 1.0

    assert one("0.1 + 0.2", 0.3) and one("(1, 2)", [1, 2]) and one("{'a': None}", {"a": None})
    assert one("2.0", 2) and not one("True", 1) and not one("'2'", 2) and not one("float('nan')", 0.0)
    assert one("(1, {2: 3})", (1, {2: 3}))  # of a task written in Python, which JSON has in the form of the answer
    assert not one("10 ** 400", 1.0) and not one("[1]", [1, 2])


ENDS_WELL = {
    "ends": "print(3)",
    "exits": "print(3); import sys; sys.exit()",
    "exits_with_0": "print(3); import sys; sys.exit(0)",
    "calls_exit": "print(3); exit()",
    "calls_quit": "print(3)\nif True: quit()\nprint(4)",
    "calls_exit_with_0": "print(3); exit(0)",
    "names_its_file": "import os; print(3 if os.path.basename(__file__) else 4)",
    "exits_at_once": "import os; os.write(1, b'3'); os._exit(0)",
    "catches": "try: 1 / 0\nexcept ZeroDivisionError: print(3)",
    "closes_its_output": "import os; os.write(1, b'3'); os.close(1)",
}
ENDS_BADLY = {
    "does_not_compile": ")(no python",
    "says_nothing_and_raises": "raise RuntimeError",
    "raises": "print(3, flush=True)\nraise RuntimeError",
    "exits_with_1": "print(3); import sys; sys.exit(1)",
    "calls_exit_with_1": "print(3); exit(1)",
    "calls_quit_with_a_message": "print(3); quit('no')",
    "exits_with_a_message": "print(3); import sys; sys.exit('no')",
    "kills_itself": "import os; os.write(1, b'3'); os.kill(os.getpid(), 9)",
    "uses_up_its_seconds": "print(3, flush=True)\nwhile True: pass",
    "uses_up_its_memory": "print(3, flush=True)\nbytearray(1 << 40)",
    "closes_its_output_and_stays": "import os, time; os.write(1, b'3'); os.close(1); time.sleep(99)",
}


@needs_isolation
@pytest.mark.parametrize("isolation", ["bubblewrap", "unsafe"])
def test_a_program_passes_only_with_exit_status_0(isolation):
    def reward(code, output):
        return judge(code, [{"input": "", "output": output}], sandbox=isolation)

    assert {name: reward(code, "3") for name, code in ENDS_WELL.items()} == dict.fromkeys(ENDS_WELL, 1.0)
    assert {name: reward(code, "3") for name, code in ENDS_BADLY.items()} == dict.fromkeys(ENDS_BADLY, -1.0)
    assert reward(ENDS_BADLY["does_not_compile"], "") == reward(ENDS_BADLY["says_nothing_and_raises"], "") == -1.0


def test_no_test_runs_after_the_one_that_decides(monkeypatch):
    """Three programs and two calls: a sandbox for each program, and one for the calls, if it runs as a module."""
    started, asked = [], []

    @contextmanager
    def counted(code, mode, *settings):
        started.append(mode)
        with session(code, mode, *settings) as process:
            monkeypatch.setattr(process, "call", lambda *call: asked.append(call) or Session.call(process, *call))
            yield process

    monkeypatch.setattr("gspo_lightning.rewards.code.session", counted)

    def judged(code, partial):
        started.clear(), asked.clear()
        programs = [{"input": str(i), "output": str(i)} for i in range(3)]
        reward = judge(code, [*TESTS, *programs], sandbox="unsafe", partial=partial)
        return reward, started.count("program"), started.count("functions"), len(asked)

    echo = "\nif __name__ == '__main__': print(input())"
    assert judged("print('wrong')", partial=False) == (-1.0, 1, 0, 0)
    assert judged("print('1' if input() == '1' else 'wrong')", partial=True) == (0.2, 3, 1, 0)
    assert judged("def double(x): return x" + echo, partial=False) == (-1.0, 3, 1, 1)
    assert judged("def double(x): return x" + echo, partial=True) == (0.6, 3, 1, 2)
    assert judged(RIGHT + echo, partial=False) == (1.0, 3, 1, 2)
