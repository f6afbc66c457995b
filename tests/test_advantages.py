"""Advantages and combined rewards, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_lightning.advantages import (
    AdvantageEstimator,
    check_combination,
    check_group,
    combine_rewards,
    silent_groups,
)
from gspo_lightning.errors import UserError
from gspo_lightning.reinforce_plus_plus import ReinforcePlusPlus

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


def test_the_mean_by_length_weighs_each_reward_by_its_completion():
    """(3 * 1 + 1 * 0 + 4 * 0) / 8 and (1 * 1 + 1 * 2) / 4: OPO."""
    rewards, lengths = tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0]]), torch.tensor([[3, 1, 4], [1, 1, 2]])
    expected = tensor([[5 / 8, -3 / 8, -3 / 8], [1 / 4, 5 / 4, -3 / 4]])
    found = AdvantageEstimator("none", "length").of_rollout(rewards, lengths)
    assert torch.allclose(found, expected, rtol=1e-12)
    assert (found * lengths).sum(dim=1).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    alike = AdvantageEstimator("group", "length").of_rollout(rewards, torch.full((2, 3), 7))
    assert torch.allclose(alike, AdvantageEstimator()(rewards), rtol=1e-12)


def test_the_mean_by_length_has_the_least_variance_where_gradients_are_as_large_as_completions_are_long():
    """E[|g|^2 (r - b)^2] with |g|^2 = length, over the completions of a group: least at b = E[length r] / E[length]."""
    rewards, lengths = tensor([[0.3, 1.0, 0.0, 0.7]]), torch.tensor([[2, 9, 4, 1]])
    own = (rewards - AdvantageEstimator("none", "length").of_rollout(rewards, lengths))[0, 0].item()

    def variance(baseline):
        return (lengths * (rewards - baseline).square()).sum().item()

    assert all(variance(own) < variance(own + off) for off in (-0.1, -0.01, 0.01, 0.1))


def test_the_mean_by_length_is_divided_by_the_scale_of_all_ranks_too():
    rewards, lengths = tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[1, 3], [2, 2]])
    std = math.sqrt(sum((r - 1) ** 2 for r in (1, 0, 3, 0)) / 3) + 1e-4
    expected = tensor([[0.75, -0.25], [1.5, -1.5]]) / std
    assert torch.allclose(AdvantageEstimator("batch", "length").of_rollout(rewards, lengths), expected, rtol=1e-12)
    shares = [
        AdvantageEstimator("batch", "length").of_rollout(share, own, rewards.flatten())
        for share, own in zip(rewards.split(1), lengths.split(1), strict=True)
    ]
    assert torch.allclose(torch.cat(shares), expected, rtol=1e-12)


def test_all_tokens_of_the_batch_are_compared_by_hand():
    """Five tokens: 1, 0, 0, 2, 2 with mean 1 and unbiased variance (0 + 1 + 1 + 1 + 1) / 4 = 1."""
    rewards, lengths = tensor([[1.0], [0.0], [2.0]]), torch.tensor([[1], [2], [2]])
    found = ReinforcePlusPlus().of_rollout(rewards, lengths)
    assert torch.allclose(found, tensor([[0.0], [-1.0], [1.0]]) / math.sqrt(1 + 1e-8), rtol=1e-12)
    assert not ReinforcePlusPlus().silent(rewards).any()


def test_all_tokens_of_the_batch_are_compared_after_the_groups_mean_by_hand():
    """Differences 1/2, -1/2 (three tokens) and 0, 0: over six tokens mean -1/6, squares (1/4 + 3/4) - 6/36 = 5/6."""
    rewards, lengths = tensor([[1.0, 0.0], [3.0, 3.0]]), torch.tensor([[1, 3], [1, 1]])
    estimator = ReinforcePlusPlus(group_baseline=True)
    expected = (tensor([[0.5, -0.5], [0.0, 0.0]]) + 1 / 6) / math.sqrt(5 / 6 / 5 + 1e-8)
    assert torch.allclose(estimator.of_rollout(rewards, lengths), expected, rtol=1e-12)
    assert estimator.silent(rewards).tolist() == [False, True]


@pytest.mark.parametrize("group_baseline", [False, True])
def test_all_tokens_of_the_batch_have_mean_0_and_variance_1_on_all_ranks_together(group_baseline):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 9, (4, 3), generator=generator)
    estimator = ReinforcePlusPlus(group_baseline)
    whole = estimator.of_rollout(rewards, lengths)
    tokens = whole.flatten().repeat_interleave(lengths.flatten())
    assert tokens.mean().item() == pytest.approx(0, abs=1e-12)
    assert tokens.var().item() == pytest.approx(1, rel=1e-6)
    everyone = rewards.flatten(), lengths.flatten()
    shares = [estimator.of_rollout(r, n, *everyone) for r, n in zip(rewards.split(2), lengths.split(2), strict=True)]
    assert torch.equal(torch.cat(shares), whole)


def test_tokens_that_are_all_worth_the_same_teach_nothing():
    rewards = torch.full((2, 3), 0.1, dtype=torch.float64)
    for estimator in (ReinforcePlusPlus(), ReinforcePlusPlus(group_baseline=True)):
        assert (estimator.of_rollout(rewards, torch.tensor([[1, 2, 3], [7, 7, 7]])) == 0).all()
    alone = ReinforcePlusPlus().of_rollout(tensor([[0.3]]), torch.tensor([[1]]))  # one token has no variance
    assert alone.tolist() == [[0.0]]


def test_tokens_are_not_compared_without_lengths_nor_turn_by_turn():
    with pytest.raises(UserError, match="^ReinforcePlusPlus was called without lengths; call of_rollout$"):
        ReinforcePlusPlus()(tensor([[1.0, 0.0]]))
    assert [e.takes_turns for e in (ReinforcePlusPlus(), AdvantageEstimator("none", "length"), AdvantageEstimator())] == [
        False, False, True,
    ]  # fmt: skip


def test_groups_of_one_are_compared_with_the_batch_but_not_with_their_own_mean():
    check_group(ReinforcePlusPlus(), 1)
    with pytest.raises(UserError, match="advantages.group_baseline=true with rollout.num_generations=1"):
        check_group(ReinforcePlusPlus(group_baseline=True), 1)
    check_group(ReinforcePlusPlus(group_baseline=True), 2, max_draws=3)
    with pytest.raises(UserError, match="dynamic_sampling.max_draws draws groups of equal rewards anew"):
        check_group(ReinforcePlusPlus(), 2, max_draws=3)


class ByLength(AdvantageEstimator):
    """One of a user's own, with a choice of its own."""

    def __call__(self, rewards, everyone=None):
        return rewards - 1


