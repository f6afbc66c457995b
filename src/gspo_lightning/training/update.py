"""From a scored rollout to micro-batches: minibatches, completions that can be left out, and packing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gspo_lightning.errors import UserError, check_choice
from gspo_lightning.objective.ratios import sequence_mean
from gspo_lightning.packing import MicroBatchPlan, PackedBatch, common_prefix, pack, plan_micro_batches
from gspo_lightning.types import ScoredRollout


@dataclass(frozen=True)
class UpdateSettings:
    """How one rollout becomes optimizer steps."""

    num_iterations: int = 1
    """Passes over each rollout (mu)."""
    num_minibatches: int = 4
    """Optimizer steps per pass; must divide the prompts per rank."""
    max_tokens_per_microbatch: int = 4096
    """Forwarded tokens at a time. Changes memory and speed, never the gradient."""
    max_grad_norm: float = 1.0
    """L2 norm that a gradient is scaled down to; infinite for no clip."""
    max_nonfinite_steps: int = 3
    """Stop after this many steps in a row with a non-finite gradient; each of them is skipped."""
    keep_zero_advantage: bool = False
    """Forward sequences even if they cannot change the gradient (for debugging)."""
    ref_sync_every_n_rollouts: int = 0
    """Rollouts between updates of the reference towards the policy; 0 never updates it."""
    ref_model_mixup_alpha: float = 0.6
    """Share alpha of such an update: ``reference = alpha * policy + (1 - alpha) * reference``."""
    log_entropy: bool = False
    """Measure the exact entropy even if the objective does not need it: two more passes over the logits, and one
    forward of the completions that are otherwise left out."""
    old_logprobs: Literal["policy", "sampler"] = "policy"
    """Denominator of the importance ratio: log-probabilities that the policy computes of what was sampled, before the
    update, or those that the sampler reported, which measures the ratio from what really drew, and takes no forward
    (where tokens are chosen by their entropy, one is taken for that)."""

    def __post_init__(self) -> None:
        check_choice("update.old_logprobs", self.old_logprobs, ("policy", "sampler"))
        for key in ("num_iterations", "num_minibatches", "max_nonfinite_steps"):
            if getattr(self, key) < 1:
                raise UserError(f"update.{key}={getattr(self, key)} must be at least 1")
        if not self.max_grad_norm > 0:  # below 0 a gradient's sign would flip
            raise UserError(f"update.max_grad_norm={self.max_grad_norm} must be above 0 (inf: no clip)")


def check_minibatches(prompts: int, minibatches: int, ranks: int) -> None:
    """Refuses numbers that would leave prompts untrained: every rank divides its share into whole minibatches.

    Args:
        prompts: of a rollout, over all ranks.
        minibatches: optimizer steps per pass.
        ranks: processes that train together.

    Raises:
        UserError: they do not divide evenly.
    """
    if not prompts or prompts % ranks or prompts // ranks % minibatches:
        shares = f" x {ranks} ranks = {minibatches * ranks}" if ranks > 1 else ""
        raise UserError(
            f"data.prompts_per_rollout={prompts} must be divisible by update.num_minibatches={minibatches}{shares}"
        )


def minibatch_order(prompts: int, minibatches: int, seed: int, first: int) -> list[int]:
    """The prompts of a rank in random order, those of the first minibatch first.

    Each run of ``minibatches`` prompts gives one to every minibatch. So every rank has equally many prompts in each,
    and a prompt's minibatch does not depend on the number of ranks.

    Args:
        prompts: of this rank.
        minibatches: optimizer steps per pass; divides ``prompts`` on every rank.
        seed: of the rollout, the same on all ranks.
        first: prompts of the ranks before this one.
    """
    generator = torch.Generator().manual_seed(seed)
    runs = [torch.randperm(minibatches, generator=generator) for _ in range((first + prompts) // minibatches)]
    members = torch.stack(runs[first // minibatches :]) + torch.arange(0, prompts, minibatches)[:, None]
    return members.T.flatten().tolist()


@dataclass(frozen=True)
class Minibatch:
    """The prompts of one optimizer step and the plan by which their surviving completions are forwarded."""

    groups: tuple[int, ...]
    """Rollout indices of the prompts."""
    plan: tuple[MicroBatchPlan, ...]
    """Micro-batches; group numbers are rollout indices. Empty if nothing survives."""
    num_sequences: int
    """Completions in the denominator: all but those masked as truncated."""
    num_tokens: int
    """Trained tokens of those completions."""
    left_out: tuple[MicroBatchPlan, ...] = ()
    """Micro-batches of the completions in the denominator that are not forwarded, as they cannot change the gradient;
    empty unless ``log_entropy`` is set."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward: the packed row, and the values that belong to each of its completion tokens."""

    packed: PackedBatch
    advantages: Tensor
    """``(L,)`` float64, rounded to the dtype of the log-probabilities by who multiplies them."""
    sampler_logprobs: Tensor
    """``(L,)`` float32."""


