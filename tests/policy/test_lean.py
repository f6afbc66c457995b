"""Layers that keep less: derivatives against finite differences, whole models against transformers, and what is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaWeightlessRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextRMSNorm

from gspo_lightning.packing import pack
from gspo_lightning.policy.lean import lean_mlp, lighten
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.norms import keeping_norm, lean_norm, norm_of_one_plus, promoting_norm
from gspo_lightning.policy.rotary import rotate
from tests.support import flat_gradient, micro_policy, random_groups, relative_distance

CONFIG = LlamaConfig(hidden_size=6, intermediate_size=10, num_attention_heads=1)
GROUPS = random_groups([(7, [3, 5]), (4, [2, 9])], 90)


def norm(dtype=torch.float64):
    module = LlamaRMSNorm(6, eps=1e-5).to(dtype)
    nn.init.normal_(module.weight)
    return module


def test_derivatives_of_the_norm_are_finite_differences():
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def of(x, weight):
        return lean_norm(SimpleNamespace(weight=weight, variance_epsilon=1e-5), x)

    assert torch.autograd.gradcheck(of, (x, weight))
    assert relative_distance(of(x, weight), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight) < 1e-12


@pytest.mark.parametrize(
    ("kind", "expected", "plus"),
    [
        (LlamaRMSNorm, promoting_norm, 0),
        (Olmo2RMSNorm, keeping_norm, 0),
        (GptOssRMSNorm, keeping_norm, 0),
        (Gemma3RMSNorm, norm_of_one_plus, 1),
    ],
)
def test_norms_of_all_families_are_in_float64_in_a_float64_model_and_have_the_dtype_that_they_had(kind, expected, plus):
    model = nn.Sequential(kind(6, eps=1e-5)).double()
    model.get_decoder = lambda: model
    nn.init.normal_(model[0].weight)
    assert lighten(model) == 1
    assert model[0].forward.func is expected
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    exact = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (plus + model[0].weight)
    assert relative_distance(model[0](x), exact) < 1e-14
    inputs, direction = (x, model[0].weight), torch.randn_like(exact)
    found, right = (torch.autograd.grad((y * direction).sum(), inputs) for y in (model[0](x), exact))
    assert all(relative_distance(*pair) < 1e-14 for pair in zip(found, right, strict=True))
    ours, theirs = model.float()[0], kind(6, eps=1e-5)
    theirs.load_state_dict(ours.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        narrow = x.detach().to(dtype)
        assert ours(narrow).dtype == theirs(narrow).dtype
        assert relative_distance(ours(narrow), theirs(narrow)) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", [Olmo2RMSNorm, Gemma3RMSNorm])
def test_which_norm_it_is_does_not_depend_on_its_weights(kind):
    """In bfloat16, one plus 50 is 50 but for rounding: all other norms of a Gemma lost their one."""
    model = nn.Sequential(kind(6), kind(6)).bfloat16()
    model.get_decoder = lambda: model
    nn.init.constant_(model[0].weight, 50.0)
    x = torch.randn(2, 3, 6, dtype=torch.bfloat16)
    expected = model(x)
    assert lighten(model) == 2
    assert relative_distance(model(x), expected) < 4 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("first", [None, 3])
def test_norms_of_one_class_may_compute_something_else_in_places(first):
    """Those of Qwen4Exp are over groups of a token's numbers where they have a group size."""
    sizes = (first, 3 if first is None else None)
    model = nn.Sequential(*(Qwen4ExpTextRMSNorm(6, group_size=size) for size in sizes))
    model.get_decoder = lambda: model
    x = torch.randn(2, 3, 6)
    expected = model(x)
    assert lighten(model) == 1
    assert relative_distance(model(x), expected) < 1e-6


@pytest.mark.parametrize("norm", [nn.RMSNorm(6, elementwise_affine=False), FalconMambaWeightlessRMSNorm(6)])
def test_a_norm_without_a_weight_is_left_alone(norm):
    """Falcon Mamba's has one that is no parameter, and does not use it."""
    model = nn.Sequential(norm)
    model.get_decoder = lambda: model
    assert lighten(model) == 0


def test_derivatives_of_the_mlp_are_finite_differences_and_those_of_transformers():
    module = LlamaMLP(CONFIG).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: lean_mlp(module, x), (x,))
    weights = [x, *module.parameters()]
    direction = torch.randn(2, 3, 6, dtype=torch.float64)
    ours = torch.autograd.grad((lean_mlp(module, x) * direction).sum(), weights)
    theirs = torch.autograd.grad((module(x) * direction).sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        assert relative_distance(a, b) < 1e-12


def test_derivatives_of_the_rotation_are_finite_differences_and_it_is_that_of_transformers():
    # Halves with angles of their own: the backward must not take them for each other.
    query, key = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 5, 1, 8, dtype=torch.float64)
    angles = torch.rand(2, 5, 8, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    inputs = query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rotate(q, k, cos, sin), inputs)
    theirs = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
    with torch.no_grad():
        without = rotate(query, key, cos, sin)
    for ours in (rotate(query, key, cos, sin), without):
        for a, b in zip(ours, theirs, strict=True):
            assert relative_distance(a, b) < 1e-14


