"""From rewards to the advantage of every token, in Python's floats: docs/rewards.md and docs/multi_turn.md written out.

What only rounding tells apart is equal: 0.1 + 0.2 is 0.3, and the mean of 0.1, 0.2 and 0.3 is 0.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from gspo_lightning.types import Completion
from tests.whole_update.case import Case

ROUNDING = 1e-12
"""Relative to the terms that a number was added up from."""

SPREAD_FLOOR = 1e-4
"""Added to every standard deviation that is divided by, as in TRL."""

OVERLONG = (10, 6)
"""L_max and L_cache."""

TARGET = (5, 4)
"""The target, and the distance from it at which nothing is left."""

Numbers = list[float]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def unbiased_std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(sum((x - centre) ** 2 for x in values) / (len(values) - 1))


def all_equal(values: Sequence[float], sizes: Sequence[float] | None = None) -> bool:
    """Whether the group is silent: its values differ by the rounding of their terms at most."""
    sizes = [abs(x) for x in values] if sizes is None else sizes
    return max(values) - min(values) <= ROUNDING * max(sizes)


def without_rounding(values: Numbers, sizes: Numbers) -> Numbers:
    return [values[0]] * len(values) if all_equal(values, sizes) else values


def length_reward(completion: Completion, case: Case) -> Numbers:
    """That of the function of the length, if there is one: docs/rewards.md."""
    if case.length_reward == "overlong":  # DAPO (arXiv 2503.14476), Eq. 13, of the whole dialogue
        length, free, cache = len(completion.token_ids), OVERLONG[0] - OVERLONG[1], OVERLONG[1]
        return [0.0 if length <= free else (free - length) / cache if length <= OVERLONG[0] else -1.0]
    if case.length_reward == "target":  # of the policy's own tokens
        distance = abs(len(turn_of_tokens(completion)) - TARGET[0])
        return [0.0 if distance >= TARGET[1] else 1 - distance / TARGET[1]]
    return []


def combined(by_function: list[Numbers], weights: Sequence[float], how: str) -> Numbers:
    """One reward per completion of a group from those of K functions; NaN means that a function does not apply."""
    if how == "normalize_then_sum":
        by_function = normalized(by_function)
    terms = [[w * x for w, x in zip(weights, row, strict=True) if not math.isnan(x)] for row in by_function]
    return without_rounding([sum(row) for row in terms], [sum(map(abs, row)) for row in terms])


def normalized(by_function: list[Numbers]) -> list[Numbers]:
    """GDPO (arXiv 2601.05242): each function's rewards with mean 0 and variance 1 within the group, where it applies."""
    rows = [list(row) for row in by_function]
    for k in range(len(rows[0])):
        column = [row[k] for row in rows if not math.isnan(row[k])]
        if not column:
            continue
        centre, spread = mean(column), unbiased_std(column) if len(column) > 1 else 0.0
        for row in rows:
            if not math.isnan(row[k]):
                centred = row[k] - centre
                row[k] = 0.0 if abs(centred) <= ROUNDING * abs(centre) else centred / (spread + SPREAD_FLOOR)
    return rows


def of_the_best(rewards: Numbers, k: int, scale: str) -> Numbers:
    """Pass@k Training (arXiv 2508.10751): the mean of the best of k with a completion, less that of the best of any k."""
    choices = list(combinations(range(len(rewards)), k))
    best = {chosen: max(rewards[i] for i in chosen) for chosen in choices}
    centre = mean(list(best.values()))
    divisor = math.sqrt(mean([(b - centre) ** 2 for b in best.values()])) + SPREAD_FLOOR if scale == "group" else 1.0
    advantages = []
    for i in range(len(rewards)):
        centred = mean([b for chosen, b in best.items() if i in chosen]) - centre
        advantages.append(0.0 if abs(centred) <= ROUNDING * max(map(abs, rewards)) else centred / divisor)
    return advantages


def against_all_tokens(rewards: list[Numbers], lengths: list[list[int]], first: str) -> list[Numbers]:
    """REINFORCE++ (arXiv 2501.03262): each token's reward, less its group's mean if that comes ``first``, normalised
    over the list of all tokens."""
    values = [[r - mean(own) for r in own] if first == "group" else own for own in rewards]
    tokens = [
        value
        for own, sizes in zip(values, lengths, strict=True)
        for value, n in zip(own, sizes, strict=True)
        for _ in range(n)
    ]
    centre, spread = mean(tokens), math.sqrt(unbiased_std(tokens) ** 2 + 1e-8)
    floor = ROUNDING * max(abs(r) for own in rewards for r in own)
    return [[0.0 if abs(v - centre) <= floor else (v - centre) / spread for v in own] for own in values]


