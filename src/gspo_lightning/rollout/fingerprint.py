"""Proof that an engine runs the policy's weights: a small rollout whose log-probabilities the trainer checks.

The probe is one prompt of random ordinary tokens, always the same, with eight short completions at temperature 0.7. It
takes the path of every rollout: prefill, prefix cache, decoding, processed log-probabilities. The engine's numbers must
equal the trainer's for the same tokens.

Two more facts catch what the bound alone would miss. Engines start from random weights (or an adapter that moves the
output), so the first proof fails if any tensor is left out; and a probe that repeats bit for bit although the
trainer's has moved shows an engine that took no new weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from gspo_lightning.data.vision import VisionSettings, encode_conversation
from gspo_lightning.packing import pack
from gspo_lightning.packing.flash import SWITCH
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.engine import WeightSyncError
from gspo_lightning.types import Completion, Prompt, SamplingParams

PROBE_TOKENS = 48
DEFAULT_LIMITS = VisionSettings()
PROBE_SAMPLING = SamplingParams(num_generations=8, max_completion_length=4, temperature=0.7)
DEFAULT_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Mean absolute difference allowed, by the dtype the engine computes in. Measured on SmolLM2: see docs/rollouts.md."""


def probe_prompt(policy: Policy, max_model_len: int, limits: VisionSettings = DEFAULT_LIMITS) -> Prompt:
    """At most `PROBE_TOKENS` tokens, none of them special; the same for the same tokenizer.

    For a policy that reads images, an image of noise precedes them: its vision half has to be proven too.

    Args:
        policy: its tokenizer and processor are used.
        max_model_len: the engine's limit; the probe and its completions fit.
        limits: the engine's limits on images.
    """
    special = {*policy.tokenizer.get_added_vocab().values(), *policy.tokenizer.all_special_ids}
    size = min(len(policy.tokenizer), policy.output_weight.shape[0])
    ordinary = torch.tensor([token for token in range(size) if token not in special])
    count = max(1, min(PROBE_TOKENS, max_model_len - PROBE_SAMPLING.max_completion_length))
    generator = torch.Generator().manual_seed(20260101)
    ids = ordinary[torch.randint(len(ordinary), (count,), generator=generator)]
    if policy.vision is not None:
        return _with_image(policy, ids[:8], generator, limits)
    return Prompt(uid="gspo:probe", prompt="", input_ids=ids, sample={})


def _with_image(policy: Policy, text: Tensor, generator: torch.Generator, limits: VisionSettings) -> Prompt:
    noise = torch.randint(256, (56, 56, 3), generator=generator, dtype=torch.uint8)
    content = [
        {"type": "image", "image": Image.fromarray(noise.numpy())},
        {"type": "text", "text": policy.tokenizer.decode(text.tolist())},
    ]
    messages = [{"role": "user", "content": content}]
    ids, media = encode_conversation(messages, policy.processor, limits, {}, "the probe")
    return Prompt("gspo:probe", messages, ids, {}, media)


def probe_logprobs(policy: Policy, probe: Prompt, completions: Sequence[Completion]) -> Tensor:
    """The trainer's log-probabilities of what an engine sampled from the probe, in float64 on the CPU."""
    packed = pack([(probe.input_ids, [c.token_ids for c in completions])], policy.device, [probe])
    with SWITCH:  # a rollout that is sampled ahead is proven in a thread of its own
        logprobs: Tensor = policy(packed, PROBE_SAMPLING.temperature)[0]
    return logprobs.double().cpu()


class Fingerprint:
    """Compares engines with the trainer; remembers what an engine sampled to notice weights that never arrived."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
        self._last: dict[str, tuple[Tensor, list[int], Tensor]] = {}

    @torch.no_grad()
    def check(self, policy: Policy, probe: Prompt, completions: Sequence[Completion], name: str) -> float:
        """Returns the mean absolute difference in nats.

        Args:
            policy: holds the weights that the engine ought to run.
            probe: prompt from `probe_prompt`.
            completions: what the engine sampled from it, by `PROBE_SAMPLING`.
            name: name of the engine, for messages and to remember its last probe.

        Raises:
            WeightSyncError: the difference exceeds the tolerance, or the engine's numbers stay as the trainer's move.
        """
        own = probe_logprobs(policy, probe, completions)
        theirs = torch.cat([c.sampler_logprobs for c in completions]).double()
        difference = (theirs - own).abs().mean().item()
        if not difference <= self.tolerance:
            raise WeightSyncError(
                f"{name} does not run the policy's weights: log-probabilities of the probe differ by "
                f"{difference:.2g} nats on average, {self.tolerance:.2g} are allowed (rollout.engine.tolerance)"
            )
        self._refuse_standstill(name, own, torch.cat([c.token_ids for c in completions]).tolist(), theirs)
        return difference

    def _refuse_standstill(self, name: str, own: Tensor, tokens: list[int], theirs: Tensor) -> None:
        before = self._last.get(name)
        if before is None or before[1] != tokens or not torch.equal(before[2], theirs):
            self._last[name] = own, tokens, theirs
            return
        # Compared with the first time that it sampled this: many small steps add up to a large one.
        moved = (own - before[0]).abs().mean().item()
        if moved > 1e-4:
            raise WeightSyncError(
                f"{name} still runs older weights: its probe repeats bit for bit although the trainer's moved by "
                f"{moved:.2g} nats"
            )

    def forget(self, name: str) -> None:
        """Forgets what engine ``name`` sampled; called when it is a new one."""
        self._last.pop(name, None)
