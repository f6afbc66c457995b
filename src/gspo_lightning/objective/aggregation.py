"""From losses of tokens to the loss of a minibatch: a weight per token and a global denominator.

``loss = sum_t weight_t loss_t / denominator`` where the sum runs over all micro-batches and ranks. Denominators count
every completion of the minibatch, including those dropped before the forward because they have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Aggregation:
    """Weight of a token as a function of its sequence's length, and the denominator of a minibatch."""

    formula: str
    token_weight: Callable[[Tensor], Tensor]
    """Sequence lengths of the tokens ``(L,)`` -> weights ``(L,)``."""
    denominator: Callable[[int, int, int], float]
    """(sequences, tokens, max_completion_length) of the whole minibatch, all ranks."""


def _one(lengths: Tensor) -> Tensor:
    return lengths.new_ones(lengths.shape)


AGGREGATIONS: dict[str, Aggregation] = {
    "sequence_mean": Aggregation("1/S sum_i 1/|y_i| sum_t", lambda n: 1 / n, lambda s, t, m: float(s)),
    "sequence_sum": Aggregation("1/S sum_i sum_t", _one, lambda s, t, m: float(s)),
    "tokens": Aggregation("1/(sum_i |y_i|) sum_i sum_t", _one, lambda s, t, m: float(t)),
    "max_tokens": Aggregation("1/(S max_completion_length) sum_i sum_t", _one, lambda s, t, m: float(s * m)),
}
"""``sequence_mean`` is GRPO's and the GSPO paper's; ``max_tokens`` is Dr. GRPO's constant (arXiv 2503.20783)."""
