"""Advantages for the best of k against all choices of k, one by one, and against the paper's form for rewards of 0 and 1."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_lightning import AdvantageEstimator, PassAtK
from gspo_lightning.advantages import STD_EPSILON, check_group
from gspo_lightning.errors import UserError


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def by_choices(rewards, k, scale):
    """Every choice of k written out: the mean of the best with a completion, less that of all, over their spread."""
    bests = [(set(chosen), max(rewards[i] for i in chosen)) for chosen in combinations(range(len(rewards)), k)]
    mean = sum(best for _, best in bests) / len(bests)
    spread = math.sqrt(sum((best - mean) ** 2 for _, best in bests) / len(bests)) + STD_EPSILON
    advantages = []
    for i in range(len(rewards)):
        own = [best for chosen, best in bests if i in chosen]
        advantages.append((sum(own) / len(own) - mean) / (spread if scale == "group" else 1))
    return advantages


@given(
    st.lists(st.sampled_from([0.0, 1.0, -2.5, 0.3, 0.1, 7.0]), min_size=3, max_size=8),
    st.integers(2, 7),
    st.sampled_from(["group", "none"]),
)
@settings(max_examples=200, deadline=None)
def test_advantages_are_those_of_all_choices(rewards, k, scale):
    k = min(k, len(rewards) - 1)
    found = PassAtK(scale, k=k)(tensor([rewards, rewards[::-1]]))
    expected = by_choices(rewards, k, scale)
    if max(rewards) == min(rewards):
        expected = [0.0] * len(rewards)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-11)
    assert found[1].tolist() == pytest.approx(expected[::-1], rel=1e-9, abs=1e-11)
    assert found.sum(dim=1).abs().max() < 1e-9


@pytest.mark.parametrize(("right", "k"), [(1, 2), (3, 2), (1, 4), (3, 4), (4, 4)])
def test_rewards_of_0_and_1_have_the_closed_form_of_the_paper(right, k):
    """arXiv 2508.10751, section 2.4, of 8 completions."""
    wrong = 8 - right
    mean = 1 - math.comb(wrong, k) / math.comb(8, k)
    spread = math.sqrt(mean * (1 - mean)) + STD_EPSILON
    of_right = (1 - mean) / spread
    of_wrong = (1 - mean - math.comb(wrong - 1, k - 1) / math.comb(7, k - 1)) / spread
    (found,) = PassAtK(k=k)(tensor([[1.0] * right + [0.0] * wrong])).tolist()
    assert found == pytest.approx([of_right] * right + [of_wrong] * wrong, rel=1e-10)


def test_by_hand():
    """Three completions, k = 2: the best are 2 (of 1 and 2), 5 and 5, on average 4; with the first 3.5, second 3.5, third 5."""
    assert PassAtK("none", k=2)(tensor([[1.0, 2.0, 5.0]])).tolist() == [pytest.approx([-0.5, -0.5, 1.0])]


def test_where_any_k_have_a_right_one_and_where_all_are_equal_nothing_is_left_to_learn():
    rewards = tensor([[1, 1, 1, 1, 1, 0, 0, 0], [0.1] * 8, [0.0] * 8])
    assert (PassAtK(k=4)(rewards) == 0).all()
    assert (AdvantageEstimator()(rewards)[0] != 0).all()


@given(st.lists(st.sampled_from([0.0, 1.0, 0.1, 0.1 + 1e-16]), min_size=3, max_size=6), st.integers(2, 5))
@settings(max_examples=200, deadline=None)
def test_groups_without_signal_are_those_whose_advantages_are_all_zero(rewards, k):
    estimator = PassAtK(k=min(k, len(rewards) - 1))
    assert estimator.silent(tensor([rewards])).tolist() == [not estimator(tensor([rewards])).any()]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"k": 1}, "advantages.k=1 must be at least 2; set advantages=group"),
        ({"scale_rewards": "batch"}, "advantages.scale_rewards=batch is not defined for the best of k"),
    ],
)
def test_what_has_no_meaning_for_the_best_of_k_is_refused(settings, line):
    with pytest.raises(UserError, match=line):
        PassAtK(**settings)


def test_groups_of_k_cannot_be_compared():
    check_group(PassAtK(k=4), 5)
    line = "advantages.k=4 with rollout.num_generations=4: the best of 4 can only be compared in larger groups"
    with pytest.raises(UserError, match=line):
        check_group(PassAtK(k=4), 4)
    with pytest.raises(UserError, match=line):
        PassAtK(k=4)(tensor([[1.0, 0.0, 1.0, 0.0]]))
