"""`GSPOModule` in a plain Trainer, with a DataModule and a reward of your own: `python examples/plain_trainer.py`.

The random micro model learns to answer with vowels. For a real model, give `PolicyLoader` a folder or a hub name.
"""

from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader

import gspo_lightning as gl


class Letters(L.LightningDataModule):
    """Any loader of `PromptBatch` will do; one batch is one rollout."""

    def __init__(self, model_path: str) -> None:
        super().__init__()
        self.tokenizer = gl.PolicyLoader(model_path).load_tokenizer()

    def batch(self, number: int) -> gl.PromptBatch:
        """Eight prompts; a uid names a row for ever, because sampling seeds derive from it."""
        rows = [{"prompt": f"{number}{letter}:"} for letter in "bcdfghjk"]
        return gl.PromptBatch([gl.make_prompt(row, self.tokenizer, uid=f"letters:{row['prompt']}") for row in rows])

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch(number) for number in range(20)], batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.batch(999)], batch_size=None)


def vowels(completions: list[str], **columns: object) -> list[float]:
    """Share of vowels; `columns` holds whatever else stands in the rows."""
    return [sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text)) for text in completions]


def main(rollouts: int = 20, **trainer_options: object) -> tuple[float, float]:
    """Mean reward of the held-out prompts before and after."""
    module = gl.GSPOModule(
        gl.PolicyLoader("bundled:micro"),
        gl.RewardSet({"vowels": gl.RewardSpec(vowels)}),
        sampling=gl.SamplingParams(num_generations=8, max_completion_length=8),
        objective=gl.Objective(max_completion_length=8, epsilon=0.03, epsilon_high=0.04),
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        max_rollouts=rollouts,
    )
    datamodule = Letters("bundled:micro")
    options = {"log_every_n_steps": 1, "enable_checkpointing": False, "limit_val_batches": 1, **trainer_options}
    trainer = L.Trainer(max_epochs=-1, **options)
    before = trainer.validate(module, datamodule)[0]["val/reward"]
    trainer.fit(module, datamodule)
    return before, trainer.validate(module, datamodule)[0]["val/reward"]


if __name__ == "__main__":
    print("held-out reward before and after: {:.2f} {:.2f}".format(*main(logger=False, enable_progress_bar=False)))
