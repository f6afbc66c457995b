"""A micro-batch that does not fit into memory is cut in two; packing is exact, so the gradient stays the same."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gspo_lightning.distributed import world_size
from gspo_lightning.errors import UserError
from gspo_lightning.packing import GroupSlice, MicroBatchPlan
from gspo_lightning.types import ScoredRollout
from gspo_lightning.update import Minibatch

_WORDS = ("can't allocate memory", "CUDA error: out of memory", "[CUDA]: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Of the CPU's allocator, and of what libraries and kernels allocate by themselves."""
_LOWER = "lower update.max_tokens_per_microbatch"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; only those by torch's own allocator for GPUs have a class."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _WORDS)


def halved(plan: MicroBatchPlan, scored: ScoredRollout) -> tuple[MicroBatchPlan, MicroBatchPlan]:
    """The micro-batch in two parts, in its own order: between groups, or within its only group.

    Raises:
        UserError: it is a single sequence, or there are several ranks, which must all run the same number of forwards.
    """
    if world_size() > 1:
        raise UserError(
            f"out of memory in a micro-batch of {tokens_of(plan, scored)} tokens on one of the ranks; {_LOWER}"
        )
    if len(plan) > 1:
        middle = len(plan) // 2
        return plan[:middle], plan[middle:]
    group, members = plan[0].group, plan[0].completions
    if len(members) == 1:
        uid = scored.prompts[group].uid
        raise UserError(
            f"out of memory: one sequence of {tokens_of(plan, scored)} tokens (row {uid}) does not fit; lower "
            "data.max_prompt_length or rollout.max_completion_length, or set model.gradient_checkpointing=true"
        )
    middle = len(members) // 2
    return (GroupSlice(group, members[:middle]),), (GroupSlice(group, members[middle:]),)


def tokens_of(plan: MicroBatchPlan, scored: ScoredRollout) -> int:
    """Forwarded tokens of a micro-batch."""
    prompts = sum(len(scored.prompts[part.group].input_ids) for part in plan)
    members = (scored.completions[part.group][n] for part in plan for n in part.completions)
    return prompts + sum(len(completion.token_ids) - 1 for completion in members)


def completion_tokens(plan: MicroBatchPlan, scored: ScoredRollout) -> int:
    """L of a micro-batch."""
    return sum(scored.completions[part.group][n].num_trained for part in plan for n in part.completions)


def cut(
    minibatch: Minibatch, tensors: list[list[Tensor] | None], index: int, scored: ScoredRollout
) -> tuple[Minibatch, list[list[Tensor] | None]]:
    """Cuts micro-batch ``index`` in two, and with it what belongs to its tokens.

    Args:
        minibatch: whose plan is changed.
        tensors: each None, or ``(L,)`` for every micro-batch of the plan.
        index: the micro-batch that did not fit.
        scored: the rollout of the plan.
    """
    plan = minibatch.plan
    first, second = halved(plan[index], scored)
    tokens = tokens_of(plan[index], scored)
    say(f"out of memory in a micro-batch of {tokens} tokens: cut in two, the gradient stays the same")
    at = completion_tokens(first, scored)
    finer = replace(minibatch, plan=(*plan[:index], first, second, *plan[index + 1 :]))
    return finer, [x and [*x[:index], x[index][:at], x[index][at:], *x[index + 1 :]] for x in tensors]


def in_parts(forward: Callable[[MicroBatchPlan], Tensor], plan: MicroBatchPlan, scored: ScoredRollout) -> Tensor:
    """``forward(plan)`` ``(..., L)``, in parts where the whole does not fit; for forwards without gradient."""
    try:
        return forward(plan)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler: it would keep the tensors of the failed forward alive.
    free()
    return torch.cat([in_parts(forward, part, scored) for part in halved(plan, scored)], dim=-1)


def free() -> None:
    """Gives back what the failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(line: str) -> None:
    """One warning on the screen."""
    print(f"warning: {line}; {_LOWER} to spare the attempt", file=sys.stderr, flush=True)
