"""The quickstart's task with TRL's GRPOTrainer and the quickstart's settings; prints one line of JSON.

Run by `scripts/quality_per_time.py` in the peers' environment.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import processor
from gspo_lightning.data import LargestOfFour
from gspo_lightning.rewards import last_integer

PROMPTS, GENERATIONS, MINIBATCHES = 8, 8, 4


class Curve(TrainerCallback):  # type: ignore[misc]
    """Mean reward of each rollout, and the seconds of training that lay before it."""

    def __init__(self) -> None:
        self.rewards: list[float] = []
        self.seconds: list[float] = []
        self.start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % MINIBATCHES == 0:
            self.seconds.append(time.perf_counter() - self.start)

    def reward(self, completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
        """That of the quickstart."""
        values = last_integer(completions, answer=answer)
        self.rewards.append(sum(values) / len(values))
        return values


def main() -> None:
    folder, seed, rollouts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    task, curve = LargestOfFour(seed=seed), Curve()
    rows = [task.train_row(index) for index in range(rollouts * PROMPTS)]
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out, seed=seed, use_cpu=True, bf16=processor.multiplies_bfloat16(), report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, optim="adamw_torch_fused", learning_rate=2e-5,
            adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="constant",
            per_device_train_batch_size=PROMPTS * GENERATIONS // MINIBATCHES, gradient_accumulation_steps=1,
            steps_per_generation=MINIBATCHES, num_generations=GENERATIONS, gradient_checkpointing=False,
            max_completion_length=16, temperature=0.9, beta=0.0, loss_type="grpo",
            importance_sampling_level="sequence", epsilon=0.03, epsilon_high=0.04,
            max_steps=rollouts * MINIBATCHES, shuffle_dataset=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=curve.reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[curve],
        )
        trainer.train()
    print("\n" + json.dumps({"reward": curve.rewards, "seconds": [0.0, *curve.seconds[:-1]]}), flush=True)


if __name__ == "__main__":
    main()
