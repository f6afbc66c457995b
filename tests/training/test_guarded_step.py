"""Clipping: a gradient above the norm is scaled down to it, one below is left as it is. Decay: of matrices alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gspo_lightning.training.guarded_step import GuardedStep, parameter_groups


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


def test_weights_decay_in_matrices_and_not_in_vectors():
    layers = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    layers[2].weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in layers.named_parameters()}
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    torch.optim.AdamW(parameter_groups(layers.parameters()), lr=0.1, weight_decay=0.5).step()
    after = dict(layers.named_parameters())
    assert torch.equal(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    assert all(torch.equal(after[name], before[name]) for name in before if name != "0.weight")
