"""The in-process engine: each prompt is forwarded once, rows leave the batch as they finish.

Reproducibility: with the same weights, seed, prompts and grouping into batches, completions are bit-identical.
Every completion has its own random numbers, so the order of the prompts and the presence of others change its
logits only by the rounding of differently shaped matrix products. In float32 that flips a token only when a
uniform falls within about 1e-6 of a boundary; in bfloat16 it can happen every few thousand tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gspo_lightning.dialogue import Environments
from gspo_lightning.distributed.sharding import in_step
from gspo_lightning.errors import NonFiniteGradientError, UserError
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.decoder import Decoder
from gspo_lightning.rollout.dialogue_decoder import DialogueDecoder
from gspo_lightning.rollout.padded_decoder import PaddedDecoder
from gspo_lightning.rollout.prepacked import prepacked_weights
from gspo_lightning.rollout.turns import refuse_padded
from gspo_lightning.types import Completion, Prompt, Rollout, SamplingParams


class NonFiniteLogitsError(NonFiniteGradientError):
    """The policy's finite weights give logits that are not: the run has diverged, and its weights are not saved."""


@dataclass(frozen=True)
class TransformersEngine:
    """Generates with the training model itself: nothing to synchronise.

    A copy of the weights in the dtype of the products is held during a rollout; on GPUs only if the dtypes differ.
    """

    max_concurrent: int = 256
    """Completions decoded at a time; further prompts are decoded in later batches."""
    environments: Environments | None = None
    """Makes every completion a dialogue (`gspo_lightning.dialogue`)."""

    def __post_init__(self) -> None:
        if self.max_concurrent < 1:
            raise UserError(f"rollout.engine.max_concurrent={self.max_concurrent} must be at least 1")

    @torch.no_grad()
    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """See `RolloutEngine.generate`; with ``environments`` every completion is a dialogue."""
        _refuse_unknown_tokens(policy, prompts)
        at_once = max(1, self.max_concurrent // sampling.num_generations)
        completions: list[list[Completion]] = []
        rows = min(at_once, len(prompts)) * sampling.num_generations
        with in_step(policy, rollout=True), prepacked_weights(policy, rows):
            for start in range(0, len(prompts), at_once):
                batch = (policy, prompts[start : start + at_once], sampling, seed)
                completions += self._decoder(*batch).run()
                _refuse_without_likelihood(completions[start:])
        return Rollout(prompts=prompts, completions=completions)

    def _decoder(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Decoder:
        if self.environments is None:
            return (PaddedDecoder if policy.samples_padded else Decoder)(policy, prompts, sampling, seed)
        refuse_padded(policy)
        return DialogueDecoder(policy, prompts, sampling, seed, self.environments)


def _refuse_unknown_tokens(policy: Policy, prompts: list[Prompt]) -> None:
    """Refuses prompts with tokens that were added to the tokenizer alone: a GPU would fail far from here.

    Raises:
        UserError: names the row and the token.
    """
    size = policy.base_model.get_input_embeddings().weight.shape[0]
    for prompt in prompts:
        if prompt.mm_inputs:  # an image's placeholder may lie beyond: PaliGemma and Gemma 3 never look it up
            continue
        if (token := int(prompt.input_ids.max())) >= size:
            raise UserError(
                f"row {prompt.uid}: the model has embeddings for {size} tokens, and the prompt has token {token} "
                f"({policy.tokenizer.convert_ids_to_tokens(token)!r}); enlarge the model (resize_token_embeddings of "
                "transformers), or take its own tokenizer"
            )


def _refuse_without_likelihood(completions: list[list[Completion]]) -> None:
    """Refuses completions without a likelihood.

    Raises:
        NonFiniteLogitsError: they were drawn from logits that are not finite.
    """
    if not all(bool(completion.sampler_logprobs.isfinite().all()) for group in completions for completion in group):
        raise NonFiniteLogitsError(
            "the policy's logits are NaN or infinite, so there is nothing to draw from; debug=detect_anomaly names the "
            "layer. Lower optimizer.lr, or check the model's weights"
        )
