"""Prepacked weights give the same bits, serve every product of a decoding step, and are gone behind the rollout."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout import TransformersEngine, prepacked, transformers_engine
from gspo_lightning.rollout.prepacked import prepacked_weights
from gspo_lightning.types import SamplingParams
from tests.support import make_prompt, micro_policy

HAS_BFLOAT16 = prepacked._is_worthwhile(torch.zeros(1, 1, dtype=torch.bfloat16))
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU has no bfloat16 products of oneDNN")
SAMPLING = SamplingParams(num_generations=4, max_completion_length=12, temperature=0.8)


@pytest.fixture
def prompts():
    return [make_prompt(list(range(30, 30 + length)), f"p{n}") for n, length in enumerate((3, 9, 6))]


def generate(policy, prompts, autocast=True):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return TransformersEngine().generate(policy, prompts, SAMPLING, seed=3)


@needs_bfloat16
@pytest.mark.parametrize("autocast", [True, False], ids=["mixed", "bf16-true"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=4)], ids=["full", "lora"])
def test_the_completions_and_their_log_probabilities_are_the_same_bits(
    micro_model_dir, lora, autocast, prompts, monkeypatch
):
    """Without autocast an adapter is in float32, whose products are other sums: within a step of bfloat16 between 4 and 8."""
    policy = PolicyLoader(str(micro_model_dir), lora=lora, dtype="float32" if autocast else "bfloat16").load()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)  # B begins at zero
    packed = generate(policy, prompts, autocast)
    monkeypatch.setattr(transformers_engine, "prepacked_weights", lambda *_: nullcontext())
    plain = generate(policy, prompts, autocast)
    for group, other in zip(packed.completions, plain.completions, strict=True):
        for a, b in zip(group, other, strict=True):
            assert torch.equal(a.token_ids, b.token_ids)
            if lora is None or autocast:
                assert torch.equal(a.sampler_logprobs, b.sampler_logprobs)
            else:
                assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() < 2**-5


@needs_bfloat16
def test_no_product_of_a_decoding_step_reads_a_plain_weight(micro_model_dir, prompts, monkeypatch):
    policy = PolicyLoader(str(micro_model_dir)).load()
    monkeypatch.setattr(nn.functional, "linear", lambda *_: pytest.fail("a product with a plain weight"))
    generate(policy, prompts)


@needs_bfloat16
def test_nothing_is_left_behind_a_rollout_and_the_next_sees_new_weights(micro_model_dir, prompts):
    policy = PolicyLoader(str(micro_model_dir)).load()
    first = generate(policy, prompts)
    assert "logits" not in vars(policy)
    assert not any("forward" in vars(m) for m in policy.modules() if type(m) is nn.Linear)
    with torch.no_grad():
        for module in policy.modules():
            if type(module) is nn.Linear:
                module.weight.mul_(1.5)
    second = generate(policy, prompts)
    assert [c.text for g in first.completions for c in g] != [c.text for g in second.completions for c in g]


def test_float32_products_are_the_same_within_rounding(micro_model_dir, prompts, monkeypatch):
    policy = PolicyLoader(str(micro_model_dir)).load()
    packed = TransformersEngine().generate(policy, prompts, SAMPLING, seed=3)
    monkeypatch.setattr(transformers_engine, "prepacked_weights", lambda *_: nullcontext())
    plain = TransformersEngine().generate(policy, prompts, SAMPLING, seed=3)
    for group, other in zip(packed.completions, plain.completions, strict=True):
        for a, b in zip(group, other, strict=True):
            assert torch.equal(a.token_ids, b.token_ids)
            assert torch.allclose(a.sampler_logprobs, b.sampler_logprobs, rtol=1e-5, atol=1e-5)


@needs_bfloat16
@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_layers_keep_their_weights(compiled, micro_model_dir):
    """A product that is exchanged would be compiled once more, and again behind the rollout."""
    policy = PolicyLoader(str(micro_model_dir), compile=compiled).load()
    with torch.autocast("cpu", torch.bfloat16), prepacked.prepacked_weights(policy, 8):
        linear = [module for module in policy.body.modules() if isinstance(module, torch.nn.Linear)]
        exchanged = {"forward" in vars(module) for module in linear}
        assert (exchanged, "logits" in vars(policy)) == ({not compiled}, not compiled)
    assert not any("forward" in vars(module) for module in linear) and "logits" not in vars(policy)


@needs_bfloat16
def test_layers_with_the_same_input_are_one_product(micro_model_dir, prompts, monkeypatch):
    policy = PolicyLoader(str(micro_model_dir)).load()
    widths = []
    original = prepacked._linear

    def spy(packed, bias, dtype, x):
        out = original(packed, bias, dtype, x)
        widths.append(out.shape[-1])
        return out

    monkeypatch.setattr(prepacked, "_linear", spy)
    generate(policy, prompts)
    layer = policy.body.layers[0]
    attention = [m.out_features for m in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]
    size = layer.self_attn.o_proj.out_features
    per_layer = [sum(attention), size, 2 * layer.mlp.gate_proj.out_features, size]
    step = per_layer * len(policy.body.layers) + [len(policy.output_weight)]
    assert widths[: len(step)] == step
    assert len(widths) % len(step) == 0


@needs_bfloat16
def test_a_product_together_is_that_of_each_layer_whatever_it_is_given(micro_model_dir):
    """Also out of order, and with biases: the slices are those of the input at hand."""
    policy = PolicyLoader(str(micro_model_dir)).load()
    attention = policy.body.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    size = attention.q_proj.in_features
    for number, layer in enumerate(layers):
        layer.bias = nn.Parameter(torch.full((layer.out_features,), float(number)))
    first, second = torch.randn(2, 8, size)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        calls = [(0, first), (1, first), (0, second), (1, first), (2, second), (2, first)]
        expected = [layers[number](x) for number, x in calls]
        with prepacked_weights(policy, 8):
            found = [layers[number](x) for number, x in calls]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2**-7, atol=1e-6)


def test_float64_products_keep_their_weights(micro_model_dir):
    policy = micro_policy(micro_model_dir)
    with prepacked_weights(policy, 8):
        assert "logits" not in vars(policy)


def test_nothing_is_packed_where_a_rank_samples_nothing(micro_model_dir):
    policy = PolicyLoader(str(micro_model_dir)).load()
    for rows, packed in ((0, False), (8, prepacked._is_worthwhile(policy.output_weight))):
        with prepacked_weights(policy, rows):
            assert ("logits" in vars(policy)) == packed
