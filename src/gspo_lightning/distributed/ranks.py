"""Sums over ranks: every mean and every denominator of this project is global."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from gspo_lightning.types import Metrics

_PIECE = 4 * 2**20
"""Characters that a rank sends at a time."""


def world_size() -> int:
    """Number of processes that train together; 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among those that train together; 0 outside a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def global_sum(values: Tensor) -> Tensor:
    """Elementwise sum over ranks."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def whole(tensor: Tensor) -> Tensor:
    """Gathers a tensor that is split over ranks, which must all call this; returns any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def global_max(value: int, device: torch.device) -> int:
    """Largest value over all ranks."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def gather_values(values: Tensor) -> Tensor:
    """Concatenates ``(N,)`` values of all ranks in the order of ranks, on the CPU; N may differ."""
    values = values.detach().cpu()
    if world_size() == 1:
        return values
    gathered: list[Tensor] = [values] * world_size()
    dist.all_gather_object(gathered, values)
    return torch.cat(gathered)


def gather_text(text: str) -> str:
    """On rank 0 the texts of all ranks, one after the other in the order of ranks; empty on the others.

    In pieces: NCCL gathers in the memory of rank 0's GPU.
    """
    if world_size() == 1:
        return text
    longest = int(gather_values(torch.tensor([len(text)])).max())
    of_ranks: list[list[str]] = []
    for start in range(0, longest, _PIECE):
        gathered: list[str] | None = [""] * world_size() if rank() == 0 else None
        dist.gather_object(text[start : start + _PIECE], gathered)
        of_ranks.append(gathered or [])
    return "".join(piece for pieces in zip(*of_ranks, strict=True) for piece in pieces)


def global_means(metrics: Metrics, device: torch.device) -> dict[str, float]:
    """Means over everything all ranks saw: sums over ranks divided by counts over ranks.

    Ranks may hold different names (a rank without a surviving group has no ratios), so the names are gathered first.
    A name whose count is zero on every rank is left out, on all ranks alike.
    """
    names = sorted(metrics)
    if world_size() > 1:
        gathered: list[list[str]] = [[] for _ in range(world_size())]
        dist.all_gather_object(gathered, names)
        names = sorted(set().union(*gathered))
    if not names:
        return {}
    zero = torch.zeros((), dtype=torch.float64)
    pairs = [metrics.get(name, (zero, zero)) for name in names]
    table = torch.stack([torch.stack([x.detach().double().cpu() for x in pair]) for pair in pairs]).to(device)
    sums, counts = global_sum(table).cpu().unbind(dim=1)
    return {name: (s / c).item() for name, s, c in zip(names, sums, counts, strict=True) if c}


def add_metrics(total: Metrics, more: Metrics) -> None:
    """Adds sums and counts of ``more`` into ``total``, in float64.

    Sums stay on their device: a copy to the CPU would wait for all of the device's pending work.
    """
    for name, (value, count) in more.items():
        value, count = value.detach().double(), count.detach().double()
        if name in total:
            value, count = total[name][0] + value, total[name][1] + count
        total[name] = (value, count)


def shares_gradients(strategy: Strategy) -> bool:
    """Whether the strategy is one for several ranks, with state such as gradient buffers; also with a single rank."""
    return isinstance(strategy, ParallelStrategy)


def gradient_sync(strategy: Strategy, last: bool) -> AbstractContextManager[None]:
    """Context of a backward: gradients of a minibatch are synchronised once, with its last micro-batch."""
    if last or not isinstance(strategy, ParallelStrategy):
        return nullcontext()
    return strategy.block_backward_sync()
