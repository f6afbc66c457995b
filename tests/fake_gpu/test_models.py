"""Whole models on a GPU, from the row to the gradients and from the prompts to a recorded decoding step."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from gspo_lightning.packing import GroupLayout, SharedPrefixLayout
from gspo_lightning.policy.load import LoraSettings
from gspo_lightning.policy.vision import TOKEN_TYPE, Features, Vision
from gspo_lightning.rollout.cache import DecodeCache, PrefillCache
from gspo_lightning.rollout.flash_cache import FlashCache
from gspo_lightning.rollout.prepacked import prepacked_weights
from gspo_lightning.rollout.steps import GraphSteps, Steps, cache_of, steps_of
from tests.fake_gpu.engine import backward
from tests.fake_gpu.machine import GPU, fake_gpu, fake_policy, fake_row, recorded
from tests.fake_gpu.models import GPT_OSS, GRAPHED
from tests.support import random_groups
from tests.vision import models as vision

BF16, FP32 = torch.bfloat16, torch.float32
GROUPS = random_groups([(7, [3, 5]), (40, [100, 60, 1, 90]), (1, [1, 1])], 90)
ADAPTER = LoraSettings(r=2)
KINDS = {
    "all weights, bf16-mixed": (FP32, True, None),
    "all weights, 32-true": (FP32, False, None),
    "an adapter on bfloat16, bf16-mixed": (BF16, True, ADAPTER),
    "an adapter on bfloat16, bf16-true": (BF16, False, ADAPTER),
}
CASES = [(name, "all weights, bf16-mixed") for name in GRAPHED] + [("qwen2", kind) for kind in list(KINDS)[1:]]


@pytest.fixture(autouse=True)
def _gpu(monkeypatch):
    with fake_gpu(monkeypatch):
        yield


def autocast(enabled):
    """As Lightning's precision plugin makes it."""
    return torch.autocast("cuda", BF16, enabled=enabled, cache_enabled=False)


def update(config, dtype, mixed, lora):
    """Log-probabilities, entropies and gradients of a packed row."""
    policy = fake_policy(config, dtype, lora)
    with autocast(mixed):
        logprobs, entropy = policy(fake_row(GROUPS), 0.9, True)
    for x in (logprobs, entropy):
        assert (tuple(x.shape), x.dtype, x.device) == ((sum(len(c) for _, cs in GROUPS for c in cs),), FP32, GPU)
    backward(logprobs.sum() + entropy.sum())
    trained = [p for name, p in policy.named_parameters() if p.requires_grad and "visual" not in name]
    assert trained
    for parameter in trained:
        assert (parameter.grad.shape, parameter.grad.dtype, parameter.grad.device) == (
            parameter.shape, parameter.dtype, GPU,
        )  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_update_of_models_with_flash_attention(name, kind):
    update(GRAPHED[name], *KINDS[kind])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_an_update_on_a_row_with_images(family, monkeypatch):
    """Behind the tower, whose features are made up here: it reads numbers back, once per prompt."""
    _, kind, tower = vision.FAMILIES[family]
    text = {**vision._TEXT, "rope_parameters": vision._ROPE}
    policy = fake_policy(kind(text_config=text, vision_config=tower, **vision._IDS), FP32)
    policy.base_model.model.visual.requires_grad_(False)
    with unset_fake_temporarily():
        prompts = [vision.image_prompt("a", 3, (4, 6), 2), vision.image_prompt("b", 2, (2, 2), 1, (4, 4), 3)]
        # Places and numbers of placeholders are known on the CPU.
        positions = {id(prompt): policy.vision.prompt_positions(prompt) for prompt in prompts}
        counts = {
            id(prompt): {
                name: int((prompt.mm_inputs["mm_token_type_ids"] == n).sum()) for name, n in TOKEN_TYPE.items()
            }
            for prompt in prompts
        }

    def features(self, some):
        return [
            {name: Features(torch.empty(n, 64, device=GPU, dtype=BF16)) for name, n in counts[id(prompt)].items() if n}
            for prompt in some
        ]

    monkeypatch.setattr(Vision, "_encode", features)
    monkeypatch.setattr(Vision, "prompt_positions", lambda self, prompt: positions[id(prompt)])
    groups = [(prompt.input_ids, completions) for prompt, (_, completions) in zip(prompts, GROUPS, strict=False)]
    with autocast(True):
        logprobs, _ = policy(fake_row(groups, prompts), 0.9)
    assert (logprobs.shape, logprobs.dtype, logprobs.device) == ((3 + 5 + 100 + 60 + 1 + 90,), FP32, GPU)
    backward(logprobs.sum())
    assert all(p.grad.dtype == FP32 for p in policy.base_model.model.language_model.parameters())


@pytest.mark.parametrize("mixed", [True, False])
def test_an_update_of_gpt_oss(mixed):
    update(GPT_OSS, BF16, mixed, ADAPTER)


@torch.no_grad()
def decode(policy, mixed):
    """Prefills two prompts of three rows, and decodes until a row has left; the kinds of cache and steps."""
    lengths = [5, 9]
    layout = SharedPrefixLayout(tuple(GroupLayout(n, ()) for n in lengths), GPU)
    with autocast(mixed), prepacked_weights(policy, 6):
        prefill = PrefillCache(torch.arange(sum(lengths), device=GPU))
        row = torch.zeros(1, sum(lengths), dtype=torch.long, device=GPU)
        policy.hidden_states(row, layout.positions[None], layout, past_key_values=prefill)
        cache = cache_of(policy, prefill, lengths, 3, 8)
        steps = steps_of(policy, cache)
        if isinstance(steps, GraphSteps):
            steps._record = recorded
        for rows in (6, 6, 5, 1):  # with one row left, another graph is recorded
            if isinstance(cache, FlashCache):
                cache.live = rows
            numbers = torch.zeros(cache.rows if isinstance(cache, DecodeCache) else rows, dtype=torch.long, device=GPU)
            hidden = steps(numbers, numbers)
            assert hidden.shape == (len(numbers), policy.body.config.hidden_size) and hidden.device == GPU
            logits = policy.logits(hidden)
            assert (logits.shape, logits.device) == ((len(numbers), 200), GPU)
            assert logits.dtype == (BF16 if mixed else policy.output_weight.dtype)
    return type(cache), type(steps)


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if "32-true" not in case[1]])
def test_a_decoding_step_can_be_recorded(name, kind):
    dtype, mixed, lora = KINDS[kind]
    assert decode(fake_policy(GRAPHED[name], dtype, lora), mixed) == (FlashCache, GraphSteps)


@pytest.mark.parametrize(
    ("config", "dtype", "mixed"),
    [(GPT_OSS, BF16, True), (GPT_OSS, BF16, False), (GRAPHED["qwen3"], FP32, False)],
    ids=["gpt-oss, bf16-mixed", "gpt-oss, bf16-true", "qwen3, 32-true"],
)
def test_a_decoding_step_of_others(config, dtype, mixed):
    assert decode(fake_policy(config, dtype), mixed) == (DecodeCache, Steps)
