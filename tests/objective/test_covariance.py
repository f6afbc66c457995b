"""Which tokens are chosen by their covariance, against examples worked by hand; over whole runs: tests/whole_update."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_lightning.errors import UserError
from gspo_lightning.objective import Objective
from gspo_lightning.objective.covariance import covariances, draw_threshold, share_of, top_covariance_threshold


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_covariance_of_a_token_is_what_it_adds_to_that_of_all():
    """Means -2 and 0.5: (1, -1, 0.5, -0.5) times (1.5, -1.5, -0.5, 0.5)."""
    logprobs, advantages = tensor(-1.0, -3.0, -1.5, -2.5), tensor(2.0, -1.0, 0.0, 1.0)
    values = covariances(logprobs, advantages, tensor(-8.0, 2.0, 4.0))
    assert values.tolist() == [1.5, 1.5, -0.25, -0.25]
    matrix = torch.cov(torch.stack([logprobs, advantages]), correction=0)
    assert values.mean().item() == pytest.approx(matrix[0, 1].item())
    assert covariances(tensor(), tensor(), tensor(0.0, 0.0, 0.0)).tolist() == []


@pytest.mark.parametrize(
    ("count", "share", "tokens"),
    [(10, 0.25, 2), (10, 0.29, 2), (100, 0.29, 29), (4, 1.0, 4), (10, 0.0002, 1), (20_000, 0.0002, 4), (0, 0.5, 1)],
)
def test_a_share_is_rounded_down_and_is_a_token_at_least(count, share, tokens):
    """In binary 0.29 * 100 is a little below 29."""
    assert share_of(count, share) == tokens


@pytest.mark.parametrize(("share", "chosen"), [(0.2, 1), (0.39, 1), (0.4, 2), (0.8, 4), (1.0, 5), (1e-9, 1)])
def test_the_highest_covariances_are_chosen(share, chosen):
    values = tensor(-0.5, 2.0, 0.1, 1.0, -3.0)
    above = values >= top_covariance_threshold(values, share)
    assert set(values[above].tolist()) == set(sorted(values.tolist(), reverse=True)[:chosen])


def test_ties_are_all_chosen_on_either_side_of_zero():
    values = tensor(-1.0, -1.0 - 5e-6, -1.0 - 2e-5, -2.0)
    assert (values >= top_covariance_threshold(values, 0.25)).tolist() == [True, True, False, False]
    assert (-values >= top_covariance_threshold(-values, 0.25)).tolist() == [False, False, False, True]
    ties = tensor(3.0, 3.0 - 1e-5, 3.0 - 1e-4)
    assert (ties >= top_covariance_threshold(ties, 0.1)).tolist() == [True, True, False]
    assert top_covariance_threshold(tensor(), 0.5) == math.inf


def test_so_many_are_drawn_as_asked_for_or_all():
    uniforms = tensor(0.4, 0.0, 0.9, 0.2)
    assert (uniforms <= draw_threshold(uniforms, 1)).tolist() == [False, True, False, False]
    assert (uniforms <= draw_threshold(uniforms, 2)).tolist() == [False, True, False, True]
    assert (uniforms <= draw_threshold(uniforms, 9)).all()
    assert not (uniforms <= draw_threshold(tensor(), 3)).any()


INDEX, LENGTHS = torch.tensor([0, 0, 1]), torch.tensor([2, 1])


def loss_and_gradient(chosen, **settings):
    """Of tokens with log-ratios 0.1, -0.2 and 0.5 and advantages 1, 1 and -2."""
    logprobs = tensor(-0.9, -2.2, -1.5).requires_grad_()
    objective = Objective(max_completion_length=4, importance_sampling_level="token", **settings)
    result = objective(
        logprobs, tensor(-1.0, -2.0, -2.0), tensor(1.0, 1.0, -2.0), INDEX, LENGTHS, chosen=torch.tensor(chosen)
    )
    return result, torch.autograd.grad(result.loss, logprobs)[0].tolist()


def test_clip_cov_leaves_chosen_tokens_without_a_gradient_and_the_denominator_as_it_is():
    result, gradient = loss_and_gradient([True, False, False], loss_type="clip_cov")
    assert result.loss.item() == pytest.approx(-math.exp(-0.2) + 2 * math.exp(0.5))
    assert gradient == pytest.approx([0.0, -math.exp(-0.2), 2 * math.exp(0.5)])
    assert [x.item() for x in result.metrics["covariance_frac"]] == [1, 3]
    assert [x.item() for x in result.metrics["clip_frac_high"]] == [0, 3]
    # With a width of 0.05 the first token, of ratio 1.105, is clipped anyway, and the third is not: A < 0.
    result, gradient = loss_and_gradient([False] * 3, loss_type="clip_cov", epsilon=0.05)
    assert gradient == pytest.approx([0.0, -math.exp(-0.2), 2 * math.exp(0.5)])
    assert [x.item() for x in result.metrics["clip_frac_high"]] == [1, 3]


def test_kl_cov_pulls_chosen_tokens_back_to_where_they_were():
    result, gradient = loss_and_gradient([True, True, False], loss_type="kl_cov", ppo_kl_coef=0.5)
    plain = -math.exp(0.1) - math.exp(-0.2) + 2 * math.exp(0.5)
    assert result.loss.item() == pytest.approx(plain + 0.5 * (0.1 + 0.2))
    assert gradient == pytest.approx([-math.exp(0.1) + 0.5, -math.exp(-0.2) - 0.5, 2 * math.exp(0.5)])
    assert [x.item() for x in result.metrics["covariance_frac"]] == [2, 3]
    assert "clip_frac_high" not in result.metrics


def test_a_token_that_is_not_chosen_has_no_penalty_even_if_its_ratio_is_infinite_or_nothing():
    logprobs, old = tensor(-1.0, -1.0), tensor(-1.0, math.inf)
    objective = Objective(max_completion_length=1, importance_sampling_level="token", loss_type="kl_cov")
    lengths = torch.ones(2, dtype=torch.long)
    loss = objective(logprobs, old, tensor(1.0, 1.0), torch.arange(2), lengths, chosen=torch.tensor([True, False])).loss
    assert loss.item() == -1.0


@pytest.mark.parametrize("loss", ["clip_cov", "kl_cov"])
def test_the_choice_is_not_left_out_where_a_program_calls_the_objective_itself(loss):
    objective = Objective(max_completion_length=4, importance_sampling_level="token", loss_type=loss)
    logprobs = tensor(-0.9, -2.2, -1.5)
    with pytest.raises(UserError, match=r"^objective.loss_type: the objective was called without chosen; give it$"):
        objective(logprobs, logprobs, logprobs, INDEX, LENGTHS)
