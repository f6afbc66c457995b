"""Takes one saving after another away from ours, for `scripts/ablation.py`: what does each of them give?"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from gspo_lightning.packing import GroupSlice, MicroBatchPlan, batch, logprobs
from gspo_lightning.policy import load, model
from gspo_lightning.rollout import transformers_engine
from gspo_lightning.rollout.decoder import Decoder, Row
from gspo_lightning.training import passes, update
from gspo_lightning.types import Dialogue, ScoredRollout


def no_prefix_sharing() -> None:
    """Every completion brings its prompt along, in the update."""
    no_common_prefix()
    build = update.build_micro_batch

    def alone(scored: ScoredRollout, plan: MicroBatchPlan, *where: Any) -> Any:
        return build(scored, tuple(GroupSlice(p.group, (n,)) for p in plan for n in p.completions), *where)

    passes.build_micro_batch = alone  # type: ignore[attr-defined]


def no_common_prefix() -> None:
    """What all prompts begin with is forwarded with each of them, in rollouts too."""
    batch.LEAST_COMMON = batch.LEAST_COMMON_ON_GPU = sys.maxsize  # type: ignore[misc]


def padding() -> None:
    """Completions of a rollout are filled up to the longest, as context, in the update."""
    build = update.build_micro_batch

    def filled(scored: ScoredRollout, plan: MicroBatchPlan, *where: Any) -> Any:
        longest = max(len(c.token_ids) for group in scored.completions for c in group)
        groups = [[_filled(c, longest) for c in group] for group in scored.completions]
        return build(replace(scored, completions=groups), plan, *where)

    passes.build_micro_batch = filled  # type: ignore[attr-defined]


def _filled(completion: Any, length: int) -> Any:
    missing = length - len(completion.token_ids)
    if not missing:
        return completion
    return replace(
        completion,
        token_ids=torch.cat([completion.token_ids, completion.token_ids.new_zeros(missing)]),
        sampler_logprobs=torch.cat([completion.sampler_logprobs, torch.zeros(missing)]),
        dialogue=Dialogue(torch.arange(length) < length - missing, [], 0.0),
    )


def old_pass_for_all() -> None:
    """Old log-probabilities of the first minibatch are computed too, though they are the new ones."""
    original = passes.Passes.before_update

    @torch.no_grad()
    def before_update(self: Any, scored: Any, minibatches: Any) -> Any:
        fixed = original(self, scored, minibatches)
        first = self._logprobs_of(self._policy, scored, minibatches[0])
        return [passes.Fixed(first), *fixed[1:]]

    passes.Passes.before_update = before_update  # type: ignore[method-assign]


def no_compaction() -> None:
    """Rows that have ended are decoded on until the last one ends."""

    class Stubborn(Decoder):
        def _next(self, hidden: torch.Tensor, step: int) -> tuple[torch.Tensor, list[bool]]:
            tokens, _ = super()._next(hidden, step)
            return tokens, [any(row.finish_reason != "stop" for row in self.rows)] * len(self.active)

        def record(self, row: Row, token: int, logprob: float) -> bool:
            return row.finish_reason != "stop" and super().record(row, token, logprob)

    transformers_engine.Decoder = Stubborn  # type: ignore[attr-defined, misc]


def plain_layers() -> None:
    """Norms and MLPs keep what transformers' keep."""
    load.lighten = lambda model, **_: 0  # type: ignore[attr-defined, assignment]


def odd_rows() -> None:
    """Rows of products have any number of tokens."""
    model.rows_missing = logprobs.rows_missing = lambda *_: 0  # type: ignore[attr-defined]


def plain_weights() -> None:
    """oneDNN brings the weights of a rollout into its own order at every token."""
    transformers_engine.prepacked_weights = lambda *_: nullcontext()  # type: ignore[attr-defined, assignment]


ABLATIONS: dict[str, Callable[[], None]] = {
    "prefix sharing in the update": no_prefix_sharing,
    "what all prompts begin with is shared": no_common_prefix,
    "no padding in the update": padding,
    "no old pass for the first minibatch": old_pass_for_all,
    "ended rows leave the decoder": no_compaction,
    "layers that keep less": plain_layers,
    "weights packed once per rollout": plain_weights,
    "rows filled up to whole tiles": odd_rows,
}
