"""A base in 4 bits with an adapter, on a CPU: what it computes, that evaluation leaves it alone, and that only the adapter moves."""

from __future__ import annotations

import functools
import logging
import warnings

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy import load
from gspo_lightning.policy.export import export_policy
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout.weights import check_base
from tests.scripted import Settings, build_module, update_of
from tests.support import random_groups, relative_distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def policy_of(folder, quantization="nf4"):
    policy = PolicyLoader(str(folder), lora=LoraSettings(r=4), quantization=quantization).load()
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(policy.named_parameters()):
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def packed_row(device="cpu"):
    return pack(random_groups([(5, [4, 7]), (9, [6])], 90), torch.device(device))


def logprobs_and_gradient(policy):
    policy.zero_grad()
    logprobs, _ = policy(packed_row())
    logprobs.sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


def test_evaluation_in_between_changes_neither_logprobs_nor_gradients(micro_model_dir):
    """bitsandbytes would repack the weights there for good."""
    policy = policy_of(micro_model_dir).train()
    before = logprobs_and_gradient(policy)
    during = logprobs_and_gradient(policy.eval())
    after = logprobs_and_gradient(policy.train())
    for ours in (during, after):
        assert torch.equal(ours[0], before[0]) and torch.equal(ours[1], before[1])


def test_every_quantised_layer_keeps_its_packing(micro_model_dir):
    layers = [module for module in policy_of(micro_model_dir).modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14 and all(layer.support_avx512bf16_for_cpu is False for layer in layers)


def test_logprobs_and_gradients_are_those_of_the_dequantised_base(micro_model_dir):
    """Products are in bfloat16, hence the bounds: 8 bits of mantissa, a few dozen operations deep."""
    quantised, plain = policy_of(micro_model_dir), policy_of(micro_model_dir, quantization=None)
    targets = dict(plain.base_model.named_modules())
    for name, module in quantised.base_model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            targets[name].weight.data = weight.reshape(targets[name].weight.shape)
    ours, expected = logprobs_and_gradient(quantised), logprobs_and_gradient(plain)
    assert (ours[0] - expected[0]).abs().max() < 0.05
    assert relative_distance(ours[1], expected[1]) < 0.02


def test_an_update_moves_the_adapter_and_not_one_byte_of_the_base(micro_model_dir, monkeypatch):
    loaded = []
    original = load.PolicyLoader.load

    def spy(self):
        policy = original(self)
        loaded.append({n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad})
        return policy

    monkeypatch.setattr(load.PolicyLoader, "load", spy)
    monkeypatch.setattr("tests.scripted.PolicyLoader", functools.partial(load.PolicyLoader, quantization="nf4"))
    moved, module = update_of(micro_model_dir, Settings(dtype="float32", lora=LoraSettings(r=4)))
    assert moved.norm() > 0
    now = dict(module.policy.named_parameters())
    assert any(value.dtype == torch.uint8 for value in loaded[0].values())
    assert all(torch.equal(now[name], value) for name, value in loaded[0].items())


def test_a_folder_that_is_in_four_bits_already_is_treated_the_same(micro_model_dir, tmp_path):
    """Without the cure the first evaluation repacks its weights, and every gradient behind it is wrong."""
    PolicyLoader(str(micro_model_dir), quantization="nf4", lora=LoraSettings(r=4)).load_model().save_pretrained(
        tmp_path
    )
    load.load_tokenizer(str(micro_model_dir)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds quantised weights, which cannot be trained; add an adapter"):
        PolicyLoader(str(tmp_path)).load()
    policy = policy_of(tmp_path, quantization=None).train()
    before = logprobs_and_gradient(policy)
    logprobs_and_gradient(policy.eval())
    after = logprobs_and_gradient(policy.train())
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
    with warnings.catch_warnings():  # an engine that reads the folder has the same weights
        warnings.simplefilter("error")
        check_base(policy, "adapter")
    with pytest.warns(UserWarning, match="the engine samples from the weights as their folder holds them"):
        check_base(policy_of(micro_model_dir), "adapter")


def test_an_adapter_is_not_merged_into_four_bits(micro_model_dir, tmp_path):
    with pytest.raises(UserError, match="the adapter would be rounded away"):
        export_policy(policy_of(micro_model_dir), tmp_path, merge_lora=True)


def test_a_checkpoint_holds_the_adapter_alone(micro_model_dir, monkeypatch):
    monkeypatch.setattr("tests.scripted.PolicyLoader", functools.partial(load.PolicyLoader, quantization="nf4"))
    module = build_module(micro_model_dir, Settings(dtype="float32", lora=LoraSettings(r=4)))
    module.configure_model()
    assert all("lora" in name for name in module.state_dict())


def test_a_layer_in_eight_bits_says_nothing_at_every_product(micro_model_dir, caplog):
    """On a GPU bitsandbytes would log a line at each, for every token."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.setLevel(logging.NOTSET)
    layer = Linear8bitLt(16, 8, bias=False, has_fp16_weights=False).eval()
    layer.weight = layer.weight.to("cpu")
    layer(torch.ones(2, 16))
    assert "inputs will be cast" in caplog.text
    caplog.clear()
    policy_of(micro_model_dir)
    layer(torch.ones(2, 16))
    assert not caplog.text
