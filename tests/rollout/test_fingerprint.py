"""The proof of an engine's weights: what it lets through and what it finds."""

from __future__ import annotations

import threading

import pytest
import torch
from peft.tuners.lora import Linear

from gspo_lightning.packing import flash
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout import TransformersEngine, WeightSyncError, weights
from gspo_lightning.rollout.fingerprint import PROBE_SAMPLING, Fingerprint, probe_logprobs, probe_prompt
from tests.support import make_completion, micro_policy


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


@pytest.mark.parametrize("work", ["probe", "merge"])
def test_products_of_another_thread_wait_while_torch_is_told_to_add_in_one_order(work, micro_model_dir, monkeypatch):
    """That setting is global, and on a GPU torch refuses products under it."""
    policy = PolicyLoader(str(micro_model_dir), lora=LoraSettings(r=2)).load()
    probe, completions, seen = probe_prompt(policy, 64), [make_completion([5, 6])], []
    if work == "probe":
        policy.register_forward_pre_hook(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled()))
        thread = threading.Thread(target=probe_logprobs, args=(policy, probe, completions))
    else:
        delta = Linear.get_delta_weight
        monkeypatch.setattr(
            Linear,
            "get_delta_weight",
            lambda *a: (seen.append(torch.are_deterministic_algorithms_enabled()), delta(*a))[1],
        )
        thread = threading.Thread(target=lambda: dict(weights.named_weights(policy, torch.float32)))
    with flash._one_order():
        thread.start()
        thread.join(0.5)
    thread.join()
    assert seen and not any(seen)
