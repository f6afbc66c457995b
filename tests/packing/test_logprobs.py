"""Log-probabilities and entropies from hidden states: values, gradients, chunks, precision."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.packing import linear_logprobs, logits_logprobs, logprobs
from gspo_lightning.packing.logprobs import _own_entry
from tests.support import relative_distance


def case(rows=13, hidden=6, vocabulary=31, dtype=torch.float64):
    h = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    w = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)
    return h, w, torch.randint(0, vocabulary, (rows,))


@pytest.mark.parametrize("vocabulary", [31, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_equals_log_softmax_of_all_logits(vocabulary, temperature, with_entropy, monkeypatch):
    h, w, targets = case(rows=40, vocabulary=vocabulary)
    monkeypatch.setitem(logprobs.SLICE_BYTES, "cpu", 128 * 8 * len(h))  # eight slices of 1000
    ours, entropy = linear_logprobs(h, w, targets, temperature=temperature, with_entropy=with_entropy)
    log_p = torch.log_softmax(h @ w.t() / temperature, dim=-1)
    expected = log_p.gather(1, targets[:, None]).squeeze(1)
    expected_entropy = -(log_p.exp() * log_p).sum(dim=-1) if with_entropy else torch.zeros_like(expected)
    g1, g2 = torch.randn(2, len(ours), dtype=torch.float64)
    gradients = torch.autograd.grad((ours * g1 + entropy * g2).sum(), [h, w])
    expected_gradients = torch.autograd.grad((expected * g1 + expected_entropy * g2).sum(), [h, w])
    assert relative_distance(ours, expected) < 1e-12
    assert (entropy - expected_entropy).abs().max() < 1e-12
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert relative_distance(a, b) < 1e-12


def test_entropies_of_whole_logits_keep_their_digits_under_autocast():
    logits, targets = 4 * torch.randn(20, 1000), torch.randint(0, 1000, (20,))
    wide = logits.double().requires_grad_()
    expected = logits_logprobs(wide, targets, 0.7, with_entropy=True)
    (expected_gradient,) = torch.autograd.grad(expected[1].sum(), wide)
    logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = logits_logprobs(logits, targets, 0.7, with_entropy=True)
    (gradient,) = torch.autograd.grad(ours[1].sum(), logits)
    for found, exact in zip((*ours, gradient), (*expected, expected_gradient), strict=True):
        assert found.dtype == torch.float32 and relative_distance(found.double(), exact) < 1e-6


def test_a_frozen_head_gets_no_gradient():
    h, w, targets = case()
    frozen = w.detach()
    (ours,) = torch.autograd.grad(linear_logprobs(h, frozen, targets)[0].sum(), [h])
    expected = torch.autograd.grad(torch.log_softmax(h @ w.t(), -1).gather(1, targets[:, None]).sum(), [h])[0]
    assert relative_distance(ours, expected) < 1e-12


def test_under_bfloat16_autocast_the_forward_is_that_of_float32():
    h, w, targets = case(rows=50, hidden=64, vocabulary=300, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = linear_logprobs(h, w, targets)
    expected, _ = linear_logprobs(h, w, targets)
    assert torch.equal(ours, expected)


def test_under_bfloat16_autocast_the_gradient_of_a_confident_token_keeps_its_size():
    # With a normaliser from float32 and logits from bfloat16, 1 - p of a confident token would be wrong several times over.
    torch.manual_seed(3)
    w = torch.randn(300, 64)
    h = (w[7] * 0.35)[None].repeat(20, 1).requires_grad_()
    targets = torch.full((20,), 7)
    expected = torch.autograd.grad(linear_logprobs(h, w, targets)[0].sum(), [h])[0]
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = linear_logprobs(h, w, targets)
    ours = torch.autograd.grad(value.sum(), [h])[0]
    assert value.exp().min() > 0.99
    assert relative_distance(ours, expected) < 0.1


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_of_drawn_tokens_are_nearer_than_those_of_a_softmax_over_bfloat16_logits(with_entropy, temperature):
    # Logits near 30 come in steps of 0.125 once they are rounded; those of likely tokens are shifted near 0 before.
    h, w, _ = case(rows=64, hidden=64, vocabulary=3000, dtype=torch.float32)
    with torch.no_grad():
        h.mul_(0.8)
        logits = h.double() @ w.double().t() / temperature
        targets = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
    g = torch.randn(2, 64)

    def gradient(logprobs, entropy):
        return torch.autograd.grad((logprobs * g[0] + with_entropy * entropy * g[1]).sum(), [h, w])

    def of(logits):
        log_p = torch.log_softmax(logits / temperature, -1)
        return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)

    exact = gradient(*of(h.double() @ w.double().t()))
    rounded = gradient(*of((h.bfloat16() @ w.bfloat16().t()).float()))
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradient(*linear_logprobs(h, w, targets, temperature=temperature, with_entropy=with_entropy))
    assert logits.abs().max() > 20
    for a, b, there in zip(ours, rounded, exact, strict=True):
        assert relative_distance(a, there) < relative_distance(b, there)


def test_a_target_outside_of_the_vocabulary_is_refused():
    h, w, targets = case()
    for wrong in (-1, len(w)):
        with pytest.raises(RuntimeError, match="outside of the vocabulary"):
            linear_logprobs(h, w, targets.clone().fill_(wrong))


def test_a_confident_token_keeps_its_digits():
    # Its log-probability is what is left of 1: the difference of two logits near 100 would have lost it.
    w = torch.zeros(1000, 2)
    w[999, 0], w[:, 1] = 17.0, 90.0
    value, _ = linear_logprobs(torch.ones(1, 2), w, torch.tensor([999]))
    exact = -torch.log1p(999 * torch.exp(torch.tensor(-17.0, dtype=torch.float64)))
    assert value.item() == pytest.approx(exact.item(), abs=3e-7)  # sums near 1 go in steps of 1.2e-7


def test_no_rows_give_no_logprobs_and_zero_gradient():
    h, w, _ = case(rows=0)
    ours, _ = linear_logprobs(h, w, torch.empty(0, dtype=torch.long))
    assert ours.shape == (0,)
    assert torch.autograd.grad(ours.sum(), [w])[0].abs().sum() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_large_logits_in_bfloat16_give_the_gradient_of_float64(temperature):
    # Normalisers near 200 and 400 are rounded by up to 0.5 and 1 before they are taken off: all of it must come back.
    torch.manual_seed(4)
    h, w, g, targets = torch.randn(40, 64), torch.randn(500, 64) * 0.1, torch.randn(40), torch.randint(500, (40,))
    h[:, 0], w[:, 0] = 14.0, 14.0
    h, w = (x.bfloat16().float().requires_grad_() for x in (h, w))  # numbers that products in bfloat16 take as they are
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = linear_logprobs(h, w, targets, temperature=temperature)
    ours = torch.autograd.grad((value * g).sum(), [h, w])
    h64, w64 = (x.detach().double().requires_grad_() for x in (h, w))
    exact = torch.log_softmax(h64 @ w64.t() / temperature, -1).gather(1, targets[:, None]).squeeze(1)
    expected = torch.autograd.grad((exact * g.double()).sum(), [h64, w64])
    for a, b in zip(ours, expected, strict=True):
        # The constant's own gradient is a sum that cancels.
        assert relative_distance(a[:, 1:], b[:, 1:]) < 0.01


def test_the_entry_of_a_target_keeps_the_digits_of_the_forward_in_a_narrow_gradient():
    logprobs = torch.tensor([-9.0, -6.83, -0.7, -1e-3, -1e-9, 0.0])
    rest = torch.tensor([0.031, -0.0284, 0.0611, 0.007, -0.05, 0.02])
    rounded, factor = _own_entry(logprobs, rest, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded * factor, torch.expm1(logprobs), rtol=2e-7, atol=0)
    # All other entries of the row are p exp(rest): they are off by one rounding at most.
    assert torch.allclose(factor * rest.exp(), torch.ones(6), rtol=2**-8, atol=0)
    assert _own_entry(logprobs, 0 * rest, torch.float32)[1].eq(1).all()
