"""Runs a scenario with gspo_lightning."""

from __future__ import annotations

from gspo_lightning.program.threads import keep_freed_memory

keep_freed_memory()

import functools  # noqa: E402
from typing import Any  # noqa: E402

import lightning as L  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from benchmarks.ablate import ABLATIONS  # noqa: E402
from benchmarks.scenarios import Scenario, common_tokens, reward, template  # noqa: E402
from benchmarks.vlm import image  # noqa: E402
from benchmarks.worker import Clock, job, report  # noqa: E402
from gspo_lightning.advantages import AdvantageEstimator  # noqa: E402
from gspo_lightning.config.hardware import busy_tokens, token_budget  # noqa: E402
from gspo_lightning.data.vision import VisionSettings, encode_conversation  # noqa: E402
from gspo_lightning.module import GSPOModule  # noqa: E402
from gspo_lightning.objective import Objective  # noqa: E402
from gspo_lightning.policy.load import PolicyLoader  # noqa: E402
from gspo_lightning.policy.model import Policy  # noqa: E402
from gspo_lightning.policy.processor import load_processor  # noqa: E402
from gspo_lightning.rewards import RewardSet, RewardSpec  # noqa: E402
from gspo_lightning.rollout import TransformersEngine  # noqa: E402
from gspo_lightning.training.schedule import Schedule  # noqa: E402
from gspo_lightning.training.update import UpdateSettings  # noqa: E402
from gspo_lightning.training.validation import ValidationSettings  # noqa: E402
from gspo_lightning.types import Prompt, PromptBatch, SamplingParams  # noqa: E402


class TimedModule(GSPOModule):
    """The module as it is, with a clock around its two phases."""

    clock = Clock()

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> int | None:
        with self.clock("rollout"):
            return super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        before = dict(self.counts)
        with self.clock("update"):
            super().training_step(batch, batch_idx)
        self.clock.end_step(
            completion_tokens=self.counts["rollout_tokens"] - before["rollout_tokens"],
            processed_tokens=self.counts["train_tokens"] - before["train_tokens"],
        )


def make_prompt(index: int, row: dict[str, Any], scenario: Scenario, tokenizer: Any, model: str) -> Prompt:
    """A prompt of a scenario's row, with its image if it has one."""
    text = row["prompt"][0]["content"]
    if not scenario.images:
        return Prompt(str(index), row["prompt"], torch.tensor(template(tokenizer, text)), row)
    parts = [{"type": "image", "image": image(index)}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": parts}]
    ids, inputs = encode_conversation(messages, load_processor(model), VisionSettings(), {}, f"row {index}")
    return Prompt(str(index), messages, ids, row, inputs)


def train(
    scenario: Scenario, loader: PolicyLoader, prompts: list[Prompt], steps: int, busy: int, **options: Any
) -> TimedModule:
    """Runs the steps and returns the module.

    Args:
        scenario: the work.
        loader: of the policy.
        prompts: of all steps.
        steps: rollouts.
        busy: what update.max_tokens_per_microbatch=auto starts from on this device.
        options: ``engine`` instead of the policy itself; all others go to the Trainer.
    """
    engine = options.pop("engine", None) or TransformersEngine()
    size = scenario.prompts
    longest = max(len(prompt.input_ids) for prompt in prompts)
    budget = token_budget(longest, scenario.completion_tokens, scenario.generations, busy)
    batches = [PromptBatch(prompts[s : s + size], cursor=0) for s in range(0, len(prompts), size)]
    module = TimedModule(
        policy_loader=loader,
        engine=engine,
        rewards=RewardSet({"reward": RewardSpec(reward)}),
        objective=Objective(
            max_completion_length=scenario.completion_tokens, importance_sampling_level="token", beta=scenario.beta
        ),
        advantages=AdvantageEstimator(),
        sampling=SamplingParams(scenario.generations, scenario.completion_tokens, temperature=0.9),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.0, weight_decay=0.0, fused=True),
        schedule=Schedule("constant"),
        update=UpdateSettings(
            num_minibatches=scenario.minibatches,
            max_tokens_per_microbatch=budget,
            keep_zero_advantage=scenario.keep_silent,
        ),
        validation=ValidationSettings(1),
        max_rollouts=steps,
    )
    trainer = L.Trainer(
        **{
            "accelerator": "cpu", "devices": 1,
            "precision": "bf16-mixed" if scenario.precision == "bf16" else "32-true",
            "max_epochs": 1, "limit_val_batches": 0, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, **options,
        }
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return module


def parameter_counts(policy: Policy) -> tuple[int, int]:
    """Of the layers of the language half, and of the output embedding."""
    head = policy.output_weight.numel()
    language = [(n, p) for n, p in policy.named_parameters() if "visual" not in n and "embed_tokens" not in n]
    return sum(p.numel() for n, p in language if "lm_head" not in n), head


def sizes(policy: Policy, prompts: list[Prompt]) -> dict[str, int]:
    """What `unique_flops` reads of a model and of the prompts of a step."""
    body, head = parameter_counts(policy)
    ids = [prompt.input_ids.tolist() for prompt in prompts]
    common = 0 if any(prompt.mm_inputs for prompt in prompts) else common_tokens(ids)
    prompt_tokens = sum(map(len, ids))
    return {"body_parameters": body, "head_parameters": head, "prompt_tokens": prompt_tokens, "common_tokens": common}


def main() -> None:
    scenario, model, steps = job()
    if scenario.ablate is not None:
        ABLATIONS[scenario.ablate]()
    if not scenario.natural_stops:
        Policy.eos_token_ids = ()  # type: ignore[assignment, misc]
    loader = PolicyLoader(model)
    tokenizer = loader.load_tokenizer()
    prompts = [make_prompt(i, row, scenario, tokenizer, model) for i, row in enumerate(scenario.rows(tokenizer, steps))]
    module = train(scenario, loader, prompts, steps, busy_tokens(on_gpu=False, narrow=scenario.precision == "bf16"))
    assert module.policy is not None
    report(TimedModule.clock, **sizes(module.policy, prompts[-scenario.prompts :]))


if __name__ == "__main__":
    main()
