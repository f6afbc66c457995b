"""vLLM in process on images: what the trainer sees, on policy, and proven with its vision half."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from gspo_lightning.data.vision import VisionSettings, encode_conversation
from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.tiny_vlm import SPECIAL_IDS, build_processor
from gspo_lightning.rollout import VLLMEngine, WeightSyncError
from gspo_lightning.rollout.vllm_requests import engine_input, unexpanded
from gspo_lightning.types import Prompt, SamplingParams
from tests.rollout.random_vlm import save_random_vlm

SAMPLING = SamplingParams(3, 5, temperature=0.8)


def conversation(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": "user", "content": content}]


def prompt_of(processor, uid, *parts, limits=None):
    messages = conversation(*parts)
    ids, media = encode_conversation(messages, processor, limits or VisionSettings(), {}, uid)
    return Prompt(uid, messages, ids, {}, media)


def images():
    gradient = Image.linear_gradient("L").convert("RGB")
    return gradient, gradient.rotate(90).resize((200, 90)), Image.new("RGB", (60, 60), (250, 10, 10))


def test_a_prompt_goes_out_with_one_placeholder_for_each_image(smollm2_dir, tmp_path):
    processor = build_processor(smollm2_dir, tmp_path)
    first, second, _ = images()
    prompt = prompt_of(processor, "two", "a", first, second, "b", limits=VisionSettings(max_pixels=20_000))
    image = SPECIAL_IDS["<|image_pad|>"]
    runs = (prompt.mm_inputs["image_grid_thw"].prod(dim=1) // 4).tolist()
    short = unexpanded(prompt)
    assert sum(runs) > 2 and short.count(image) == 2
    again = iter(runs)
    assert [t for token in short for t in ([image] * next(again) if token == image else [token])] == (
        prompt.input_ids.tolist()
    )
    sent = engine_input(prompt)
    assert [p.size for p in sent["multi_modal_data"]["image"]] == [(256, 256), (200, 90)]
    assert sent["prompt_token_ids"] == short
    video = Prompt("v", [{"role": "user", "content": [{"type": "video", "video": "x"}]}], prompt.input_ids, {},
                   prompt.mm_inputs)  # fmt: skip
    with pytest.raises(UserError, match="row v has a video, which rollout=vllm does not accept"):
        engine_input(video)


# ---------------------------------------------------------------- with vLLM


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, smollm2_dir):
    return save_random_vlm(tmp_path_factory.mktemp("vlm"), smollm2_dir, tmp_path_factory.mktemp("scratch"))


@pytest.fixture
def engine(model_dir):
    made = VLLMEngine(str(model_dir), 100, 8, dtype="float32", kv_cache_gb=0.1, max_num_seqs=8)
    yield made
    made.close()


def prompts_of(policy):
    first, second, third = images()
    text = policy.tokenizer("only text", return_tensors="pt")["input_ids"][0]
    return [
        prompt_of(policy.processor, "two", "a", first, second, "b"),
        Prompt("text", "", text, {}),
        prompt_of(policy.processor, "one", third, "colour?"),
    ]


def mismatch(policy, engine, seed):
    rollout = engine.generate(policy, prompts_of(policy), SAMPLING, seed)
    groups = [
        (p.input_ids, [c.token_ids for c in g]) for p, g in zip(rollout.prompts, rollout.completions, strict=True)
    ]
    with torch.no_grad():
        own, _ = policy(pack(groups, policy.device, rollout.prompts), SAMPLING.temperature)
    theirs = torch.cat([c.sampler_logprobs for group in rollout.completions for c in group])
    return (own - theirs).abs().max().item(), own


@pytest.mark.vllm
def test_it_samples_on_policy_from_images_before_and_after_the_vision_half_changes(model_dir, engine):
    policy = PolicyLoader(str(model_dir), train_vision=True).load()
    difference, before = mismatch(policy, engine, 1)
    assert difference < 1e-4
    with torch.no_grad():
        for parameter in policy.base_model.model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    difference, after = mismatch(policy, engine, 1)
    assert difference < 1e-4
    assert len(after) != len(before) or (after - before).abs().max() > 1e-2


@pytest.mark.vllm
def test_a_vision_weight_that_did_not_arrive_stops_the_run(model_dir, engine, monkeypatch):
    from gspo_lightning.rollout import vllm_engine

    def without_merger(policy, dtype):
        return ((name, value) for name, value in named_weights(policy, dtype) if "merger.mlp.2" not in name)

    named_weights = vllm_engine.named_weights
    monkeypatch.setattr(vllm_engine, "named_weights", without_merger)
    policy = PolicyLoader(str(model_dir)).load()
    with pytest.raises(WeightSyncError, match="does not run the policy's weights"):
        engine.generate(policy, prompts_of(policy), SAMPLING, 1)


@pytest.mark.vllm
def test_limits_of_the_data_that_the_engine_was_not_told_are_refused_with_the_row(model_dir, engine):
    policy = PolicyLoader(str(model_dir)).load()
    large = prompt_of(policy.processor, "large", images()[0], "?", limits=VisionSettings(max_pixels=14_112))
    with pytest.raises(UserError, match="row large: vLLM makes .* tokens of the prompt .*min_pixels and max_pixels"):
        engine.generate(policy, [large], SAMPLING, 1)


@pytest.mark.vllm
def test_limits_of_the_data_hold_in_the_engine_too(model_dir):
    policy = PolicyLoader(str(model_dir)).load()
    limits = VisionSettings(max_pixels=14_112)
    large = prompt_of(policy.processor, "large", images()[0], "?", limits=limits)
    assert (large.mm_inputs["image_grid_thw"].prod() * 14 * 14).item() > 84 * 84
    engine = VLLMEngine(str(model_dir), 100, 8, dtype="float32", kv_cache_gb=0.1, max_num_seqs=8, max_pixels=14_112)
    try:
        (completions,) = engine.generate(policy, [large], SAMPLING, 1).completions
    finally:
        engine.close()
    row = pack([(large.input_ids, [c.token_ids for c in completions])], policy.device, [large])
    with torch.no_grad():
        own, _ = policy(row, SAMPLING.temperature)
    torch.testing.assert_close(own, torch.cat([c.sampler_logprobs for c in completions]), atol=1e-4, rtol=0)


@pytest.mark.vllm
def test_without_the_scaling_of_pixels_the_first_proof_fails(model_dir, engine, monkeypatch):
    """A start from random weights overwrites what is no weight of the checkpoint (`vllm_worker.restore_pixel_norm`)."""
    from gspo_lightning.rollout import vllm_worker

    monkeypatch.setattr(vllm_worker, "restore_pixel_norm", lambda model, config: None)
    policy = PolicyLoader(str(model_dir)).load()
    with pytest.raises(WeightSyncError, match="does not run the policy's weights"):
        engine.generate(policy, prompts_of(policy), SAMPLING, 1)


def with_tower_adapter(model_dir):
    return PolicyLoader(str(model_dir), train_vision=True, lora=LoraSettings(r=4, alpha=8)).load()


@pytest.mark.vllm
def test_an_adapter_of_the_tower_is_sampled_on_policy_from_its_first_value_to_every_other(model_dir, engine):
    policy = with_tower_adapter(model_dir)
    difference, before = mismatch(policy, engine, 1)
    assert difference < 1e-4
    for part in ("visual.blocks", "visual.merger"):
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if part in name and parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
        difference, after = mismatch(policy, engine, 1)
        assert difference < 1e-4
        assert len(after) != len(before) or (after - before).abs().max() > 1e-2
        before = after


@pytest.mark.vllm
def test_an_engine_that_leaves_out_the_towers_adapter_is_found_in_bfloat16_too(model_dir, monkeypatch):
    from gspo_lightning.rollout import vllm_engine

    def language_alone(policy):
        return {**lora_settings(policy), "enable_tower_connector_lora": False}

    lora_settings = vllm_engine.lora_settings
    monkeypatch.setattr(vllm_engine, "lora_settings", language_alone)
    policy = with_tower_adapter(model_dir)
    engine = VLLMEngine(str(model_dir), 100, 8, dtype="bfloat16", kv_cache_gb=0.1, max_num_seqs=8)
    try:
        with pytest.raises(WeightSyncError, match="does not apply the adapter of visual.blocks"):
            engine.generate(policy, prompts_of(policy), SAMPLING, 1)
    finally:
        engine.close()
