"""Which sequences share a micro-batch: groups are kept whole if they fit and split if they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class GroupSlice:
    """Some completions of one prompt."""

    group: int
    completions: tuple[int, ...]


MicroBatchPlan = tuple[GroupSlice, ...]

_Part = tuple[int, GroupSlice]
"""A group slice, preceded by its number of forwarded tokens."""


def plan_micro_batches(
    prompt_lengths: Sequence[int],
    completion_lengths: Sequence[Sequence[tuple[int, int]]],
    max_tokens: int,
    common: int = 0,
) -> list[MicroBatchPlan]:
    """Distributes groups over few micro-batches of at most ``max_tokens`` forwarded tokens, evenly filled.

    First-fit decreasing decides how many micro-batches are needed. The parts are then spread evenly over them if this
    exceeds no budget, because the largest micro-batch decides how much memory an update takes.

    A group longer than the budget is split between completions; its prompt is then forwarded once per part. A
    single sequence longer than the budget gets its own micro-batch. The plan depends on lengths alone, so the
    passes for old, reference and new log-probabilities that share a plan share their rounding.

    Args:
        prompt_lengths: tokens of each group's prompt.
        completion_lengths: per group, ``(completion number, forwarded tokens)`` of the completions to train on.
            Groups without any are left out.
        max_tokens: budget per micro-batch.
        common: tokens that all prompts begin with, which each micro-batch forwards once.
    """
    room = max_tokens - common
    parts: list[_Part] = []
    for group, (prompt, completions) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        parts.extend(_split_group(group, prompt - common, completions, room))
    parts.sort(key=lambda item: -item[0])
    bins = _first_fit(parts, room)
    even = _evenly(parts, len(bins))
    if all(len(filled) == 1 or sum(tokens for tokens, _ in filled) <= room for filled in even):
        bins = even
    return [tuple(sorted((s for _, s in filled), key=lambda s: (s.group, s.completions))) for filled in bins]


def _first_fit(parts: list[_Part], max_tokens: int) -> list[list[_Part]]:
    bins: list[list[_Part]] = []
    free: list[int] = []
    for part in parts:
        place = next((number for number, room in enumerate(free) if room >= part[0]), None)
        if place is None:
            bins.append([])
            free.append(max_tokens)
            place = len(bins) - 1
        bins[place].append(part)
        free[place] -= part[0]
    return bins


def _evenly(parts: list[_Part], count: int) -> list[list[_Part]]:
    """Puts each part, longest first, into the emptiest of ``count`` bins."""
    bins: list[list[_Part]] = [[] for _ in range(count)]
    filled = [0] * count
    for part in parts:
        place = filled.index(min(filled))
        bins[place].append(part)
        filled[place] += part[0]
    return bins


def _split_group(group: int, prompt: int, completions: Sequence[tuple[int, int]], max_tokens: int) -> list[_Part]:
    parts: list[_Part] = []
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
