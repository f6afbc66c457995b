"""A subclass that adds a loss of its own: `python examples/auxiliary_loss.py`, or in a config, see docs/reuse.md.

After the policy loss of every minibatch comes a small pull of the output embedding towards where it started. The term
is added once per optimizer step, whatever the number of micro-batches, so it means the same under any token budget.
"""

import sys
from functools import partial

import lightning as L
import torch

import gspo_lightning as gl
from gspo_lightning.data import MicroLetters
from gspo_lightning.distributed.ranks import whole
from gspo_lightning.rewards import letter_share


class AnchoredModule(gl.GSPOModule):
    """``loss + weight * mean((W - W_start)^2)`` with W the output embedding."""

    def __init__(self, *args: object, anchor_weight: float, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.anchor_weight = anchor_weight
        self.register_buffer("start", None, persistent=False)  # a buffer goes to the device with the module

    def configure_model(self) -> None:
        """Comes before a checkpoint is loaded, so a resumed run starts from the same weights."""
        super().configure_model()
        if self.start is None:
            self.start = whole(self.policy.output_weight.detach()).clone()  # trainer=fsdp has split it by now

    def auxiliary_loss(self, minibatch: gl.Minibatch) -> torch.Tensor:
        """Called once per optimizer step, on every rank; the result is a mean, not a sum."""
        return self.anchor_weight * (self.policy.output_weight - self.start).square().mean()


def main(anchor_weight: float, rollouts: int = 3, **trainer_options: object) -> float:
    """How far the output embedding has moved."""
    module = AnchoredModule(
        gl.PolicyLoader("bundled:micro"),
        gl.RewardSet({"letters": gl.RewardSpec(letter_share)}),
        sampling=gl.SamplingParams(num_generations=4, max_completion_length=8),
        objective=gl.Objective(max_completion_length=8, epsilon=0.03, epsilon_high=0.04),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        max_rollouts=rollouts,
        anchor_weight=anchor_weight,
    )
    datamodule = gl.PromptDataModule(MicroLetters(), "bundled:micro", prompts_per_rollout=8, max_prompt_length=16)
    options = {"log_every_n_steps": 1, "enable_checkpointing": False, "limit_val_batches": 0, **trainer_options}
    L.Trainer(max_epochs=-1, **options).fit(module, datamodule)
    return (whole(module.policy.output_weight.detach()) - module.start).norm().item()


if __name__ == "__main__":
    options = {"logger": False, "enable_progress_bar": False}
    for weight in map(float, sys.argv[1:] or ("0", "1000")):
        print(f"anchor_weight={weight:g}: the output embedding moved by {main(weight, **options):.4f}")
