"""Forwards over micro-batches: old log-probabilities, those of the reference, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspo_lightning.distributed.ranks import add_metrics, gather_values
from gspo_lightning.distributed.sharding import in_step
from gspo_lightning.objective import Objective
from gspo_lightning.objective.selection import top_entropy_threshold
from gspo_lightning.packing import GroupSlice, MicroBatchPlan
from gspo_lightning.packing.products import onednn_float32, product_dtype
from gspo_lightning.policy.model import Policy
from gspo_lightning.training.out_of_memory import in_parts
from gspo_lightning.training.update import MicroBatch, Minibatch, build_micro_batch, sampler_logprobs
from gspo_lightning.types import Metrics, ScoredRollout

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule

Logprobs = list[Tensor]
"""Log-probabilities ``(L,)`` of each micro-batch of a minibatch, in the order of its plan."""


@dataclass(frozen=True)
class Fixed:
    """Fixed inputs of the update of one minibatch, one entry per micro-batch in the order of its plan."""

    old: Logprobs | None = None
    """None means that the weights to be updated are those that sampled: old and new log-probabilities are equal."""
    reference: Logprobs | None = None
    selected: list[Tensor] | None = None
    """``(L,)`` bool: the tokens of the policy term; None for all."""
    chosen: list[Tensor] | None = None
    """``(L,)`` bool: the tokens that the loss chooses by their covariance, of one step alone (`choice.choose`)."""

    def of(self, index: int) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Old and reference log-probabilities, the selection and the choice of one micro-batch."""
        old, reference, selected, chosen = (x[index] if x else None for x in self.tensors)
        return old, reference, selected, chosen

    @property
    def tensors(self) -> list[list[Tensor] | None]:
        """In the order of the fields."""
        return [self.old, self.reference, self.selected, self.chosen]


@dataclass
class Attempt:
    """Results of one accumulation of a gradient; discarded as a whole if it runs out of memory."""

    fresh: bool
    """Whether the weights are those that sampled."""
    denominator: float
    """Denominator of the loss, over minibatch and ranks."""
    seen: Logprobs = field(default_factory=list)
    """Log-probabilities of the micro-batches whose backward is done."""
    ratios: list[Tensor] = field(default_factory=list)
    """Importance ratios, one tensor per micro-batch."""
    metrics: Metrics = field(default_factory=dict)
    tokens: int = 0
    """Forwarded tokens."""
    has_term: bool = False
    """Whether an auxiliary loss with a gradient was added."""

    def finish(self, logprobs: Tensor, micro: MicroBatch) -> None:
        """Records a micro-batch whose backward is done."""
        self.seen.append(logprobs.detach())
        self.tokens += micro.packed.num_tokens


