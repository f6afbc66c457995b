"""Corrections of the sampler's mismatch, against weights computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_lightning.config import checks
from gspo_lightning.errors import UserError
from gspo_lightning.objective import Objective
from gspo_lightning.objective.mismatch import MismatchCorrection
from tests.conf.test_groups import resolved

# Two completions of two tokens and one; trainer over sampler: 2, 3/2 and 1/4.
SAMPLER = torch.tensor([0.2, 0.4, 0.8], dtype=torch.float64).log()
TRAINER = torch.tensor([0.4, 0.6, 0.2], dtype=torch.float64).log()
INDEX, LENGTHS = torch.tensor([0, 0, 1]), torch.tensor([2, 1])
ROOT3 = math.sqrt(3.0)


@pytest.mark.parametrize(
    ("level", "how", "low", "high", "weights", "acted", "mean"),
    [
        ("token", "truncate", 0.0, 1.75, [1.75, 1.5, 0.25], 1 / 3, 3.75 / 3),
        ("token", "mask", 0.5, 1.75, [0.0, 1.5, 0.0], 2 / 3, 3.75 / 3),
        ("sequence", "truncate", 0.0, 2.5, [2.5, 2.5, 0.25], 1 / 2, 3.25 / 2),
        ("sequence", "mask", 0.0, 2.5, [0.0, 0.0, 0.25], 1 / 2, 3.25 / 2),
        ("sequence_mean", "truncate", 0.0, 1.5, [1.5, 1.5, 0.25], 1 / 2, (ROOT3 + 0.25) / 2),
        ("sequence_mean", "mask", 0.5, 2.0, [ROOT3, ROOT3, 0.0], 1 / 2, (ROOT3 + 0.25) / 2),
    ],
)
def test_weights_and_raw_metrics(level, how, low, high, weights, acted, mean):
    found, metrics = MismatchCorrection(level, how, high, low)(TRAINER, SAMPLER, INDEX, LENGTHS)
    assert found.tolist() == pytest.approx(weights, abs=1e-14)
    values = {name: (total / count).item() for name, (total, count) in metrics.items()}
    name = "mismatch/capped_frac" if how == "truncate" else "mismatch/masked_frac"
    assert values == pytest.approx({"mismatch/weight_mean": mean, name: acted}, abs=1e-14)


def test_the_weight_multiplies_the_policy_term_and_not_the_kl_term():
    """grpo, sequence mean: (-(1.75 A1 + 1.5 A1) / 2 - 0.25 A2) + beta (KL terms) on ratio 1."""
    objective = Objective(
        max_completion_length=4, importance_sampling_level="token", beta=0.1, kl_estimator="k1",
        mismatch=MismatchCorrection("token", "truncate", 1.75),
    )  # fmt: skip
    logprobs = TRAINER.clone().requires_grad_()
    advantages = torch.tensor([2.0, 2.0, -1.0], dtype=torch.float64)
    reference = TRAINER - 0.5
    result = objective(logprobs, TRAINER, advantages, INDEX, LENGTHS, ref_logprobs=reference, sampler_logprobs=SAMPLER)
    expected = -(1.75 + 1.5) * 2.0 / 2 + 0.25 + 0.1 * (0.5 + 0.5)
    assert result.loss.item() == pytest.approx(expected, abs=1e-13)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert gradient.tolist() == pytest.approx([-1.75 + 0.05, -1.5 + 0.05, 0.25 + 0.1], abs=1e-13)


def test_a_sampler_that_is_the_trainer_changes_nothing():
    for level in ("token", "sequence", "sequence_mean"):
        weights, _ = MismatchCorrection(level, "mask", 1.01, 0.99)(TRAINER, TRAINER, INDEX, LENGTHS)
        assert weights.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("how", ["truncate", "mask"])
def test_a_weight_at_a_bound_is_within_it(how):
    correction = MismatchCorrection("token", how, 1.0, 1.0 if how == "mask" else 0.0)
    weights, metrics = correction(TRAINER, TRAINER, INDEX, LENGTHS)
    assert weights.tolist() == [1.0, 1.0, 1.0]
    assert [total.item() for total, _ in metrics.values()] == [3.0, 0.0]


@pytest.mark.parametrize(
    ("how", "low", "high", "message"),
    [
        ("mask", 0.5, 0.9, "<= high"),
        ("mask", 1.1, 2.0, "<= 1"),
        ("mask", -0.1, 2.0, "low at least 0"),
        ("truncate", 0.5, 2.0, "low=0.5 has no effect"),
    ],
)
def test_bounds_that_cannot_be_meant_are_refused(how, low, high, message):
    with pytest.raises(UserError, match=message):
        MismatchCorrection("token", how, high, low)


@pytest.mark.parametrize("setting", ["top_p=0.9", "top_k=20", "min_p=0.1"])
def test_a_correction_is_refused_where_the_sampler_leaves_tokens_out(setting):
    with pytest.raises(UserError, match=rf"rollout.{setting} contradicts objective.mismatch.*mismatch=none"):
        checks.check(resolved("mismatch=token_truncate", f"rollout.{setting}"))
    checks.check(resolved(f"rollout.{setting}"))
