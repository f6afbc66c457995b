"""Weights in the dtype and memory order that products read, for as long as a rollout lasts.

oneDNN first reorders the weight of a product into its own blocks, every time. With the few rows of a decoding step that
costs as much as the product itself (49,152 x 576 by 16 rows: 10.8 ms, of which 6.1), and the weights do not change
during a rollout: they are reordered once. Bfloat16 products keep their bits; float32 ones, which MKL would compute
otherwise, add the same terms in another order. Layers that read the same input are merged into one product: for a small
product, a separate call costs as much as its weight does. On a GPU autocast would narrow every weight for every token,
which reads and writes three times what the product itself reads: they are narrowed once.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gspo_lightning.packing.products import product_dtype
from gspo_lightning.policy.model import Policy

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input, in the order of their calls."""


@contextmanager
def prepacked_weights(policy: Policy, rows: int) -> Iterator[None]:
    """Prepacks weights for the forwards of a rollout without gradient, during which no weight changes.

    A second copy of these weights, in the dtype of the products, is held meanwhile. It has no effect where nothing is
    gained: on GPUs for weights in that dtype, in float64, on weights that are sharded, quantised or in compiled layers.

    Args:
        policy: its linear layers and output embedding are prepacked.
        rows: rows of a decoding step; with 0, nothing is packed.
    """
    modules = [] if not rows or policy.is_padded or policy.shards is not None else list(policy.body.modules())
    if any(module._compiled_call_impl is not None for module in modules):
        modules = []
    with ExitStack() as stack:
        for layers in _by_input(modules):
            forwards = _products([layer.weight for layer in layers], [layer.bias for layer in layers], rows)
            for layer, forward in zip(layers, forwards, strict=True):
                _replace(stack, layer, "forward", forward)
        if modules and _is_worthwhile(policy.output_weight):
            _replace(stack, policy, "logits", _products([policy.output_weight], [None], rows)[0])
        yield


def _by_input(modules: Sequence[nn.Module]) -> Iterator[list[nn.Linear]]:
    """The linear layers whose product can be replaced, each once; the layers of a list read the same input."""
    left = {m: None for m in modules if type(m) is nn.Linear and "forward" not in vars(m) and _is_worthwhile(m.weight)}
    for module in modules:
        for names in SIBLINGS:
            layers = [layer for name in names if (layer := getattr(module, name, None)) in left]
            kinds = {(layer.in_features, layer.weight.dtype, layer.bias is None) for layer in layers}
            if len(layers) == len(names) and len(kinds) == 1:
                yield layers
                for layer in layers:
                    del left[layer]
    yield from ([layer] for layer in left)


def _replace(stack: ExitStack, owner: nn.Module, name: str, method: Callable[[Tensor], Tensor]) -> None:
    setattr(owner, name, method)
    stack.callback(delattr, owner, name)


def _is_worthwhile(weight: Tensor) -> bool:
    """Whether oneDNN has prepacked products for the weight, or a GPU's autocast would narrow it."""
    if weight.is_cuda:
        return weight.is_floating_point() and product_dtype(weight) != weight.dtype
    if weight.device.type != "cpu" or platform.machine() != "x86_64" or not torch.backends.mkldnn.is_available():
        return False
    dtype = product_dtype(weight)
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _products(weights: list[Tensor], biases: list[Tensor | None], rows: int) -> list[Callable[[Tensor], Tensor]]:
    """``x -> x @ weight.T + bias`` in the dtype of the products, for layers that are called in this order."""
    dtype = product_dtype(weights[0])
    weight = torch.cat([weight.detach().to(dtype) for weight in weights]) if len(weights) > 1 else weights[0].detach()
    present = [bias.detach() for bias in biases if bias is not None]
    bias = torch.cat(present).to(dtype) if present else None
    narrow = weight.to(dtype)
    if weight.is_cuda:
        product = functools.partial(_narrow_linear, narrow, bias, dtype)
    else:
        product = functools.partial(_linear, torch.ops.mkldnn._reorder_linear_weight(narrow, rows), bias, dtype)
    if len(weights) == 1:
        return [product]
    together = _Together(product, [len(weight) for weight in weights])
    return [functools.partial(together, number) for number in range(len(weights))]


class _Together:
    """Several products with one input: the first call computes all, the last one forgets them."""

    def __init__(self, product: Callable[[Tensor], Tensor], sizes: list[int]) -> None:
        self.product, self.sizes = product, sizes
        self.input: Tensor | None = None
        self.parts: Sequence[Tensor] = ()

    def __call__(self, number: int, x: Tensor) -> Tensor:
        if x is not self.input:
            self.input, self.parts = x, self.product(x).split(self.sizes, -1)
        part = self.parts[number]
        if number == len(self.sizes) - 1:
            self.input, self.parts = None, ()
        return part


def _narrow_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    return nn.functional.linear(x.to(dtype), weight, bias)


def _linear(packed: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")
    return result
