"""The package on a case: a `GSPOModule` in a Trainer, whose engine returns the scripted completions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.module import GSPOModule
from gspo_lightning.objective import Objective, check_objective
from gspo_lightning.objective.mismatch import MismatchCorrection
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.training.schedule import Schedule
from gspo_lightning.training.update import UpdateSettings
from gspo_lightning.training.validation import ValidationSettings
from gspo_lightning.types import Prompt, PromptBatch, SamplingParams
from tests.scripted import ScriptedEngine, trainer
from tests.whole_update.draw import Case
from tests.whole_update.reference_model import Optimizer, Trained

RUN_SEED = 3
LORA = LoraSettings(r=4, alpha=32)


@dataclass
class Recorder(L.Callback):
    """Metrics and trained tensors after every rollout."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    tensors: list[dict[str, Tensor]] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.metrics.append(dict(module.last_metrics))
        self.tensors.append(trained_tensors(module))


def trained_tensors(module: GSPOModule) -> dict[str, Tensor]:
    """By the names that the reference gives them: the network's, and those of adapted matrices with ``:A`` or ``:B``."""
    assert module.policy is not None
    found = {}
    for name, parameter in module.policy.named_parameters():
        if parameter.requires_grad:
            name = name[name.index("model.layers") :] if "model.layers" in name else name[name.rindex("model.") :]
            for side in "AB":
                name = name.replace(f".lora_{side}.default.weight", f".weight:{side}")
            found[name] = parameter.detach().clone()
    return found


def prepared(folder: Any, case: Case) -> GSPOModule:
    """The module with its policy; an adapter is given random values, as one that is trained has."""
    module = build(folder, case)
    module.configure_model()
    assert module.policy is not None
    generator = torch.Generator().manual_seed(5)
    if case.lora:
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def train(module: GSPOModule, rollouts: list[list[Prompt]]) -> Recorder:
    """Runs all rollouts."""
    recorder = Recorder()
    loader: Any = DataLoader([PromptBatch(prompts) for prompts in rollouts], batch_size=None)  # type: ignore[arg-type]
    trainer(callbacks=[recorder]).fit(module, loader)
    return recorder


def starting_point(case: Case, start: dict[str, Tensor], tensors: dict[str, Tensor]) -> Trained:
    """The same weights for the reference."""
    if not case.lora:
        return Trained(start, None, 1.0)
    names = sorted({name.split(":")[0] for name in tensors})
    adapter = {name: (tensors[f"{name}:A"], tensors[f"{name}:B"]) for name in names}
    return Trained(start, adapter, LORA.alpha / LORA.r)


def contradictions(module: GSPOModule, case: Case) -> list[str]:
    """Why a user could not run the case."""
    findings = check_objective(
        module.objective,
        num_iterations=case.iterations,
        num_minibatches=case.minibatches,
        num_generations=case.generations,
        has_adapter=case.lora,
        keep_zero_advantage=case.keep_zero_advantage,
        ref_sync_every_n_rollouts=case.ref_sync_every,
        ref_model_mixup_alpha=case.ref_mixup_alpha,
    )
    return [finding.message for finding in findings if finding.kind == "contradiction"]


def build(folder: Any, case: Case) -> GSPOModule:
    """The settings of the case as the package takes them."""
    functions = {f"f{k}": RewardSpec(_reward(k), weight=w) for k, w in enumerate(case.reward_weights)}
    return GSPOModule(
        policy_loader=PolicyLoader(str(folder), dtype="float64", lora=LORA if case.lora else None),
        engine=ScriptedEngine(),
        rewards=RewardSet(functions, combine=case.combine),  # type: ignore[arg-type]
        objective=_objective(case),
        advantages=AdvantageEstimator(case.scale, case.baseline),  # type: ignore[arg-type]
        sampling=SamplingParams(case.generations, case.max_length, case.temperature),
        optimizer=_optimizer(case),
        schedule=Schedule(case.schedule, case.warmup_ratio, case.min_ratio),  # type: ignore[arg-type]
        update=UpdateSettings(
            num_iterations=case.iterations,
            num_minibatches=case.minibatches,
            max_tokens_per_microbatch=case.token_budget,
            max_grad_norm=case.max_grad_norm,
            keep_zero_advantage=case.keep_zero_advantage,
            ref_sync_every_n_rollouts=case.ref_sync_every,
            ref_model_mixup_alpha=case.ref_mixup_alpha,
            log_entropy=case.log_entropy,
        ),
        validation=ValidationSettings(1),
        max_rollouts=case.rollouts,
        seed=RUN_SEED,
    )


def _objective(case: Case) -> Objective:
    return Objective(
        max_completion_length=case.max_length,
        importance_sampling_level=case.level,  # type: ignore[arg-type]
        loss_type=case.loss,
        epsilon=case.epsilon,
        epsilon_high=case.epsilon_high,
        delta=case.delta,
        beta=case.beta,
        beta_end=case.beta_end,
        kl_estimator=case.kl_estimator,  # type: ignore[arg-type]
        kl_importance_weighted=case.kl_importance_weighted,
        entropy_coef=case.entropy_coef,
        mask_truncated_completions=case.mask_truncated,
        top_entropy_quantile=case.top_entropy_quantile,
        off_policy_mask_threshold=case.off_policy_threshold,
        mismatch=MismatchCorrection(*case.mismatch) if case.mismatch is not None else None,  # type: ignore[arg-type]
        tau_positive=case.tau_positive,
        tau_negative=case.tau_negative,
    )


def _optimizer(case: Case) -> Any:
    rates = {"lr": case.lr, "weight_decay": case.weight_decay}
    if case.optimizer == "sgd":
        return functools.partial(torch.optim.SGD, momentum=case.momentum, **rates)
    return functools.partial(torch.optim.AdamW, betas=Optimizer.BETAS, eps=Optimizer.EPSILON, **rates)


def _reward(k: int) -> Callable[..., list[float | None]]:
    """The k-th function: completion g of a prompt gets the number of its row, None where that is NaN."""

    def function(completion_ids: list[Any], rewards: list[Any], **_: Any) -> list[float | None]:
        found = [row[number % len(row)][k] for number, row in enumerate(rewards)]
        return [None if math.isnan(value) else value for value in found]

    return function
