"""A packed row with images gives the log-probabilities and gradients of ordinary padded rows."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.packing import pack
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.training.loading import move_reference
from gspo_lightning.training.update import UpdateSettings
from gspo_lightning.training.validation import ValidationSettings, Validator
from gspo_lightning.types import SamplingParams
from tests.support import flat_gradient, relative_distance
from tests.vision.models import FAMILIES, IMAGE, image_prompt, padded_vision_logprobs, vision_policy

CPU = torch.device("cpu")


def prompts():
    return [
        image_prompt("one image", 4, (4, 6), 3, seed=1),
        image_prompt("text only", 7, seed=2),
        image_prompt("two images of different sizes", 2, (2, 4), 1, (6, 4), 5, seed=3),
    ]


def video_prompts(family):
    frames = 1 if family == "qwen3_vl" else 2  # Qwen3-VL writes a time stamp before every frame
    return [image_prompt("video, then image", 2, (frames, 4, 4), 3, (4, 2), 2, seed=4), *prompts()[:2]]


def groups_of(prompts, lengths=((5, 1, 8), (3, 6), (2, 7, 4))):
    generator = torch.Generator().manual_seed(9)
    return [
        (prompt, [torch.randint(3, 90, (n,), generator=generator) for n in own])
        for prompt, own in zip(prompts, lengths, strict=True)
    ]


def packed_row(groups):
    return pack([(p.input_ids, c) for p, c in groups], CPU, [p for p, _ in groups])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "make", [lambda family: prompts(), video_prompts], ids=["images and text", "video, images and text"]
)
def test_packed_equals_padded_in_log_probabilities_and_in_language_and_vision_gradients(family, make):
    policy = vision_policy(family)
    groups = groups_of(make(family))
    logprobs, _ = policy(packed_row(groups))
    weights = torch.randn(len(logprobs), dtype=torch.float64)
    (logprobs @ weights).backward()
    body = policy.base_model.model
    ours = [flat_gradient(part) for part in (body.visual, body.language_model)]
    policy.zero_grad()
    expected = padded_vision_logprobs(policy, groups)
    (expected @ weights).backward()
    assert relative_distance(logprobs, expected) < 1e-12
    # transformers rotates in the tower in float32 whatever the model is in.
    for mine, part, bound in zip(ours, (body.visual, body.language_model), (1e-6, 1e-12), strict=True):
        assert relative_distance(mine, flat_gradient(part)) < bound
        assert mine.norm() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_text_alone_that_begin_alike_equal_padded_ones_too(family):
    policy = vision_policy(family)
    system, alike = torch.arange(10, 30), prompts()[1]
    batch = [
        dataclasses.replace(alike, input_ids=torch.cat([system, torch.arange(31 + n, 32 + 2 * n)])) for n in (1, 4, 2)
    ]
    groups = groups_of(batch)
    row = packed_row(groups)
    assert row.layout.common == 20
    assert torch.equal(policy.vision.positions(row.layout, row.prompts)[:, 0], row.layout.positions.expand(4, -1))
    logprobs, _ = policy(row)
    weights = torch.randn(len(logprobs), dtype=torch.float64)
    (logprobs @ weights).backward()
    ours = flat_gradient(policy.base_model.model.language_model)
    policy.zero_grad()
    expected = padded_vision_logprobs(policy, groups)
    (expected @ weights).backward()
    assert relative_distance(logprobs, expected) < 1e-12
    assert relative_distance(ours, flat_gradient(policy.base_model.model.language_model)) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_of_packed_completions_are_those_of_the_unpacked_sequence(family):
    policy = vision_policy(family)
    groups = groups_of(video_prompts(family))
    row = packed_row(groups)
    axes = policy.vision.positions(row.layout, row.prompts)[1:, 0]
    start = 0
    for prompt, completions in groups:
        for number, completion in enumerate(completions):
            before = sum(len(c) - 1 for c in completions[:number])
            at = start + len(prompt.input_ids) + before
            ours = torch.cat(
                [axes[:, start : start + len(prompt.input_ids)], axes[:, at : at + len(completion) - 1]], 1
            )
            sequence = torch.cat([prompt.input_ids, completion[:-1]])[None]
            types = torch.zeros_like(sequence)
            if prompt.mm_inputs:
                types[0, : len(prompt.input_ids)] = prompt.mm_inputs["mm_token_type_ids"]
            grids = {k: v for k, v in prompt.mm_inputs.items() if k.endswith("grid_thw")}
            alone, _ = policy.base_model.model.get_rope_index(sequence, mm_token_type_ids=types, **grids)
            assert ours.tolist() == alone[:, 0].tolist()
        start += len(prompt.input_ids) + sum(len(c) - 1 for c in completions)


def count_tower(policy):
    calls = []
    policy.base_model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_frozen_tower_sees_each_prompt_once_for_generation_and_all_passes():
    policy = vision_policy("qwen2_5_vl", train_vision=False)
    calls = count_tower(policy)
    batch = prompts()
    rollout = TransformersEngine().generate(policy, batch, SamplingParams(2, 5), seed=0)
    groups = [(p, [c.token_ids for c in own]) for p, own in zip(batch, rollout.completions, strict=True)]
    with torch.no_grad():
        policy(packed_row(groups))  # old
    for group in groups:  # training, in other micro-batches
        policy(packed_row([group]))[0].sum().backward()
    assert len(calls) == policy.vision.calls == 1
    TransformersEngine().generate(policy, prompts(), SamplingParams(2, 2), seed=0)
    assert len(calls) == 2  # other prompt objects: another rollout


def test_features_are_forgotten_with_their_prompts():
    policy = vision_policy("qwen2_5_vl", train_vision=False)
    batch = prompts()
    policy(packed_row(groups_of(batch)))
    assert len(policy.vision._features) == 2
    del batch
    assert len(policy.vision._features) == 0


def test_a_reference_that_has_moved_sees_the_images_of_prompts_that_come_again_anew():
    """Its tower is frozen, and yet another one after it has followed a tower that trains."""
    policy, reference = vision_policy("qwen2_5_vl"), vision_policy("qwen2_5_vl").requires_grad_(False)
    row = packed_row(groups_of(prompts()))
    with torch.no_grad():
        for parameter in policy.base_model.model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        before, wanted = reference(row)[0], policy(row)[0]
        settings = UpdateSettings(ref_sync_every_n_rollouts=1, ref_model_mixup_alpha=1.0)
        move_reference(
            SimpleNamespace(update_settings=settings, rollouts_done=0, references=[reference], policy=policy)
        )
        assert relative_distance(reference(row)[0], wanted) < 1e-9 < 1e-4 < relative_distance(before, wanted)


def test_features_of_held_out_prompts_are_forgotten_when_their_validation_is_done():
    """A loader keeps the prompts of validation as long as the run."""
    policy = vision_policy("qwen2_5_vl", train_vision=False)
    held_out, rollout = prompts(), prompts()
    policy(packed_row(groups_of(rollout)))
    rewards = RewardSet({"length": RewardSpec(lambda completion_ids, **_: [float(len(c)) for c in completion_ids])})
    validator = Validator(ValidationSettings(2), rewards, SamplingParams(2, 3), seed=0)
    calls = count_tower(policy)
    for times in (1, 2):
        validator.update(policy, TransformersEngine(), held_out)
        assert len(calls) == times  # greedy and drawn completions share them
        assert len(policy.vision._features) == 2 and set(policy.vision._features) <= set(rollout)


def test_a_tower_that_trains_runs_once_per_pass():
    policy = vision_policy("qwen2_5_vl")
    calls = count_tower(policy)
    groups = groups_of(prompts())
    policy(packed_row(groups))
    policy(packed_row(groups))
    assert len(calls) == 2


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_a_row_without_images_gives_a_tower_that_trains_a_zero_gradient(padded):
    policy = vision_policy("qwen2_5_vl")
    if padded:
        policy.fall_back()
    groups = groups_of([prompts()[1]], [(3, 4)])
    policy(packed_row(groups))[0].sum().backward()
    tower = list(policy.base_model.model.visual.parameters())
    assert all(p.grad is not None and not p.grad.any() for p in tower)


@pytest.mark.parametrize("most", [1, 8192])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_gives_the_log_probabilities_of_the_packed_pass(family, most, monkeypatch):
    monkeypatch.setattr("gspo_lightning.rollout.decoder.PREFILL_TOKENS", most)  # with 1, every prompt by itself
    policy = vision_policy(family)
    batch = video_prompts(family)
    rollout = TransformersEngine().generate(policy, batch, SamplingParams(3, 9), seed=5)
    groups = [(p, [c.token_ids for c in own]) for p, own in zip(batch, rollout.completions, strict=True)]
    logprobs, _ = policy(packed_row(groups))
    sampled = torch.cat([c.sampler_logprobs for own in rollout.completions for c in own])
    assert relative_distance(sampled.double(), logprobs.detach()) < 1e-6


def test_a_placeholder_that_the_policy_samples_is_an_ordinary_token():
    policy = vision_policy("qwen2_5_vl")
    prompt = prompts()[0]
    with_placeholder = [torch.tensor([5, IMAGE, 7, 8])]
    logprobs, _ = policy(packed_row([(prompt, with_placeholder)]))
    policy.base_model.model.get_input_embeddings().weight.data[IMAGE] += 1.0
    changed, _ = policy(packed_row([(prompt, with_placeholder)]))
    same = (logprobs - changed).abs() < 1e-12
    assert same.tolist() == [True, True, False, False]