class Doubled(AdvantageEstimator):
    def __call__(self, rewards, everyone=None):
        return super().__call__(2 * rewards, everyone)


class Longest(AdvantageEstimator):
    def of_rollout(self, rewards, lengths, *everyone):
        return rewards * (lengths == lengths.amax(dim=1, keepdim=True))


def test_an_estimator_of_ones_own_is_called_as_before_or_overrides_what_gets_lengths():
    rewards, lengths = tensor([[1.0, 2.0]]), torch.tensor([[3, 4]])
    assert ByLength("none", "length").of_rollout(rewards, lengths).tolist() == [[0.0, 1.0]]
    assert Longest().of_rollout(rewards, lengths).tolist() == [[0.0, 2.0]]


def test_the_mean_by_length_is_not_taken_without_lengths():
    """Nor is it taken for the plain mean in a subclass that calls what it overrides."""
    for estimator in (AdvantageEstimator("none", "length"), Doubled("none", "length")):
        with pytest.raises(
            UserError, match=f"^advantages.baseline=length: {type(estimator).__name__} was called without"
        ):
            estimator(tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_zero_where_a_rounded_mean_would_not(scale):
    rewards = tensor([[0.1] * 7, [0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1]])
    assert (rewards[0] - rewards[0].mean()).abs().max() > 0  # the trap: 0.1 * 7 / 7 is not 0.1
    advantages = AdvantageEstimator(scale)(rewards)
    assert advantages[0].tolist() == [0.0] * 7
    assert (advantages[1] != 0).any()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "rloo"])
def test_a_reward_equal_to_the_mean_gets_exactly_zero_where_a_rounded_mean_would_not_give_it(scale, baseline):
    rewards = tensor([[0.1, 0.2, 0.3], [0.1, 0.2 + 1e-9, 0.3]])
    assert rewards[0, 1] != rewards[0].mean()
    advantages = AdvantageEstimator(scale, baseline)(rewards)
    assert advantages[0, 1] == 0 and (advantages[0, [0, 2]] != 0).all()
    assert 0 < advantages[1, 1] < 1e-7  # above the mean by 2e-9 / 3


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        AdvantageEstimator()(tensor([[1.0]]))


class KeepsAState(AdvantageEstimator):
    def state_dict(self):
        return {}


class OfTheBatch(AdvantageEstimator):
    def __call__(self, rewards, everyone=None):
        return rewards - rewards.mean()


def test_two_can_be_compared_and_one_only_by_an_estimator_of_ones_own_that_draws_nothing_anew():
    for estimator in (AdvantageEstimator(), KeepsAState(), OfTheBatch(), lambda rewards: rewards):
        check_group(estimator, 2, max_draws=1)
    for estimator in (AdvantageEstimator(), KeepsAState()):
        with pytest.raises(UserError, match="rollout.num_generations=1 must be at least 2"):
            check_group(estimator, 1)
    for estimator in (OfTheBatch(), lambda rewards: rewards):
        check_group(estimator, 1)
        with pytest.raises(UserError, match=r"max_draws=1: every group of rollout.num_generations=1 .* max_draws to 0"):
            check_group(estimator, 1, max_draws=1)


