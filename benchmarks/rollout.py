"""Tokens per second of the three rollout engines and the time of a weight synchronisation, on SmolLM2-135M-Instruct.

    OMP_NUM_THREADS=2 GOMP_SPINCOUNT=1000 python scripts/benchmark.py rollout [--dtype bfloat16] [--engines NAME ...]

8 prompts x 8 completions x 128 tokens; no completion ends early, so every engine makes the same 8,192 tokens. One
round warms up, the better of two counts. ``vllm_server`` needs a server on port 8000 (scripts/serve_rollouts.sh).
The time of a synchronisation holds the check of the weights, the transfer and the proof.
"""

from __future__ import annotations

import argparse
import contextlib
import time

import torch

from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout import RolloutEngine, TransformersEngine, VLLMEngine, VLLMServerEngine
from gspo_lightning.types import Prompt, SamplingParams

MODEL = "bundled:smollm2-135m-instruct"
PROMPTS, GENERATIONS, TOKENS, PROMPT_TOKENS = 8, 8, 128, 64
SAMPLING = SamplingParams(GENERATIONS, TOKENS, temperature=1.0)


class _Endless(Policy):
    """A policy whose completions never end early."""

    eos_token_ids = ()  # type: ignore[assignment]


def build(name: str) -> RolloutEngine:
    """The engine as its config group builds it."""
    if name == "transformers":
        return TransformersEngine()
    if name == "vllm":
        return VLLMEngine(MODEL, PROMPT_TOKENS, TOKENS)
    return VLLMServerEngine(["http://127.0.0.1:8000"], PROMPT_TOKENS, TOKENS)


def nudge(policy: Policy) -> None:
    """Changes the weights a little, as an optimizer step does."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.0001)
    torch.clear_autocast_cache()


def measure(name: str, policy: Policy, prompts: list[Prompt]) -> None:
    """Prints one row."""
    engine, rollout_s, first_s = build(name), [], []
    for seed in range(3):
        start = time.perf_counter()
        rollout = engine.generate(policy, prompts, SAMPLING, seed)
        rollout_s.append(time.perf_counter() - start)
        tokens = sum(len(c.token_ids) for group in rollout.completions for c in group)
    short = SamplingParams(1, 1)
    for seed in range(3):
        unchanged = _seconds(engine, policy, prompts[:1], short, seed)
        nudge(policy)
        first_s.append(_seconds(engine, policy, prompts[:1], short, seed) - unchanged)
    best = min(rollout_s[1:])
    print(f"{name:13} {best:6.1f} s {tokens / best:7.0f} tokens/s   sync {min(first_s):5.2f} s ({tokens} tokens)")
    if not isinstance(engine, TransformersEngine):
        engine.close()  # type: ignore[attr-defined]


def _seconds(
    engine: RolloutEngine, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int
) -> float:
    start = time.perf_counter()
    engine.generate(policy, prompts, sampling, seed)
    return time.perf_counter() - start


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    choices = ["transformers", "vllm", "vllm_server"]
    parser.add_argument("--engines", nargs="+", choices=choices, default=choices)
    arguments = parser.parse_args()
    policy = PolicyLoader(MODEL).load()
    policy.__class__ = _Endless
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(20, 40_000, (PROMPT_TOKENS,), generator=generator) for _ in range(PROMPTS)]
    prompts = [Prompt(f"bench:{number}", "", row, {}) for number, row in enumerate(ids)]
    mixed = torch.autocast("cpu", torch.bfloat16) if arguments.dtype == "bfloat16" else contextlib.nullcontext()
    print(f"{PROMPTS} prompts x {GENERATIONS} x {TOKENS} tokens, {arguments.dtype}, {torch.get_num_threads()} threads")
    with mixed:
        for name in arguments.engines:
            measure(name, policy, prompts)


if __name__ == "__main__":
    main()
