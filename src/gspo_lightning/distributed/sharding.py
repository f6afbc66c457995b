"""Weights split over ranks by FSDP2, as rollouts, passes and exports use them.

Every layer is an FSDP unit, and the rest (embeddings, norms, a vision tower) is another: a rank without an image then
gathers the same as the others. A forward gathers weights from all ranks, so all must run the same number of forwards:
an update does so by construction, everything without gradient runs inside `in_step`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from gspo_lightning.distributed.ranks import global_max, rank, whole
from gspo_lightning.distributed.sharded_checkpoint import read_index
from gspo_lightning.errors import UserError
from gspo_lightning.packing import GroupLayout, SharedPrefixLayout
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.model import Policy


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 with all ranks in one data-parallel group; every rank writes its part of the checkpoint.

    Args:
        timeout: how long a rank waits for the others.
        gather_for_rollouts: keep the whole weights on every rank while it samples, instead of gathering each layer
            again for each token. Needs room for one copy of the model.
    """

    def __init__(self, timeout: timedelta = timedelta(minutes=30), gather_for_rollouts: bool = True) -> None:
        super().__init__(tensor_parallel_size=1, timeout=timeout)
        self.gather_for_rollouts = gather_for_rollouts

    def setup_environment(self) -> None:
        """Starts the process group; its size is known only here."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads this rank's part, whatever the number of ranks that saved it.

        Raises:
            UserError: the checkpoint is of another model.
        """
        metadata = read_index(Path(checkpoint_path)).state_dict_metadata
        module: Any = self.lightning_module
        prefix = "state_dict."
        module.refuse_other_model(
            {name.removeprefix(prefix): tuple(getattr(m, "size", ())) for name, m in metadata.items()}
        )
        return super().load_checkpoint(checkpoint_path, weights_only)


class Shards:
    """The FSDP units of a sharded policy, and whether its forwards are announced to other ranks."""

    def __init__(self, policy: Policy, gather_for_rollouts: bool) -> None:
        self.root, self.gather_for_rollouts = policy, gather_for_rollouts
        self.units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
        self.counting = False

    def announce(self, *_: Any) -> None:
        """Announces one more forward of this rank, which the other ranks must follow."""
        if self.counting:
            global_max(1, self.root.device)

    def gather(self, keep: bool) -> None:
        """Sets whether layers stay whole after a forward."""
        for unit in self.units:
            # The root unit always stays whole: rollouts read its output embedding after the forward.
            unit.set_reshard_after_forward(unit is not self.root and not keep, recurse=False)

    def reshard(self) -> None:
        """Reduces all units to this rank's part again."""
        self.gather(False)
        for unit in self.units:
            unit.reshard()

    def follow(self) -> None:
        """Runs forwards of one token for as long as any rank announces forwards."""
        device = self.root.device
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        layout = SharedPrefixLayout((GroupLayout(1, ()),), device)
        while global_max(0, device):
            self.root.hidden_states(token, token, layout)


def shard_policy(policy: Policy, mesh: DeviceMesh, *, gather_for_rollouts: bool = True) -> None:
    """Splits the weights of a policy over the ranks of ``mesh``, in place.

    Args:
        policy: whole, and the same on every rank.
        mesh: Lightning's, with dimensions ``data_parallel`` and ``tensor_parallel``.
        gather_for_rollouts: see `FSDP2Strategy`.

    Raises:
        UserError: the mesh splits matrices, or the model runs padded or quantised.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise UserError(
            "trainer.strategy: tensor parallelism is not supported; use trainer=fsdp, or "
            "gspo_lightning.distributed.sharding.FSDP2Strategy()"
        )
    if policy.samples_padded:
        raise UserError(
            f"trainer=fsdp: {type(policy.base_model).__name__} runs padded, or samples, by its own forwards, which "
            "FSDP2 cannot count; use trainer=ddp"
        )
    if getattr(policy.base_model, "is_quantized", False):
        raise UserError("trainer=fsdp cannot split quantised weights; use trainer=ddp, or model.quantization=null")
    layers: Any = policy.base_model.get_decoder().layers
    data = mesh["data_parallel"]
    for layer in layers:
        fully_shard(layer, mesh=data)
    fully_shard(policy, mesh=data)
    policy.shards = shards = Shards(policy, gather_for_rollouts)
    register_fsdp_forward_method(policy, "hidden_states")
    gathering = policy.hidden_states

    def announced(*args: Any, **kwargs: Any) -> Tensor:
        shards.announce()
        return gathering(*args, **kwargs)

    # Before the first weights are gathered, which a rank that follows does after the announcement.
    policy.register_forward_pre_hook(shards.announce, prepend=True)
    policy.hidden_states = announced  # type: ignore[method-assign]


@contextmanager
def in_step(policy: Policy, *, rollout: bool = False) -> Iterator[None]:
    """Context of forwards without gradient, whose number may differ between ranks; all ranks must enter together.

    A rank that has finished runs dummy forwards until all have finished. Whole weights are released at the end. Without
    effect on a policy that is not sharded.
    """
    shards: Shards | None = policy.shards
    if shards is None:
        yield
        return
    shards.gather(rollout and shards.gather_for_rollouts)
    shards.counting = True
    try:
        yield
    finally:
        shards.counting = False
    with torch.no_grad():
        shards.follow()
    shards.reshard()


@torch.no_grad()
def copy_trained_weights(module: nn.Module, target: nn.Module | None) -> None:
    """Copies every trained weight, gathered, into the parameter of the same name. All ranks must call it together.

    One parameter is whole at a time, so ``target`` is the only whole copy of the model that this needs.

    Args:
        module: the source; its weights may be split over ranks.
        target: unsharded; None on a rank that keeps nothing.
    """
    own = {} if target is None else dict(target.named_parameters())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter.detach())
            if target is not None:
                own[name].copy_(value)
            del value  # before the next one is gathered


def whole_copy(policy: Policy, loader: PolicyLoader) -> Policy:
    """A new copy, in the dtypes of the policy: the precision bf16-true has narrowed what is frozen."""
    copy = loader.load()
    dtypes = {name: parameter.dtype for name, parameter in policy.named_parameters()}
    for name, parameter in copy.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return copy


def whole_policy(policy: Policy, loader: PolicyLoader) -> Policy | None:
    """The policy with all of its weights, on the CPU of rank 0; None on other ranks. All ranks must call it.

    A policy that is not sharded is returned unchanged on rank 0.
    """
    if policy.shards is None:
        return None if rank() else policy
    fresh = None if rank() else whole_copy(policy, loader)
    copy_trained_weights(policy, fresh)
    return fresh
