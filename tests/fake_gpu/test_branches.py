"""What only a GPU runs has the right shapes, dtypes and devices, and reads no number where it may not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError

from gspo_lightning.objective import Objective
from gspo_lightning.objective.mismatch import MismatchCorrection
from gspo_lightning.packing import GroupLayout, SharedPrefixLayout, linear_logprobs
from gspo_lightning.packing.attention import shared_prefix_attention
from gspo_lightning.packing.flash import can_flash, flash_shared_prefix_attention
from gspo_lightning.packing.flex import can_flex, flex_shared_prefix_attention
from gspo_lightning.policy.lean import lean_mlp
from gspo_lightning.policy.norms import NORMS, lean_norm, promoting_norm, remade_norm
from gspo_lightning.rollout.sampling import sample
from gspo_lightning.rollout.vllm_settings import own_precision
from gspo_lightning.types import SamplingParams
from tests.fake_gpu.engine import backward
from tests.fake_gpu.machine import GPU, fake_gpu, recorded
from tests.fake_gpu.models import llama_layer

BF16, FP32 = torch.bfloat16, torch.float32
LAYOUTS = {
    "ragged": (GroupLayout(6, (3, 0, 4, 2, 11, 2)), GroupLayout(5, ()), GroupLayout(1, (2,))),
    "several blocks": (GroupLayout(200, (150, 3, 40)), GroupLayout(90, (7, 61))),
    "prompts": (GroupLayout(4, ()), GroupLayout(7, ())),
    "a common prefix": (GroupLayout(180, (50, 3, 40)), GroupLayout(153, (7, 61)), GroupLayout(151, ())),
}
COMMON = {"a common prefix": 150}


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    with fake_gpu(monkeypatch):
        yield


def there(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device=GPU, requires_grad=True)


def facts(x):
    return tuple(x.shape), x.dtype, x.device


def test_the_stand_in_notices_what_a_gpu_would():
    x = there(3)
    with pytest.raises(FakeTensorDeviceMismatchError):
        x + torch.ones(3)
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    with pytest.raises(AssertionError, match="tensor of the CPU"):
        recorded(lambda: torch.tensor([1.0, 2.0]).to(GPU))
    recorded(lambda: x + 1)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["flash", "flex", "flex in float32", "flex with sinks", "blocks", "blocks with sinks"])
def test_attention_and_its_gradients_are_like_its_inputs(kind, name):
    layout = SharedPrefixLayout(LAYOUTS[name], GPU, COMMON.get(name, 0))
    dtype = FP32 if "float32" in kind else BF16
    query, key, value = (there(1, heads, layout.num_tokens, 64, dtype=dtype) for heads in (6, 2, 2))
    sinks = there(6) if "sinks" in kind else None
    window = 4 if sinks is not None else None
    assert can_flex(query) and can_flash(query, window, sinks) == (dtype == BF16 and sinks is None)
    forms = {
        "flash": flash_shared_prefix_attention,
        "flex": flex_shared_prefix_attention,
        "blocks": shared_prefix_attention,
    }
    out = forms[kind.split()[0]](query, key, value, layout, scaling=0.1, window=window, sinks=sinks)
    assert facts(out) == facts(query)
    backward(out.sum())
    for x in (query, key, value, *([] if sinks is None else [sinks])):
        assert facts(x.grad) == facts(x)


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "autocast"),
    [*((a, b, True) for a in (FP32, BF16) for b in (FP32, BF16)), (FP32, FP32, False), (BF16, BF16, False)],
)
def test_log_probabilities_are_in_float32_and_gradients_like_their_inputs(dtype, weight_dtype, autocast, with_entropy):
    hidden, weight = there(300, 64, dtype=dtype), there(1_000_000, 64, dtype=weight_dtype)  # several slices
    targets = torch.zeros(300, dtype=torch.long, device=GPU)
    with torch.autocast("cuda", BF16, enabled=autocast):
        found = linear_logprobs(hidden, weight, targets, temperature=0.7, with_entropy=with_entropy)
    for x in found:
        assert facts(x) == ((300,), FP32, GPU)
    backward(found[0].sum() + found[1].sum())
    assert facts(hidden.grad) == facts(hidden) and facts(weight.grad) == facts(weight)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("norm", [lean_norm, remade_norm])
def test_a_norm_is_in_the_dtype_of_the_products_and_an_mlp_keeps_nothing_of_it(norm, dtype, autocast):
    layer = llama_layer(dtype)
    x = there(1, 5, 64, dtype=dtype)
    with torch.autocast("cuda", BF16, enabled=autocast):
        normed = norm(layer.input_layernorm, x)
        products = BF16 if autocast else dtype
        assert facts(normed) == ((1, 5, 64), products, GPU)
        out = lean_mlp(layer.mlp, normed)
    assert facts(out) == ((1, 5, 64), products, GPU)
    backward(out.sum())
    assert facts(x.grad) == facts(x)
    for parameter in (*layer.input_layernorm.parameters(), *layer.mlp.parameters()):
        assert facts(parameter.grad) == facts(parameter)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("weight_dtype", [FP32, BF16])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("norm", NORMS)
def test_other_norms_take_mixed_dtypes_and_can_be_recorded(norm, dtype, weight_dtype, autocast):
    """Models made without weights, as all on this GPU, cannot tell Gemma's norm from others."""
    x, module = there(1, 5, 64, dtype=dtype), SimpleNamespace(weight=there(64, dtype=weight_dtype), eps=1e-6)
    with torch.autocast("cuda", BF16, enabled=autocast):
        normed = norm(module, x)
        with torch.no_grad():
            recorded(lambda: norm(module, x))
    wider = torch.promote_types(dtype, weight_dtype)
    assert facts(normed) == ((1, 5, 64), wider if norm is promoting_norm else dtype, GPU)
    backward(normed.sum())
    assert facts(x.grad) == facts(x) and facts(module.weight.grad) == facts(module.weight)


