"""Proof that an engine runs the policy's weights: log-probabilities of a fixed probe, by engine and by trainer.

The probe is one sequence of random ordinary tokens. The engine scores it twice: each of its tokens given those before
(every layer and the output embedding take part), and one token sampled behind it at temperature 0.7, which goes the
way of rollouts, through the prefix cache and the processed log-probabilities. Both must equal the trainer's.

What the bound alone would miss is caught by two more facts. Engines start from random weights (or an adapter that
moves the output), so the first proof fails if any tensor is left out; and a probe that repeats bit for bit
although the trainer's has moved shows an engine that took nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_lightning.packing import pack
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.engine import WeightSyncError

PROBE_TOKENS = 80
PROBE_TEMPERATURE = 0.7
DEFAULT_TOLERANCE = {torch.float64: 2e-3, torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Mean absolute difference allowed, by the dtype the engine computes in. Measured on SmolLM2: see docs/rollouts.md."""


@dataclass(frozen=True)
class EngineProbe:
    """What an engine says about the probe."""

    logprobs: Tensor
    """``(N - 1,)``: tokens 1 to N - 1 given those before, at temperature 1."""
    sampled_token: int
    """One token drawn behind the probe at `PROBE_TEMPERATURE`."""
    sampled_logprob: float


def probe_ids(policy: Policy, max_tokens: int) -> Tensor:
    """``(N,)`` token ids, the same for the same tokenizer: no special token, at most `PROBE_TOKENS` of them."""
    special = {*policy.tokenizer.get_added_vocab().values(), *policy.tokenizer.all_special_ids}
    size = min(len(policy.tokenizer), policy.output_weight.shape[0])
    ordinary = torch.tensor([token for token in range(size) if token not in special])
    count = min(PROBE_TOKENS, max_tokens)
    return ordinary[torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(20260101))]


class Fingerprint:
    """Compares engines with the trainer; remembers the last probe to notice weights that never arrived."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._last: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def check(self, policy: Policy, ids: Tensor, engine: EngineProbe, name: str) -> float:
        """Returns the mean absolute difference in nats.

        Args:
            policy: with the weights that the engine ought to run.
            ids: the probe.
            engine: what the engine says about it.
            name: of the engine, for messages and memory.

        Raises:
            WeightSyncError: beyond the tolerance, or the engine's numbers stand still while the trainer's move.
        """
        own = self._logprobs(policy, ids[:1], ids[1:], 1.0)
        behind = self._logprobs(policy, ids, [engine.sampled_token], PROBE_TEMPERATURE)
        theirs = engine.logprobs.double()
        difference = (theirs - own).abs().mean().item()
        at_sampled = abs(engine.sampled_logprob - behind.item())
        # One number has a wider spread than a mean of many.
        if not difference <= self.tolerance or not at_sampled <= 8 * self.tolerance:
            raise WeightSyncError(
                f"{name} does not run the policy's weights: log-probabilities of the probe differ by "
                f"{difference:.2g} on average and {at_sampled:.2g} for a sampled token, allowed are "
                f"{self.tolerance:.2g} and {8 * self.tolerance:.2g}; nothing was trained on its completions"
            )
        self._refuse_standstill(name, own, theirs)
        return difference

    def _refuse_standstill(self, name: str, own: Tensor, theirs: Tensor) -> None:
        before = self._last.get(name)
        self._last[name] = (own, theirs)
        if before is None or not torch.equal(before[1], theirs):
            return
        moved = (own - before[0]).abs().mean().item()
        if moved > 1e-4:
            raise WeightSyncError(
                f"{name} still runs older weights: its probe repeats bit for bit although the trainer's moved by "
                f"{moved:.2g} nats; nothing was trained on its completions"
            )

    def forget(self, name: str) -> None:
        """The engine ``name`` is a new one."""
        self._last.pop(name, None)

    @staticmethod
    def _logprobs(policy: Policy, prompt: Tensor, completion: Tensor | Sequence[int], temperature: float) -> Tensor:
        packed = pack([(prompt, [torch.as_tensor(completion)])], policy.device)
        return policy(packed, temperature)[0].double().cpu()
