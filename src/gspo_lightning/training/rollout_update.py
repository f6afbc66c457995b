"""The optimizer steps on one rollout: passes, micro-batches, backwards, and retries when memory runs out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from gspo_lightning.distributed.ranks import (
    add_metrics,
    gather_values,
    global_max,
    global_sum,
    gradient_sync,
    rank,
    shares_gradients,
    world_size,
)
from gspo_lightning.errors import UserError, is_out_of_memory
from gspo_lightning.objective import Objective
from gspo_lightning.rollout.seeds import rollout_seed
from gspo_lightning.training.choice import choose
from gspo_lightning.training.out_of_memory import (
    check_repeatable,
    cut,
    free,
    memory_for,
    refuse_untrained,
)
from gspo_lightning.training.part_checks import check_auxiliary_loss
from gspo_lightning.training.passes import Attempt, Fixed, Passes
from gspo_lightning.training.update import (
    Minibatch,
    check_minibatches,
    minibatch_order,
    sampler_mismatch,
    split_minibatches,
)
from gspo_lightning.types import Metrics, ScoredRollout

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule


_SMALLER_OPTIMIZER = "optimizer=adamw_8bit keeps a quarter of the state, lora=language only that of an adapter"


@dataclass
class RolloutUpdate:
    """One rollout, trained on once: `prepare` takes the passes without gradient, `run` all optimizer steps."""

    module: GSPOModule
    scored: ScoredRollout
    metrics: Metrics
    """Sums and counts of this rank, added to while the update runs."""
    forwarded_tokens: int = 0
    """Tokens forwarded with gradient on this rank, prompts included."""
    passes: Passes = field(init=False)
    _minibatches: list[Minibatch] = field(default_factory=list, init=False)
    _fixed: list[Fixed] = field(default_factory=list, init=False)
    _ratios: list[Tensor] = field(default_factory=list, init=False)
    """Importance ratios of the losses taken so far, one tensor per micro-batch."""
    _trained: int = field(default=0, init=False)
    """Number of parameters that the optimizer steps, counted before the first step of the rollout."""

    def __post_init__(self) -> None:
        self.passes = _passes(self.module)

    def prepare(self) -> None:
        """Computes what stays fixed in the update: old and reference log-probabilities, and selected tokens."""
        module = self.module
        minibatches = minibatches_of(module, self.scored, self.passes.objective)
        self._minibatches = list(minibatches)
        with module.stopwatch("old_logprobs"):
            fixed = self.passes.before_update(self.scored, minibatches)
            self._add_entropy(self.passes.entropy_left_out(self.scored, minibatches))
        if self.passes.behaviour is not None and not self.passes.old_is_sampler:
            self._compare_with_sampler(fixed)
        with module.stopwatch("ref_logprobs"):
            reference = self.passes.reference(self.scored, minibatches)
            self._fixed = [replace(f, reference=r) for f, r in zip(fixed, reference, strict=True)]
        # If autocast caches casts (Lightning's does not): casts made without gradient must not be used with gradient.
        torch.clear_autocast_cache()

    def run(self) -> None:
        """Takes ``num_iterations`` steps on each minibatch."""
        module = self.module
        seed = rollout_seed(module.seed, module.rollouts_done)
        self._trained = len(self._stepped_parameters())
        with module.stopwatch("update"):
            for iteration in range(module.update_settings.num_iterations):
                for number, minibatch in enumerate(self._minibatches):
                    fresh = iteration == 0 and number == 0 and self.passes.behaviour is None
                    fixed = choose(self.passes, self.scored, minibatch, self._fixed[number], seed, iteration)
                    self._minibatches[number], self._fixed[number] = self._step(minibatch, fixed, fresh)

    def _add_entropy(self, left_out: Tensor) -> None:
        """Adds the entropies of completions that no step forwards, weighted like the others: once per pass."""
        passes = self.module.update_settings.num_iterations
        if len(left_out):
            count = torch.tensor(float(len(left_out) * passes), dtype=torch.float64)
            add_metrics(self.metrics, {"entropy": (left_out.double().sum() * passes, count)})

    def _compare_with_sampler(self, fixed: list[Fixed]) -> None:
        """Measures the sampler mismatch of a rollout generated ahead, with the weights that sampled it."""
        if not self.module.sampled_with.full_support:
            return
        for minibatch, given in zip(self._minibatches, fixed, strict=True):
            for plan, old in zip(minibatch.plan, given.old or [], strict=True):
                micro = self.passes.micro_batch(self.scored, plan)
                add_metrics(self.metrics, sampler_mismatch(old, micro))

    def ratios(self) -> Tensor:
        """Importance ratios of every step, over all ranks."""
        return gather_values(torch.cat([torch.zeros(0), *(ratio.detach().cpu() for ratio in self._ratios)]))

    def _step(self, minibatch: Minibatch, fixed: Fixed, fresh: bool) -> tuple[Minibatch, Fixed]:
        """One optimizer step on one minibatch.

        Returns:
            The minibatch as finally cut, and its fixed inputs with the old log-probabilities that apply from now on.
        """
        module = self.module
        counts = torch.tensor(
            [minibatch.num_sequences, minibatch.num_tokens], dtype=torch.float64, device=module.device
        )
        self.passes = replace(self.passes, objective=module.entropy_control.at_this_step(self.passes.objective))
        denominator = self.passes.objective.denominator(*(int(x) for x in global_sum(counts).tolist()))
        while True:
            attempt = Attempt(fresh, denominator)
            try:
                rounds = self._accumulate(minibatch, fixed, attempt)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, which would keep the tensors of the failed attempt alive.
            minibatch, fixed = self._cut(minibatch, fixed, len(attempt.seen))
        self._ratios.extend(attempt.ratios)
        add_metrics(self.metrics, attempt.metrics)
        self._control_entropy(attempt.metrics)
        self.forwarded_tokens += attempt.tokens
        module.update_begun = True
        if rounds and self._has_gradient(minibatch, attempt):
            self._take_step()
        else:
            cast(LightningOptimizer, module.optimizers()).zero_grad()
            module.counts["skipped_steps"] += 1
        # A subclass's own configure_optimizers may have none.
        if (scheduler := module.lr_schedulers()) is not None:
            with warnings.catch_warnings():
                # It advances even if a minibatch has no signal and so no step; `count/skipped_steps` counts those.
                warnings.filterwarnings("ignore", message=".*call of `lr_scheduler.step\\(\\)` before.*")
                cast(LRScheduler, scheduler).step()
        return minibatch, replace(fixed, old=attempt.seen if fixed.old is None else fixed.old)

    def _control_entropy(self, of_step: Metrics) -> None:
        """Lets the weight of the entropy bonus follow the entropy of a step, over all ranks."""
        objective = self.passes.objective
        if objective.entropy_target is None:
            return
        mine = of_step.get("entropy", (torch.zeros(()), torch.zeros(())))
        total, count = global_sum(torch.stack([x.double().to(self.module.device) for x in mine])).tolist()
        if count:
            weight = torch.tensor(objective.entropy_coef, dtype=torch.float64)
            add_metrics(self.metrics, {"entropy_coef": (weight, torch.ones(()))})
            self.module.entropy_control.observe(objective, total / count)

    def _has_gradient(self, minibatch: Minibatch, attempt: Attempt) -> bool:
        """Whether anything forwarded on any rank can have a gradient. If not, the step is skipped: with momentum a zero
        gradient moves the weights too."""
        module, objective = self.module, self.passes.objective
        # Adaptive entropy control forwards all completions, whether its bonus acts in this step or not.
        rests = objective.entropy_target is not None and not objective.entropy_coef
        keeps = module.update_settings.keep_zero_advantage or rests
        if not keeps and not module.has_auxiliary_loss:
            return True  # completions that cannot have one are left out
        members = [(part.group, number) for plan in minibatch.plan for part in plan for number in part.completions]
        signal = bool(members)
        if keeps and all(self.scored.has_zero_advantage(group, number) for group, number in members):
            signal &= not replace(objective, entropy_target=None).zero_advantage_is_free
        # No reason to return at once: of a loss that draws at random ranks may find different things, and all must ask.
        return bool(global_max(int(signal or attempt.has_term), module.device))

    def _accumulate(self, minibatch: Minibatch, fixed: Fixed, attempt: Attempt) -> int:
        """Accumulates the gradient of one minibatch; returns the number of backwards, the same on every rank."""
        module = self.module
        rounds = global_max(max(len(minibatch.plan), int(module.has_auxiliary_loss)), module.device)
        for index in range(rounds):
            with gradient_sync(module.trainer.strategy, last=index + 1 == rounds):
                if index < len(minibatch.plan):
                    micro = self.passes.micro_batch(self.scored, minibatch.plan[index])
                    loss, logprobs = self.passes.loss(micro, fixed, index, attempt)
                    # Under top-p, top-k or min-p the sampler's distribution has another support.
                    if attempt.fresh and module.sampled_with.full_support:
                        add_metrics(attempt.metrics, sampler_mismatch(logprobs, micro))
                else:
                    loss, logprobs = self.passes.empty_loss(self.scored), None
                # Data-parallel strategies average over ranks; the denominator already covers all of them.
                loss = loss * (world_size() / attempt.denominator)
                if index + 1 == rounds and (extra := module.auxiliary_loss(minibatch)) is not None:
                    check_auxiliary_loss(extra, module)
                    attempt.has_term = extra.requires_grad
                    add_metrics(attempt.metrics, {"loss/auxiliary": (extra.detach().double(), torch.ones(()))})
                    loss = loss + extra
                module.manual_backward(loss)
                if logprobs is not None:
                    attempt.finish(logprobs, micro)
        return rounds

    def _cut(self, minibatch: Minibatch, fixed: Fixed, index: int) -> tuple[Minibatch, Fixed]:
        """Clears the gradient of an attempt that ran out of memory, and cuts its micro-batch in two."""
        if index >= len(minibatch.plan):
            refuse_untrained(self.module.has_auxiliary_loss)
        alone = not shares_gradients(self.module.trainer.strategy)
        least = self.passes.policy.least_common
        check_repeatable(minibatch.plan[index], self.scored, least, repeatable=alone)
        cast(LightningOptimizer, self.module.optimizers()).zero_grad()
        free()
        self.module.counts["oom_splits"] += 1
        minibatch, tensors = cut(minibatch, fixed.tensors, index, self.scored, least)
        return minibatch, Fixed(*tensors)

    def _stepped_parameters(self) -> list[nn.Parameter]:
        """The module's parameters that the optimizer steps."""
        optimizer = cast(LightningOptimizer, self.module.optimizers())
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [p for p in self.module.parameters() if id(p) in stepped]

    def _take_step(self) -> None:
        module = self.module
        optimizer = cast(LightningOptimizer, module.optimizers())
        parameters = self._stepped_parameters()
        if len(parameters) < max(1, self._trained):
            raise UserError(
                f"optimizer: of the {self._trained} parameters that it trained, {len(parameters)} are still in the "
                "module, and the rest would not change; do not replace parameters after configure_optimizers, and let "
                "a failed backward end the run"
            )
        settings, step = module.update_settings, module.guarded_step  # the former may be other ones than at first
        step.max_grad_norm, step.max_nonfinite_steps = settings.max_grad_norm, settings.max_nonfinite_steps
        with memory_for("in the optimizer step", _SMALLER_OPTIMIZER):
            norm = step(optimizer, parameters, module.rollouts_done + 1, self._before_zero_grad)
        module.counts["optimizer_steps" if norm is not None else "nonfinite_steps"] += 1
        if norm is not None:
            add_metrics(self.metrics, {"grad_norm": (norm, torch.ones(()))})

    def _before_zero_grad(self) -> None:
        """Calls the hook that Lightning leaves out under manual optimization, with the weights of this step."""
        module = self.module
        optimizer = cast(LightningOptimizer, module.optimizers()).optimizer
        for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_before_zero_grad(module.trainer, module, optimizer)
        module.on_before_zero_grad(optimizer)