def split_minibatches(
    scored: ScoredRollout,
    settings: UpdateSettings,
    *,
    zero_advantage_is_free: bool,
    mask_truncated: bool,
    order: list[int],
    least_common: int,
) -> list[Minibatch]:
    """Cuts the rollout into ``num_minibatches`` sets of whole groups, taken in ``order``, and plans each.

    Their number divides that of the prompts: `check_minibatches`; ``least_common`` is that of `common_prefix`.

    A completion is left out of the forward if it cannot change the gradient: it is masked as truncated, or its
    advantage is zero under an objective without another term. Only the former leave the denominator too.
    """
    size = len(order) // settings.num_minibatches
    drop_zero = zero_advantage_is_free and not settings.keep_zero_advantage
    return [
        _minibatch(scored, tuple(order[start : start + size]), settings, drop_zero, mask_truncated, least_common)
        for start in range(0, size * settings.num_minibatches, size)
    ]


def _minibatch(
    scored: ScoredRollout,
    groups: tuple[int, ...],
    settings: UpdateSettings,
    drop_zero: bool,
    mask_truncated: bool,
    least_common: int,
) -> Minibatch:
    survivors: list[list[tuple[int, int]]] = []
    others: list[list[tuple[int, int]]] = []
    num_sequences = num_tokens = 0
    for group in groups:
        survivors.append([])
        others.append([])
        for number, completion in enumerate(scored.completions[group]):
            if mask_truncated and completion.finish_reason == "length":
                continue
            num_sequences += 1
            num_tokens += completion.num_trained
            members = others if drop_zero and scored.has_zero_advantage(group, number) else survivors
            members[-1].append((number, len(completion.token_ids) - 1))
    lengths = [len(scored.prompts[group].input_ids) for group in groups]

    def planned(members: list[list[tuple[int, int]]]) -> tuple[MicroBatchPlan, ...]:
        prompts = [scored.prompts[group] for group, some in zip(groups, members, strict=True) if some]
        common = common_prefix([prompt.input_ids for prompt in prompts], least_common, prompts)
        local = plan_micro_batches(lengths, members, settings.max_tokens_per_microbatch, common)
        return tuple(tuple(type(part)(groups[part.group], part.completions) for part in micro) for micro in local)

    left_out = planned(others) if settings.log_entropy else ()
    return Minibatch(groups, planned(survivors), num_sequences, num_tokens, left_out)


def build_micro_batch(
    scored: ScoredRollout, plan: MicroBatchPlan, device: torch.device, least_common: int
) -> MicroBatch:
    """Packs the completions of one micro-batch; ``least_common`` as in `gspo_lightning.packing.common_prefix`."""
    members = [(part.group, number) for part in plan for number in part.completions]
    rows = [scored.completions[group][number] for group, number in members]
    groups = [
        (scored.prompts[part.group].input_ids, [scored.completions[part.group][n].token_ids for n in part.completions])
        for part in plan
    ]
    trained = [row.dialogue.trained if row.dialogue is not None else None for row in rows]
    packed = pack(groups, device, [scored.prompts[part.group] for part in plan], trained, least_common)
    return MicroBatch(packed, token_advantages(scored, plan).to(device), sampler_logprobs(scored, plan).to(device))


def token_advantages(scored: ScoredRollout, plan: MicroBatchPlan) -> Tensor:
    """``(L,)`` float64 advantages of the trained tokens of one micro-batch."""
    return torch.cat([scored.token_advantages(part.group, number) for part in plan for number in part.completions])


def sampler_logprobs(scored: ScoredRollout, plan: MicroBatchPlan) -> Tensor:
    """``(L,)`` float32 log-probabilities that the sampler reported of the trained tokens of one micro-batch."""
    rows = [scored.completions[part.group][number] for part in plan for number in part.completions]
    return torch.cat(
        [r.sampler_logprobs if r.dialogue is None else r.sampler_logprobs[r.dialogue.trained] for r in rows]
    )


def sampler_mismatch(logprobs: Tensor, micro: MicroBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """How far the sampler's log-probabilities are from the trainer's for the same weights, as (sum, count).

    ``sampler_mismatch/abs_mean`` averages ``|difference|`` over tokens. ``gspo/ratio_noise_var`` averages the square of
    a sequence's mean difference: rounding alone moves ``log s_i`` by its root, the noise floor of the sequence ratio.
    """
    difference = logprobs.detach().double() - micro.sampler_logprobs.double()
    sequence = sequence_mean(difference, micro.packed.sequence_index, micro.packed.lengths)
    return {
        "sampler_mismatch/abs_mean": (difference.abs().sum(), torch.tensor(len(difference))),
        "gspo/ratio_noise_var": (sequence.square().sum(), torch.tensor(len(sequence))),
    }
