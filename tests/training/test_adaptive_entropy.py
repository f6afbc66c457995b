"""Adaptive entropy control in a run: it is part of a checkpoint, and keeps the entropy near its target."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TARGET = 4.2
CONTROL = {"entropy_target": TARGET, "entropy_coef": 0.2, "entropy_coef_delta": 0.15}


def run(folder, rollouts, ckpt=None, save=None, **objective):
    """Metrics of the last rollout, weights and control of a run of two steps a rollout."""
    settings = Settings(
        objective={**CONTROL, **objective},
        optimizer=functools.partial(torch.optim.Adam, lr=3e-3),
        rollouts=rollouts,
        update={"num_minibatches": 2},
    )
    module, fit = build_module(folder, settings), trainer()
    # The part of a run that is resumed: what it was trained on does not depend on how far it goes.
    fit.fit(module, Batches(scripted_prompts(), rollouts).loader(), ckpt_path=ckpt)
    if save is not None:
        fit.save_checkpoint(save)
    return module


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


def test_a_resumed_run_is_the_unbroken_one_to_the_bit(micro_model_dir, tmp_path):
    whole = run(micro_model_dir, 6)
    begun = run(micro_model_dir, 3, save=tmp_path / "x.ckpt")
    assert begun.entropy_control.entropy != float("inf")
    resumed = run(micro_model_dir, 6, ckpt=tmp_path / "x.ckpt")
    assert torch.equal(flat(resumed), flat(whole))
    assert resumed.entropy_control == whole.entropy_control != begun.entropy_control
    assert resumed.last_metrics["entropy_coef"] == whole.last_metrics["entropy_coef"]


def test_the_entropy_stays_near_its_target_where_it_would_fall(micro_model_dir):
    left_alone = run(micro_model_dir, 16, entropy_target=None, entropy_coef=1e-9, entropy_coef_delta=0.005)
    held = run(micro_model_dir, 16)
    assert left_alone.last_metrics["entropy"] < TARGET - 1
    assert abs(held.last_metrics["entropy"] - TARGET) < 0.3
    assert "entropy_coef" not in left_alone.last_metrics


def test_a_target_that_a_second_fit_brings_begins_with_the_weight_beside_it(micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    trainer().fit(module, Batches(scripted_prompts()).loader())
    module.objective = replace(module.objective, **CONTROL)
    module.max_rollouts = 2
    trainer().fit(module, Batches(scripted_prompts()).loader())
    moved = module.entropy_control.coefficient - CONTROL["entropy_coef"]
    assert abs(moved) == pytest.approx(CONTROL["entropy_coef_delta"])
