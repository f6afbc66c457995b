"""Checks once, before training, that decoding token by token gives what the packed forward gives.

Our caches attend to keys and values as a layer hands them over. Some architectures change them after that (latent
attention expands them, others repeat or rearrange them), which a forward without a cache does not show.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from gspo_lightning.distributed.ranks import rank
from gspo_lightning.errors import is_out_of_memory
from gspo_lightning.packing import linear_logprobs, pack
from gspo_lightning.policy.check import TOLERANCE, PackingMismatchError, coarsest_dtype, prompt_length
from gspo_lightning.policy.model import Policy
from gspo_lightning.policy.padded import CAUSES
from gspo_lightning.rollout.decoder import Decoder
from gspo_lightning.rollout.steps import Steps
from gspo_lightning.types import Prompt, SamplingParams

NARROW_TOLERANCE = 0.2
"""Bound in narrower dtypes, of the distance from the mean: rounding gives hundredths, a wrong key 1 and more."""


def choose_decoding(policy: Policy) -> None:
    """Leaves a policy that packs to our decoders if they are exact; else its own ``generate`` samples, with a warning.

    A model that reads images then runs padded altogether: only so has ``generate`` the distribution that is trained.
    """
    if policy.samples_padded:
        return
    try:
        check_decoding(policy)
    except (PackingMismatchError, *CAUSES) as error:
        if is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:160]
        if rank() == 0:
            warnings.warn(
                f"{type(policy.base_model).__name__}: its attention does something after the cache that decoding does "
                f"not support ({cause}); sampling by the model's own generate: exact, but several times slower",
                stacklevel=2,
            )
        if policy.vision is not None:
            policy.fall_back()
        policy.caches_are_exact = False


@torch.no_grad()
def check_decoding(policy: Policy) -> float:
    """Feeds two completions of random tokens to the decoding cache; returns the relative distance from a packed row.

    Raises:
        PackingMismatchError: the distance exceeds the bound of the model's dtype.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(policy.output_weight.shape[0], 1000)
    text, *completions = (
        torch.randint(3, vocabulary, (n,), generator=generator) for n in (prompt_length(policy), 4, 4)
    )
    vision = None if policy.vision is None else policy.vision.probe(text, generator)
    prompt = vision or Prompt("probe", "", text, {})
    row = pack([(prompt.input_ids, completions)], policy.device, [] if vision is None else [vision])
    row.layout.may_compile = False
    expected, _ = policy(row)
    found = _Forced(policy, prompt, torch.stack(completions).to(policy.device)).logprobs()
    bound, size = TOLERANCE.get(coarsest_dtype(policy)), expected.norm()
    if bound is None:
        bound, size = NARROW_TOLERANCE, (expected - expected.mean()).norm()
    distance = ((found - expected).norm() / size).item()
    if not distance <= bound:
        raise PackingMismatchError(f"decoded log-probabilities are {distance:.1e} away, bound {bound:.1e}")
    return distance


class _Forced(Decoder):
    """Takes given tokens ``(R, C)`` instead of drawing any, one row of them per completion."""

    may_compile = False

    def __init__(self, policy: Policy, prompt: Prompt, tokens: Tensor) -> None:
        super().__init__(policy, [prompt], SamplingParams(*tokens.shape), seed=0)
        self.tokens = tokens

    def logprobs(self) -> Tensor:
        """``(R * C,)``, row after row."""
        hidden, cache, positions = self._prefill()
        forward, found = Steps(self.policy, cache), []
        for step, token in enumerate(self.tokens.T):
            if step:
                positions = positions + 1
                hidden = forward(self.tokens[:, step - 1], positions)
            found.append(linear_logprobs(hidden, self.policy.output_weight, token)[0])
        return torch.stack(found, dim=1).flatten()
