"""What each argument of a reward does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from gspo_lightning.rewards import sandbox
from tests.conf.probes.base import Probe, built, or_error

TEXTS = [
    "<REASONING>r</REASONING><SOLUTION>5.4</SOLUTION>", "\n\n\n\n\n", "addCriterion\n\n\n...", "B", "(E)",
    "<think>a</think><SOLUTION>C</SOLUTION>", "<answer>5</answer>", "\n\n\nabcde", "So the answer: C",
]  # fmt: skip


def reads_text(answer: str) -> Callable[[dict[str, Any], Path], Any]:
    def observe(node: dict[str, Any], folder: Path) -> Any:
        return or_error(lambda: built(node)(TEXTS, answer=[answer] * len(TEXTS)))

    return observe


def lengths(node: dict[str, Any], folder: Path) -> Any:
    return built(node)(completion_ids=[[0] * n for n in range(0, 140, 3)])


def code_reward(node: dict[str, Any], folder: Path) -> Any:
    """Rewards of right, half-right, nearly right and missing code; which sandbox; how many side by side."""
    programs = ["def f(x): return 2 * x", "def f(x): return 2 if x == 1 else 0", "def f(x): return 2 * x + 1e-4", ""]
    tests = [{"call": "f", "args": [x], "expected": 2.0 * x} for x in (1, 3)]
    seen: set[str] = set()
    real = sandbox._start

    def start(isolation: Any, *rest: Any) -> Any:
        seen.add(isolation)
        return real("unsafe", *rest)

    with mock.patch.object(sandbox, "_start", start), mock.patch("os.geteuid", lambda: 1000), trusted():
        reward = built(node)
        with mock.patch("gspo_lightning.rewards.code.ThreadPoolExecutor", wraps=completions_pool()) as pool:
            values = reward(programs, tests=[tests] * len(programs))
        return values, seen, pool.call_args


def completions_pool() -> Any:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor


def trusted() -> Any:
    """Lets a machine without bubblewrap say what it would do."""
    stack = contextlib.ExitStack()
    for module in ("code", "matmul"):
        stack.enter_context(mock.patch(f"gspo_lightning.rewards.{module}.require", lambda isolation: None))
    return stack


def limits(node: dict[str, Any], folder: Path) -> Any:
    """The limits in force inside a process, and those of the session around it."""
    code = "import resource\ndef f():\n    return [list(resource.getrlimit(getattr(resource, n))) for n in NAMES]\n"
    code += "NAMES = ['RLIMIT_CPU', 'RLIMIT_AS', 'RLIMIT_FSIZE', 'RLIMIT_NPROC']\n"
    real = sandbox._start
    set_to = built(node)
    plain = mock.patch.object(sandbox, "_start", lambda isolation, *rest: real("unsafe", *rest))
    with plain, sandbox.session(code, "functions", set_to, "bubblewrap") as process:
        room, seconds = process.room, process.deadline - time.monotonic()
        process.receive(), process.receive()
        return process.call("f"), room, round(seconds)


MATRIX_CODE = [
    "def matmul(a, b):\n    return [[sum(x*y for x, y in zip(r, c)) for c in zip(*b)] for r in a]",
    "def other(a, b):\n    return [[sum(x*y for x, y in zip(r, c)) for c in zip(*b)] for r in a]",
    "def matmul(a, b):\n    return [[sum(x*y for x, y in zip(r, c)) + 1e-7 for c in zip(*b)] for r in a]",
    "def matmul(a, b): return 0",
    "try:\n    import numpy\nexcept ImportError: pass\ndef matmul(a, b): return 0",
]


def matmul(node: dict[str, Any], folder: Path) -> Any:
    """Parts of the reward, with the products asked for and a clock by which each candidate is 16 times as fast."""
    asked: list[Any] = []
    real, seen = sandbox._start, set()
    real_call = sandbox.Session.call

    def start(isolation: Any, limits: Any, *rest: Any) -> Any:
        seen.add((isolation, limits))
        return real("unsafe", limits, *rest)

    def call(session: Any, function: str, a: Any, b: Any) -> Any:
        asked.append((len(a), len(b), a[0][0]))
        return real_call(session, function, a, b)

    with contextlib.ExitStack() as stack:
        stack.enter_context(trusted())
        stack.enter_context(mock.patch("os.geteuid", lambda: 1000))
        stack.enter_context(mock.patch.object(sandbox, "_start", start))
        stack.enter_context(mock.patch.object(sandbox.Session, "call", call))
        reward = built(node)
        object.__setattr__(reward, "_time_of_reference", lambda: 1e6)
        return [reward._parts(code, 1e6) for code in MATRIX_CODE], asked, seen


def reward_model(node: dict[str, Any], folder: Path) -> Any:
    from tests.rewards.test_reward_model import build

    if node["path"] == "nowhere":
        return or_error(lambda: built(node)(prompts=["a"], completions=["b"]))
    path = build(folder / "classifier", None)
    reward = built(node | {"path": str(path)})
    sizes: list[int] = []
    real = type(reward)._forward

    def forward(self: Any, ids: Any) -> Any:
        sizes.append(len(ids))
        return real(self, ids)

    with mock.patch.object(type(reward), "_forward", forward):
        values = or_error(lambda: reward(prompts=["say "] * 3, completions=["a", "bc", "d" * 30]), RuntimeError)
    return values, sizes, str(reward._model.device), next(reward._model.parameters()).dtype


def math_verify(node: dict[str, Any], folder: Path) -> Any:
    reward, asked = built(node), []
    reward._worker = lambda text, answer, is_answer, timeout_s: asked.append((text, timeout_s))  # type: ignore[func-returns-value]
    or_error(lambda: reward(["<SOLUTION>5</SOLUTION> or 6"], answer=["5"]))
    reward(["no tag"], answer=["5"]) if node["tag"] else None
    return asked


def for_tasks(node: dict[str, Any], folder: Path) -> Any:
    return built(node)(task=["largest", "sums"], completions=["1", "1"], answer=["1", "1"])


def reward_set(node: dict[str, Any], folder: Path) -> Any:
    """Combined rewards and how long a function may take."""
    rewards = built(node)
    try:
        return {name: (spec.weight, spec.function.__name__) for name, spec in rewards.functions.items()}
    finally:
        rewards.close()


PROBES = [
    Probe(["reward=tag_format"], "reward.functions.tag_format.function", reads_text("5"), {
        "reasoning": "think", "solution": "answer", "reasoning_score": 0.25, "solution_score": 0.5,
        "degenerate_score": -1.0, "degenerate_frac": 0.3, "filler": ["x"],
    }),
    Probe(["reward=tagged_number"], "reward.functions.tagged_number.function", reads_text("5"), {
        "right": 3.0, "tag": "answer", "tolerance": 0.01,
    }, {"tolerance": 0.2}),
    Probe(["reward=multiple_choice"], "reward.functions.multiple_choice.function", reads_text("C"), {
        "choices": "AB", "tag": "SOLUTION", "answer_words": ["Antwort"],
    }, {"choices": "ABCDE"}),
    Probe(["reward=length_target"], "reward.functions.length_target.function", lengths, {"target_tokens": 3, "tolerance_tokens": 7}),
    Probe(["reward=soft_overlong"], "reward.functions.soft_overlong.function", lengths, {"max_tokens": 99, "cache_tokens": 9}),
    Probe(["reward=math"], "reward.functions.math.function", math_verify, {"tag": "SOLUTION", "item_timeout_s": 0.25}),
    Probe(["reward=code"], "reward.functions.code.function", code_reward, {
        "partial": True, "failure": -1.0, "tolerance": 0.1, "workers": 3, "sandbox": "unsafe",
    }),
    Probe(["reward=code"], "reward.functions.code.function.limits", limits, {
        "wall_s": 99.0, "cpu_s": 3, "memory_mb": 300, "disk_mb": 3, "max_processes": 9, "output_mb": 1,
    }),
    Probe(["reward=matmul"], "reward.functions.matmul.function", matmul, {
        "function": "other", "runs": 2.0, "fails": -5.0, "own_imports": 0.5, "foreign_import": -9.0,
        "ladder": [[1e-9, 7.0], [1e-3, 1.0]], "wrong": -4.0, "speed_size": 8, "speed_repeats": 1, "speed_clip": 1.0,
        "seed": 3, "sandbox": "unsafe",
    }, {"speed_size": 4, "speed_repeats": 2}),
    Probe(["reward=reward_model", "reward.functions.reward_model.function.path=here"], "reward.functions.reward_model.function", reward_model, {
        "path": "nowhere", "batch_size": 2, "max_length": 5, "device": "meta", "dtype": "bfloat16",
    }),
    Probe(["reward=by_task", "data=mixture"], "reward.functions.largest.function", for_tasks, {"tasks": ["sums"]}),
    Probe(["reward=letters"], "reward", reward_set, {
        "functions": {"letter_share": {
            "_target_": "gspo_lightning.rewards.RewardSpec", "weight": 1.0,
            "function": {"_target_": "hydra.utils.get_method", "path": "gspo_lightning.rewards.exact_match"},
        }},
    }),
]  # fmt: skip
