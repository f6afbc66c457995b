"""Root-mean-square norms (arXiv 1910.07467) that keep their input and one number per token for the backward.

Those of transformers keep three tensors of their input's size, and compute in float32 whatever the model is in. These
compute in float32 or wider, so that a float64 model is in float64 throughout. Each function is the forward of a module
of transformers, which has ``weight`` ``(H,)`` and an epsilon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gspo_lightning.packing.products import product_dtype
from gspo_lightning.policy.remade import Remade


def lean_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """The norm of ``(..., H)`` in the dtype of the products after it."""
    return _norm_in(product_dtype(hidden_states), hidden_states, self.weight, _eps(self))


def promoting_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """The same in the wider dtype of weight and input, as Llama's: for rotations or a head, which read it as it is."""
    dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
    return _norm_in(dtype, hidden_states, self.weight, _eps(self))


def keeping_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """The same in the dtype of its input, as OLMo's and gpt-oss's."""
    return _norm_in(hidden_states.dtype, hidden_states, self.weight, _eps(self))


def norm_of_one_plus(self: Any, hidden_states: Tensor) -> Tensor:
    """The same with one plus the weight, as Gemma's."""
    weight = 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
    return _norm_in(hidden_states.dtype, hidden_states, weight, _eps(self))


NORMS = (promoting_norm, keeping_norm, norm_of_one_plus)
"""In the dtypes that those of transformers have."""


def is_norm(module: nn.Module) -> bool:
    """Whether a module may be such a norm, by its name and parts."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and weight.ndim == 1
    return named and _eps(module) is not None


@torch.no_grad()
def has_its_dtype(norm: Any, module: nn.Module) -> bool:
    """Whether one of `NORMS` returns what the module does, also for an input of another dtype than the weight's."""
    weight: Any = module.weight
    other = torch.bfloat16 if weight.dtype == torch.float32 else torch.float32
    x = torch.ones(1, 3, len(weight), dtype=other, device=weight.device)
    return module(x).dtype == norm(module, x).dtype


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _norm_in(dtype: torch.dtype, x: Tensor, weight: Tensor, eps: Any) -> Tensor:
    if x.is_cuda or not torch.is_grad_enabled():
        return _norm(x, weight, eps, dtype)
    return _RMSNorm.apply(x, weight, eps, dtype)


def remade_norm(self: Any, hidden_states: Tensor) -> Tensor:
    """`lean_norm` with a result that the layers after it need not keep."""
    out = lean_norm(self, hidden_states)
    if torch.is_grad_enabled():
        x, weight, dtype = hidden_states.detach(), self.weight.detach(), out.dtype
        again = Remade(out, lambda: _norm(x, weight, _eps(self), dtype))
        out.remade = again  # type: ignore[attr-defined]
    return out


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if not x.is_cuda:
        return _normed(x, weight, eps, dtype)[0]
    # One kernel, which keeps equally little; on a CPU it is slower than ours for long rows. It takes one dtype.
    wide = torch.promote_types(x.dtype, weight.dtype)
    with torch.autocast("cuda", enabled=False):
        return nn.functional.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(dtype)


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm in ``dtype``, and the factors ``(..., 1)`` of the tokens in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # As few operations as possible: on the few rows of a decoding step each takes longer to start than to run.
    scale = torch.addcmul(length.new_tensor(eps), length, length, value=1 / x.shape[-1]).rsqrt_()
    return (wide * scale).mul_(weight).to(dtype), scale


class _RMSNorm(torch.autograd.Function):
    """Everything in float32 or wider. With ``y = s w x``, ``s = (mean(x^2) + eps)^-1/2`` and g the gradient of y:

    that of x is ``s g w - s^3 x sum(g w x) / H`` (``along`` is the factor of x), that of w ``sum(s g x)`` over tokens.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, scale = _normed(x, weight, eps, dtype)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, scale = ctx.saved_tensors
        grad, wide = grad.to(scale.dtype), x.to(scale.dtype)
        with torch.autocast(x.device.type, enabled=False):
            products = (grad * wide).flatten(0, -2)
            needed = ctx.needs_input_grad[1]
            # Products with vectors, which no setting lets a GPU compute in TF32.
            grad_weight = (products.t() @ scale.flatten()).view_as(weight).to(weight.dtype) if needed else None
            along = (products @ weight.to(scale.dtype)).view_as(scale).mul_(scale.pow(3)).div_(-x.shape[-1])
        return (grad * weight).mul_(scale).addcmul_(wide, along).to(x.dtype), grad_weight, None, None
