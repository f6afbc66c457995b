"""An architecture that packing does not understand is refused before it trains."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.packing import blocks
from gspo_lightning.policy.check import TOLERANCE, PackingMismatchError, check_packing
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from tests.support import micro_policy


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_a_known_architecture_passes(dtype, bound, micro_model_dir):
    assert check_packing(micro_policy(micro_model_dir, dtype)) < bound


def test_a_trained_model_in_bfloat16_passes():
    """Thirty layers of rounding; padding more or less changes nothing and says nothing about it."""
    distance = check_packing(PolicyLoader("bundled:smollm2-135m-instruct", dtype="bfloat16").load())
    assert TOLERANCE[torch.float32] < distance < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_model_in_four_bits_passes(dtype):
    """Its products are in bfloat16 whatever dtype the rest has; judged as float32 it would run padded."""
    policy = PolicyLoader("bundled:smollm2-135m-instruct", dtype, lora=LoraSettings(r=2), quantization="nf4").load()
    assert TOLERANCE[torch.float32] < check_packing(policy) < 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_to_the_wrong_tokens_is_refused(dtype, micro_model_dir, monkeypatch):
    def blind(positions, segments, queries, keys, window):  # completions see each other
        return positions[queries][..., None] >= positions[keys][..., None, :]

    monkeypatch.setattr(blocks, "may_look", blind)
    with pytest.raises(PackingMismatchError, match="LlamaForCausalLM: packed log-probabilities are .* away"):
        check_packing(micro_policy(micro_model_dir, dtype))


def test_a_model_with_another_attention_is_said_to_have_one(micro_model_dir):
    """As one that a program loaded by itself; its architecture has nothing to do with it."""
    policy = micro_policy(micro_model_dir)
    policy.base_model.set_attn_implementation("sdpa")
    with pytest.raises(PackingMismatchError, match="^LlamaForCausalLM: its attention is sdpa, which knows nothing of"):
        check_packing(policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_scales_its_logits_is_refused(dtype, micro_model_dir):
    policy = micro_policy(micro_model_dir, dtype)
    original = policy.base_model.lm_head.forward
    policy.base_model.lm_head.forward = lambda hidden: 1.1 * original(hidden)
    with pytest.raises(PackingMismatchError):
        check_packing(policy)


def test_logits_with_a_soft_cap_are_refused_also_where_they_are_too_small_to_show_it(micro_model_dir):
    policy = micro_policy(micro_model_dir, torch.float32)
    head = policy.base_model.lm_head
    original = head.forward
    with torch.no_grad():
        head.weight.mul_(0.1)
    head.forward = lambda hidden: 30 * torch.tanh(original(hidden) / 30)
    assert check_packing(policy) < TOLERANCE[torch.float32]
    policy.base_model.config.final_logit_softcapping = 30.0
    with pytest.raises(PackingMismatchError, match="LlamaForCausalLM: its logits are soft-capped, which packing does"):
        check_packing(policy)