@dataclass(frozen=True)
class Passes:
    """The forwards of an update, all at the training temperature.

    Old, reference and new log-probabilities are taken over the same micro-batches, so that they share their rounding.
    """

    policy: Policy
    frozen: Policy | None
    """The reference of full fine-tuning; with an adapter the reference is the policy without it."""
    objective: Objective
    temperature: float
    log_entropy: bool
    behaviour: Policy | None = None
    """The weights that sampled, if those are not the policy's (`gspo_lightning.training.one_step_off`)."""
    old_is_sampler: bool = False
    """Whether the old log-probabilities are those that the sampler reported."""

    @torch.no_grad()
    def before_update(self, scored: ScoredRollout, minibatches: list[Minibatch]) -> list[Fixed]:
        """Old log-probabilities of all minibatches but the first, and the selection of tokens if there is one.

        The first is updated from the very weights that sampled it, so its old log-probabilities are the new ones. If
        the rollout was generated ahead, all minibatches get old log-probabilities, those of ``behaviour``. Those of the
        sampler are known for all.
        """
        if self.objective.selects_tokens:
            with in_step(self.policy):
                outputs = [self._entropies(scored, minibatch) for minibatch in minibatches]
            # Ranks exchange thresholds only after all forwards: under FSDP2 forwards communicate too.
            selected = [self._select(of_minibatch) for of_minibatch in outputs]
            if not self.old_is_sampler:
                return selected
            return [replace(f, old=self._of_sampler(scored, m)) for f, m in zip(selected, minibatches, strict=True)]
        if self.old_is_sampler:
            return [Fixed(self._of_sampler(scored, minibatch)) for minibatch in minibatches]
        with in_step(self.policy):
            first = 0 if self.behaviour is not None else 1
            return [
                Fixed(self._logprobs_of(self._old_policy, scored, minibatch) if number >= first else None)
                for number, minibatch in enumerate(minibatches)
            ]

    @torch.no_grad()
    def reference(self, scored: ScoredRollout, minibatches: list[Minibatch]) -> list[Logprobs | None]:
        """Log-probabilities of the reference; None for each minibatch if the objective needs none."""
        if not self.objective.needs_ref:
            return [None] * len(minibatches)
        if self.frozen is not None:
            # Not at every forward: moving sharded weights splits them again, which a rank that only follows does not.
            self.frozen.to(self.policy.device)
        with in_step(self.frozen or self.policy):
            return [self._logprobs_of(self._reference, scored, m) for m in minibatches]

    @torch.no_grad()
    def current(self, scored: ScoredRollout, minibatch: Minibatch) -> Logprobs:
        """Log-probabilities under the weights as they are, between two steps."""
        with in_step(self.policy):
            logprobs = self._logprobs_of(self._policy, scored, minibatch)
        torch.clear_autocast_cache()  # see `rollout_update.RolloutUpdate.prepare`
        return logprobs

    @torch.no_grad()
    def entropy_left_out(self, scored: ScoredRollout, minibatches: list[Minibatch]) -> Tensor:
        """``(N,)`` entropies at the tokens of completions without a loss; empty unless ``log_entropy`` is set."""

        def forward(plan: MicroBatchPlan) -> Tensor:
            micro = self.micro_batch(scored, plan)
            return self.policy(micro.packed, self.temperature, True)[1]

        if not self.log_entropy:
            return torch.zeros(0)
        with in_step(self.policy):
            plans = [plan for minibatch in minibatches for plan in minibatch.left_out]
            return torch.cat([torch.zeros(0), *(self._in_parts(forward, plan, scored).cpu() for plan in plans)])

    def micro_batch(self, scored: ScoredRollout, plan: MicroBatchPlan) -> MicroBatch:
        """Packs the completions of a micro-batch for the policy."""
        return build_micro_batch(scored, plan, self.policy.device, self.policy.least_common)

    def loss(self, micro: MicroBatch, fixed: Fixed, index: int, attempt: Attempt) -> tuple[Tensor, Tensor]:
        """Loss sum and log-probabilities, with gradient, of the micro-batch ``index`` of a minibatch."""
        old, reference, selected, chosen = fixed.of(index)
        with_entropy = self.objective.needs_entropy or self.log_entropy
        logprobs, entropy = self.policy(micro.packed, self.temperature, with_entropy)
        result = self.objective(
            logprobs,
            logprobs.detach() if old is None else old,
            micro.advantages.to(logprobs.dtype),
            micro.packed.sequence_index,
            micro.packed.lengths,
            ref_logprobs=reference,
            entropy=entropy if with_entropy else None,
            selected=selected,
            sampler_logprobs=micro.sampler_logprobs,
            chosen=chosen,
        )
        attempt.ratios.append(result.ratio)
        add_metrics(attempt.metrics, result.metrics)
        return result.loss, logprobs

    def empty_loss(self, scored: ScoredRollout) -> Tensor:
        """A zero attached to the graph, so that every rank runs the same number of forwards and backwards."""
        micro = self.micro_batch(scored, (GroupSlice(0, (0,)),))
        return self._policy(micro).sum() * 0.0

    def _of_sampler(self, scored: ScoredRollout, minibatch: Minibatch) -> Logprobs:
        return [sampler_logprobs(scored, plan).to(self.policy.device) for plan in minibatch.plan]

    def _entropies(self, scored: ScoredRollout, minibatch: Minibatch) -> list[Tensor]:
        """Per micro-batch ``(3, L)``: old log-probabilities, entropies, and 1 where the advantage is not zero."""

        def forward(plan: MicroBatchPlan) -> Tensor:
            micro = self.micro_batch(scored, plan)
            old_policy = self.behaviour or self.policy
            logprobs, entropy = old_policy(micro.packed, self.temperature, True)
            return torch.stack([logprobs, entropy.to(logprobs.dtype), (micro.advantages != 0).to(logprobs.dtype)])

        return [self._in_parts(forward, plan, scored) for plan in minibatch.plan]

    def _select(self, outputs: list[Tensor]) -> Fixed:
        """Old log-probabilities of a minibatch and, from the same forwards, the tokens of highest entropy.

        Tokens of advantage zero do not compete: whether they are forwarded must not change the gradient.
        """
        competing = [entropy[signal != 0] for _, entropy, signal in outputs]
        everyone = gather_values(torch.cat([torch.zeros(0), *(x.float().cpu() for x in competing)]))
        threshold = top_entropy_threshold(everyone, self.objective.top_entropy_quantile)
        return Fixed(
            old=[logprobs for logprobs, _, _ in outputs],
            selected=[entropy.float() >= threshold.to(entropy.device) for _, entropy, _ in outputs],
        )

    def _logprobs_of(
        self, forward: Callable[[MicroBatch], Tensor], scored: ScoredRollout, minibatch: Minibatch
    ) -> Logprobs:
        def logprobs(plan: MicroBatchPlan) -> Tensor:
            return forward(self.micro_batch(scored, plan))

        return [self._in_parts(logprobs, plan, scored) for plan in minibatch.plan]

    def _in_parts(
        self, forward: Callable[[MicroBatchPlan], Tensor], plan: MicroBatchPlan, scored: ScoredRollout
    ) -> Tensor:
        return in_parts(forward, plan, scored, self.policy.least_common, repeatable=self.policy.shards is None)

    def _policy(self, micro: MicroBatch) -> Tensor:
        return self.policy(micro.packed, self.temperature)[0]

    def _old_policy(self, micro: MicroBatch) -> Tensor:
        return (self.behaviour or self.policy)(micro.packed, self.temperature)[0]

    def _reference(self, micro: MicroBatch) -> Tensor:
        if self.frozen is not None:
            return self.frozen(micro.packed, self.temperature)[0]
        with self.policy.adapter_disabled():
            return self._policy(micro)


def float32_by_onednn(module: GSPOModule) -> AbstractContextManager[None]:
    """Context of an update that uses oneDNN for float32 products if that is faster and row lengths recur.

    Lengths recur in packed rows of text, and in the head of every model; layers of a padded model or of a vision tower
    see others again and again, but with bfloat16 around them no product of theirs is in float32.

    Not if a thread samples ahead: the setting is global, so that thread's rollouts would depend on timing.
    """
    policy = module.policy
    assert policy is not None
    narrow = product_dtype(next(policy.parameters())) != torch.float32
    recur = narrow or (not policy.is_padded and policy.vision is None)
    return onednn_float32(module.device) if recur and module.ahead is None else nullcontext()
