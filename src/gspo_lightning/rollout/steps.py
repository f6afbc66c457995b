"""One token of every row through the model; on a GPU by a CUDA graph.

A decoding step is a thousand small kernels, and telling a GPU to start them takes ten times as long as they do. A
graph is told once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gspo_lightning.policy.lean import FAMILIES
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.cache import DecodeCache

FIRST_WIDTH = 64
"""Slots that the first graph looks at; the next one looks at twice as many."""

FEWER_ROWS = 4
"""A graph for fewer rows is recorded when so many times as many have been computed as are left."""

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function of fixed tensors, and returns one that does the same with what is in them then."""


def steps_of(policy: Policy, cache: DecodeCache) -> Steps:
    """The way to step that suits the policy and its device."""
    return GraphSteps(policy, cache) if can_record(policy) else Steps(policy, cache)


def can_record(policy: Policy) -> bool:
    """Whether a forward of single tokens starts the same kernels every time, on a GPU.

    Not with experts, who are chosen by the data, with windows, which move, or with weights that come from other ranks.
    """
    if policy.device.type != "cuda" or policy.shards is not None or getattr(policy.base_model, "is_quantized", False):
        return False
    layers = list(policy.base_model.get_decoder().layers)
    is_compiled = any(layer._compiled_call_impl is not None for layer in layers)
    is_known = all(type(layer).__name__ in FAMILIES for layer in layers)
    return is_known and not is_compiled and getattr(policy.body.config, "sliding_window", None) is None


class Steps:
    """Forwards token after token.

    Args:
        policy: see `Policy.hidden_states`.
        cache: of the rows; it is written to.
    """

    def __init__(self, policy: Policy, cache: DecodeCache) -> None:
        self.policy, self.cache = policy, cache

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens ``(R,)`` at their positions ``(R,)`` -> last hidden states ``(R, H)``, good until the next call."""
        hidden = self._forward(tokens[:, None], positions[:, None])
        self.cache.advance()
        return hidden

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = self.policy.hidden_states(tokens, positions, self.cache.layout(), past_key_values=self.cache)
        return hidden[:, -1]


class GraphSteps(Steps):
    """The same, recorded: all of a step's kernels are started at once.

    Args:
        policy: see `can_record`.
        cache: of the rows; it is written to.
        record: makes a graph of a function.
    """

    def __init__(self, policy: Policy, cache: DecodeCache, record: Record | None = None) -> None:
        super().__init__(policy, cache)
        self._record = record or cuda_graph
        self._replay: Callable[[], None] | None = None
        self._is_warm = False

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """See `Steps`."""
        if not self._is_warm:  # libraries make their plans at the first call, which no graph may hold
            self._is_warm = True
            return super().__call__(tokens, positions)
        rows, cache = len(tokens), self.cache
        if self._replay is None or cache.slots_filled == self._fixed.width or rows * FEWER_ROWS <= self._fixed.rows:
            self._replay = self._new_graph(tokens, positions)
        self._tokens[:rows, 0] = tokens
        self._positions[:rows, 0] = positions
        self._fixed.begin(cache.slots_filled)
        self._replay()
        cache.advance()
        return self._hidden[:rows]

    def _new_graph(self, tokens: Tensor, positions: Tensor) -> Callable[[], None]:
        self._replay = None  # its memory is free before the next one takes some
        width = FIRST_WIDTH
        while width <= self.cache.slots_filled:
            width *= 2
        self._fixed = self.cache.fix_shapes(min(width, self.cache.slots))
        self._tokens, self._positions = tokens[:, None].clone(), positions[:, None].clone()
        return self._record(self._run)

    def _run(self) -> None:
        self._hidden = self._forward(self._tokens, self._positions)


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Records what the function does on the current GPU."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile: pictures of the next prompts are on their way.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay
