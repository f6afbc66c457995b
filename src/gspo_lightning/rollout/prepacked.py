"""Weights in the order in memory that a CPU's bfloat16 products read, for as long as a rollout lasts.

oneDNN brings the weight of a product into blocks of its own first, every time. With the few rows of a decoding step
that costs as much as the product itself (49,152 x 576 by 16 rows: 10.8 ms, of which 6.1), and the weights of a rollout
do not change: they are brought into blocks once. The numbers are the same to the last bit.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gspo_lightning.policy.model import Policy


@contextmanager
def prepacked_weights(policy: Policy, rows: int) -> Iterator[None]:
    """Around the forwards of a rollout without gradient, during which no weight changes.

    Without effect where nothing is gained: on GPUs, in float32, on weights that are sharded or quantised.

    Args:
        policy: whose linear layers and output embedding are multiplied.
        rows: of a decoding step.
    """
    if policy.is_padded or policy.shards is not None or not _is_worthwhile(policy.output_weight):
        yield
        return
    with ExitStack() as stack:
        for module in _body(policy).modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                stack.callback(delattr, module, "forward")
                module.forward = _product(module.weight, module.bias, rows)  # type: ignore[method-assign]
        stack.callback(delattr, policy, "logits")
        policy.logits = _product(policy.output_weight, None, rows)  # type: ignore[method-assign]
        yield


def _body(policy: Policy) -> nn.Module:
    body: Any = policy.base_model.model
    return policy.vision.language_model if policy.vision is not None else body


def _is_worthwhile(weight: Tensor) -> bool:
    """Whether products with it are oneDNN's bfloat16 ones."""
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return (
        kind == "cpu"
        and dtype == torch.bfloat16
        and platform.machine() == "x86_64"
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _product(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """``x -> x @ weight.T + bias`` in bfloat16."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().bfloat16(), rows)
    return functools.partial(_linear, packed, None if bias is None else bias.detach().bfloat16())


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, bias, "none", [], "")
    return result
