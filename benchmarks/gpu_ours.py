"""Our side of `scripts/gpu_benchmark.py`: one process, one line of JSON for each case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_models import MODELS, RandomLoader, write_folder
from benchmarks.gpu_worker import answer
from benchmarks.scenarios import Scenario
from benchmarks.worker_ours import TimedModule, make_prompt, sizes, train
from gspo_lightning.config.hardware import busy_tokens
from gspo_lightning.policy.load import LoraSettings
from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Completion, Prompt, Rollout, SamplingParams


@dataclass(frozen=True)
class RandomEngine:
    """Completions of random tokens: the update alone is measured."""

    def generate(self, policy: Any, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """See `gspo_lightning.rollout.RolloutEngine`."""
        length = sampling.max_completion_length
        generator = torch.Generator().manual_seed(seed)

        def one() -> Completion:
            ids = torch.randint(7, 100, (length,), generator=generator)
            return Completion(ids, "", torch.zeros(length), "length")

        return Rollout(prompts, [[one() for _ in range(sampling.num_generations)] for _ in prompts])


def prompts_of(case: dict[str, Any], scenario: Scenario, loader: RandomLoader, steps: int) -> list[Prompt]:
    """Text with its image, or random tokens where lengths must be met exactly."""
    if not case.get("random"):
        tokenizer = loader.load_tokenizer()
        rows = scenario.rows(tokenizer, steps)
        return [make_prompt(i, row, scenario, tokenizer, loader.path) for i, row in enumerate(rows)]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 100, (steps * scenario.prompts, scenario.prompt_tokens), generator=generator)
    return [Prompt(str(n), "", row, {"silent": False}) for n, row in enumerate(ids)]


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One model, one scenario."""
    scenario, architecture, steps = Scenario(**case["scenario"]), MODELS[case["model"]], int(case["steps"])
    loader = RandomLoader(
        write_folder(case["model"]),
        dtype="bfloat16" if architecture.lora else "float32",
        lora=LoraSettings(r=16, alpha=16) if architecture.lora else None,
        gradient_checkpointing=architecture.checkpointing,
        attention=case.get("attention", "auto"),
        compile=case.get("compile", False),
        device=case["device"],
    )
    TimedModule.clock.steps.clear()
    on_gpu = case["device"] == "cuda"
    prompts = prompts_of(case, scenario, loader, steps)
    module = train(
        scenario, loader, prompts, steps, busy_tokens(on_gpu, narrow=True),
        engine=RandomEngine() if case.get("random") else None, accelerator="gpu" if on_gpu else "cpu",
    )  # fmt: skip
    assert module.policy is not None
    return {"steps": list(TimedModule.clock.steps), **sizes(module.policy, prompts[-scenario.prompts :])}


def main() -> None:
    Policy.eos_token_ids = ()  # type: ignore[assignment, misc]
    answer(run)


if __name__ == "__main__":
    main()
