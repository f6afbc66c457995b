"""The policy and its reference as the module holds them: loaded, split over ranks, moved; and their forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gspo_lightning.distributed.ranks import rank
from gspo_lightning.distributed.sharding import shard_policy
from gspo_lightning.errors import UserError
from gspo_lightning.policy.check import choose_forward
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.check import choose_decoding
from gspo_lightning.rollout.engine import traits
from gspo_lightning.rollout.gathered import gathered

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule


def load_policies(module: GSPOModule) -> None:
    """Loads the policy, and a frozen copy of it if the objective needs a reference and there is no adapter.

    Raises:
        UserError: the weights cannot be split over the ranks of this Trainer.
    """
    is_split = module.device_mesh is not None
    if is_split and module.ahead is not None:
        raise UserError("rollout.engine.staleness=1 needs whole weights; set it to 0 with trainer=fsdp")
    module.policy = module.policy_loader.load()
    if is_split:
        choose_forwards(module)  # runs whole weights, by other forwards than those that sharding counts
        # Before the reference is loaded, so that one whole model is in memory and not two.
        _shard(module, module.policy)
        module.engine = gathered(module.engine, module.policy_loader)
    if module.objective.needs_ref and not module.policy.has_adapter:
        module.references = [module.policy_loader.load_reference(module.policy)]
        if is_split:
            _shard(module, module.references[0])


def check_split(module: GSPOModule) -> None:
    """Refuses a policy that was loaded before, whole, where a strategy splits weights over ranks.

    It does so only as they are loaded; each rank would train a model of its own.
    """
    if module.device_mesh is not None and module.policy is not None and module.policy.shards is None:
        raise UserError(
            "trainer.strategy: the policy was loaded before this fit, whole, and weights are split over ranks only as "
            "they are loaded; make a new module, or use trainer=ddp"
        )


def _shard(module: GSPOModule, policy: Policy) -> None:
    """Splits the weights over ranks; refuses a padded policy, so its reference is never padded either."""
    gather = getattr(module.trainer.strategy, "gather_for_rollouts", True)
    assert module.device_mesh is not None
    shard_policy(policy, module.device_mesh, gather_for_rollouts=gather)


def choose_forwards(module: GSPOModule) -> None:
    """Chooses packed or padded forwards, once: see `choose_forward`. A reference follows the policy.

    And how to decode, if the engine says that it does so in this process: see `choose_decoding`.
    """
    assert module.policy is not None
    if module.forward_chosen:
        return
    _say_if_endless(module)
    choose_forward(module.policy)
    if traits(module.engine).max_concurrent:
        choose_decoding(module.policy)
    for reference in module.references:
        if module.policy.is_padded and not reference.is_padded:
            reference.fall_back()
    module.forward_chosen = True


def _say_if_endless(module: GSPOModule) -> None:
    """Warns if no token and no text ends a completion: each would have the greatest length, and count as cut."""
    assert module.policy is not None
    if not module.policy.eos_token_ids and not module.sampling.stop and rank() == 0:
        warnings.warn(
            "the model has no end-of-sequence token, in its generation_config.json or its tokenizer: every completion "
            "goes on to rollout.max_completion_length; add eos_token_id there, or set rollout.stop",
            stacklevel=2,
        )


@torch.no_grad()
def move_reference(module: GSPOModule) -> None:
    """``reference = alpha * policy + (1 - alpha) * reference`` (TR-DPO, arXiv 2404.09656), if it is due.

    ``alpha`` is ``update.ref_model_mixup_alpha``; due after every ``update.ref_sync_every_n_rollouts`` rollouts.
    """
    settings, every = module.update_settings, module.update_settings.ref_sync_every_n_rollouts
    if not every or (module.rollouts_done + 1) % every or not module.references:
        return
    assert module.policy is not None
    for theirs, ours in zip(module.references[0].parameters(), module.policy.parameters(), strict=True):
        theirs.lerp_(ours.to(theirs), settings.ref_model_mixup_alpha)
    if (vision := module.references[0].vision) is not None:
        vision.forget()  # of prompts that come again, as from a loader of the user's own: the tower may have moved
    module.reference_moves = True  # from now on no model folder holds it


def keeping_dtypes(module: GSPOModule, convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``convert``, which narrows or moves tensors of the module, except that buffers and adapters keep their dtype.

    In bfloat16 most updates of an adapter would be rounded away, and rotary frequencies, which are buffers, would
    rotate a token 2048 positions away by more than a radian too much. Sharded weights are replaced by the converted
    ones, so widening them again after the call would be too late.
    """
    wide = {id(buffer) for buffer in module.buffers()}
    if module.policy is not None and module.policy.has_adapter:
        wide |= {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    return lambda tensor: tensor.to(convert(tensor).device) if id(tensor) in wide else convert(tensor)
