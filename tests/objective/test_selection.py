"""Which tokens and sequences the policy term keeps, against examples worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_lightning.objective import LOSSES, Objective
from gspo_lightning.objective.selection import near_old_policy, top_entropy_threshold

INDEX, LENGTHS = torch.tensor([0, 0, 1]), torch.tensor([2, 1])


@pytest.mark.parametrize(("quantile", "kept"), [(0.2, 1), (0.25, 2), (0.5, 3), (1.0, 5), (1e-9, 1)])
def test_the_share_is_rounded_up_and_never_empty(quantile, kept):
    entropies = torch.tensor([0.1, 0.9, 0.3, 0.7, 0.5])
    assert int((entropies >= top_entropy_threshold(entropies, quantile)).sum()) == kept


def test_a_share_of_decimals_is_no_token_more():
    """In binary 0.07 * 100 is a little above 7."""
    entropies = torch.arange(100.0)
    assert int((entropies >= top_entropy_threshold(entropies, 0.07)).sum()) == 7


def test_ties_at_the_threshold_are_all_kept_and_nothing_has_no_threshold():
    # One distribution in three rows of a float32 product, and a token that is 2e-5 away.
    entropies = torch.tensor([8.45833969, 8.45834160, 8.45833969, 8.45817])
    assert (entropies >= top_entropy_threshold(entropies, 0.1)).tolist() == [True, True, True, False]
    assert (torch.zeros(3) >= top_entropy_threshold(torch.zeros(3), 0.1)).all()
    assert top_entropy_threshold(torch.zeros(0), 0.5) == math.inf


def test_only_tokens_of_negative_advantage_in_a_sequence_that_the_policy_left_are_masked():
    log_ratio = torch.tensor([-0.5, -0.1, -2.0])  # drifts 0.3 and 2.0 nats per token
    for advantages, kept in (([-1.0, -1.0, -1.0], [True, True, False]), ([1.0, 1.0, 1.0], [True, True, True])):
        assert near_old_policy(log_ratio, torch.tensor(advantages), INDEX, LENGTHS, 0.3001).tolist() == kept
    assert near_old_policy(log_ratio, -torch.ones(3), INDEX, LENGTHS, 0.2).tolist() == [False, False, False]
    # Rewards of turns: the drift is that of the sequence, the sign that of the token.
    turns = torch.tensor([1.0, -3.0, 0.0])
    assert near_old_policy(log_ratio, turns, INDEX, LENGTHS, 0.2).tolist() == [True, False, True]


def loss_and_gradient(**settings):
    logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    selected = settings.pop("selected", None)
    advantages = settings.pop("advantages", -torch.ones(3, dtype=torch.float64))
    objective = Objective(max_completion_length=4, importance_sampling_level="token", **settings)
    result = objective(
        logprobs, torch.tensor([-1.0, -1.9, -1.0], dtype=torch.float64), advantages,
        INDEX, LENGTHS, ref_logprobs=logprobs.detach() - 0.5, selected=selected,
    )  # fmt: skip
    result.loss.backward()
    return result, logprobs.grad


def test_masks_take_the_policy_term_and_leave_the_kl():
    everything, _ = loss_and_gradient(beta=0.1)
    result, gradient = loss_and_gradient(beta=0.1, selected=torch.tensor([False, True, False]))
    kl = math.expm1(-0.5) + 0.5
    # Sequence means 1/2 (a1 + a2) + a3 of w = 1, e^-0.1, e^-2 with advantage -1: clipped from below at 0.8.
    assert everything.loss.item() == pytest.approx((1 + math.exp(-0.1)) / 2 + 0.8 + 0.1 * kl * 2, rel=1e-12)
    assert result.loss.item() == pytest.approx(math.exp(-0.1) / 2 + 0.1 * kl * 2, rel=1e-12)
    slope = 0.1 * (1 - math.exp(-0.5))
    assert gradient.tolist() == pytest.approx([slope / 2, math.exp(-0.1) / 2 + slope / 2, slope], rel=1e-12)
    assert result.metrics["selected_frac"][0] == 1 and result.metrics["selected_frac"][1] == 3


def test_the_off_policy_mask_acts_in_the_objective_and_is_counted():
    result, gradient = loss_and_gradient(off_policy_mask_threshold=1.0, epsilon=0.9)
    assert gradient.tolist() == pytest.approx([0.5, math.exp(-0.1) / 2, 0.0], rel=1e-12)
    assert [x.item() for x in result.metrics["off_policy_masked_frac"]] == [1, 2]


def test_the_off_policy_mask_decides_per_token_where_turns_have_rewards():
    advantages = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    result, gradient = loss_and_gradient(advantages=advantages, off_policy_mask_threshold=0.04, epsilon=0.9)
    assert gradient.tolist() == pytest.approx([-0.5, 0.0, 0.0], rel=1e-12)
    assert [x.item() for x in result.metrics["off_policy_masked_frac"]] == [1.5, 2]


def test_beta_goes_linearly_to_its_end_and_needs_the_reference_throughout():
    objective = Objective(max_completion_length=4, beta=0.2, beta_end=0.0)
    assert [objective.at(p).beta for p in (0.0, 0.25, 1.0)] == pytest.approx([0.2, 0.15, 0.0])
    assert objective.needs_ref and not objective.at(1.0).needs_ref
    assert Objective(max_completion_length=4, beta_end=0.1).needs_ref
    assert Objective(max_completion_length=4, beta=0.1).at(0.7).beta == 0.1


@pytest.mark.parametrize(("loss", "level"), [(n, level) for n, s in LOSSES.items() for level in s.levels or ("token",)])
def test_a_token_left_out_has_no_gradient_unless_the_tokens_of_a_completion_share_one_loss(loss, level):
    """Of four tokens the first is chosen: where they share a loss, all four get a quarter of their gradient."""
    objective = Objective(max_completion_length=4, loss_type=loss, importance_sampling_level=level)
    index, lengths = torch.zeros(4, dtype=torch.long), torch.tensor([4])

    def gradient(selected):
        logprobs = torch.tensor([-0.5, -1.0, -1.5, -2.0], dtype=torch.float64, requires_grad=True)
        advantages = torch.full((4,), 0.7, dtype=torch.float64)
        chosen = torch.zeros(4, dtype=torch.bool)
        loss = objective(logprobs, logprobs.detach(), advantages, index, lengths, selected=selected, chosen=chosen).loss
        return torch.autograd.grad(loss, logprobs)[0]

    whole, chosen = gradient(None), gradient(torch.tensor([True, False, False, False]))
    share = torch.full((4,), 0.25) if objective.shares_one_loss else torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert whole.abs().min() > 0.01
    assert chosen.tolist() == pytest.approx((whole * share).tolist(), abs=1e-15)
