"""What gradient each estimate of the KL term has on average, by enumerating every token of a small vocabulary."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.objective.kl import kl_estimate

ESTIMATES = [(kind, weighted) for kind in ("k1", "k2", "k3") for weighted in (False, True)]


def log_policies(vocabulary: int = 6):
    """Logits of a policy, and log-probabilities of a reference and of an older policy."""
    generator = torch.Generator().manual_seed(0)
    logits, *others = (torch.randn(vocabulary, dtype=torch.float64, generator=generator) for _ in range(3))
    reference, older = (torch.log_softmax(x, -1) for x in others)
    return logits.requires_grad_(), reference, older


def average_gradient(kind, weighted, sampler, logits, reference):
    """Over tokens drawn from ``sampler``; None for the policy itself."""
    logprobs = torch.log_softmax(logits, -1)
    sampler = logprobs.detach() if sampler is None else sampler
    terms = kl_estimate(logprobs, reference, kind) * ((logprobs - sampler).exp() if weighted else 1.0)
    return torch.autograd.grad((sampler.exp() * terms).sum(), logits)[0]


def gradient(value, logits):
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize(("kind", "weighted"), ESTIMATES)
def test_the_gradient_on_policy_is_that_of_the_divergence_the_docs_name(kind, weighted):
    logits, reference, _ = log_policies()
    p = torch.log_softmax(logits, -1)
    to_reference = gradient((p.exp() * (p - reference)).sum(), logits)
    p = torch.log_softmax(logits, -1)
    from_reference = gradient((reference.exp() * (reference - p)).sum(), logits)
    p = torch.log_softmax(logits, -1)
    square = gradient((p.exp() * (p - reference).square() / 2).sum(), logits)
    expected = {
        ("k1", False): torch.zeros_like(logits),
        ("k1", True): to_reference,
        ("k2", False): to_reference,
        ("k2", True): square,
        ("k3", False): from_reference,
        ("k3", True): to_reference,
    }[kind, weighted]
    found = average_gradient(kind, weighted, None, logits, reference)
    assert (found - expected).norm() <= 1e-14
    assert to_reference.norm() > 0.1 and (square - to_reference).norm() > 0.1 * to_reference.norm()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_weighted_it_is_the_divergence_of_the_policy_whoever_sampled(kind):
    logits, reference, older = log_policies()
    on_policy = average_gradient(kind, True, None, logits, reference)
    assert (average_gradient(kind, True, older, logits, reference) - on_policy).norm() <= 1e-14
    assert (average_gradient(kind, False, older, logits, reference) - on_policy).norm() > 0.1 * on_policy.norm()
