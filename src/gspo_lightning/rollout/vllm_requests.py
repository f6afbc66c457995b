"""Requests to vLLM, and completions from its answers; the same in process and over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from gspo_lightning.data.images import load_image
from gspo_lightning.data.vision import image_parts
from gspo_lightning.errors import UserError
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.text import answer_and_thinking
from gspo_lightning.types import Completion, Prompt, SamplingParams

_LEAST_TEMPERATURE = 0.01


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


def refuse_sampling(sampling: SamplingParams) -> None:
    """Refuses settings that vLLM silently samples differently from `TransformersEngine`; greedy ones read none."""
    if 0 < sampling.temperature < _LEAST_TEMPERATURE:
        raise UserError(
            f"rollout.temperature={sampling.temperature}: vLLM samples at {_LEAST_TEMPERATURE} instead; set at least "
            "that, or rollout=transformers"
        )
    if sampling.temperature > 0 and sampling.top_p < 1 and sampling.min_p > 0:
        # The nucleus of what min-p has left is smaller. transformers' `generate` cuts in the other order.
        raise UserError(
            f"rollout.top_p={sampling.top_p} with rollout.min_p={sampling.min_p}: vLLM applies min_p first and "
            "rollout=transformers top_p; set one of them, or rollout=transformers"
        )


def refuse_images(prompts: Sequence[Prompt]) -> None:
    """Refuses images: servers are sent token ids, and such a request has no place for images."""
    for prompt in prompts:
        if prompt.mm_inputs:
            raise UserError(
                f"row {prompt.uid} has images, which rollout=vllm_server does not accept; use rollout=vllm or "
                "rollout=transformers"
            )


def refuse_padded_images(policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Refuses images of padded models: only packed families have known image tokens and a proven vision half."""
    for prompt in prompts:
        if prompt.mm_inputs and policy.is_padded:
            raise UserError(
                f"row {prompt.uid} has images, which rollout=vllm does not accept for {policy.config.model_type}: it "
                "runs through the padded path; use rollout=transformers"
            )


def engine_input(prompt: Prompt) -> dict[str, Any]:
    """A prompt for vLLM's `generate`: its tokens with one placeholder per image, and the images themselves.

    vLLM expands the placeholders itself; prompts that are already expanded would be expanded twice.

    Raises:
        UserError: the prompt has a video.
    """
    if not prompt.mm_inputs:
        return {"prompt_token_ids": prompt.input_ids.tolist()}
    parts = image_parts(prompt.prompt)
    if any(part["type"] == "video" for part in parts):
        raise UserError(f"row {prompt.uid} has a video, which rollout=vllm does not accept; use rollout=transformers")
    where = f"row {prompt.uid}"
    images = [load_image(part.get("image"), f"{where}, image {n}") for n, part in enumerate(parts)]
    return {"prompt_token_ids": unexpanded(prompt), "multi_modal_data": {"image": images}}


def unexpanded(prompt: Prompt) -> list[int]:
    """The tokens of a prompt with one placeholder per image in place of a run of them."""
    types = prompt.mm_inputs["mm_token_type_ids"].tolist()
    ids = prompt.input_ids.tolist()
    return [
        token
        for number, (token, kind) in enumerate(zip(ids, types, strict=True))
        if not (kind and number and types[number - 1] == kind)
    ]


def completion(
    policy: Policy, token_ids: Sequence[int], logprobs: Sequence[float], finish_reason: str | None
) -> Completion:
    """One completion; raises ValueError for an answer that no sampler can give."""
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
    text, thinking = answer_and_thinking(policy.tokenizer, token_ids)
    return Completion(ids, text, values, finish_reason, thinking=thinking)  # type: ignore[arg-type]


def completions_of(policy: Policy, prompt: Prompt, output: Any) -> list[Completion]:
    """The completions of one prompt out of vLLM's output in process, in order.

    Raises:
        UserError: vLLM has made other tokens of the prompt's images.
        ValueError: see `completion`.
    """
    if prompt.mm_inputs and list(output.prompt_token_ids) != prompt.input_ids.tolist():
        raise UserError(
            f"row {prompt.uid}: vLLM makes {len(output.prompt_token_ids)} tokens of the prompt and its images, the "
            f"trainer {len(prompt.input_ids)}; rollout.engine.min_pixels and max_pixels must be those of the data"
        )
    return [
        completion(policy, list(one.token_ids), _chosen(one.token_ids, one.logprobs), one.finish_reason)
        for one in sorted(output.outputs, key=lambda one: one.index)
    ]


def _chosen(token_ids: Any, logprobs: Any) -> list[float]:
    """The log-probability of each token out of vLLM's dictionaries."""
    return [entry[token].logprob for token, entry in zip(token_ids, logprobs, strict=True)]
