"""The gradient of an embedding that is also the output embedding, without a table of zeros.

The backward of an ordinary embedding fills a gradient of the whole vocabulary with zeros for the few rows that were
read, and autograd adds all of it to the head's. Here only those rows are added to the head's gradient, in place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding


@contextmanager
def tied_weight(table: nn.Module, weight: Tensor) -> Iterator[Tensor]:
    """Context for a training forward on a CPU, where filling and adding take a twentieth of an update.

    Args:
        table: the input embedding.
        weight: ``(V, H)`` weight of the output embedding.

    Yields:
        the weight for the head: ``weight`` itself if nothing is tied, trained or gained.
    """
    trained = torch.is_grad_enabled() and weight.requires_grad and weight.device.type == "cpu"
    if not trained or type(table) is not nn.Embedding or table.weight is not weight or "forward" in vars(table):
        yield weight
        return
    of_table, of_head = _Tied.apply(weight)
    table.forward = functools.partial(  # type: ignore[method-assign]
        embedding, weight=of_table, padding_idx=table.padding_idx, sparse=True
    )
    try:
        yield of_head
    finally:
        del table.forward


class _Tied(torch.autograd.Function):
    """Two views of one weight, of which the first gets a sparse gradient and the second a separate dense one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, whole: Tensor) -> Tensor:
        return whole.add_(rows)
