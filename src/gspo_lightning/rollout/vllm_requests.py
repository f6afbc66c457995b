"""What we ask of vLLM and how its answer becomes completions; the same in process and over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from gspo_lightning.errors import UserError
from gspo_lightning.policy.model import Policy
from gspo_lightning.types import Completion, Prompt, SamplingParams


def request_seed(seed: int, uid: str) -> int:
    """The seed of a prompt's request; vLLM adds g to it for generation g."""
    digest = hashlib.blake2b(f"{seed}|{uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def request_fields(policy: Policy, prompt: Prompt, sampling: SamplingParams, seed: int) -> dict[str, Any]:
    """Sampling settings under the names that vLLM's SamplingParams and its completion endpoint share."""
    return {
        "n": sampling.num_generations,
        "max_tokens": sampling.max_completion_length,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": list(policy.eos_token_ids),
        "seed": request_seed(seed, prompt.uid),
        "logprobs": 0,
        "skip_special_tokens": False,
    }


def refuse_images(prompts: Sequence[Prompt]) -> None:
    """Images go to vLLM as raw images beside the unexpanded prompt, which `Prompt` does not carry yet."""
    for prompt in prompts:
        if prompt.mm_inputs:
            raise UserError(f"row {prompt.uid} has images; vLLM engines do not take them, use rollout=transformers")


def completion(
    policy: Policy, token_ids: Sequence[int], logprobs: Sequence[float], finish_reason: str | None
) -> Completion:
    """One completion; raises ValueError for what no sampler can have meant."""
    if finish_reason not in ("stop", "length"):
        raise ValueError(f"finish reason {finish_reason!r}")
    if not token_ids or len(token_ids) != len(logprobs):
        raise ValueError(f"{len(token_ids)} tokens with {len(logprobs)} log-probabilities")
    values = torch.tensor(logprobs, dtype=torch.float32)
    if not bool(((values <= 1e-3) & values.isfinite()).all()):
        raise ValueError("a log-probability above 0 or not finite")
    ids = torch.tensor(token_ids, dtype=torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= policy.output_weight.shape[0]:
        raise ValueError("a token id outside the vocabulary")
    text = policy.tokenizer.decode(token_ids, skip_special_tokens=True)
    return Completion(ids, text, values, finish_reason)  # type: ignore[arg-type]