def test_a_rotation_in_bfloat16_is_rounded_once():
    query, key = torch.randn(1, 40, 3, 8).bfloat16(), torch.randn(1, 40, 1, 8).bfloat16()
    angles = torch.rand(1, 40, 4).repeat(1, 1, 2)
    exact = apply_rotary_pos_emb(query.double(), key.double(), angles.double().cos(), angles.double().sin(), 2)
    with torch.no_grad():
        without = rotate(query, key, angles.cos(), angles.sin())
    trained = rotate(query.clone().requires_grad_(), key, angles.cos(), angles.sin())
    for ours, there in zip([*trained, *without], [*exact, *exact], strict=True):
        assert ours.dtype == torch.bfloat16
        # Half a unit in the last place, of which bfloat16 has 8 bits.
        assert ((ours.double() - there).abs() <= 2**-9 * 2.001 * there.abs().clamp(min=1e-3)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 3000])
def test_tokens_are_rotated_to_the_same_bits_with_and_without_gradient(dtype, tokens):
    """Old log-probabilities come from a pass without; the ratio of unmoved weights is exactly one."""
    query, key = torch.randn(1, tokens, 3, 8).to(dtype), torch.randn(1, tokens, 1, 8).to(dtype)
    angles = 100 * torch.rand(1, tokens, 4).repeat(1, 1, 2)
    with torch.no_grad():
        without = rotate(query, key, angles.cos(), angles.sin())
    for a, b in zip(without, rotate(query.requires_grad_(), key, angles.cos(), angles.sin()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parts", [[24, 8, 8], [8, 24, 8], [24, 8, 8, 16]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_one_product_are_rotated_as_others_are(dtype, parts):
    """They are read where they lie if the keys come right behind the queries, and left as they are."""
    product = torch.randn(6, 1, sum(parts)).to(dtype)
    before = product.clone()
    query, key, *_ = (x.unflatten(-1, (-1, 8)) for x in product.split(parts, dim=-1))
    angles = torch.rand(6, 1, 4).repeat(1, 1, 2)
    with torch.no_grad():
        for q, k in ((query, key), (key, query)):
            expected = rotate(q.clone(), k.clone(), angles.cos(), angles.sin())
            for a, b in zip(rotate(q, k, angles.cos(), angles.sin()), expected, strict=True):
                assert torch.equal(a, b)
    assert torch.equal(product, before)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=str)
def test_a_loaded_model_computes_what_transformers_does(dtype, bound, micro_model_dir):
    lean = PolicyLoader(str(micro_model_dir), dtype=str(dtype).removeprefix("torch.")).load()
    changed = [m for m in lean.base_model.modules() if "forward" in vars(m)]
    assert len(changed) == 9  # two norms, the attention and the MLP of two layers, and the last norm
    found = []
    for policy in (lean, micro_policy(micro_model_dir, dtype)):
        logprobs, _ = policy(pack(GROUPS, torch.device("cpu")))
        logprobs.sum().backward()
        found.append((logprobs.detach(), flat_gradient(policy)))
    for a, b in zip(*found, strict=True):
        assert relative_distance(a, b) < bound


def test_layers_are_compared_where_their_weights_lie_whatever_the_default_device_is(micro_model_dir):
    """The Trainer builds the policy where the accelerator is the default device."""
    model = micro_policy(micro_model_dir).base_model
    with torch.device("meta"):
        assert lighten(model) == 9


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)], ids=["full", "LoRA"])
def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_is(lora, micro_model_dir, monkeypatch):
    found = []
    for lean, mixed in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr("gspo_lightning.policy.load.lighten", lighten if lean else lambda model, **_: 0)
        torch.manual_seed(0)
        policy = PolicyLoader(str(micro_model_dir), lora=lora).load()
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logprobs, _ = policy(pack(GROUPS, torch.device("cpu")))
            logprobs.sum().backward()
        found.append((logprobs.detach(), flat_gradient(policy)))
    for ours, theirs, exact in zip(*found, strict=True):
        assert relative_distance(ours, exact) < 1.2 * relative_distance(theirs, exact)


def test_what_is_kept_for_the_backward():
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(5, 6, requires_grad=True)
    module = norm(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lean_norm(module, x)
    assert sorted(t.numel() for t in kept) == [5, 6, 30]  # a scale per token, the weight, the input
    kept.clear()
    mlp = LlamaMLP(CONFIG)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = lean_mlp(mlp, x)
    wide = {t.untyped_storage().data_ptr() for t in kept if t.shape == (5, 10)}
    assert len(wide) == 2  # gate and up; transformers keeps four
    out.sum().backward()


def test_a_norm_that_computes_something_else_is_left_alone(micro_model_dir, monkeypatch):
    class Gemma(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) * (1 + 1 / self.weight)

    model = micro_policy(micro_model_dir, torch.float32).base_model
    model.model.layers[0].input_layernorm.__class__ = Gemma
    assert lighten(model) == 8
    assert "forward" not in vars(model.model.layers[0].input_layernorm)


@pytest.mark.parametrize(("setting", "parts"), [("gradient_checkpointing", ["Norm", "Attention"]), ("compile", [])])
def test_layers_that_keep_less_by_themselves(setting, parts, micro_model_dir):
    policy = PolicyLoader(str(micro_model_dir), **{setting: True}).load()
    changed = [type(m).__name__ for m in policy.base_model.modules() if "forward" in vars(m)]
    assert len(changed) == (7 if parts else 0)  # of two layers, and the last norm
    assert all(name.endswith(tuple(parts)) for name in changed)
