"""Handles running out of memory: a micro-batch is cut in two; if it cannot be cut, the run ends with one line.

Packing is exact, so the gradient of a micro-batch in two parts is the same.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from gspo_lightning.distributed.ranks import world_size
from gspo_lightning.errors import UserError, is_out_of_memory
from gspo_lightning.packing import GroupSlice, MicroBatchPlan, common_prefix
from gspo_lightning.rollout import RolloutError
from gspo_lightning.training.update import Minibatch
from gspo_lightning.types import ScoredRollout

_SHORTER = "lower data.max_prompt_length or rollout.max_completion_length, or set model.gradient_checkpointing=true"
_LOWER = "lower update.max_tokens_per_microbatch"


class OutOfMemoryError(UserError):
    """Memory ran out in work that cannot be repeated. A run adds the checkpoint it can resume from."""


@contextmanager
def memory_for(doing: str, fix: str) -> Iterator[None]:
    """Context of work that is not repeated: if memory runs out, the error is one line.

    Args:
        doing: what the memory is for, as in "out of memory in the optimizer step".
        fix: the settings that reduce it.

    Raises:
        OutOfMemoryError: an allocation failed.
    """
    try:
        yield
    except RolloutError:  # may be about the memory of an engine elsewhere; the run is saved on this error
        raise
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory {doing}; {fix}") from error


def check_repeatable(plan: MicroBatchPlan, scored: ScoredRollout, least_common: int, *, repeatable: bool) -> None:
    """Refuses a micro-batch that cannot be repeated; a single sequence is left to `halved` to refuse.

    Args:
        plan: what did not fit.
        scored: the rollout of the plan.
        least_common: as in `tokens_of`.
        repeatable: False if a failed attempt leaves state behind: DDP has counted the gradients that arrived,
            FSDP2 has gathered weights and releases them only at the end of a backward.

    Raises:
        OutOfMemoryError: it cannot be repeated, or there are several ranks, which must all run the same forwards.
    """
    several = world_size() > 1
    if (repeatable and not several) or _is_single(plan):
        return
    where = " on one of the ranks" if several else ""
    tokens = tokens_of(plan, scored, least_common)
    raise OutOfMemoryError(f"out of memory in a micro-batch of {tokens} tokens{where}; {_LOWER}")


def refuse_untrained(has_auxiliary_loss: bool) -> NoReturn:
    """Refuses a backward without completions, in which there is nothing to cut: one sequence and an auxiliary loss.

    Raises:
        OutOfMemoryError: always.
    """
    extra = " and auxiliary_loss" if has_auxiliary_loss else ""
    raise OutOfMemoryError(
        f"out of memory: one sequence{extra}, where a rank has nothing else to train in a minibatch, does not fit; "
        f"{_SHORTER}"
    )


def _is_single(plan: MicroBatchPlan) -> bool:
    return len(plan) == 1 and len(plan[0].completions) == 1


def halved(plan: MicroBatchPlan, scored: ScoredRollout) -> tuple[MicroBatchPlan, MicroBatchPlan]:
    """The micro-batch in two parts, in its own order: between groups, or within its only group.

    Raises:
        OutOfMemoryError: it is a single sequence.
    """
    if len(plan) > 1:
        middle = len(plan) // 2
        return plan[:middle], plan[middle:]
    group, members = plan[0].group, plan[0].completions
    if _is_single(plan):
        prompt, completion = scored.prompts[group], scored.completions[group][members[0]]
        tokens = len(prompt.input_ids) + len(completion.token_ids) - 1
        raise OutOfMemoryError(
            f"out of memory: one sequence of {tokens} tokens (row {prompt.uid}) does not fit; {_SHORTER}"
        )
    middle = len(members) // 2
    return (GroupSlice(group, members[:middle]),), (GroupSlice(group, members[middle:]),)


def tokens_of(plan: MicroBatchPlan, scored: ScoredRollout, least_common: int) -> int:
    """Forwarded tokens of a micro-batch; ``least_common`` as in `gspo_lightning.packing.common_prefix`."""
    prompts = [scored.prompts[part.group] for part in plan]
    members = (scored.completions[part.group][n] for part in plan for n in part.completions)
    common = common_prefix([prompt.input_ids for prompt in prompts], least_common, prompts)
    own = sum(len(prompt.input_ids) - common for prompt in prompts)
    return common + own + sum(len(completion.token_ids) - 1 for completion in members)


def cut(
    minibatch: Minibatch, tensors: list[list[Tensor] | None], index: int, scored: ScoredRollout, least_common: int
) -> tuple[Minibatch, list[list[Tensor] | None]]:
    """Cuts micro-batch ``index`` in two, and the tensors of its tokens accordingly.

    Args:
        minibatch: the minibatch whose plan is changed.
        tensors: each None, or ``(L,)`` for every micro-batch of the plan.
        index: the micro-batch that did not fit.
        scored: the rollout of the plan.
        least_common: as in `tokens_of`.
    """
    plan = minibatch.plan
    first, second = halved(plan[index], scored)
    tokens = tokens_of(plan[index], scored, least_common)
    say(f"out of memory in a micro-batch of {tokens} tokens: split in two, the gradient stays the same")
    at = sum(scored.completions[part.group][n].num_trained for part in first for n in part.completions)
    finer = replace(minibatch, plan=(*plan[:index], first, second, *plan[index + 1 :]))
    return finer, [x and [*x[:index], x[index][:at], x[index][at:], *x[index + 1 :]] for x in tensors]


def in_parts(
    forward: Callable[[MicroBatchPlan], Tensor],
    plan: MicroBatchPlan,
    scored: ScoredRollout,
    least_common: int,
    *,
    repeatable: bool,
) -> Tensor:
    """``forward(plan)`` ``(..., L)``, in parts if the whole does not fit; for forwards without gradient.

    Raises:
        OutOfMemoryError: a single sequence does not fit, or the forward cannot be repeated, see `check_repeatable`.
    """
    try:
        return forward(plan)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler, which would keep the tensors of the failed forward alive.
    check_repeatable(plan, scored, least_common, repeatable=repeatable)
    free()
    parts = halved(plan, scored)
    return torch.cat([in_parts(forward, part, scored, least_common, repeatable=repeatable) for part in parts], dim=-1)


def free() -> None:
    """Frees the memory that the failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(line: str) -> None:
    """Prints one warning."""
    print(f"warning: {line}; {_LOWER} to avoid the failed attempt", file=sys.stderr, flush=True)
