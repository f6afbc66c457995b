"""Decoding with the training model: prefill of the unique prompts, then one token per row until all have ended."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gspo_lightning.packing import pack
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.cache import PrefillCache, joined
from gspo_lightning.rollout.sampling import row_uniforms, sample
from gspo_lightning.rollout.steps import DecodingCache, cache_of, steps_of
from gspo_lightning.rollout.text import answer_and_thinking
from gspo_lightning.types import Completion, FinishReason, Prompt, SamplingParams

SPARE_TOKENS = 8
"""Tokens decoded in addition to those that a stop string can span: decoding may drop the first space of a text."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4
"""Bytes. Where the first of the decoded tokens is a byte within a character, tokenizers that fall back to bytes lose
all bytes up to the next whole token, line feeds among them; so a row is decoded from a token earlier, until it is not.
"""

PREFILL_TOKENS = 8192
"""Prompt tokens forwarded at a time, unless one prompt is longer: more need more memory and are no faster."""


@dataclass
class Row:
    """One completion in progress."""

    prompt: int
    generation: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason = "length"


class Decoder:
    """One batch of prompts from prefill to the last finished row."""

    may_compile = True
    """Whether a kernel may be compiled for its prompts; see `SharedPrefixLayout`."""

    def __init__(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> None:
        self.policy, self.prompts, self.sampling = policy, prompts, sampling
        count, budget = sampling.num_generations, sampling.max_completion_length
        self.rows = [Row(p, g) for p in range(len(prompts)) for g in range(count)]
        self.active = list(self.rows)
        uniforms = [row_uniforms(seed, prompts[r.prompt].uid, r.generation, budget) for r in self.rows]
        self.uniforms = torch.stack(uniforms).to(policy.device)  # once: a copy per token would wait for the device
        self.eos = frozenset(policy.eos_token_ids)
        # A token decodes to a byte or more, except for a few that give none.
        self.stop_window = max((len(stop.encode()) for stop in sampling.stop), default=0) + SPARE_TOKENS
        self.seen = self._seen_in_prompts() if sampling.repetition_penalty != 1.0 else None

    def run(self) -> list[list[Completion]]:
        """Decodes until every row has ended."""
        hidden, cache, positions = self._prefill()
        forward = steps_of(self.policy, cache)
        for step in range(self.sampling.max_completion_length):
            tokens, alive = self._next(hidden, step)
            if not any(alive) or step + 1 == self.sampling.max_completion_length:
                break
            if not all(alive):
                kept = cache.keep(torch.tensor(alive, device=tokens.device))
                self._keep(kept)
                tokens, positions = tokens[kept], positions[kept]
            positions = positions + 1
            if self.seen is not None:
                self.seen.scatter_(1, tokens[:, None], True)
            hidden = forward(tokens, positions)
        return self._completions()

    def _prefill(self) -> tuple[Tensor, DecodingCache, Tensor]:
        """Forwards the unique prompts; returns last hidden states, cache and positions per row."""
        parts = _in_parts(self.prompts)
        ends, caches = zip(*map(self._forwarded, parts), strict=True)
        hidden, prefill = torch.cat(ends), joined(caches)
        lengths, count = [len(prompt.input_ids) for prompt in self.prompts], self.sampling.num_generations
        cache = cache_of(self.policy, prefill, lengths, count, self.sampling.max_completion_length)
        positions = self.policy.last_positions(self.prompts)
        return hidden.repeat_interleave(count, dim=0), cache, positions.repeat_interleave(count)

    def _forwarded(self, prompts: list[Prompt]) -> tuple[Tensor, PrefillCache]:
        """One packed row of prompts: their last hidden states ``(n, H)``, and keys and values of all tokens."""
        row = pack([(prompt.input_ids, ()) for prompt in prompts], self.policy.device, prompts)
        row.layout.may_compile = self.may_compile
        places = row.layout.prompt_places()
        cache = PrefillCache(torch.cat(places).to(self.policy.device))
        hidden = self.policy.hidden_states(row.input_ids, row.position_ids, row.layout, prompts, past_key_values=cache)
        return hidden[0, torch.stack([of_prompt[-1] for of_prompt in places]).to(hidden.device)], cache

    def _next(self, hidden: Tensor, step: int) -> tuple[Tensor, list[bool]]:
        """The next token ``(R,)`` of each row, and which rows continue."""
        tokens, logprobs = sample(self.policy.logits(hidden), self.uniforms[:, step], self.sampling, self.seen)
        drawn = zip(self.active, tokens.tolist(), logprobs.tolist(), strict=True)
        return tokens, [self.record(row, token, logprob) for row, token, logprob in drawn]

    def record(self, row: Row, token: int, logprob: float) -> bool:
        """Appends a drawn token; returns whether the row continues."""
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if token in self.eos or self._has_stop_string(row.tokens):
            row.finish_reason = "stop"
        return row.finish_reason != "stop"

    def _has_stop_string(self, tokens: list[int]) -> bool:
        if not self.sampling.stop:
            return False
        for more in range(LONGEST_CHARACTER):
            # Special tokens too: a stop string may contain them, and vLLM keeps them for this as well.
            text = self.policy.tokenizer.decode(tokens[-self.stop_window - more :], skip_special_tokens=False)
            if any(stop in text for stop in self.sampling.stop):
                return True
            if REPLACEMENT not in text:
                break
        return False

    def _keep(self, kept: Tensor) -> None:
        self.active = [self.active[index] for index in kept.tolist()]
        self.uniforms = self.uniforms[kept]
        if self.seen is not None:
            self.seen = self.seen[kept]

    def _seen_in_prompts(self) -> Tensor:
        seen = torch.zeros(len(self.rows), self.policy.output_weight.shape[0], dtype=torch.bool)
        for number, row in enumerate(self.rows):
            seen[number, self.prompts[row.prompt].input_ids.cpu()] = True
        return seen.to(self.policy.device)

    def _completions(self) -> list[list[Completion]]:
        done, count = self._ended(), self.sampling.num_generations
        return [done[start : start + count] for start in range(0, len(done), count)]

    def _ended(self) -> list[Completion]:
        """The completions of all rows, in their order."""
        return [self._completion(row) for row in self.rows]

    def _completion(self, row: Row) -> Completion:
        text, thinking = answer_and_thinking(self.policy.tokenizer, row.tokens)
        return Completion(
            token_ids=torch.tensor(row.tokens),
            text=text,
            thinking=thinking,
            sampler_logprobs=torch.tensor(row.logprobs, dtype=torch.float32),
            finish_reason=row.finish_reason,
        )


def _in_parts(prompts: list[Prompt]) -> list[list[Prompt]]:
    """The prompts in order, in runs of at most `PREFILL_TOKENS` tokens."""
    parts: list[list[Prompt]] = []
    filled = PREFILL_TOKENS
    for prompt in prompts:
        size = len(prompt.input_ids)
        if filled + size > PREFILL_TOKENS:
            parts.append([])
            filled = 0
        parts[-1].append(prompt)
        filled += size
    return parts
