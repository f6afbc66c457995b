"""Drawing the next token: warp the logits, then invert the cumulative distribution with one uniform per row.

The uniform of row r at token t is a pure function of the row's seed and t. Which other rows are in the batch, in
what order, and when they finish therefore cannot change what a row draws from the same logits.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from gspo_lightning.types import SamplingParams

_BLOCKS = 192
"""The vocabulary is summed in this many blocks: two short scans in place of one sequential pass."""


def row_uniforms(seed: int, uid: str, generation: int, count: int) -> Tensor:
    """``(count,)`` float64 uniforms in [0, 1) of one completion: a pure function of the arguments."""
    digest = hashlib.blake2b(f"{seed}|{uid}|{generation}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token per row.

    Args:
        logits: ``(R, V)`` raw logits.
        uniforms: ``(R,)`` in [0, 1).
        params: temperature and filters; temperature 0 takes the most likely token.
        seen: ``(R, V)`` bool, the tokens in the prompt or already drawn; only read with a repetition penalty.

    Returns:
        ``(R,)`` token ids, and ``(R,)`` float32 log-probabilities under the warped distribution (greedy: under the
        unwarped distribution at temperature 1). Where logits are NaN or infinity, any token and NaN.
    """
    scores = logits.float()
    if params.repetition_penalty != 1.0:
        assert seen is not None
        scores = repetition_penalty(scores, seen, params.repetition_penalty)
    if params.temperature == 0.0:
        tokens = scores.argmax(dim=-1)
        return tokens, torch.log_softmax(scores, dim=-1).gather(1, tokens[:, None]).squeeze(1)
    if params.temperature != 1.0:
        scores = scores / params.temperature
    probabilities = torch.softmax(keep_likely(scores, params), dim=-1)
    tokens = invert_cdf(probabilities, uniforms)
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


def repetition_penalty(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divides positive and multiplies negative logits of seen tokens by ``penalty`` (CTRL, arXiv 1909.05858)."""
    penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
    return torch.where(seen, penalised, scores)


def keep_likely(scores: Tensor, params: SamplingParams) -> Tensor:
    """Sets logits outside top-k, top-p (nucleus, arXiv 1904.09751) and min-p (arXiv 2407.01082) to minus infinity, in
    this order; one token is kept."""
    if 0 < params.top_k < scores.shape[-1]:
        threshold = scores.topk(params.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    if params.top_p < 1.0:
        ordered, index = scores.sort(dim=-1, descending=True)
        mass = torch.softmax(ordered, dim=-1)
        outside = _running_sum(mass) - mass >= params.top_p
        scores = scores.masked_fill(outside.scatter(1, index, outside), -torch.inf)
    if params.min_p > 0.0:
        threshold = scores.amax(dim=-1, keepdim=True) + math.log(params.min_p)
        scores = scores.masked_fill(scores < threshold, -torch.inf)
    return scores


def invert_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The smallest index whose cumulative probability exceeds the uniform, never one of probability zero.

    Args:
        probabilities: ``(R, V)``; rows need not sum to exactly 1.
        uniforms: ``(R,)`` float64.
    """
    rows, size = probabilities.shape
    width = -(-size // _BLOCKS)
    missing = width * _BLOCKS - size
    padded = torch.nn.functional.pad(probabilities, (0, missing)) if missing else probabilities
    padded = padded.view(rows, _BLOCKS, width)
    block_cdf = _running_sum(padded.sum(dim=-1).double())
    goal = uniforms.to(block_cdf.device)[:, None] * block_cdf[:, -1:]
    block = torch.searchsorted(block_cdf, goal, right=True).clamp_(max=_BLOCKS - 1)
    before = torch.where(block > 0, block_cdf.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(goal))
    inner = padded.gather(1, block[:, :, None].expand(-1, -1, width)).squeeze(1)
    cdf = _running_sum(inner.double())
    # The block sum and the scan inside it round differently: keep the goal inside the block, on a token with mass.
    inside = (goal - before).clamp(max=cdf[:, -1:] * (1 - 1e-15))
    offset = torch.searchsorted(cdf, inside, right=True).clamp_(max=width - 1)
    return (block * width + offset).squeeze(1).clamp_(max=size - 1)  # NaN has no place, and would be outside


def _running_sum(values: Tensor) -> Tensor:
    """Sums of ``(..., N)`` floating-point values up to each one, by ``cumsum`` where torch has it.

    On a GPU its order of additions is not fixed, so ``trainer.deterministic=true`` makes it raise: there each value
    is added to the one a step after it, with steps of 1, 2, 4, ...
    """
    if not _cumsum_is_refused(values):
        return values.cumsum(dim=-1)
    step = 1
    while step < values.shape[-1]:
        values = values + torch.nn.functional.pad(values[..., :-step], (step, 0))
        step *= 2
    return values


def _cumsum_is_refused(values: Tensor) -> bool:
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return values.is_cuda and strict
