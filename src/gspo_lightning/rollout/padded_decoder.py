"""Decoding by the model's own `generate`, for architectures that run padded (`gspo_lightning.policy.padded`).

The tokens are still drawn by our sampler from the row's own random numbers, so runs are as reproducible as with others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from gspo_lightning.policy.padded import check_images, padding_id, repeated_media, without_placeholders
from gspo_lightning.rollout.decoder import Decoder, Row
from gspo_lightning.rollout.sampling import sample
from gspo_lightning.types import Completion


class PaddedDecoder(Decoder):
    """One prompt after the other, with all of its completions."""

    def run(self) -> list[list[Completion]]:
        """Decodes until every row has ended."""
        count = self.sampling.num_generations
        for number in range(len(self.prompts)):
            self._generate(number, slice(number * count, (number + 1) * count))
        return self._completions()

    def _generate(self, number: int, rows: slice) -> None:
        model: Any = self.policy.model
        prompt, mine = self.prompts[number], self.rows[rows]
        ids = prompt.input_ids.to(self.policy.device).expand(len(mine), -1)
        draw = _Draw(self, number, rows)
        was_training = model.training
        model.eval()  # with gradient checkpointing a model in training mode has no cache
        try:
            if prompt.mm_inputs:
                check_images(self.policy.base_model, prompt)
            with _blank_generation_config(self.policy.base_model):
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    **repeated_media(prompt.mm_inputs, len(mine), ids.shape[1], ids.device),
                    generation_config=GenerationConfig(
                        max_new_tokens=self.sampling.max_completion_length,
                        do_sample=False,
                        eos_token_id=None,
                        pad_token_id=padding_id(self.policy.base_model),
                    ),
                    logits_processor=[draw],
                    stopping_criteria=[draw.ended],
                )
        finally:
            model.train(was_training)


@contextmanager
def _blank_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Temporarily removes the model's own settings of `generate`.

    `generate` takes whatever its argument leaves open from them: a repetition penalty, tokens to suppress or beams that
    a model was published with would change the scores our sampler draws from.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Draw(LogitsProcessor):
    """Draws the next token of every active row, and leaves `generate` no choice but to take it."""

    def __init__(self, decoder: Decoder, number: int, rows: slice) -> None:
        self.decoder, self.rows, self.uniforms = decoder, decoder.rows[rows], decoder.uniforms[rows]
        self.seen = None if decoder.seen is None else decoder.seen[rows]
        self.has_images = bool(decoder.prompts[number].mm_inputs)
        self.step = 0
        self.ended = _Ended(self.rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.has_images:
            scores = without_placeholders(scores, self.decoder.policy.base_model)
        tokens, logprobs = sample(scores, self.uniforms[:, self.step], self.decoder.sampling, self.seen)
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row.finish_reason != "stop":
                self.decoder.record(row, token, logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Ends a row where our decoder does: at any of several ids, or a stop string."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor([row.finish_reason == "stop" for row in self.rows], device=input_ids.device)
