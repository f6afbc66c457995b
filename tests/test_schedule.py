"""Learning-rate factors, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gspo_lightning.schedule import Schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("constant"), [1, 1, 1, 1, 1]),
        (Schedule("constant", warmup_ratio=0.4), [0.5, 1, 1, 1, 1]),
        (Schedule("linear"), [1, 0.8, 0.6, 0.4, 0.2]),
        (Schedule("linear", warmup_ratio=0.2, min_ratio=0.5), [1, 1, 0.875, 0.75, 0.625]),
        (Schedule("cosine"), [0.5 * (1 + math.cos(math.pi * n / 5)) for n in range(5)]),
    ],
)
def test_factors_of_five_steps(schedule, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=2.0)
    scheduler = schedule.build(optimizer, 5)
    rates = []
    for _ in range(5):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2.0 * factor for factor in expected])
