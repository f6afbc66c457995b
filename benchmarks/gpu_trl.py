"""TRL's side of `scripts/gpu_benchmark.py`: one process, one line of JSON for each case."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from benchmarks.gpu_models import MODELS, random_model, write_folder
from benchmarks.gpu_worker import answer
from benchmarks.scenarios import Scenario
from benchmarks.vlm import image
from benchmarks.worker_trl import TimedTrainer, train
from gspo_lightning.policy.processor import load_processor


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One model, one scenario; a group at a time goes through the model, all of them make one optimizer step."""
    scenario, architecture, steps = Scenario(**case["scenario"]), MODELS[case["model"]], int(case["steps"])
    folder = write_folder(case["model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = scenario.rows(tokenizer, steps)
    if scenario.images:
        rows = [{**row, "image": image(index)} for index, row in enumerate(rows)]
    dtype = torch.bfloat16 if architecture.lora else torch.float32
    model = random_model(folder, dtype, case["device"], "sdpa")
    TimedTrainer.clock.steps.clear()
    TimedTrainer.clock.now.clear()
    train(
        scenario, model, load_processor(folder) if scenario.images else tokenizer, rows, steps,
        use_cpu=case["device"] == "cpu", gradient_checkpointing=architecture.checkpointing,
        per_device_train_batch_size=scenario.generations, gradient_accumulation_steps=scenario.prompts,
        steps_per_generation=scenario.prompts,
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear") if architecture.lora else None,
    )  # fmt: skip
    return {"steps": list(TimedTrainer.clock.steps)}


if __name__ == "__main__":
    answer(run)