SETTINGS = {
    "gspo": {},
    "tokens": {"importance_sampling_level": "token", "loss_type": "dapo", "beta": 0.1},
    "masks": {"off_policy_mask_threshold": 0.1, "mismatch": MismatchCorrection("sequence", "truncate", 2.0)},
    "entropy": {"entropy_coef": 0.1, "importance_sampling_level": "sequence_token"},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_loss_waits_for_no_number(kind):
    logprobs, entropy = there(7, dtype=FP32), there(7, dtype=FP32)
    old, reference, sampled, advantages = (torch.empty(7, device=GPU) for _ in range(4))
    owner = torch.zeros(7, dtype=torch.long, device=GPU)
    settings = {"importance_sampling_level": "sequence", "loss_type": "grpo", "max_completion_length": 8}
    result = Objective(**settings | SETTINGS[kind])(
        logprobs, old, advantages, owner, torch.empty(2, dtype=torch.long, device=GPU), ref_logprobs=reference,
        entropy=entropy, sampler_logprobs=sampled,
    )  # fmt: skip
    assert facts(result.loss) == ((), FP32, GPU)
    assert {total.device for total, _ in result.metrics.values()} == {GPU}
    backward(result.loss)
    assert facts(logprobs.grad) == facts(logprobs)


FILTERS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "filters": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    "penalty": {"temperature": 0.7, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("kind", FILTERS)
@torch.no_grad()
def test_drawing_waits_for_no_number(kind):
    uniforms = torch.empty(6, dtype=torch.float64, device=GPU)
    seen = torch.empty(6, 1000, dtype=torch.bool, device=GPU)
    tokens, logprobs = sample(there(6, 1000), uniforms, SamplingParams(6, 4, **FILTERS[kind]), seen)
    assert facts(tokens) == ((6,), torch.long, GPU) and facts(logprobs) == ((6,), FP32, GPU)


def test_what_vllm_makes_in_this_process_is_in_the_dtype_that_it_wants():
    """It makes the angles of rotations by an einsum, which autocast narrows on a GPU, though on no CPU."""
    positions, frequencies = torch.arange(300.0, device=GPU), torch.arange(8.0, device=GPU)
    with torch.autocast("cuda", BF16):
        assert torch.einsum("i,j -> ij", positions, frequencies).dtype == BF16
        with own_precision():
            assert torch.einsum("i,j -> ij", positions, frequencies).dtype == FP32
