"""What a loader gives the module: refused if it is no rollout, warned of if it repeats prompts, its end said."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gspo_lightning.distributed.ranks import gather_values, rank
from gspo_lightning.errors import UserError
from gspo_lightning.training.sampling_checks import check_rotation
from gspo_lightning.types import Prompt, PromptBatch

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule


def check_prompts(batch: Any, loader: str) -> None:
    """Refuses a batch of a custom loader that is no `PromptBatch`, or whose prompts have no row of token ids."""
    if not isinstance(batch, PromptBatch):
        raise UserError(
            f"{loader}: a batch is a {type(batch).__name__}, not a PromptBatch; give "
            "PromptBatch(prompts) by DataLoader(..., batch_size=None)"
        )
    for prompt in batch.prompts:
        if not isinstance(prompt, Prompt):
            raise UserError(
                f"{loader}: a PromptBatch of a {type(prompt).__name__}, not of Prompts; make_prompt gives one of a row"
            )
        ids: Any = prompt.input_ids
        if not are_token_ids(ids) or not len(ids):
            found = f"{ids.dtype} tensor {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise UserError(
                f"{loader}: row {prompt.uid}: input_ids are a {found}, not a tensor (P,) of whole numbers, at least "
                "one; give the token ids of one prompt, without a batch dimension"
            )


def are_token_ids(ids: Any) -> bool:
    """Whether it is a tensor ``(N,)`` of whole numbers."""
    return isinstance(ids, Tensor) and ids.ndim == 1 and ids.dtype in (torch.int64, torch.int32)


def check_batch(batch: Any, module: GSPOModule) -> None:
    """Refuses a batch of a custom loader that no rollout can be made of."""
    check_prompts(batch, "train_dataloader")
    if not batch.prompts:
        raise UserError("train_dataloader: a PromptBatch without prompts; leave empty batches out")
    assert module.policy is not None
    longest = max(len(prompt.input_ids) for prompt in batch.prompts)
    check_rotation(module.policy.config, longest, module.sampling.max_completion_length)


def warn_of_equal_uids(batch: PromptBatch) -> None:
    """Warns of prompts of a rollout, on all ranks, that share a uid. All ranks must call it together."""
    own = [hashlib.blake2b(str(prompt.uid).encode(), digest_size=7).digest() for prompt in batch.prompts]
    everyone = gather_values(torch.tensor([int.from_bytes(key) for key in own])).tolist()
    if len(set(everyone)) < len(everyone) and rank() == 0:
        warnings.warn(
            "train_dataloader: prompts of one rollout share a uid, of which their random numbers are made: the same "
            "prompt gets the same completions again; give every prompt of a rollout, on every rank, a uid of its own "
            "(an IterableDataset yields the same on each rank, unless it takes a share)",
            stacklevel=2,
        )


def say_nothing_is_left(module: GSPOModule) -> None:
    """Prints one line if all rollouts of the run were done before it began."""
    if module.rollouts_done >= module.max_rollouts and module.trainer.is_global_zero:
        done = f"{module.rollouts_done} of {module.max_rollouts} rollouts are done"
        print(f"{done}, so nothing is trained; raise max_rollouts to continue", flush=True)


def end_without_batches(module: GSPOModule) -> None:
    """Ends a run whose loader gave no batch in two epochs running: Lightning would begin epochs without end.

    A single one is what a loader gives that begins anew behind its last batch: where it has a length, or resumes at its
    end, Lightning does not ask for what comes there before the next epoch.
    """
    trainer: Any = module.trainer
    module.empty_epochs = 0 if trainer.fit_loop.epoch_loop.batch_progress.current.ready else module.empty_epochs + 1
    if trainer.should_stop or module.empty_epochs < 2:
        return
    trainer.should_stop = True
    if trainer.is_global_zero:
        warnings.warn(
            f"train_dataloader: it gave no batch in epochs {trainer.current_epoch - 1} and {trainer.current_epoch}, so "
            f"the run ends after {module.rollouts_done} of {module.max_rollouts} rollouts; give a loader that begins "
            "anew in each epoch, which a generator does not",
            stacklevel=2,
        )
