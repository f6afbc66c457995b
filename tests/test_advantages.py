"""Advantages and combined rewards, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_lightning.advantages import AdvantageEstimator, combine_rewards

NAN = math.nan


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_group_scaling_subtracts_the_mean_and_divides_by_the_unbiased_std():
    rewards = tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 2.0, 2.0]])
    s1, s2 = math.sqrt(1 / 3) + 1e-4, math.sqrt(2 / 3) + 1e-4
    expected = tensor([[0.5 / s1, -0.5 / s1, -0.5 / s1, 0.5 / s1], [1 / s2, -1 / s2, 0, 0]])
    assert torch.allclose(AdvantageEstimator()(rewards), expected, rtol=1e-12, atol=0)


def test_batch_scaling_divides_by_the_std_of_all_rewards():
    rewards = tensor([[1.0, 0.0], [3.0, 0.0]])
    std = math.sqrt(sum((r - 1) ** 2 for r in (1, 0, 3, 0)) / 3) + 1e-4
    expected = tensor([[0.5, -0.5], [1.5, -1.5]]) / std
    assert torch.allclose(AdvantageEstimator("batch")(rewards), expected, rtol=1e-12)


def test_batch_scaling_of_a_share_divides_by_the_std_of_all_ranks():
    rewards = tensor([[1.0, 0.0], [3.0, 0.0]])
    shares = [AdvantageEstimator("batch")(share, rewards.flatten()) for share in rewards.split(1)]
    assert torch.equal(torch.cat(shares), AdvantageEstimator("batch")(rewards))


def test_none_only_subtracts_the_mean():
    assert AdvantageEstimator("none")(tensor([[1.0, 0.0, 2.0]])).tolist() == [[0.0, -1.0, 1.0]]


def test_rloo_compares_with_the_mean_of_the_others():
    rewards = tensor([[1.0, 0.0, 5.0]])
    expected = tensor([[1 - 2.5, 0 - 3, 5 - 0.5]])
    assert torch.allclose(AdvantageEstimator("none", "rloo")(rewards), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero_where_a_rounded_mean_would_not(scale):
    rewards = tensor([[0.1] * 7, [0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1]])
    assert (rewards[0] - rewards[0].mean()).abs().max() > 0  # the trap: 0.1 * 7 / 7 is not 0.1
    advantages = AdvantageEstimator(scale)(rewards)
    assert advantages[0].tolist() == [0.0] * 7
    assert (advantages[1] != 0).any()


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        AdvantageEstimator()(tensor([[1.0]]))


def test_weighted_sum_leaves_out_what_does_not_apply():
    by_function = tensor([[[1.0, 2.0], [NAN, 4.0]]])
    assert combine_rewards(by_function, tensor([0.5, 2.0])).tolist() == [[4.5, 8.0]]


def test_normalize_then_sum_gives_each_function_the_same_scale():
    by_function = tensor([[[0.0, 0.0], [1.0, 100.0]]])
    z = 0.5 / (math.sqrt(0.5) + 1e-4), 50 / (math.sqrt(5000) + 1e-4)
    expected = tensor([[-z[0] - z[1], z[0] + z[1]]])
    assert torch.allclose(combine_rewards(by_function, tensor([1.0, 1.0]), "normalize_then_sum"), expected, rtol=1e-12)


def test_a_completion_without_any_reward_is_refused():
    with pytest.raises(ValueError, match="completion 1 of prompt 0"):
        combine_rewards(tensor([[[1.0], [NAN]]]), tensor([1.0]))
