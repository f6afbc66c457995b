"""Forwards of one token of every row; on a GPU by a CUDA graph.

A decoding step is a thousand small kernels, and launching them takes ten times as long as they run. A graph takes one
launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gspo_lightning.packing.flash import can_flash
from gspo_lightning.packing.products import product_dtype
from gspo_lightning.policy.known_layers import is_known
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.block_cache import BlockCache
from gspo_lightning.rollout.cache import DecodeCache, PrefillCache
from gspo_lightning.rollout.flash_cache import FlashCache

FEWER_ROWS = 4
"""A new graph is recorded when the old one computes at least this many times the active rows."""

DecodingCache = DecodeCache | BlockCache | FlashCache

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function of fixed tensors, and returns one that repeats it with the tensors' contents at its call."""


def cache_of(
    policy: Policy, prefill: PrefillCache, prompt_lengths: Sequence[int], repeats: int, new_tokens: int
) -> DecodingCache:
    """The decoding cache that suits device and model; arguments are those of the caches."""
    some_keys = prefill.states[0][0][:, :, :1]
    kind: Any = BlockCache if some_keys.device.type == "cpu" else DecodeCache
    if _attends_to_all(policy) and can_flash(some_keys.to(product_dtype(some_keys)), None, None):
        kind = FlashCache
    return kind(prefill, prompt_lengths, repeats, new_tokens)


def steps_of(policy: Policy, cache: DecodingCache) -> Steps:
    """The kind of `Steps` that suits the policy and its device."""
    if isinstance(cache, FlashCache) and _starts_the_same_kernels(policy):
        return GraphSteps(policy, cache)
    return Steps(policy, cache)


def _attends_to_all(policy: Policy) -> bool:
    """Whether the architecture is known to attend without windows and sinks."""
    layers: Any = policy.base_model.get_decoder().layers
    return all(map(is_known, layers)) and getattr(policy.body.config, "sliding_window", None) is None


def _starts_the_same_kernels(policy: Policy) -> bool:
    """Whether a step starts the same kernels at every token, and reads no number back from the GPU.

    False if weights come from other ranks or are dequantised, if layers are compiled or have hooks, or if the rotation
    depends on the positions' range.
    """
    if policy.shards is not None or getattr(policy.base_model, "is_quantized", False):
        return False
    modules: list[Any] = list(policy.body.modules())
    is_compiled = any(module._compiled_call_impl is not None for module in modules)
    embedding = policy.base_model.get_input_embeddings()  # peft's hook there only requires gradients
    is_watched = any((m._forward_hooks or m._forward_pre_hooks) and m is not embedding for m in modules)
    is_dynamic = any("dynamic" in kind or kind == "longrope" for m in modules if (kind := getattr(m, "rope_type", "")))
    return not (is_compiled or is_watched or is_dynamic)


class Steps:
    """Forwards token after token.

    Args:
        policy: see `Policy.hidden_states`.
        cache: cache of the rows; it is written to.
    """

    def __init__(self, policy: Policy, cache: DecodingCache) -> None:
        self.policy, self.cache = policy, cache

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens ``(R,)`` at their positions ``(R,)`` -> last hidden states ``(R, H)``, valid until the next call."""
        hidden = self._forward(tokens[:, None], positions[:, None])
        self.cache.advance()
        return hidden

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = self.policy.hidden_states(tokens, positions, self.cache, past_key_values=self.cache)
        return hidden[:, -1]


class GraphSteps(Steps):
    """`Steps` as a recorded graph: all of a step's kernels are started at once.

    Args:
        policy: see `Policy.hidden_states`.
        cache: cache of the rows; it is written to.
        record: makes a graph of a function.
    """

    cache: FlashCache

    def __init__(self, policy: Policy, cache: FlashCache, record: Record | None = None) -> None:
        super().__init__(policy, cache)
        self._record = record or cuda_graph
        self._replay: Callable[[], None] | None = None
        self._is_warm = False

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """See `Steps`."""
        if not self._is_warm:  # libraries make their plans at the first call, which cannot be recorded
            self._is_warm = True
            return super().__call__(tokens, positions)
        if self._replay is None or len(tokens) * FEWER_ROWS <= self.cache.rows:
            self._replay = None  # frees its memory before the next graph takes some
            self.cache.hold()
            self._tokens, self._positions = tokens[:, None].clone(), positions[:, None].clone()
            self._replay = self._record(self._run)
        rows = len(tokens)
        self._tokens[:rows, 0] = tokens
        self._positions[:rows, 0] = positions
        self._replay()
        self.cache.advance()
        return self._hidden[:rows]

    def _run(self) -> None:
        self._hidden = self._forward(self._tokens, self._positions)


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Records what the function does on the current GPU."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile: they copy images of the next prompts.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay
