"""Log-probabilities and entropies straight from hidden states, without ever holding all logits.

``log p(y | h) = (h . w_y) / tau - logsumexp_v((h . w_v) / tau)``. The vocabulary is processed in slices: the sums over
it are combined as in the online softmax (arXiv 1805.02867), and the backward recomputes the logits slice by slice and
writes each slice's part of the head's gradient once. A slice stays in the CPU's cache from product to product.

The products of the forward are in float32 whatever the dtype of the body: a clip width of 3e-4 on a sequence's mean
log-ratio would drown in the rounding of bfloat16 logits. Those of the backward are in the dtype of the autocast region
(its rounding reaches the gradient as it does in every other layer, but no ratio).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from gspo_lightning.packing.products import float32_products, product_dtype, rows_missing

SLICE_BYTES = {"cpu": 8 * 2**20, "cuda": 512 * 2**20}
"""Size of a slice's logits, and of its weights: near a CPU's cache, enough to occupy a GPU. Copies come on top."""


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
        weight: ``(V, H)`` weight of the output embedding.
        targets: ``(L,)`` int64.
        temperature: logits are divided by it, in sampling and training alike.
        with_entropy: False returns zeros in place of the entropy and saves two passes over the logits.

    Returns:
        ``(L,)`` log-probabilities and ``(L,)`` entropies in nats, float32 (float64 for float64 input), both with
        gradient to ``hidden`` and ``weight``.

    Raises:
        RuntimeError: a target is not a row of ``weight`` (on a GPU: raised at the next synchronisation).
    """
    torch._assert_async(((targets >= 0) & (targets < len(weight))).all(), "a target outside of the vocabulary")
    backward_dtype, count = product_dtype(hidden), len(hidden)
    missing = rows_missing(count, hidden.device, backward_dtype)
    if missing:
        hidden, targets = pad(hidden, (0, 0, 0, missing)), pad(targets, (0, missing))
    with torch.autocast(hidden.device.type, enabled=False):
        out = _LinearLogprobs.apply(hidden, weight, targets, temperature, with_entropy, backward_dtype)
    return (out[0][:count], out[1][:count]) if missing else out


