"""VESPO: its weight, against closed forms, TRL's own numbers, ratios beyond any dtype, and corrections inside its ratio."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from gspo_lightning.objective import LossSpec, Objective
from gspo_lightning.objective.mismatch import MismatchCorrection

DEFAULTS = (2.0, 3.0, 3.0, 2.0)
"""k and lambda for advantages of 0 or more, then for negative ones."""

OTHERS = (1.5, 0.75, 2.5, 1.25)
"""Exact in float32, to which TRL rounds them in float64 too."""

# Printed by GRPOTrainer.get_gamma_weights of TRL 1.16.0 in float64: log-ratios of the tokens, advantage, weights of a
# correction, (k, lambda) of either sign, the weight of the loss.
OF_TRL = [
    ([0.1, -0.3, 0.25], 1.5, None, DEFAULTS, 0.9476090188917151),
    ([0.1, -0.3, 0.25], -1.5, None, DEFAULTS, 1.0486019567855367),
    ([0.1, -0.3, 0.25], 1.5, None, OTHERS, 1.037222718077331),
    ([0.4, 0.5, 0.3], 0.7, None, DEFAULTS, 0.01045838982928397),
    ([0.4, 0.5, 0.3], -0.7, None, DEFAULTS, 0.35337203784481247),
    ([0.4, 0.5, 0.3], -0.7, None, OTHERS, 1.1050094053686357),
    ([-0.6, -0.9, -0.2], 2.0, None, DEFAULTS, 0.3874956825108837),
    ([-0.6, -0.9, -0.2], -2.0, None, DEFAULTS, 0.03126152883529734),
    ([0.2, -0.1, 0.3], 0.5, [1.2, 0.9, 1.5], DEFAULTS, 0.08329092060836653),
    ([0.2, -0.1, 0.3], -0.5, [1.2, 0.9, 1.5], DEFAULTS, 0.8300796884455302),
    ([0.2, -0.1, 0.3], -0.5, [1.2, 0.9, 1.5], OTHERS, 1.5451490224943578),
    ([-0.4, 0.3, 0.0], -1.0, [0.5, 2.0, 1.3], DEFAULTS, 1.1439823980381858),
    ([400.0, 300.0, 300.0], 1.0, None, DEFAULTS, 0.0),
]


def call(d, advantages, correction=None, settings=DEFAULTS, lengths=None, dtype=torch.float64, spec=None):
    """(loss of each token, gradient of each log-probability); ``correction``: trainer over sampler of each token."""
    keys = ("k_positive", "lambda_positive", "k_negative", "lambda_negative")
    objective = Objective(
        max_completion_length=8, importance_sampling_level="token", loss_type=spec or "vespo",
        mismatch=None if correction is None else MismatchCorrection("token", "mask", 2.0, 0.4),
        **dict(zip(keys, settings, strict=True)),
    )  # fmt: skip
    old = torch.linspace(-1.0, -2.0, len(d), dtype=dtype)
    sampler = None if correction is None else old - torch.tensor(correction, dtype=dtype).log()
    logprobs = (old + torch.tensor(d, dtype=dtype)).requires_grad_()
    lengths = torch.tensor(lengths or [len(d)])
    index = torch.arange(len(lengths)).repeat_interleave(lengths)
    advantages = torch.tensor(advantages, dtype=dtype)
    result = objective(logprobs, old, advantages, index, lengths, sampler_logprobs=sampler)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    return result.loss.item(), gradient.tolist(), logprobs.detach(), result.metrics


@pytest.mark.parametrize(("d", "advantage", "correction", "settings", "weight"), OF_TRL)
def test_the_weight_is_the_one_of_trl(d, advantage, correction, settings, weight):
    loss, gradient, logprobs, _ = call(d, [advantage] * 3, correction, settings)
    assert gradient == pytest.approx([-weight * advantage] * 3, rel=1e-12)
    assert loss == pytest.approx(-weight * advantage * logprobs.sum().item(), rel=1e-12)


def test_each_token_has_the_weight_of_its_advantages_sign_by_the_ratio_of_its_sequence():
    """Two completions whose turns have rewards: d sums to 0.3 and to -0.25."""
    d, lengths, advantages = [0.5, -0.4, 0.2, -0.1, -0.15], [3, 2], [1.5, -0.5, 0.0, -2.0, 0.25]

    def phi(total, k, decay):  # the density of a gamma distribution, but for its scale
        return math.exp(total) ** k * math.exp(-decay * math.exp(total)) / math.exp(-decay)

    for settings in (DEFAULTS, OTHERS, (1.3, 0.7, 2.1, 1.1)):
        above, below = settings[:2], settings[2:]
        weights = [phi(0.3, *above), phi(0.3, *below), phi(0.3, *above), phi(-0.25, *below), phi(-0.25, *above)]
        loss, gradient, logprobs, _ = call(d, advantages, settings=settings, lengths=lengths)
        expected = [-w * a for w, a in zip(weights, advantages, strict=True)]
        assert gradient == pytest.approx(expected, rel=1e-12)
        assert loss == pytest.approx(np.dot(expected, logprobs.numpy()), rel=1e-12)


def test_the_weight_is_largest_where_the_ratio_is_k_over_lambda():
    def weight(ratio):
        return -call([math.log(ratio)], [1.0], settings=(3.0, 2.0, 1.0, 1.0))[1][0]

    assert weight(1.0) == pytest.approx(1.0, abs=1e-15)
    assert weight(1.5) == pytest.approx(1.5**3 / math.e, rel=1e-14)
    assert max(weight(1.49), weight(1.51)) < weight(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("total", [-1e6, -1000.0, -400.0, 50.0, 95.0, 1000.0, 1e6])
def test_ratios_beyond_any_dtype_have_weight_0_and_a_gradient_of_0(total, dtype):
    loss, gradient, _, _ = call([total / 2, total / 2], [1.0, -1.0], dtype=dtype)
    assert loss == 0.0 and gradient == [0.0, 0.0]


def test_a_correction_is_a_factor_of_the_ratio_and_of_nothing_else():
    """W = 0.8 * 1.25 * 1.5 = 1.5; the loss is not multiplied by 1.25 and 1.5 once more."""
    _, gradient, _, metrics = call([math.log(0.8), 0.0], [-1.0, -1.0], correction=[1.25, 1.5])
    assert gradient == pytest.approx([1.5**3 / math.e] * 2, rel=1e-13)
    assert [(s.item(), n.item()) for s, n in (metrics["mismatch/weight_mean"], metrics["mismatch/masked_frac"])] == [
        (pytest.approx(2.75), 2.0), (0.0, 2.0),
    ]  # fmt: skip


def test_a_masked_token_leaves_out_its_sequence_and_no_other():
    loss, gradient, logprobs, metrics = call([0.1, 0.2, 0.0], [1.0, -1.0, 1.0], [1.0, 0.25, 1.0], lengths=[2, 1])
    assert gradient == [0.0, 0.0, -1.0] and loss == pytest.approx(-logprobs[2].item())
    assert metrics["mismatch/masked_frac"] == (1, 3)


def test_a_capped_weight_goes_into_the_ratio_as_capped():
    objective = Objective(
        max_completion_length=8, importance_sampling_level="token", loss_type="vespo",
        mismatch=MismatchCorrection("token", "truncate", 1.5),
    )  # fmt: skip
    logprobs = torch.full((2,), -1.0, dtype=torch.float64, requires_grad=True)
    old, sampler = logprobs.detach(), logprobs.detach() - torch.tensor([3.0, 1.0]).double().log()
    result = objective(
        logprobs, old, torch.tensor([-1.0, -1.0]).double(), torch.zeros(2, dtype=torch.long), torch.tensor([2]),
        sampler_logprobs=sampler,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert gradient.tolist() == pytest.approx([1.5**3 / math.e] * 2, rel=1e-13)
    assert metrics_of(result.metrics, "mismatch/capped_frac") == 0.5


def metrics_of(metrics, name):
    total, count = metrics[name]
    return (total / count).item()


def test_a_loss_of_ones_own_gets_the_correction_if_its_spec_says_that_it_corrects_itself():
    seen = []

    def own(x):
        seen.append(x.correction)
        return -x.ratio * x.advantages

    spec = LossSpec(own, "tokens", None, (), ("token",), corrects_itself=True)
    settings = {"settings": DEFAULTS, "correction": [0.5, 1.5], "d": [0.0, 0.0], "advantages": [1.0, -1.0]}
    assert call(**settings, spec=spec)[1] == [-1.0, 1.0]  # not multiplied
    assert seen.pop().tolist() == pytest.approx([0.5, 1.5])
    assert call(**settings, spec=dataclasses.replace(spec, corrects_itself=False))[1] == pytest.approx([-0.5, 1.5])
    assert seen == [None]
    assert call(**settings | {"correction": None}, spec=spec)[1] == [-1.0, 1.0] and seen[-1] is None
