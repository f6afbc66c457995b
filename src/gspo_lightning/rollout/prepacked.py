"""Weights in the order in memory that a CPU's products read, for as long as a rollout lasts.

oneDNN brings the weight of a product into blocks of its own first, every time. With the few rows of a decoding step
that costs as much as the product itself (49,152 x 576 by 16 rows: 10.8 ms, of which 6.1), and the weights of a rollout
do not change: they are brought into blocks once. Bfloat16 products keep their bits; float32 ones, which MKL would
multiply otherwise, are another sum of the same terms.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gspo_lightning.packing.products import product_dtype
from gspo_lightning.policy.model import Policy


@contextmanager
def prepacked_weights(policy: Policy, rows: int) -> Iterator[None]:
    """Around the forwards of a rollout without gradient, during which no weight changes.

    A second copy of these weights, in the dtype of the products, is held meanwhile. Without effect where nothing is
    gained: on GPUs, in float64, on weights that are sharded, quantised or in compiled layers.

    Args:
        policy: whose linear layers and output embedding are multiplied.
        rows: of a decoding step; nothing is packed for none.
    """
    modules = [] if not rows or policy.is_padded or policy.shards is not None else list(policy.body.modules())
    if any(module._compiled_call_impl is not None for module in modules):
        modules = []
    with ExitStack() as stack:
        for module in modules:
            if type(module) is nn.Linear and "forward" not in vars(module) and _is_worthwhile(module.weight):
                _replace(stack, module, "forward", _product(module.weight, module.bias, rows))
        if modules and _is_worthwhile(policy.output_weight):
            _replace(stack, policy, "logits", _product(policy.output_weight, None, rows))
        yield


def _replace(stack: ExitStack, owner: nn.Module, name: str, method: Callable[[Tensor], Tensor]) -> None:
    setattr(owner, name, method)
    stack.callback(delattr, owner, name)


def _is_worthwhile(weight: Tensor) -> bool:
    """Whether oneDNN has such products."""
    if weight.device.type != "cpu" or platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available():
        return False
    dtype = product_dtype(weight)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """``x -> x @ weight.T + bias`` in the dtype of the products."""
    dtype = product_dtype(weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)
    return functools.partial(_linear, packed, None if bias is None else bias.detach().to(dtype), dtype)


def _linear(packed: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")
    return result
