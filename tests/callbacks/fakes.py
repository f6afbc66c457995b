"""A module and a trainer with what the callbacks read, and a run that can be cut at any point."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gspo_lightning.callbacks import RunRecorder
from gspo_lightning.types import Completion, Prompt, ScoredRollout

TRAINER = SimpleNamespace(is_global_zero=True, sanity_checking=False)
OTHER_RANK = SimpleNamespace(is_global_zero=False, sanity_checking=False)


def scored_rollout(step: int, text: str = "yes") -> ScoredRollout:
    """One prompt, two completions; the second reward function does not apply to the second completion."""
    completions = [
        Completion(torch.tensor([1, 2, 3]), f"{text} {step}", torch.zeros(3), "stop"),
        Completion(torch.tensor([4] * (step + 1)), "no", torch.zeros(step + 1), "length"),
    ]
    return ScoredRollout(
        prompts=[Prompt(f"task:{step}", "Yes or no?", torch.tensor([7]), {})],
        completions=[completions],
        reward_names=("right", "short"),
        rewards_by_function=torch.tensor([[[1.0, 0.5], [0.25, float("nan")]]], dtype=torch.float64),
        rewards=torch.tensor([[1.5, 0.25]], dtype=torch.float64),
        advantages=torch.tensor([[0.75, -0.75]], dtype=torch.float64),
    )


class FakeModule(SimpleNamespace):
    """What a training module shows of itself after ``rollouts_done`` rollouts."""

    def __init__(self, total: int = 8) -> None:
        super().__init__(max_rollouts=total)
        self.at(0)

    def at(self, step: int) -> FakeModule:
        """Moves to the boundary behind rollout ``step``; from rollout 3 on there is one more metric."""
        self.rollouts_done = step
        self.last_metrics = {"reward/mean": step / 3, "completion/mean_tokens": 2.0 + step}
        if step >= 3:
            self.last_metrics["late"] = 10.0**-step
        self.last_scored = scored_rollout(step)
        self.last_validation = {"val/accuracy": step / 10}
        self.validation_samples = [{"prompt": "p", "completion": f"c{step}", "reward": 1.0, "answer": "a"}]
        return self


def play(recorder: RunRecorder, first: int, last: int, validate_every: int = 2) -> dict[int, dict[str, Any]]:
    """Rollouts ``first..last`` with validations between; returns the state for a checkpoint behind each."""
    module, states = FakeModule(), {}
    recorder.on_train_start(TRAINER, module)
    for step in range(first, last + 1):
        recorder.on_train_batch_end(TRAINER, module.at(step), None, None, step)
        if step % validate_every == 0:
            recorder.on_validation_end(TRAINER, module)
        states[step] = recorder.state_dict()
    return states


def start(folder: Path) -> RunRecorder:
    """A recorder behind the validation before training."""
    folder.mkdir(exist_ok=True)
    recorder = RunRecorder(folder)
    recorder.on_validation_end(TRAINER, FakeModule())
    return recorder


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of the records."""
    names = ("metrics.csv", "completions.jsonl", "validation_before.json", "validation_after.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
