"""Forwards over micro-batches: old log-probabilities, those of the reference, and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_lightning.distributed import add_metrics
from gspo_lightning.objective import Objective
from gspo_lightning.packing import GroupSlice
from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Metrics, ScoredRollout
from gspo_lightning.update import MicroBatch, Minibatch, build_micro_batch

Logprobs = list[Tensor]
"""Log-probabilities ``(L,)`` of each micro-batch of a minibatch, in the order of its plan."""


@dataclass(frozen=True)
class Passes:
    """The three forwards of an update, all at the training temperature and over the same micro-batches."""

    policy: Policy
    frozen: Policy | None
    """The reference of full fine-tuning; with an adapter the reference is the policy without it."""
    objective: Objective
    temperature: float
    log_entropy: bool

    @torch.no_grad()
    def before_update(self, scored: ScoredRollout, minibatches: list[Minibatch]) -> list[Logprobs | None]:
        """Old log-probabilities of all minibatches but the first.

        The first is updated from the very weights that sampled it: there, old is new.
        """
        return [self._logprobs_of(self._policy, scored, m) if n else None for n, m in enumerate(minibatches)]

    @torch.no_grad()
    def reference(self, scored: ScoredRollout, minibatches: list[Minibatch]) -> list[Logprobs | None]:
        """Log-probabilities of the reference; None for each minibatch if the objective needs none."""
        if not self.objective.needs_ref:
            return [None] * len(minibatches)
        return [self._logprobs_of(self._reference, scored, m) for m in minibatches]

    def loss(
        self, micro: MicroBatch, old: Tensor | None, reference: Tensor | None, metrics: Metrics
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and loss sum of one micro-batch, with gradient; ``old=None`` means that old is new."""
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
            sampler_logprobs=micro.sampler_logprobs,
        )
        add_metrics(metrics, result.metrics)
        return logprobs, result.loss

    def empty_loss(self, scored: ScoredRollout) -> Tensor:
        """A zero attached to the graph, so that every rank runs the same number of forwards and backwards."""
        micro = build_micro_batch(scored, (GroupSlice(0, (0,)),), self.policy.device)
        return self._policy(micro).sum() * 0.0

    def _logprobs_of(
        self, forward: Callable[[MicroBatch], Tensor], scored: ScoredRollout, minibatch: Minibatch
    ) -> Logprobs:
        micro_batches = (build_micro_batch(scored, plan, self.policy.device) for plan in minibatch.plan)
        return [forward(micro) for micro in micro_batches]

    def _policy(self, micro: MicroBatch) -> Tensor:
        return self.policy(micro.packed, self.temperature)[0]

    def _reference(self, micro: MicroBatch) -> Tensor:
        if self.frozen is not None:
            return self.frozen.to(self.policy.device)(micro.packed, self.temperature)[0]
        with self.policy.adapter_disabled():
            return self._policy(micro)
