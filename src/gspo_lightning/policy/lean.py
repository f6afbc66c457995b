"""Layers that keep and compute less: our own attention and gated MLPs for the Llama family, and norms for all.

transformers' RMSNorm keeps three tensors of its input's size, and every linear layer after it casts its output again;
its MLP keeps the activated gate and the product with it. Here a norm keeps its input and one number per token and
returns the dtype of the products, the layers after it keep nothing and recompute the norm in the backward, the MLP
keeps only gate and up and multiplies them again, and attention rotates queries and keys in a third of the operations
(`gspo_lightning.policy.rotary`).
Results equal those of transformers except for rounding; `lighten` compares them before it changes anything.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gspo_lightning.policy.known_layers import is_known
from gspo_lightning.policy.norms import NORMS, has_its_dtype, is_norm, lean_norm, remade_norm
from gspo_lightning.policy.remade import Remade, remade
from gspo_lightning.policy.rotary import rotate

Forward = Callable[..., Any]

ATTENTIONS = frozenset(
    f"{name}Attention" for name in ("Llama", "Qwen2", "Qwen3", "Qwen2VL", "Qwen2_5_VL", "Qwen3VLText")
)
"""Attention modules that compute projections, any norms of heads, rotation, cache, attention and projection, in order.

Mistral's reads its window from the config.
"""


def lighten(model: PreTrainedModel, *, recomputed: bool = False, check: bool = True) -> int:
    """Replaces what can be replaced, in place; returns the number of modules changed, norms alone in unknown layers.

    Not for compiled layers, which do less by themselves.

    Args:
        model: the model before any adapter is added.
        recomputed: whether the layers' activations are recomputed: nothing is kept then, so the MLPs stay unchanged
            and the norms are not recomputed separately.
        check: compare the results first; impossible for a model without weights.
    """
    changed = 0
    chosen: dict[Any, Forward | None] = {}
    for module, choices in _replaceable(model, recomputed):
        # Norms of one class may differ: those of some models are over groups of a token's numbers in places.
        kind = module if choices is NORMS else (type(module), next(module.parameters()).dtype, choices)
        if kind not in chosen:
            chosen[kind] = next((lean for lean in choices if _fits(module, lean, check)), None)
        if (lean := chosen[kind]) is not None:
            # No bound method: that one is pickled as the name of an attribute, which the module does not have.
            module.forward = functools.partial(lean, module)
            changed += 1
    return changed


def _replaceable(model: PreTrainedModel, recomputed: bool) -> Iterator[tuple[nn.Module, tuple[Forward, ...]]]:
    """Modules, each with what may take its place: parts of known layers, and every other norm of whatever model."""
    norm = lean_norm if recomputed else remade_norm
    of_layers: set[nn.Module] = set()
    for layer in getattr(model.get_decoder(), "layers", ()):
        if not is_known(layer):
            continue
        of_layers |= {layer.input_layernorm, layer.post_attention_layernorm}
        yield layer.input_layernorm, (norm,)
        if type(layer.self_attn).__name__ in ATTENTIONS:
            yield layer.self_attn, (lean_attention,)
        yield layer.post_attention_layernorm, (norm,)
        if not recomputed:
            yield layer.mlp, (lean_mlp,)
    for module in model.modules():
        if module not in of_layers and is_norm(module):
            yield module, NORMS


def _fits(module: nn.Module, lean: Forward, check: bool) -> bool:
    return (lean not in NORMS or has_its_dtype(lean, module)) and (not check or _computes_the_same(module, lean))


@torch.no_grad()
def _computes_the_same(module: nn.Module, lean: Forward) -> bool:
    """Whether ``lean`` computes what the module does, which may differ between versions of transformers."""
    weight = next(module.parameters())
    if not weight.is_floating_point():  # a quantised one
        return False
    generator = torch.Generator().manual_seed(0)
    if lean in NORMS:  # with other weights in float32: in bfloat16, one plus 50 is 50 but for rounding
        module = copy.deepcopy(module).float()
        weight = next(module.parameters())
        weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu"))
    # The device is named because the Trainer builds the policy under another default device.
    x = torch.randn(1, 3, weight.shape[-1], generator=generator, device="cpu").to(weight.device, weight.dtype)
    more = {}
    if lean is lean_attention:
        angles = torch.rand(1, 3, module.head_dim // 2, generator=generator, device="cpu").to(x).repeat(1, 1, 2)  # type: ignore[arg-type, operator]
        more = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
    expected, found = module(x, **more), lean(module, x, **more)
    if lean is lean_attention:
        expected, found = expected[0], found[0]
    distance, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return bool(distance <= 4 * torch.finfo(x.dtype).eps * size + 1e-6 * size)


def lean_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention with queries and keys rotated together; arguments and results are those of transformers."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    with remade(hidden_states):
        query, key, value = (p(hidden_states).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    query, key = rotate(query, key, *position_embeddings)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    eager = sys.modules[type(self).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
    out, weights = attend(
        self, query, key, value, attention_mask, dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling, sliding_window=getattr(self, "sliding_window", None), **kwargs,
    )  # fmt: skip
    return self.o_proj(out.flatten(2)), weights


def lean_mlp(self: Any, x: Tensor) -> Tensor:
    """``down(silu(gate(x)) * up(x))``, whose product is not kept."""
    with remade(x):
        gate, up = self.gate_proj(x), self.up_proj(x)
    if not torch.is_grad_enabled():
        return self.down_proj(nn.functional.silu(gate).mul_(up))
    activated: list[Tensor] = []
    product = _Gated.apply(gate, up, activated)
    gate, up = gate.detach(), up.detach()

    def again() -> Tensor:
        activated[:] = [nn.functional.silu(gate)]  # which the backward of `_Gated` takes out again
        return activated[0] * up

    with Remade(product, again).hooks():
        return self.down_proj(product)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activated: list[Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activated = activated
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        # Empty if the product was not recomputed, since the weight it feeds has no gradient.
        activated = ctx.activated.pop() if ctx.activated else nn.functional.silu(gate)
        return torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad), None
