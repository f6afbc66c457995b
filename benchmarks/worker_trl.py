"""Runs a scenario with TRL's GRPOTrainer, set up as its documentation suggests."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.scenarios import Scenario, reward
from benchmarks.vlm import image
from benchmarks.worker import Clock, job, report
from gspo_lightning.policy.processor import load_processor


class TimedTrainer(GRPOTrainer):
    """The trainer as it is, with a clock around generation."""

    clock = Clock()
    completion_tokens = 0

    def _generate(self, prompts: list[Any]) -> Any:
        with self.clock("rollout"):
            result = super()._generate(prompts)
        TimedTrainer.completion_tokens = sum(len(ids) for ids in result[1])
        return result


def train(
    scenario: Scenario, model: Any, processing: Any, rows: list[dict[str, Any]], steps: int, **options: Any
) -> None:
    """Runs the steps.

    Args:
        scenario: the work.
        model: to train.
        processing: its tokenizer or processor.
        rows: of all steps.
        steps: rollouts.
        options: ``peft_config`` goes to the trainer, all others to its config.
    """
    peft_config = options.pop("peft_config", None)
    per_forward = scenario.prompts * scenario.generations // scenario.minibatches
    extra = {} if scenario.natural_stops else {"generation_kwargs": {"min_new_tokens": scenario.completion_tokens}}
    with tempfile.TemporaryDirectory() as out:
        settings: dict[str, Any] = {
            "output_dir": out, "bf16": scenario.precision == "bf16", "report_to": "none", "save_strategy": "no",
            "logging_strategy": "no", "disable_tqdm": True, "optim": "adamw_torch_fused", "learning_rate": 0.0,
            "weight_decay": 0.0, "lr_scheduler_type": "constant", "per_device_train_batch_size": per_forward,
            "gradient_accumulation_steps": 1, "steps_per_generation": scenario.minibatches,
            "num_generations": scenario.generations, "gradient_checkpointing": False,
            "max_completion_length": scenario.completion_tokens, "temperature": 0.9, "beta": scenario.beta,
            "loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.27, "max_steps": steps * scenario.minibatches,
            "shuffle_dataset": False, **extra,
        }  # fmt: skip
        trainer = TimedTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(**{**settings, **options}),
            train_dataset=Dataset.from_list(rows),
            processing_class=processing,
            peft_config=peft_config,
        )
        _close_steps(trainer, scenario.minibatches)
        trainer.train()


def main() -> None:
    scenario, folder, steps = job()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = scenario.rows(tokenizer, steps)
    if scenario.images:
        rows = [{**row, "image": image(index)} for index, row in enumerate(rows)]
    kind = AutoModelForImageTextToText if scenario.images else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32)
    if scenario.images:
        model.model.visual.requires_grad_(False)  # as ours: the tower is frozen
    train(scenario, model, load_processor(folder) if scenario.images else tokenizer, rows, steps, use_cpu=True)
    report(TimedTrainer.clock)


def _close_steps(trainer: TimedTrainer, minibatches: int) -> None:
    """A step of the benchmark is a rollout: it ends with the last optimizer step on it."""
    from transformers import TrainerCallback

    class Close(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.whole = TimedTrainer.clock("whole")
            self.whole.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.whole.__exit__(None, None, None)
            if state.global_step % minibatches == 0:
                now = TimedTrainer.clock.now
                for kind in ("wall_s", "cpu_s"):
                    now[f"update_{kind}"] = now.pop(f"whole_{kind}") - now[f"rollout_{kind}"]
                TimedTrainer.clock.end_step(completion_tokens=TimedTrainer.completion_tokens)

    trainer.add_callback(Close())


if __name__ == "__main__":
    main()
