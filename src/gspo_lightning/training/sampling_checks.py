"""Settings of the sampling that would teach nothing, compare what cannot be compared, or exceed the model: refused."""

from __future__ import annotations

from typing import Any

from gspo_lightning.errors import UserError

COLDEST = 1e-3
"""Least temperature: a difference of 0.02 nats between two tokens is then one of 20."""
HOTTEST = 100
"""Largest temperature: divided by it, logits that differ by tens differ by tenths."""


def check_sampling(temperature: float, repetition_penalty: float, top_k: int, min_p: float) -> None:
    """Refuses rollouts with nothing to learn from, or from another distribution than the policy's."""
    if not temperature > 0:
        raise UserError(f"rollout.temperature={temperature} must be above 0: greedy completions are all equal")
    if temperature < COLDEST:
        raise UserError(
            f"rollout.temperature={temperature} must be at least {COLDEST}: below, completions are all equal"
        )
    for key, value, one_left in (("top_k", top_k, top_k == 1), ("min_p", min_p, min_p >= 1)):
        if one_left:
            raise UserError(f"rollout.{key}={value} leaves one token to draw: greedy completions are all equal")
    if temperature > HOTTEST:
        raise UserError(
            f"rollout.temperature={temperature} must be at most {HOTTEST}: every token of the vocabulary would be as "
            "likely as any other, whatever is learned"
        )
    if repetition_penalty != 1.0:
        raise UserError(
            "rollout.repetition_penalty must be 1.0 in training: it depends on the history, so the policy's "
            "log-probabilities would not be those of the distribution that was sampled"
        )


def check_support(top_p: float, top_k: int, min_p: float, compared_by: tuple[str, str]) -> None:
    """Refuses a cut of the distribution where ratios compare it with the whole one.

    Args:
        top_p: as the other two, of the sampling.
        top_k: likewise.
        min_p: likewise.
        compared_by: the setting that compares them, and one that does not.
    """
    for key, value, everything in (("top_p", top_p, 1.0), ("top_k", top_k, 0), ("min_p", min_p, 0.0)):
        if value != everything:
            raise UserError(
                f"rollout.{key}={value} contradicts {compared_by[0]}: the sampler excludes tokens, so the weights "
                f"would compare distributions with different supports; set rollout.{key}={everything}, or "
                f"{compared_by[1]}"
            )


def compared_by(has_mismatch: bool, old_logprobs: str) -> tuple[str, str] | None:
    """The setting that compares the sampler's log-probabilities with the policy's, and one that does not."""
    if has_mismatch:
        return "objective.mismatch", "mismatch=none"
    return ("update.old_logprobs=sampler", "update.old_logprobs=policy") if old_logprobs == "sampler" else None


def check_rotation(config: Any, prompt_tokens: int, completion_tokens: int) -> None:
    """Refuses lengths at which the rotary embedding of all tokens in a row changes, in sampling even between tokens.

    Rotary embeddings of types longrope and dynamic choose their frequencies by the longest sequence of a forward.
    """
    limit = _rotation_limit(config.get_text_config())
    if limit is not None and prompt_tokens + completion_tokens > limit:
        raise UserError(
            f"data.max_prompt_length + rollout.max_completion_length: prompts of {prompt_tokens} and completions of "
            f"{completion_tokens} tokens exceed {limit}, beyond which this model's rotary embedding changes for all "
            "earlier tokens too; lower one of them, or set the kind of rotation in model.overrides"
        )


def _rotation_limit(config: Any) -> int | None:
    """Number of tokens up to which a model's rotary embeddings do not change; None if they never change."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # one, or one per kind of layer
    limits = []
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            limits.append(kind.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        elif kind.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)
