"""Log-probabilities and entropies straight from hidden states, without ever holding all logits.

``log p(y | h) = (h . w_y) / tau - logsumexp_v((h . w_v) / tau)``. The vocabulary product and the log-softmax of the
forward are in float32 whatever the body ran in: a clip width of 3e-4 on a sequence's mean log-ratio would drown
in bfloat16 logits. The backward recomputes the products chunk by chunk, in the dtype of the autocast region (its
rounding reaches the gradient as it does in every other layer, but no ratio).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gspo_lightning.packing.products import float32_products

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Logits held at a time: on a GPU a product of few rows would be bound by reading the weight."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of ``targets`` and entropy of the distribution, row by row.

    Args:
        hidden: ``(L, H)`` last hidden states.
        weight: ``(V, H)`` of the output embedding.
        targets: ``(L,)`` int64.
        temperature: logits are divided by it, in sampling and training alike.
        with_entropy: False returns zeros in place of the entropy and saves two passes over the logits.

    Returns:
        ``(L,)`` log-probabilities and ``(L,)`` entropies in nats, float32 (float64 for float64 input), both with
        gradient to ``hidden`` and ``weight``.
    """
    backward_dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        backward_dtype = torch.get_autocast_dtype(hidden.device.type)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearLogprobs.apply(hidden, weight, targets, temperature, with_entropy, backward_dtype)


def logits_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """The same from ``(L, V)`` logits, for models whose head is more than a matrix; float32 whatever theirs are."""
    log_p = torch.log_softmax(_wide(logits) / temperature, dim=-1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    return logprobs, -torch.linalg.vecdot(log_p.exp(), log_p) if with_entropy else torch.zeros_like(logprobs)


def _chunks(hidden: Tensor, vocabulary: int, dtype: torch.dtype) -> list[slice]:
    rows = len(hidden)
    size = max(16, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"]) // (dtype.itemsize * vocabulary))
    count = max(1, -(-rows // size))
    size = -(-rows // count) if rows else 1
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _logits(hidden: Tensor, weight: Tensor, narrow: torch.dtype) -> Callable[[slice], Tensor]:
    """Logits of some rows in float32 or wider; ``narrow`` is the dtype of the other products of this training step."""
    if hidden.is_cuda and narrow == torch.bfloat16:
        return float32_products(hidden, weight)
    wide = _wide(hidden)
    weight_t = weight.to(wide.dtype).t()
    return lambda rows: wide[rows] @ weight_t


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        with_entropy: bool,
        backward_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy = hidden.new_empty(len(hidden), dtype=dtype), hidden.new_zeros(len(hidden), dtype=dtype)
        logits_of = _logits(hidden, weight, backward_dtype)
        for rows in _chunks(hidden, weight.shape[0], dtype):
            logits = logits_of(rows)
            if temperature != 1.0:
                logits.div_(temperature)
            log_p = torch.log_softmax(logits, dim=-1)
            logprobs[rows] = log_p.gather(1, targets[rows, None]).squeeze(1)
            if with_entropy:
                entropy[rows] = -torch.linalg.vecdot(torch.exp(log_p, out=logits), log_p)
        ctx.save_for_backward(hidden, weight, targets, logprobs, entropy)
        ctx.temperature, ctx.with_entropy, ctx.backward_dtype = temperature, with_entropy, backward_dtype
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, logprobs, entropy = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        narrow, narrow_weight = hidden.to(ctx.backward_dtype), weight.to(ctx.backward_dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(hidden, weight.shape[0], ctx.backward_dtype):
                g, h = grad_logprobs[rows, None], (grad_entropy[rows, None], entropy[rows, None])
                grad_logits = _grad_logits(
                    narrow[rows] @ narrow_weight.t(), targets[rows, None], logprobs[rows, None], g,
                    h if ctx.with_entropy else None, ctx.temperature,
                )  # fmt: skip
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad_logits @ narrow_weight).to(hidden.dtype)
                if needs_weight:
                    grad_weight = _add_product(grad_weight, grad_logits.t(), narrow[rows], weight.dtype)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        return grad_hidden, grad_weight, None, None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + a @ b`` in ``dtype``, in place; without a product of its own where the dtypes allow it."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)


def _grad_logits(
    logits: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    grad_logprobs: Tensor,
    entropy: tuple[Tensor, Tensor] | None,
    temperature: float,
) -> Tensor:
    """Gradient with respect to the raw logits of some rows, in their dtype; overwrites ``logits``.

    ``d log p(y) / d logits = onehot(y) - p`` and ``d entropy / d logits = -p (log p + entropy)``. In a narrow dtype
    ``p(y) - 1`` would lose the gradient of every confident token, so the target's entry is set from the forward's
    log-probability instead.

    Args:
        logits: ``(rows, V)``; all others ``(rows, 1)``.
        entropy: incoming gradient and value of the entropy, if it takes part.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    if entropy is None:
        grad = torch.softmax(logits, dim=-1).mul_(-grad_logprobs.to(logits.dtype))
        target = -torch.expm1(logprobs) * grad_logprobs
    else:
        grad_entropy, value = entropy
        log_p = torch.log_softmax(_wide(logits), dim=-1)
        factor = grad_logprobs + grad_entropy * (log_p + value)
        grad = log_p.exp_().mul_(factor).neg_().to(logits.dtype)
        target = -torch.expm1(logprobs) * grad_logprobs - logprobs.exp() * grad_entropy * (logprobs + value)
    # Into the flat tensor: a scatter over a dimension copies the whole tensor first on CPUs.
    first = torch.arange(0, grad.numel(), grad.shape[1], device=grad.device)
    grad.view(-1).index_copy_(0, first + targets.squeeze(1), target.squeeze(1).to(grad.dtype))
    return grad.div_(temperature) if temperature != 1.0 else grad
