"""The package on a case: a `GSPOModule` in a Trainer, whose engine returns the scripted completions."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.distributed.ranks import rank, whole, world_size
from gspo_lightning.module import GSPOModule
from gspo_lightning.objective import Finding, Objective, check_objective
from gspo_lightning.objective.losses import SETTINGS
from gspo_lightning.objective.mismatch import MismatchCorrection
from gspo_lightning.packing import PackedBatch
from gspo_lightning.pass_at_k import PassAtK
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.reinforce_plus_plus import ReinforcePlusPlus
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.rewards.length import LengthTarget, SoftOverlong
from gspo_lightning.training.schedule import Schedule
from gspo_lightning.training.update import Minibatch, UpdateSettings
from gspo_lightning.training.validation import ValidationSettings
from gspo_lightning.types import Prompt, PromptBatch, SamplingParams
from tests.scripted import ScriptedEngine, ScriptedSource, trainer
from tests.whole_update.case import Case
from tests.whole_update.own_losses import OWN
from tests.whole_update.padded_models import PADDED
from tests.whole_update.reference_advantages import OVERLONG, TARGET
from tests.whole_update.reference_model import Optimizer, Trained

RUN_SEED = 3
RANK, ALPHA = 4, 32


@dataclass
class Recorder(L.Callback):
    """Metrics and trained tensors after every rollout."""

    case: Case
    metrics: list[dict[str, float]] = field(default_factory=list)
    tensors: list[dict[str, Tensor]] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.metrics.append(dict(module.last_metrics))
        self.tensors.append(trained_tensors(module))
        if self.case.later and len(self.metrics) == 1:
            temperature, longest = self.case.later
            module.sampling = replace(module.sampling, temperature=temperature, max_completion_length=longest)


class Source(ScriptedSource):
    """The stream of prompts, of which every rank takes its share."""

    def __init__(self, stream: list[Prompt], case: Case) -> None:
        super().__init__()
        self.stream, self.case = stream, case

    def batch_at(self, cursor: int) -> PromptBatch:
        share = self.case.prompts // world_size()
        first = cursor + rank() * share
        return PromptBatch(self.stream[first : first + share], cursor + self.case.prompts)

    def draw(self, batch: PromptBatch, counts: Sequence[int]) -> PromptBatch | None:
        first = batch.cursor + sum(counts[: rank()])
        return PromptBatch(self.stream[first : first + counts[rank()]], batch.cursor + sum(counts))

    def finish(self, batch: PromptBatch) -> None:
        self.cursor = batch.cursor

    def train_dataloader(self) -> DataLoader[PromptBatch]:
        return DataLoader(_Batches(self), batch_size=None)


class _Batches(IterableDataset[PromptBatch]):  # batches of a list would be shared out among the ranks by Lightning
    def __init__(self, source: Source) -> None:
        self.source = source

    def __iter__(self) -> Iterator[PromptBatch]:
        return (self.source.batch_at(self.source.case.prompts * n) for n in range(self.source.case.rollouts))


class Ahead(ScriptedEngine):
    """Samples one update ahead."""

    staleness = 1


class WithPenalty(GSPOModule):
    """Adds the squared norm of what is trained, and what unbalances the experts on the prompts."""

    weight, balance = 0.0, 0.0

    def auxiliary_loss(self, minibatch: Minibatch) -> Tensor:
        assert self.policy is not None and self.last_scored is not None
        total = torch.zeros((), dtype=torch.float64)
        if self.weight:
            total = total + self.weight * sum(p.square().sum() for p in self.parameters() if p.requires_grad)
        prompts = [self.last_scored.prompts[number] for number in minibatch.groups] if self.balance else []
        for prompt in prompts:
            output = self.policy.base_model(prompt.input_ids[None], output_router_logits=True, use_cache=False)
            total = total + self.balance * sum(map(self._unbalance, output.router_logits)) / len(prompts)
        return total

    def _unbalance(self, logits: Tensor) -> Tensor:
        """Of one layer, from ``(tokens, experts)`` logits of its router."""
        chosen = logits.topk(self.policy.config.num_experts_per_tok, dim=1).indices  # type: ignore[union-attr]
        counts = torch.zeros_like(logits).scatter_(1, chosen, 1.0).mean(dim=0)
        return logits.shape[1] * counts @ logits.softmax(dim=1).mean(dim=0)


def trained_tensors(module: GSPOModule) -> dict[str, Tensor]:
    """By the names that the reference gives them: the network's, and those of adapted matrices with ``:A`` or ``:B``."""
    assert module.policy is not None
    # Of stacked experts peft adapts a parameter of the module, elsewhere its weight.
    adapted = {path: getattr(m, "parameter_name", "weight") for path, m in module.policy.named_modules()}
    found = {}
    for name, parameter in module.policy.named_parameters():
        if parameter.requires_grad:
            path, _, side = name.removesuffix(".default.weight").rpartition(".lora_")
            if path:
                name = f"{path}.{adapted[path]}:{side}".replace(".base_layer", "")
            found[name.removeprefix("model.").removeprefix("base_model.model.")] = whole(parameter.detach()).clone()
    return found


