"""A training module on the micro model with scripted rollouts, and the gradient of one update."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.distributed.ranks import whole
from gspo_lightning.distributed.rendezvous import leave_at_exit, own_environment
from gspo_lightning.module import GSPOModule
from gspo_lightning.objective import Objective
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.training.schedule import Schedule
from gspo_lightning.training.update import UpdateSettings
from gspo_lightning.training.validation import ValidationSettings
from gspo_lightning.types import Completion, Prompt, PromptBatch, Rollout, SamplingParams


@dataclass(frozen=True)
class ScriptedEngine:
    """Returns the completions that stand in the prompts' rows."""

    def generate(self, policy: Any, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        return Rollout(prompts, [prompt.sample["completions"] for prompt in prompts])


def scripted_prompts(seed: int = 0, count: int = 4, generations: int = 3) -> list[Prompt]:
    """Ragged prompts with ragged completions and rewards; the rewards of prompt 1 are all equal."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> Tensor:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 90, (length,), generator=generator)

    prompts = []
    for number in range(count):
        completions = [Completion(c, "", torch.zeros(len(c)), "stop") for c in (ids(1, 9) for _ in range(generations))]
        rewards = torch.rand(generations, generator=generator).tolist() if number != 1 else [0.1] * generations
        row = {"completions": completions, "scripted": list(enumerate(rewards))}
        prompts.append(Prompt(f"scripted:{number}", "", ids(3, 12), row))
    return prompts


def scripted_reward(completion_ids: list[Any], scripted: list[Any], **_: Any) -> list[float]:
    """Reads the rewards off the rows: completion g of a prompt gets the g-th."""
    count = len(scripted[0])
    return [row[number % count][1] for number, row in enumerate(scripted)]


class ScriptedSource(L.LightningDataModule):
    """A `PromptSource` of scripted prompts whose cursor counts rollouts; tests replace what they are about."""

    max_prompt_length = 8
    task_names = ()
    cursor = 0

    def first(self) -> PromptBatch:
        return self.batch_at(self.cursor)

    def batch_at(self, cursor: int) -> PromptBatch:
        return PromptBatch(scripted_prompts(seed=cursor), cursor + 1)

    def draw(self, batch: PromptBatch, counts: Sequence[int]) -> PromptBatch | None:
        return None

    def finish(self, batch: PromptBatch) -> None:
        self.cursor = batch.cursor


@dataclass
class Batches:
    """A loader of one fixed batch, again and again."""

    prompts: list[Prompt]
    batches: int = 1

    def loader(self) -> DataLoader[PromptBatch]:
        return DataLoader([PromptBatch(self.prompts, cursor=0)] * self.batches, batch_size=None)  # type: ignore[arg-type]


@dataclass
class Settings:
    """What the tests vary."""

    objective: dict[str, Any] = field(default_factory=dict)
    update: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = functools.partial(torch.optim.SGD, lr=1.0)
    dtype: str = "float64"
    lora: Any = None
    train_vision: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    advantages: Any = "group"
    rollouts: int = 1
    longest: int = 8
    """Most tokens of a completion."""


def build_module(folder: Any, settings: Settings, generations: int = 3) -> GSPOModule:
    """A module on the micro model that trains with plain SGD at rate 1, so that a step is minus the gradient."""
    return GSPOModule(
        policy_loader=PolicyLoader(
            str(folder),
            dtype=settings.dtype,
            lora=settings.lora,
            train_vision=settings.train_vision,
            compile=settings.compile,
            gradient_checkpointing=settings.gradient_checkpointing,
        ),  # fmt: skip
        engine=ScriptedEngine(),
        rewards=RewardSet({"scripted": RewardSpec(scripted_reward)}),
        objective=Objective(max_completion_length=settings.longest, **settings.objective),
        advantages=AdvantageEstimator(settings.advantages),
        sampling=SamplingParams(num_generations=generations, max_completion_length=settings.longest),
        optimizer=settings.optimizer,
        schedule=Schedule("constant"),
        update=UpdateSettings(**{"num_minibatches": 1, "max_grad_norm": 1e9, **settings.update}),
        validation=ValidationSettings(1),
        max_rollouts=settings.rollouts,
    )


def trainer(**changes: Any) -> L.Trainer:
    """A silent Trainer."""
    leave_at_exit()
    return L.Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "logger": False, "max_epochs": -1, "num_sanity_val_steps": 0,
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "limit_val_batches": 0, "plugins": own_environment(1), **changes,
        }
    )  # fmt: skip


def weights(module: GSPOModule) -> Tensor:
    """All trained parameters as one vector."""
    return torch.cat([whole(p.detach()).flatten().clone() for p in module.policy.parameters() if p.requires_grad])


class Before(L.Callback):
    """Keeps the weights that training starts from."""

    weights: Tensor

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.weights = weights(pl_module)


def update_of(
    folder: Any, settings: Settings, prompts: Sequence[Prompt] | None = None, **changes: Any
) -> tuple[Tensor, GSPOModule]:
    """Minus the change of the weights by one run: the gradient, for one step of SGD at rate 1; and the module.

    ``changes`` go to the Trainer.
    """
    prompts = scripted_prompts() if prompts is None else list(prompts)
    module = build_module(folder, settings, generations=len(prompts[0].sample["completions"]))
    before = Before()
    if isinstance(changes.get("strategy"), ModelParallelStrategy):  # which splits weights as it has them loaded
        changes["callbacks"] = [*changes.get("callbacks", []), before]
    else:
        module.configure_model()
        before.weights = weights(module)
    trainer(**changes).fit(module, Batches(prompts, settings.rollouts).loader())
    return before.weights.cpu() - weights(module).cpu(), module
