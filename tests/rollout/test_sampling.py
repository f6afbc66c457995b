"""Drawing tokens: the distribution is right, filters keep what they say, and draws depend on their row alone."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_lightning.rollout import sampling
from gspo_lightning.rollout.sampling import invert_cdf, row_uniforms, sample
from gspo_lightning.types import SamplingParams


def params(**changes):
    return SamplingParams(**{"num_generations": 2, "max_completion_length": 4, **changes})


def test_the_smallest_index_whose_cumulative_probability_exceeds_the_uniform():
    probabilities = torch.tensor([[0.1, 0.0, 0.2, 0.7]]).repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.99999], dtype=torch.float64)
    assert invert_cdf(probabilities, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [5, 192, 193, 49152])
def test_inverting_equals_a_plain_scan_in_float64(size):
    probabilities = torch.softmax(torch.randn(64, size) * 3, dim=-1)
    uniforms = torch.rand(64, dtype=torch.float64)
    cdf = probabilities.double().cumsum(-1)
    expected = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True).squeeze(1)
    drawn = invert_cdf(probabilities, uniforms)
    # Block sums are in float32: a uniform within 1e-6 of a boundary may fall on its other side.
    off = drawn != expected
    assert ((cdf.gather(1, expected[:, None]).squeeze(1) - uniforms)[off].abs() < 1e-5).all() or not off.any()
    assert off.sum() <= 1


def test_tokens_of_probability_zero_are_never_drawn():
    probabilities = torch.zeros(200, 1000)
    probabilities[:, 400:410] = 0.1
    uniforms = torch.linspace(0, 1 - 1e-12, 200, dtype=torch.float64)
    drawn = invert_cdf(probabilities, uniforms)
    assert drawn.min() >= 400 and drawn.max() < 410


def test_frequencies_and_logprobs_follow_the_tempered_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(40_000, 1)
    tokens, logprobs = sample(logits, torch.rand(40_000, dtype=torch.float64), params(temperature=0.5))
    expected = torch.softmax(torch.tensor([4.0, 2.0, 0.0, -2.0]), 0)
    frequencies = torch.bincount(tokens, minlength=4) / 40_000
    assert (frequencies - expected).abs().max() < 4 * math.sqrt(0.25 / 40_000)
    assert torch.allclose(logprobs, expected.log()[tokens], atol=1e-6)


def test_temperature_zero_is_greedy_with_plain_logprobs():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logprobs = sample(logits, torch.zeros(1, dtype=torch.float64), params(temperature=0.0))
    assert tokens.item() == 1
    assert logprobs.item() == pytest.approx(torch.log_softmax(logits[0], 0)[1].item())


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.7}, {0, 1}),  # 0.6439 alone is below 0.7, so the second is needed
        ({"top_p": 0.6}, {0}),
        ({"min_p": 0.2}, {0, 1}),  # 0.6439 * 0.2 = 0.129; the second has 0.2369, the third 0.0871
        ({"top_k": 3, "top_p": 0.99}, {0, 1, 2}),
    ],
)
def test_filters_keep_exactly_these_tokens_and_renormalise(changes, kept):
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).repeat(4000, 1)
    tokens, logprobs = sample(logits, torch.rand(4000, dtype=torch.float64), params(**changes))
    assert set(tokens.tolist()) == kept
    raw = torch.softmax(logits[0], 0)
    expected = (raw / raw[sorted(kept)].sum()).log()
    assert torch.allclose(logprobs, expected[tokens], atol=1e-6)


@pytest.mark.parametrize(
    ("halvings", "changes", "kept"),
    [
        ([0.0, 0.0, 0.0, 0.0], {"top_p": 0.5}, 2),  # two have the mass
        ([0.0, 1.0, 1.0], {"top_k": 2}, 3),  # those as likely as the last stay
        ([1.0, 0.0, 1.0], {"min_p": 0.5}, 3),
        ([1.0, 0.0, 1.0], {"min_p": 1.0}, 1),
        ([1.0, 0.0, 1.0], {"top_k": 1}, 1),
    ],
)
def test_what_lies_at_the_bound_of_a_filter(halvings, changes, kept):
    """Each token is as likely as the likeliest, or half as likely, to the bit."""
    scores = torch.tensor([halvings]) * torch.tensor(0.5).log()
    found = sampling.keep_likely(scores, params(**changes))
    assert found.isfinite().sum() == kept
    assert torch.equal(found[found.isfinite()], scores[found.isfinite()])


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[2.0, -1.0, 1.5, 0.5]])
    seen = torch.tensor([[True, True, False, True]])
    tokens, logprobs = sample(
        logits, torch.zeros(1, dtype=torch.float64), params(temperature=0.0, repetition_penalty=2.0), seen
    )
    assert tokens.item() == 2
    assert logprobs.item() == pytest.approx(torch.log_softmax(torch.tensor([1.0, -2.0, 1.5, 0.25]), 0)[2].item())


def test_uniforms_belong_to_seed_prompt_and_generation():
    base = row_uniforms(1, "task:3", 0, 8)
    assert torch.equal(base, row_uniforms(1, "task:3", 0, 8))
    assert torch.equal(base[:5], row_uniforms(1, "task:3", 0, 5))
    for other in (row_uniforms(2, "task:3", 0, 8), row_uniforms(1, "task:4", 0, 8), row_uniforms(1, "task:3", 1, 8)):
        assert not torch.equal(base, other)


@pytest.mark.parametrize("size", [1, 5, 193, 4099])
def test_where_cumsum_is_refused_the_same_tokens_are_drawn_without_it(size, monkeypatch):
    """On a GPU under ``trainer.deterministic=true``, which this stands in for."""
    logits, uniforms = torch.randn(64, size) * 3, torch.rand(64, dtype=torch.float64)
    expected = sample(logits, uniforms, params(top_p=0.9))

    def refused(*args, **kwargs):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")

    monkeypatch.setattr(sampling, "_cumsum_is_refused", lambda values: True)
    monkeypatch.setattr(torch.Tensor, "cumsum", refused)
    tokens, logprobs = sample(logits, uniforms, params(top_p=0.9))
    assert tokens.tolist() == expected[0].tolist()
    torch.testing.assert_close(logprobs, expected[1], rtol=0, atol=0)


def test_cumsum_is_refused_on_a_gpu_under_strict_determinism_alone():
    on_gpu, here = (type("Values", (), {"is_cuda": cuda})() for cuda in (True, False))
    assert not sampling._cumsum_is_refused(on_gpu)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert not sampling._cumsum_is_refused(on_gpu)
    torch.use_deterministic_algorithms(True)
    assert sampling._cumsum_is_refused(on_gpu) and not sampling._cumsum_is_refused(here)


def test_the_bound_of_min_p_is_exact_where_new_tensors_are_in_bfloat16():
    """As under bf16-true, whose numbers next to log(0.05) are -2.984 and -3."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        kept = sampling.keep_likely(torch.tensor([[0.0, math.log(0.0499)]], dtype=torch.float32), params(min_p=0.05))
    finally:
        torch.set_default_dtype(before)
    assert kept.isfinite().tolist() == [[True, False]]
