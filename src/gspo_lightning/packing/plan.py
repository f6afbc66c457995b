"""Which sequences share a micro-batch: whole groups where they fit, split groups where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupSlice:
    """Some completions of one prompt."""

    group: int
    completions: tuple[int, ...]


MicroBatchPlan = tuple[GroupSlice, ...]


def plan_micro_batches(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[tuple[int, int]]],
    max_tokens: int,
) -> list[MicroBatchPlan]:
    """Distributes groups over micro-batches of at most ``max_tokens`` forwarded tokens (first fit, longest first).

    A group longer than the budget is split between completions; its prompt is then forwarded once per part. A
    single sequence longer than the budget gets a micro-batch of its own. The plan depends on lengths alone, so
    the passes for old, reference and new log-probabilities that share a plan share their rounding.

    Args:
        prompt_lengths: tokens of each group's prompt.
        completion_lengths: per group, ``(completion number, forwarded tokens)`` of the completions to train on.
            Groups without any are left out.
        max_tokens: budget per micro-batch.
    """
    parts: list[tuple[int, GroupSlice]] = []
    for group, (prompt, completions) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        parts.extend(_split_group(group, prompt, completions, max_tokens))
    bins: list[list[GroupSlice]] = []
    free: list[int] = []
    for tokens, part in sorted(parts, key=lambda item: -item[0]):
        place = next((number for number, room in enumerate(free) if room >= tokens), None)
        if place is None:
            bins.append([])
            free.append(max_tokens)
            place = len(bins) - 1
        bins[place].append(part)
        free[place] -= tokens
    return [tuple(sorted(part, key=lambda s: (s.group, s.completions))) for part in bins]


def _split_group(
    group: int, prompt: int, completions: Sequence[tuple[int, int]], max_tokens: int
) -> list[tuple[int, GroupSlice]]:
    parts: list[tuple[int, GroupSlice]] = []
    members: list[int] = []
    tokens = prompt
    for number, length in completions:
        if members and tokens + length > max_tokens:
            parts.append((tokens, GroupSlice(group, tuple(members))))
            members, tokens = [], prompt
        members.append(number)
        tokens += length
    if members:
        parts.append((tokens, GroupSlice(group, tuple(members))))
    return parts
