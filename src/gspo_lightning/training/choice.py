"""Chooses the tokens that a loss treats apart by their covariance: before each step, over minibatch and ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gspo_lightning.distributed.ranks import gather_values, global_sum
from gspo_lightning.objective import Objective
from gspo_lightning.objective.covariance import covariances, draw_threshold, share_of, top_covariance_threshold
from gspo_lightning.packing import MicroBatchPlan
from gspo_lightning.rollout.sampling import row_uniforms
from gspo_lightning.training.passes import Fixed, Passes
from gspo_lightning.training.update import Minibatch, token_advantages
from gspo_lightning.types import ScoredRollout


@torch.no_grad()
def choose(
    passes: Passes, scored: ScoredRollout, minibatch: Minibatch, fixed: Fixed, seed: int, iteration: int
) -> Fixed:
    """The inputs of a step with the tokens that its loss chooses, under the weights that the step starts from.

    Tokens of advantage zero do not compete: whether they are forwarded must not change the gradient. Nor do those that
    `Fixed.selected` leaves out. All ranks call it together.

    Args:
        passes: of the update.
        scored: the rollout.
        minibatch: this rank's part of it.
        fixed: the inputs without a choice.
        seed: of the rollout.
        iteration: number of the pass over the rollout, from 0; each draws its own tokens.
    """
    objective, device = passes.objective, passes.policy.device
    if objective.spec.chooses is None:
        return fixed
    logprobs = passes.current(scored, minibatch)
    advantages = [token_advantages(scored, plan).to(device) for plan in minibatch.plan]
    competing = [a != 0 for a in advantages]
    if fixed.selected is not None:
        competing = [c & s for c, s in zip(competing, fixed.selected, strict=True)]
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, a, c in zip(logprobs, advantages, competing, strict=True):
        sums += torch.stack([x.double()[c].sum(), a[c].sum(), c.double().sum()])
    sums = global_sum(sums)
    values = [covariances(x, a, sums) for x, a in zip(logprobs, advantages, strict=True)]
    if objective.spec.chooses == "top":
        least = top_covariance_threshold(_everyone(values, competing), objective.kl_cov_ratio).to(device)
        return replace(fixed, chosen=[c & (v >= least) for v, c in zip(values, competing, strict=True)])
    drawn_from = []
    for number, plan in enumerate(minibatch.plan):
        old = None if fixed.old is None else fixed.old[number]
        clipped = _clipped(objective, logprobs[number], old, advantages[number], scored, plan)
        inside = (values[number] > objective.clip_cov_lb) & (values[number] < objective.clip_cov_ub)
        drawn_from.append(competing[number] & inside & ~clipped)
    uniforms = [_uniforms(scored, plan, seed, iteration).to(device) for plan in minibatch.plan]
    count = share_of(int(sums[2]), objective.clip_cov_ratio)
    most = draw_threshold(_everyone(uniforms, drawn_from), count).to(device)
    return replace(fixed, chosen=[d & (u <= most) for u, d in zip(uniforms, drawn_from, strict=True)])


def _everyone(values: list[Tensor], which: list[Tensor]) -> Tensor:
    """``(N,)`` values of the tokens in question, of all micro-batches and ranks."""
    own = [v[w].cpu() for v, w in zip(values, which, strict=True)]
    return gather_values(torch.cat([torch.zeros(0, dtype=torch.float64), *own]))


def _clipped(
    objective: Objective, logprobs: Tensor, old: Tensor | None, advantages: Tensor, scored: ScoredRollout,
    plan: MicroBatchPlan,
) -> Tensor:  # fmt: skip
    """``(L,)`` bool: tokens that the loss clips anyway; none where ``old`` is None, for these are the weights that
    sampled."""
    if old is None or objective.spec.clip is None:
        return torch.zeros_like(logprobs, dtype=torch.bool)
    lengths = torch.tensor([scored.completions[part.group][n].num_trained for part in plan for n in part.completions])
    index = torch.arange(len(lengths)).repeat_interleave(lengths)
    inputs = objective.inputs(
        logprobs, logprobs - old, advantages.to(logprobs.dtype), index.to(old.device), lengths.to(old.device)
    )
    low, high = objective.spec.clip.masks(inputs)
    return low | high


def _uniforms(scored: ScoredRollout, plan: MicroBatchPlan, seed: int, iteration: int) -> Tensor:
    """``(L,)`` float64 in [0, 1), functions of seed, iteration, prompt and completion. Not those that sampled: they say
    which token was likely."""
    return torch.cat([
        row_uniforms(
            seed, f"covariance|{iteration}|{scored.prompts[part.group].uid}", number,
            scored.completions[part.group][number].num_trained,
        )
        for part in plan
        for number in part.completions
    ])  # fmt: skip