def _passes(module: GSPOModule) -> Passes:
    """The forwards of a rollout, with the objective as it is at this point of the run."""
    assert module.policy is not None
    frozen = module.references[0] if module.references else None
    behaviour = module.ahead.behaviour if module.ahead is not None and module.ahead.is_stale else None
    objective = module.current_objective.at(module.rollouts_done / max(1, module.max_rollouts - 1))
    settings, temperature = module.update_settings, module.sampled_with.temperature
    is_sampler = settings.old_logprobs == "sampler"
    return Passes(module.policy, frozen, objective, temperature, settings.log_entropy, behaviour, is_sampler)


def minibatches_of(module: GSPOModule, scored: ScoredRollout, objective: Objective) -> list[Minibatch]:
    """This rank's part of each minibatch of a rollout."""
    assert module.policy is not None
    settings = module.update_settings
    counts = gather_values(torch.tensor([len(scored.prompts)])).tolist()
    for count in counts:
        check_minibatches(count, settings.num_minibatches, 1)
    seed = rollout_seed(module.seed, module.rollouts_done)
    return split_minibatches(
        scored,
        settings,
        zero_advantage_is_free=objective.zero_advantage_is_free,
        mask_truncated=objective.mask_truncated_completions,
        order=minibatch_order(counts[rank()], settings.num_minibatches, seed, sum(counts[: rank()])),
        least_common=module.policy.least_common,
    )
