"""The work that both sides do, and the floating-point operations it cannot do without.

The learning rate is 0, with the whole optimizer at work: the rewards mean nothing, and a policy that drifted on
them would give the two sides completions of different lengths.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from os.path import commonprefix
from typing import Any

from benchmarks import processor


@dataclass(frozen=True)
class Scenario:
    """One kind of training step. Rewards are a function of the completion, so every group has signal unless said."""

    name: str
    prompts: int
    generations: int
    prompt_tokens: int
    completion_tokens: int
    precision: str
    """``bf16`` (autocast over float32 weights) or ``fp32``."""
    natural_stops: bool = False
    """End at the end-of-sequence token; otherwise every completion has exactly ``completion_tokens``."""
    minibatches: int = 1
    beta: float = 0.0
    silent_groups: int = 0
    """Groups whose rewards are all equal."""
    images: bool = False
    """Each prompt has an image of 256 visual tokens, for `benchmarks.vlm`; ``prompt_tokens`` counts them."""
    ablate: str | None = None
    """A saving that ours does without, of `benchmarks.ablate`."""
    keep_silent: bool = False
    """Ours forwards groups without signal."""
    bars: tuple[float, float] | None = None
    """What TRL / ours must reach: (time, memory)."""

    def rows(self, tokenizer: Any, steps: int) -> list[dict[str, Any]]:
        """``steps * prompts`` dataset rows with prompts of exactly ``prompt_tokens`` tokens after the template."""
        return [self._row(tokenizer, index) for index in range(steps * self.prompts)]

    def _row(self, tokenizer: Any, index: int) -> dict[str, Any]:
        rng = random.Random(index)
        numbers = rng.sample(range(10, 100), 4)
        question = (
            f"Which is the largest of these numbers: {', '.join(map(str, numbers))}? Answer with just the number."
        )
        message = question
        while len(template(tokenizer, message)) < self.prompt_tokens - (VISUAL_TOKENS if self.images else 0):
            message = f"{rng.choice(WORDS)} {message}"
        return {
            "prompt": [{"role": "user", "content": message}],
            "silent": index % self.prompts < self.silent_groups,
        }

    def on_this_processor(self) -> Scenario:
        """As ``trainer.precision=auto`` would train it here: in float32 where the processor has no units for bfloat16,
        and then without bars."""
        slow = self.precision == "bf16" and not processor.multiplies_bfloat16()
        return replace(self, precision="fp32", bars=None) if slow else self

    def as_dict(self) -> dict[str, Any]:
        """For the worker processes."""
        return asdict(replace(self, bars=None))


VISUAL_TOKENS = 258
"""Of an image, with the marks of its beginning and end."""


WORDS = [
    "red",
    "blue",
    "green",
    "stone",
    "river",
    "cloud",
    "tree",
    "light",
    "paper",
    "glass",
    "iron",
    "salt",
    "wind",
    "fire",
    "sand",
    "snow",
]


def template(tokenizer: Any, message: str) -> list[int]:
    """Token ids of a user message with the chat template."""
    return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
        [{"role": "user", "content": message}], add_generation_prompt=True, return_dict=False
    )


def reward(completion_ids: list[list[int]], silent: list[bool], **_: Any) -> list[float]:
    """A number in [0, 1) that depends on every token; 0.5 in silent groups."""
    return [
        0.5 if quiet else (sum((n + 1) * t for n, t in enumerate(ids)) * 2_654_435_761 % 9973) / 9973
        for ids, quiet in zip(completion_ids, silent, strict=True)
    ]


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("quickstart", 8, 8, 45, 16, "bf16", natural_stops=True, bars=(6, 3)),
        Scenario("long_prompt", 2, 8, 256, 64, "fp32", bars=(6, 4)),
        Scenario("long_completion", 2, 8, 64, 256, "bf16", bars=(2.5, 2)),
        Scenario("vision", 2, 8, 303, 64, "bf16", images=True, bars=(8, 4)),
        Scenario("paper", 8, 8, 45, 16, "bf16", minibatches=4, bars=(5, 3)),
        Scenario("reference", 8, 8, 45, 16, "bf16", beta=0.04, bars=(5, 3)),
        Scenario("half_silent", 8, 8, 45, 16, "bf16", silent_groups=4, bars=(7.5, 3)),
    )
}


GUARD = Scenario("guard", 2, 8, 45, 16, "bf16")


def quick_here() -> Scenario:
    """What `scripts/benchmark.py --quick` runs here: half of `quickstart` where that is in float32."""
    here = SCENARIOS["quickstart"].on_this_processor()
    return replace(here, name="half_quickstart", prompts=4) if here.precision == "fp32" else here


def guard_here() -> Scenario:
    """What `scripts/benchmark.py --check` runs here: where that is in float32, half of `GUARD`, which takes as long."""
    here = GUARD.on_this_processor()
    return here if here.precision == GUARD.precision else replace(here, prompts=1)


def common_tokens(prompts: list[list[int]]) -> int:
    """Tokens that all prompts begin with."""
    return len(commonprefix(prompts)) if len(prompts) > 1 else 0


def unique_flops(scenario: Scenario, sizes: dict[str, Any], completion_tokens: int) -> dict[str, float]:
    """Operations of one step when every token is computed once, and in the update once per optimizer step.

    A parameter costs 2 operations per token forward and 4 backward. The head is needed where a completion token is
    predicted, the body at every token but the last of a completion. Attention scores are left out on both sides.

    Args:
        sizes: ``body_parameters`` of all layers without embeddings, ``head_parameters`` of the output embedding,
            ``prompt_tokens`` of a step, and ``common_tokens``, that all of its prompts begin with.
        completion_tokens: sampled in the step.
    """
    names = ("body_parameters", "head_parameters", "prompt_tokens", "common_tokens")
    body, head, prompt_tokens, common = (sizes[name] for name in names)
    live = scenario.prompts - scenario.silent_groups

    def forwarded(prompts: int, rows: int) -> float:
        """Tokens of so many groups, divided among so many rows."""
        own = prompt_tokens - scenario.prompts * common + completion_tokens - scenario.prompts * scenario.generations
        return own * prompts / scenario.prompts + rows * common

    rollout = 2 * body * forwarded(scenario.prompts, 1) + 2 * head * completion_tokens
    old = (scenario.minibatches - 1) / scenario.minibatches
    passes = 3 + old + (1 if scenario.beta else 0)
    predicted = completion_tokens * live / scenario.prompts
    update = passes * 2 * (body * forwarded(live, scenario.minibatches) + head * predicted)
    return {"rollout": rollout, "update": update}