class Loader(PolicyLoader):
    """Reads no processor, for prompts are scripted, and gives an adapter random values, as one that is trained has."""

    def as_policy(self, *model: Any, **settings: Any) -> Policy:
        with patch("gspo_lightning.policy.load.load_processor"):
            return super().as_policy(*model, **settings)

    def load(self) -> Policy:
        policy, generator = super().load(), torch.Generator().manual_seed(5)
        if self.lora is not None:
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return policy


def prepared(folder: Any, case: Case) -> GSPOModule:
    """The module with its policy."""
    module = build(folder, case)
    module.configure_model()
    assert module.policy is not None
    if (
        case.padded and case.model not in PADDED
    ):  # not `Policy.fall_back`, whose attention transformers computes in float32
        for policy in (module.policy, *module.references):
            policy.is_padded = True
            policy.base_model.set_attn_implementation("eager" if case.model == "gpt_oss" else "sdpa")
    return module


def train(module: GSPOModule, case: Case, stream: list[Prompt], **changes: Any) -> Recorder:
    """Runs all rollouts; ``changes`` go to the Trainer."""
    recorder = Recorder(case)
    source = Source(stream, case)
    with memory_for(case.fits):
        trainer(callbacks=[recorder], **changes).fit(module, datamodule=source)
    return recorder


@contextmanager
def memory_for(completions: int) -> Iterator[None]:
    """Within it a forward of more completions fails for want of memory; 0: none does."""
    forward = Policy.forward

    def limited(policy: Policy, packed: PackedBatch, *arguments: Any) -> Any:
        checked = not packed.prompts or packed.prompts[0].uid == "probe"  # by the check of the packing
        if not checked and len(packed.lengths) > completions:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(policy, packed, *arguments)

    if not completions:
        yield
        return
    # A collection of garbage takes longer than all else that is done here.
    with patch.object(Policy, "forward", limited), patch("gc.collect"):
        yield


