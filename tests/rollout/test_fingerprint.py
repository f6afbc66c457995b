"""The proof of an engine's weights: what it lets through and what it finds."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.rollout import TransformersEngine, WeightSyncError
from gspo_lightning.rollout.fingerprint import PROBE_SAMPLING, Fingerprint, probe_prompt
from tests.support import micro_policy


def drift(policy, size):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def test_weights_that_never_arrive_are_found_however_small_the_steps(micro_model_dir):
    """Each step moves the trainer's probe by less than what a standstill may be; together they do not."""
    policy = micro_policy(micro_model_dir)
    probe, fingerprint = probe_prompt(policy, 64), Fingerprint(0.25)
    (old,) = TransformersEngine().generate(policy, [probe], PROBE_SAMPLING, 0).completions
    moved = [fingerprint.check(policy, probe, old, "engine")]
    with pytest.raises(WeightSyncError, match="repeats bit for bit although the trainer's moved by 0.0001"):
        for _ in range(200):
            drift(policy, 5e-7)
            moved.append(fingerprint.check(policy, probe, old, "engine"))
    steps = [after - before for before, after in zip(moved, moved[1:], strict=False)]
    assert len(steps) >= 3 and max(steps) < 1e-4


def test_an_engine_that_follows_or_is_new_may_repeat_itself(micro_model_dir):
    policy = micro_policy(micro_model_dir)
    probe, fingerprint = probe_prompt(policy, 64), Fingerprint(0.25)
    for _ in range(3):
        (fresh,) = TransformersEngine().generate(policy, [probe], PROBE_SAMPLING, 0).completions
        assert fingerprint.check(policy, probe, fresh, "engine") < 1e-6
        drift(policy, 1e-3)
    fingerprint.check(policy, probe, fresh, "another")
    fingerprint.forget("another")
    drift(policy, 1e-3)
    fingerprint.check(policy, probe, fresh, "another")
