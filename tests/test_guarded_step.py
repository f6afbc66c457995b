"""Clipping: a gradient above the norm is scaled down to it, one below is left as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gspo_lightning.guarded_step import GuardedStep


@pytest.mark.parametrize(
    ("gradient", "step"),
    [((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4))],
    ids=["above", "below"],
)
def test_a_step_has_at_most_the_clipping_norm(gradient, step):
    weights = [nn.Parameter(torch.zeros(())) for _ in gradient]
    for weight, value in zip(weights, gradient, strict=True):
        weight.grad = torch.tensor(value)
    norm = GuardedStep(1.0, 3)(torch.optim.SGD(weights, lr=1.0), weights, rollout=1)
    assert norm.item() == pytest.approx(torch.tensor(gradient).norm().item(), rel=1e-6)
    assert [-w.item() for w in weights] == pytest.approx(step, rel=2e-6)