def group_advantages(
    rewards: Numbers, scale: str, baseline: str, everyone: Numbers, lengths: Sequence[int] = ()
) -> Numbers:
    """``(r_i - baseline) / scale`` (GRPO, arXiv 2402.03300, section 4.1.2; leave one out, arXiv 2402.14740; OPO, arXiv
    2505.23585, with trained tokens as lengths)."""
    if all_equal(rewards):
        return [0.0] * len(rewards)
    divisor = {
        "none": 1.0,
        "group": unbiased_std(rewards) + SPREAD_FLOOR,
        "batch": unbiased_std(everyone) + SPREAD_FLOOR,
    }[scale]
    advantages = []
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        if baseline == "length":
            level = sum(n * r for n, r in zip(lengths, rewards, strict=True)) / sum(lengths)
        else:
            level = mean(rewards) if baseline == "mean" else mean(others)
        centred = reward - level
        advantages.append(0.0 if abs(centred) <= ROUNDING * max(map(abs, rewards)) else centred / divisor)
    return advantages


def turn_of_tokens(completion: Completion) -> list[int]:
    """For each trained token, the number of its turn: a turn begins after tokens of the environment, or where said."""
    dialogue = completion.dialogue
    if dialogue is None:
        return [0] * len(completion.token_ids)
    trained = dialogue.trained.tolist()
    turn, turns = -1, []
    for t, is_trained in enumerate(trained):
        if dialogue.begins is not None:
            turn += int(dialogue.begins[t])
        elif is_trained and (t == 0 or not trained[t - 1]):
            turn += 1
        if is_trained:
            turns.append(turn)
    return turns


def returns(completion: Completion, whole: float) -> Numbers:
    """For each turn: the rewards of this turn, of later turns and of the whole."""
    turns = turn_of_tokens(completion)[-1] + 1
    own = (completion.dialogue.turn_rewards if completion.dialogue is not None else ()) or (0.0,) * turns
    return [whole + sum(own[turn:]) for turn in range(turns)]


def sizes_of_returns(completion: Completion, whole: float) -> Numbers:
    """The same with the magnitude of every term."""
    turns = turn_of_tokens(completion)[-1] + 1
    own = (completion.dialogue.turn_rewards if completion.dialogue is not None else ()) or (0.0,) * turns
    return [abs(whole) + sum(map(abs, own[turn:])) for turn in range(turns)]


def returns_by_turn(group: list[Completion], rewards: Numbers) -> list[tuple[list[int], Numbers]]:
    """For each turn, the completions that have it and their returns."""
    values = [returns(c, r) for c, r in zip(group, rewards, strict=True)]
    sizes = [sizes_of_returns(c, r) for c, r in zip(group, rewards, strict=True)]
    found = []
    for turn in range(max(map(len, values))):
        members = [i for i in range(len(group)) if turn < len(values[i])]
        found.append((members, without_rounding([values[i][turn] for i in members], [sizes[i][turn] for i in members])))
    return found


def is_silent(group: list[Completion], rewards: Numbers, case: Case) -> bool:
    """Whether every completion is worth the same: whichever of its turns, or whichever k are chosen; of no
    interest if completions are compared with those of other groups."""
    if case.plus_plus == "reward":
        return False
    if case.pass_at_k:
        return len({max(chosen) for chosen in combinations(rewards, case.pass_at_k)}) == 1
    return all(all_equal(values) for _, values in returns_by_turn(group, rewards))


def turn_advantages(group: list[Completion], rewards: Numbers, case: Case) -> list[Numbers]:
    """Each turn's return against the same turn of the others; a turn no other has gets its dialogue's first one."""
    advantages: list[Numbers] = [[] for _ in group]
    for members, values in returns_by_turn(group, rewards):
        if len(members) > 1:
            of_turn = group_advantages(values, case.scale, case.baseline, values)
        else:
            of_turn = [advantages[members[0]][0]]
        for i, advantage in zip(members, of_turn, strict=True):
            advantages[i].append(advantage)
    return advantages


def has_turn_rewards(group: list[Completion]) -> bool:
    return any(c.dialogue is not None and c.dialogue.turn_rewards for c in group)


def rollout_advantages(groups: list[list[Completion]], rewards: list[Numbers], case: Case) -> list[list[Numbers]]:
    """``[B][G]`` lists of advantages: one for each turn in groups whose environment rewards turns, else one."""
    if any(map(has_turn_rewards, groups)):
        return [
            turn_advantages(group, own, case)
            if has_turn_rewards(group)
            else [[a] for a in group_advantages(own, case.scale, case.baseline, own)]
            for group, own in zip(groups, rewards, strict=True)
        ]
    everyone = [x for own in rewards for x in own]
    if case.pass_at_k:
        return [[[a] for a in of_the_best(own, case.pass_at_k, case.scale)] for own in rewards]
    lengths = [[len(turn_of_tokens(c)) for c in group] for group in groups]
    if case.plus_plus:
        return [[[a] for a in own] for own in against_all_tokens(rewards, lengths, case.plus_plus)]
    return [
        [[a] for a in group_advantages(own, case.scale, case.baseline, everyone, sizes)]
        for own, sizes in zip(rewards, lengths, strict=True)
    ]


def token_advantages(completion: Completion, of_turns: Numbers) -> Numbers:
    """The advantage of every trained token: that of its turn, or of the completion."""
    return [of_turns[turn if len(of_turns) > 1 else 0] for turn in turn_of_tokens(completion)]
