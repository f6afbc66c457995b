"""On CUDA: packed rows against padded ones, in float64, float32 and bfloat16, for language, vision and gpt-oss models."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from gspo_lightning.packing import linear_logprobs, pack
from gspo_lightning.policy import lean
from gspo_lightning.policy.attention import attention_implementation
from gspo_lightning.policy.check import check_packing
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout import TransformersEngine, decoder
from gspo_lightning.rollout.steps import GraphSteps, Steps, steps_of
from gspo_lightning.types import SamplingParams
from tests.support import flat_gradient, make_prompt, micro_policy, padded_logprobs, random_groups, relative_distance
from tests.vision.models import image_prompt, padded_vision_logprobs, vision_policy

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]

CUDA = torch.device("cuda")
GROUPS = random_groups([(7, [3, 5]), (40, [100, 60, 1, 90]), (1, [1, 1]), (260, [3] * 6)], 90)


def outcome(policy, logprobs):
    policy.zero_grad()
    logprobs.double().sum().backward()
    return logprobs.detach().double(), flat_gradient(policy).double()


def padded(policy):
    groups = [(prompt.cuda(), [c.cuda() for c in completions]) for prompt, completions in GROUPS]
    with torch.device(CUDA):
        return padded_logprobs(policy.base_model, groups)[0]


@pytest.mark.parametrize(
    ("form", "dtype", "bound"),
    [("sdpa", torch.float64, 1e-6), ("sdpa", torch.float32, 1e-5), ("flex", torch.float32, 1e-5)],
    ids=lambda x: str(x),
)
def test_packed_equals_padded(form, dtype, bound, micro_model_dir):
    policy = micro_policy(micro_model_dir, dtype).to(CUDA)
    policy.base_model.set_attn_implementation(attention_implementation(form, has_vision=False))
    packed = outcome(policy, policy(pack(GROUPS, CUDA))[0])
    truth = micro_policy(micro_model_dir)
    exact = outcome(truth, padded_logprobs(truth.base_model, GROUPS)[0])
    for ours, plain, there in zip(packed, outcome(policy, padded(policy)), exact, strict=True):
        assert relative_distance(ours, plain) < bound
        assert relative_distance(ours.cpu(), there) < bound


@pytest.mark.parametrize("form", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("mixed", [True, False], ids=["bf16-mixed", "bf16-true"])
def test_in_bfloat16_packed_is_as_near_to_float64_as_padded(mixed, form, micro_model_dir):
    policy = micro_policy(micro_model_dir, torch.float32 if mixed else torch.bfloat16).to(CUDA)
    policy.base_model.set_attn_implementation(attention_implementation(form, has_vision=False))
    truth = micro_policy(micro_model_dir, torch.float32 if mixed else torch.bfloat16).double()
    exact = outcome(truth, padded_logprobs(truth.base_model, GROUPS)[0])
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        packed = outcome(policy, policy(pack(GROUPS, CUDA))[0])
        torch.clear_autocast_cache()
        plain = outcome(policy, padded(policy))
    for ours, theirs, there in zip(packed, plain, exact, strict=True):
        assert relative_distance(ours.cpu(), there) < 1.5 * relative_distance(theirs.cpu(), there)


def test_norms_that_are_made_again_leave_gradients_as_they_are(micro_model_dir, monkeypatch):
    found = []
    for hooks in (lean.remade, lambda x: nullcontext()):
        monkeypatch.setattr(lean, "remade", hooks)
        policy = PolicyLoader(str(micro_model_dir)).load().to(CUDA)
        with torch.autocast("cuda", torch.bfloat16):
            found.append(outcome(policy, policy(pack(GROUPS, CUDA))[0]))
    for ours, kept in zip(*found, strict=True):
        assert torch.equal(ours, kept)


def test_log_probabilities_from_bfloat16_products_are_those_of_float32():
    hidden = torch.randn(700, 512, device=CUDA)
    weight = 0.05 * torch.randn(4000, 512, device=CUDA)
    targets = torch.randint(0, 4000, (700,), device=CUDA)
    exact, entropy = linear_logprobs(hidden.double(), weight.double(), targets, with_entropy=True)
    with torch.autocast("cuda", torch.bfloat16):
        ours, own_entropy = linear_logprobs(hidden, weight, targets, with_entropy=True)
    assert relative_distance(ours.double(), exact) < 1e-6
    assert relative_distance(own_entropy.double(), entropy) < 1e-6
    narrow = torch.log_softmax(hidden.bfloat16() @ weight.bfloat16().t(), -1).gather(1, targets[:, None])[:, 0]
    assert relative_distance(narrow.double(), exact) > 1e-4


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_images_packed_equal_padded(family, monkeypatch):
    # A tower begins with a convolution, and cuDNN's are in TensorFloat-32 unless told otherwise: 1e-4 by itself.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    policy = vision_policy(family, torch.float32).to(CUDA)
    prompts = [
        image_prompt("a", 3, (4, 6), 2, dtype=torch.float32),
        image_prompt("b", 2, (2, 2), 1, (4, 4), 3, dtype=torch.float32, seed=1),
    ]
    completions = [list(group) for _, group in random_groups([(1, [3, 5]), (1, [4, 1])], 90)]
    rows = [(prompt.input_ids, group) for prompt, group in zip(prompts, completions, strict=True)]
    packed = outcome(policy, policy(pack(rows, CUDA, prompts))[0])
    policy.cpu()
    plain = outcome(policy, padded_vision_logprobs(policy, list(zip(prompts, completions, strict=True))))
    for ours, theirs in zip(packed, plain, strict=True):
        assert relative_distance(ours.cpu(), theirs) < 2e-5


@pytest.mark.parametrize("form", ["sdpa", "flex"])
def test_gpt_oss_with_its_sinks_windows_and_experts(form):
    groups = random_groups([(40, (30, 3, 18)), (5, (4, 25)), (17, (1,))], 100)
    exact = PolicyLoader("bundled:micro-gpt-oss", dtype="float64").load()
    expected = outcome(exact, exact(pack(groups, torch.device("cpu")))[0])
    policy = PolicyLoader("bundled:micro-gpt-oss", attention=form).load().to(CUDA)
    for ours, there in zip(outcome(policy, policy(pack(groups, CUDA))[0]), expected, strict=True):
        assert relative_distance(ours.cpu(), there) < 1e-5
    assert check_packing(policy) < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_the_sampler_gives_the_log_probabilities_of_the_packed_pass(compiled, micro_model_dir):
    policy = PolicyLoader(str(micro_model_dir), compile=compiled).load().to(CUDA)
    prompts = [make_prompt(prompt, uid=str(n)) for n, (prompt, _) in enumerate(GROUPS)]
    rollout = TransformersEngine().generate(policy, prompts, SamplingParams(3, 40, temperature=0.7), 1)
    groups = [
        (p.input_ids, [c.token_ids for c in group]) for p, group in zip(prompts, rollout.completions, strict=True)
    ]
    with torch.no_grad():
        own, _ = policy(pack(groups, CUDA), 0.7)
    theirs = torch.cat([c.sampler_logprobs for group in rollout.completions for c in group])
    torch.testing.assert_close(own.float().cpu(), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)], ids=["full", "LoRA"])
def test_a_graph_of_a_decoding_step_draws_what_its_layers_do(lora, micro_model_dir, monkeypatch):
    policy = PolicyLoader(str(micro_model_dir), lora=lora).load().to(CUDA)
    monkeypatch.setattr(type(policy), "eos_token_ids", tuple(range(0, 90, 30)))
    prompts = [make_prompt(prompt, uid=str(n)) for n, (prompt, _) in enumerate(GROUPS)]
    kinds = []

    def recorded(policy, cache):
        kinds.append(steps_of(policy, cache))
        return kinds[-1]

    with torch.autocast("cuda", torch.bfloat16):
        monkeypatch.setattr(decoder, "steps_of", recorded)
        ours = TransformersEngine().generate(policy, prompts, SamplingParams(8, 150, temperature=1.2), 1)
        monkeypatch.setattr(decoder, "steps_of", Steps)
        theirs = TransformersEngine().generate(policy, prompts, SamplingParams(8, 150, temperature=1.2), 1)
    assert isinstance(kinds[0], GraphSteps)
    lengths = set()
    for a, b in zip(sum(ours.completions, []), sum(theirs.completions, []), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        torch.testing.assert_close(a.sampler_logprobs, b.sampler_logprobs, atol=1e-5, rtol=0)
        lengths.add(len(a.token_ids))
    assert min(lengths) < 5 and max(lengths) > 64  # rows left, and another graph was recorded


def test_in_bfloat16_the_sampler_is_as_near_to_float32_as_the_packed_pass_is(micro_model_dir):
    policy = PolicyLoader(str(micro_model_dir)).load().to(CUDA)
    prompts = [make_prompt(prompt, uid=str(n)) for n, (prompt, _) in enumerate(GROUPS)]
    with torch.autocast("cuda", torch.bfloat16):
        rollout = TransformersEngine().generate(policy, prompts, SamplingParams(4, 40), 1)
    groups = [
        (p.input_ids, [c.token_ids for c in group]) for p, group in zip(prompts, rollout.completions, strict=True)
    ]
    sampled = torch.cat([c.sampler_logprobs for group in rollout.completions for c in group])
    with torch.no_grad():
        exact = policy(pack(groups, CUDA))[0].float().cpu()
        with torch.autocast("cuda", torch.bfloat16):
            packed = policy(pack(groups, CUDA))[0].float().cpu()
    # The packed pass has float32 logits, the sampler's are rounded.
    assert (sampled - exact).abs().mean() < 3 * (packed - exact).abs().mean() + 2**-9