def starting_point(case: Case, start: dict[str, Tensor], tensors: dict[str, Tensor]) -> Trained:
    """The same weights for the reference."""
    if not case.lora:
        return Trained(start, None, {}, case.vision)
    names = sorted({name.split(":")[0] for name in tensors})
    adapter = {name: (tensors[f"{name}:A"], tensors[f"{name}:B"]) for name in names}
    scales = {
        name: _scale(case, len(a) // (len(start[name]) if start[name].ndim == 3 else 1))
        for name, (a, _) in adapter.items()
    }
    return Trained(start, adapter, scales)


def _scale(case: Case, rank: int) -> float:
    """``alpha / r`` of LoRA (arXiv 2106.09685, section 4.1), and that of rsLoRA (arXiv 2312.03732).

    peft doubles both where two matrices of an expert are one: gate and up.
    """
    alpha = ALPHA * rank / RANK
    return alpha / (math.sqrt(rank) if case.rslora else rank)


def contradictions(module: GSPOModule, case: Case) -> list[str]:
    """Why a user could not run the case, whatever ``allow_no_effect`` says."""
    return [finding.message for finding in _findings(module, case) if finding.kind == "contradiction"]


def refusals(module: GSPOModule, case: Case) -> list[str]:
    """Why a user could not run the case, settings without effect among the reasons."""
    return [finding.message for finding in _findings(module, case) if finding.kind != "warning"]


def _findings(module: GSPOModule, case: Case) -> list[Finding]:
    return check_objective(
        module.objective,
        num_iterations=case.iterations,
        num_minibatches=case.minibatches,
        has_adapter=case.lora,
        keep_zero_advantage=case.keep_zero_advantage,
        ref_sync_every_n_rollouts=case.ref_sync_every,
        ref_model_mixup_alpha=case.ref_mixup_alpha,
        staleness=int(case.stale),
        max_completion_length=case.max_length,
    )


def build(folder: Any, case: Case) -> GSPOModule:
    """The settings of the case as the package takes them."""
    lora = LoraSettings(r=RANK, alpha=ALPHA, use_rslora=case.rslora) if case.lora else None
    module = (WithPenalty if case.auxiliary or case.balance else GSPOModule)(
        policy_loader=Loader(
            str(folder),
            dtype="float64",
            lora=lora,
            gradient_checkpointing=case.checkpointing,
            train_vision=case.vision != "frozen",
            train_language=case.vision != "alone",
        ),
        engine=Ahead() if case.stale else ScriptedEngine(),
        rewards=rewards(case),
        objective=_objective(case),
        advantages=_advantages(case),
        sampling=SamplingParams(
            case.generations, case.max_length, case.temperature, case.top_p, case.top_k, case.min_p
        ),
        optimizer=_optimizer(case),
        schedule=Schedule(case.schedule, case.warmup_ratio, case.min_ratio),  # type: ignore[arg-type]
        update=UpdateSettings(
            num_iterations=case.iterations,
            num_minibatches=case.minibatches,
            max_tokens_per_microbatch=case.token_budget,
            max_grad_norm=case.max_grad_norm,
            old_logprobs=case.old,  # type: ignore[arg-type]
            keep_zero_advantage=case.keep_zero_advantage,
            ref_sync_every_n_rollouts=case.ref_sync_every,
            ref_model_mixup_alpha=case.ref_mixup_alpha,
            log_entropy=case.log_entropy,
        ),
        validation=ValidationSettings(1),
        max_rollouts=case.rollouts,
        seed=RUN_SEED,
        max_draws=case.max_draws,
    )
    if isinstance(module, WithPenalty):
        module.weight, module.balance = case.auxiliary, case.balance
    return module


def rewards(case: Case) -> RewardSet:
    """Those of the rows, and that of the length."""
    functions = {f"f{k}": RewardSpec(_reward(k), weight=w) for k, w in enumerate(case.reward_weights)}
    of_length = {None: None, "overlong": SoftOverlong(*OVERLONG), "target": LengthTarget(*TARGET)}[case.length_reward]
    if of_length is not None:
        functions[f"f{len(functions)}"] = RewardSpec(of_length, weight=case.weights[-1])
    return RewardSet(functions, combine=case.combine)  # type: ignore[arg-type]


def _advantages(case: Case) -> AdvantageEstimator:
    if case.plus_plus:
        return ReinforcePlusPlus(case.plus_plus == "group")
    if case.pass_at_k:
        return PassAtK(case.scale, k=case.pass_at_k)  # type: ignore[arg-type]
    return AdvantageEstimator(case.scale, case.baseline)  # type: ignore[arg-type]


def _objective(case: Case) -> Objective:
    return Objective(
        max_completion_length=case.constant_length or case.max_length,
        importance_sampling_level=case.level,  # type: ignore[arg-type]
        loss_type=OWN[case.loss].given if case.loss in OWN else case.loss,
        epsilon=case.epsilon,
        epsilon_high=case.epsilon_high,
        delta=case.delta,
        beta=case.beta,
        beta_end=case.beta_end,
        kl_estimator=case.kl_estimator,  # type: ignore[arg-type]
        kl_importance_weighted=case.kl_importance_weighted,
        entropy_coef=case.entropy_coef,
        entropy_target=case.entropy_target,
        entropy_coef_delta=case.entropy_coef_delta,
        entropy_coef_min=case.entropy_coef_min,
        entropy_coef_max=case.entropy_coef_max,
        mask_truncated_completions=case.mask_truncated,
        top_entropy_quantile=case.top_entropy_quantile,
        off_policy_mask_threshold=case.off_policy_threshold,
        mismatch=MismatchCorrection(*case.mismatch) if case.mismatch is not None else None,  # type: ignore[arg-type]
        clip_cov_ratio=case.clip_cov_ratio,
        clip_cov_lb=case.clip_cov_lb,
        clip_cov_ub=case.clip_cov_ub,
        kl_cov_ratio=case.kl_cov_ratio,
        **{key: getattr(case, key) for key in SETTINGS},
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