def test_weighted_sum_leaves_out_what_does_not_apply():
    by_function = tensor([[[1.0, 2.0], [NAN, 4.0]]])
    assert combine_rewards(by_function, tensor([0.5, 2.0])).tolist() == [[4.5, 8.0]]


def test_normalize_then_sum_gives_each_function_the_same_scale():
    by_function = tensor([[[0.0, 0.0], [1.0, 100.0]]])
    z = 0.5 / (math.sqrt(0.5) + 1e-4), 50 / (math.sqrt(5000) + 1e-4)
    expected = tensor([[-z[0] - z[1], z[0] + z[1]]])
    assert torch.allclose(combine_rewards(by_function, tensor([1.0, 1.0]), "normalize_then_sum"), expected, rtol=1e-12)


def test_normalised_rewards_scaled_by_the_batch_are_gdpos():
    """Eq. 4 to 6 of arXiv 2601.05242 in plain Python, over two groups whose second function is silent in one."""
    by_function = [[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [[1.0, 4.0], [0.0, 2.0], [1.0, 0.0]]]
    sums = []
    for group in by_function:
        columns = [[row[k] for row in group] for k in range(2)]
        means = [sum(column) / 3 for column in columns]
        stds = [math.sqrt(sum((r - m) ** 2 for r in column) / 2) for column, m in zip(columns, means, strict=True)]
        sums.append([sum((row[k] - means[k]) / (stds[k] + 1e-4) for k in range(2)) for row in group])
    flat = [value for group in sums for value in group]
    mean = sum(flat) / 6
    std = math.sqrt(sum((value - mean) ** 2 for value in flat) / 5)
    expected = tensor([[(value - mean) / (std + 1e-4) for value in group] for group in sums])
    rewards = combine_rewards(tensor(by_function), tensor([1.0, 1.0]), "normalize_then_sum")
    assert torch.allclose(AdvantageEstimator("batch")(rewards), expected, rtol=1e-12, atol=1e-15)


def test_normalised_rewards_are_refused_with_any_other_scale():
    for scale in ("group", "none"):
        with pytest.raises(UserError, match=rf"contradicts advantages.scale_rewards={scale}: .* set advantages=batch"):
            check_combination("normalize_then_sum", scale)
        check_combination("weighted_sum", scale)
    check_combination("normalize_then_sum", "batch")


@pytest.mark.parametrize(
    ("rows", "weights"),
    [
        ([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [0.1, 0.2, 0.3]),  # 0.30000000000000004 and 0.3
        ([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [0.1, 0.2, -0.3]),  # 5.6e-17 and 0
    ],
)
def test_sums_that_differ_by_rounding_alone_are_the_same_reward(rows, weights):
    trap = [sum(w * r for w, r in zip(weights, row, strict=True)) for row in rows]
    assert trap[0] != trap[1]
    rewards = combine_rewards(tensor([rows * 2, [[0.0] * 3, *rows, [1.0, 0.0, 0.0]]]), tensor(weights))
    assert len(set(rewards[0].tolist())) == 1
    assert silent_groups(rewards).tolist() == [True, False]
    assert AdvantageEstimator()(rewards)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("value", [0.1, 1e6 / 3])
def test_a_normalised_reward_of_equal_values_is_0_where_a_rounded_mean_would_not_make_it(value):
    by_function = tensor([[[value, NAN]] * 7, [[value, float(n)] for n in range(7)]])
    rewards = combine_rewards(by_function, tensor([1.0, 1.0]), "normalize_then_sum")
    assert rewards[0].tolist() == [0.0] * 7
    assert rewards[1, 3].item() == 0.0 and rewards[1, 6].item() == pytest.approx(
        3 / (math.sqrt(28 / 6) + 1e-4), rel=1e-14
    )


def test_rewards_apart_by_more_than_rounding_are_compared():
    rewards = tensor([[0.3, 0.1 + 0.2], [0.3, 0.3 + 1e-11], [0.0, 5e-324], [-2.0, -2.0], [0.0, 0.0]])
    assert silent_groups(rewards).tolist() == [True, False, False, True, True]
    assert AdvantageEstimator("none")(rewards)[0].tolist() == [0.0, 0.0]
    assert AdvantageEstimator("none")(rewards)[1, 1].item() == pytest.approx(5e-12, rel=1e-4)


def test_a_completion_without_any_reward_is_refused():
    with pytest.raises(ValueError, match="completion 1 of prompt 0"):
        combine_rewards(tensor([[[1.0], [NAN]]]), tensor([1.0]))