def logits_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` from ``(L, V)`` logits, for models whose head is more than a matrix; float32 or wider."""
    log_p = torch.log_softmax(_wide(logits) / temperature, dim=-1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    if not with_entropy:
        return logprobs, torch.zeros_like(logprobs)
    with torch.autocast(logits.device.type, enabled=False):  # it would round this product to its own dtype
        return logprobs, -torch.linalg.vecdot(log_p.exp(), log_p)


def _slices(hidden: Tensor, vocabulary: int, dtype: torch.dtype) -> list[slice]:
    held = SLICE_BYTES.get(hidden.device.type, SLICE_BYTES["cpu"]) // (dtype.itemsize * max(1, *hidden.shape))
    # A power of two: kernels for odd sizes are slow, and take up to 50 ms to build.
    size = max(128, (1 << held.bit_length()) >> 1)
    return [slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size)]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scaled_logits(
    hidden: Tensor, weight_dtype: torch.dtype, narrow: torch.dtype, temperature: float
) -> Callable[[Tensor], Tensor]:
    """Rows of the weight -> ``(L, rows)`` logits over the temperature, in float32 or wider.

    Args:
        narrow: dtype of the other products of this training step.
    """
    if hidden.is_cuda and narrow == torch.bfloat16:
        product = float32_products(hidden, weight_dtype)
        return product if temperature == 1.0 else lambda weight: product(weight).div_(temperature)
    scaled = _wide(hidden) / temperature
    return lambda weight: scaled @ weight.to(scaled.dtype).t()


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
        logits_of = _scaled_logits(hidden, weight.dtype, backward_dtype, temperature)
        slices = _slices(hidden, len(weight), dtype)
        parts = [_summed(logits_of(weight[part]), targets - part.start, with_entropy) for part in slices]
        logprobs, normaliser, entropy = _together(*(torch.stack(sums) for sums in zip(*parts, strict=True)))
        if not with_entropy:
            entropy.zero_()
        ctx.save_for_backward(hidden, weight, targets, logprobs, normaliser, entropy)
        ctx.temperature, ctx.with_entropy, ctx.backward_dtype = temperature, with_entropy, backward_dtype
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, logprobs, normaliser, entropy = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        narrow, temperature = ctx.backward_dtype, ctx.temperature
        rows, wide = hidden.to(narrow), _wide(hidden)
        # Subtracted inside the product, before rounding: what remains of a likely token's logit is small.
        # `rest` is the rounding error of the shift: a row holds log-probabilities plus it.
        shift = -normaliser.to(narrow)
        rest = shift + normaliser
        own, own_factor = _own_entry(logprobs, rest, narrow)
        # The factor common to all logits of a row is applied to the small operand of the products.
        factor = -(torch.ones_like(logprobs) if ctx.with_entropy else grad_logprobs * own_factor)[:, None] / temperature
        weighted_rows = (wide * factor).to(narrow)
        grad_hidden = torch.zeros_like(wide) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _slices(hidden, len(weight), narrow):
                narrow_weight = weight[part].to(narrow)
                shifted = torch.addmm(shift[:, None], rows, narrow_weight.t(), alpha=1 / temperature)
                inside = targets - part.start
                if ctx.with_entropy:
                    shifted = shifted.to(wide.dtype).sub_(rest[:, None])
                    grad = _grad_of_both(shifted, inside, logprobs, entropy, grad_logprobs, grad_entropy, narrow)
                else:
                    grad = _set(shifted.exp_(), inside, own)
                if grad_hidden is not None:
                    _add_product(grad_hidden, grad, narrow_weight)
                if grad_weight is not None:
                    _put_product(grad_weight[part], grad.t(), weighted_rows)
                del shifted, grad  # else they stay in memory while those of the next slice are made
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(factor).to(hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _summed(logits: Tensor, targets: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    """Sums over a slice of the vocabulary; overwrites ``logits`` ``(L, slice)``.

    Args:
        targets: ``(L,)``, counted from the slice's beginning; they may lie outside the slice.

    Returns:
        each ``(L,)``: the largest logit m; the sum of ``exp(l - m)``; ``l - m`` of the target, -inf if it lies outside;
        and the sum of ``exp(l - m) (l - m)``, zeros without ``with_entropy``.
    """
    largest = logits.amax(-1, keepdim=True)
    logits.sub_(largest)
    place, inside = _place(targets, logits.shape[1])
    chosen = logits[place].masked_fill(~inside, -torch.inf)
    moment = torch.zeros_like(chosen)
    if with_entropy:
        moment = torch.linalg.vecdot(logits.exp(), logits)
    return largest.squeeze(1), logits.exp_().sum(-1), chosen, moment


def _together(largest: Tensor, total: Tensor, chosen: Tensor, moment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, normaliser ``logsumexp(l)`` and entropy, each ``(L,)``, from `_summed` of slices ``(n, L)``."""
    overall = largest.amax(0)
    below = largest - overall
    scale = below.exp()
    log_sum = (total * scale).sum(0).log()
    mean = ((moment + below * total) * scale).sum(0) / log_sum.exp()
    return (chosen + below).amax(0) - log_sum, overall + log_sum, log_sum - mean


def _own_entry(logprobs: Tensor, rest: Tensor, narrow: torch.dtype) -> tuple[Tensor, Tensor]:
    """``exp(rest) (p - 1)`` of the targets, rounded, and the factors that undo ``exp(rest)`` and rounding: ``(L,)``.

    With the rounding undone, the target's entry, most of a row's gradient, is as exact as the forward.
    """
    own = torch.expm1(logprobs)
    rounded = (own * rest.exp()).to(narrow)
    return rounded, torch.where(rounded == 0, rest.neg().exp(), own / rounded)


def _grad_of_both(
    log_p: Tensor,
    targets: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    narrow: torch.dtype,
) -> Tensor:
    """The negative gradient of log-probabilities and entropies together with respect to a slice's logits.

    ``d log p(y) / d l = onehot(y) - p`` and ``d entropy / d l = -p (log p + entropy)``.

    Args:
        log_p: ``(L, slice)``, overwritten; all others ``(L,)``.
        targets: counted from the slice's beginning.
        narrow: dtype of the result.
    """
    factor = (log_p + entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_logprobs[:, None])
    grad = log_p.exp_().mul_(factor).to(narrow)
    own = torch.expm1(logprobs) * grad_logprobs + logprobs.exp() * grad_entropy * (logprobs + entropy)
    return _set(grad, targets, own)


def _set(grad: Tensor, targets: Tensor, values: Tensor) -> Tensor:
    """Writes the values ``(L,)`` at those targets that lie in this slice.

    Computing ``p(y) - 1`` in a narrow dtype would lose the gradient of every confident token, so the target's entry
    comes from the forward's log-probability.
    """
    place, inside = _place(targets, grad.shape[1])
    grad[place] = torch.where(inside, values.to(grad.dtype), grad[place])
    return grad


def _place(targets: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Row and column of each target, clamped to the slice; and whether the target lies in a slice of this size."""
    rows = torch.arange(len(targets), device=targets.device)
    return (rows, targets.clamp(0, size - 1)), (targets >= 0) & (targets < size)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``; without a temporary for the product if the dtypes allow it."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _put_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
