"""Loading, adapters, export and the first-use check of models that see."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy import patches
from gspo_lightning.policy import vision as vision_module
from gspo_lightning.policy.check import PackingMismatchError, check_packing
from gspo_lightning.policy.export import export_policy
from gspo_lightning.policy.fake import _without_weights
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.processor import ImageTextProcessor, load_processor
from gspo_lightning.policy.quantization import check_quantization
from gspo_lightning.policy.tiny_vlm import build_processor
from tests.support import relative_distance
from tests.vision.models import FAMILIES, image_prompt, padded_vision_logprobs, vision_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2_dir):
    """A saved random Qwen2.5-VL with a processor."""
    path = tmp_path_factory.mktemp("vlm")
    vision_policy("qwen2_5_vl", torch.float32).base_model.save_pretrained(path)
    build_processor(smollm2_dir, tmp_path_factory.mktemp("scratch")).save_pretrained(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_use_check_passes_with_an_image(family):
    policy = vision_policy(family, torch.float64)
    assert check_packing(policy) < 1e-6
    assert policy.vision.calls > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_first_use_check_refuses_positions_that_ignore_images(family, dtype, monkeypatch):
    policy = vision_policy(family, dtype)
    check_packing(policy)
    one_axis = lambda self, layout, prompts: layout.positions.expand(4, 1, -1)  # noqa: E731
    monkeypatch.setattr(vision_module.Vision, "positions", one_axis)
    with pytest.raises(PackingMismatchError):
        check_packing(policy)


def test_dropout_within_the_language_half_is_refused_and_can_be_switched_off(folder, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.1
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"add '\+model.overrides=\{text_config: \{attention_dropout: 0.0\}\}'"):
        PolicyLoader(str(copy)).load()
    without = PolicyLoader(str(copy), overrides={"text_config": {"attention_dropout": 0.0}})
    for model in (without.load().base_model, _without_weights(without)):
        text = model.config.text_config
        assert (text.attention_dropout, text.hidden_size) == (0.0, config["text_config"]["hidden_size"])


def trained(policy):
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def test_the_tower_is_frozen_by_default_and_trains_by_choice(folder):
    assert not any("visual" in name for name in trained(PolicyLoader(str(folder)).load()))
    assert any("visual" in name for name in trained(PolicyLoader(str(folder), train_vision=True).load()))


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}])
def test_a_loaded_tower_multiplies_its_patches(folder, settings):
    tower = PolicyLoader(str(folder), **settings).load().base_model.model.visual
    assert tower.patch_embed.proj.forward.func is patches._product


def test_the_tower_may_train_alone_and_only_with_itself(folder):
    policy = PolicyLoader(str(folder), train_vision=True, train_language=False).load()
    assert {name.split(".")[2] for name, p in policy.named_parameters() if p.requires_grad} == {"visual"}
    for settings in ({}, {"train_vision": True, "lora": LoraSettings()}):
        with pytest.raises(UserError, match="model.train_language=false.*needs model.train_vision=true and lora=none"):
            PolicyLoader(str(folder), train_language=False, **settings).load()


@pytest.mark.parametrize("train_vision", [False, True])
def test_adapters_sit_on_language_layers_and_on_the_tower_by_choice(folder, train_vision):
    names = trained(PolicyLoader(str(folder), lora=LoraSettings(r=2), train_vision=train_vision).load())
    assert any("language_model" in name for name in names)
    assert any("visual" in name for name in names) == train_vision
    assert all("lora_" in name for name in names)


def test_a_text_model_has_no_tower_to_train(micro_model_dir):
    with pytest.raises(UserError, match="model.train_vision=true has no effect"):
        PolicyLoader(str(micro_model_dir), train_vision=True).load()


def test_a_frozen_reference_shares_the_features_of_the_policy(folder):
    loader = PolicyLoader(str(folder))
    policy = loader.load()
    reference = loader.load_reference(policy)
    prompt = image_prompt("one", 3, (4, 4), 2, dtype=torch.float32)
    row = pack([(prompt.input_ids, [torch.tensor([5, 6, 7])])], policy.device, [prompt])
    with torch.no_grad():
        assert torch.equal(policy(row)[0], reference(row)[0])
    assert (policy.vision.calls, reference.vision.calls) == (1, 0)


def test_a_reference_of_a_tower_that_trains_has_features_of_its_own(folder):
    loader = PolicyLoader(str(folder), train_vision=True)
    policy = loader.load()
    reference = loader.load_reference(policy)
    prompt = image_prompt("one", 3, (4, 4), 2, dtype=torch.float32)
    row = pack([(prompt.input_ids, [torch.tensor([5, 6, 7])])], policy.device, [prompt])
    policy.base_model.model.visual.patch_embed.proj.weight.data.mul_(2)
    assert not torch.allclose(policy(row)[0], reference(row)[0])


def test_an_export_loads_in_plain_transformers_and_computes_the_same(folder, tmp_path):
    policy = PolicyLoader(str(folder)).load()
    export_policy(policy, tmp_path, merge_lora=False)
    prompt = image_prompt("one", 3, (4, 4), 2, dtype=torch.float32)
    completion = torch.tensor([5, 6, 7])
    row = pack([(prompt.input_ids, [completion])], policy.device, [prompt])
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    policy.model = plain
    with torch.no_grad():
        expected = padded_vision_logprobs(policy, [(prompt, [completion])])
        ours = PolicyLoader(str(folder)).load()(row)[0]
    assert relative_distance(ours, expected) < 1e-5
    assert isinstance(load_processor(str(tmp_path)), ImageTextProcessor)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert '"Qwen2_5_VLProcessor"' in (tmp_path / "processor_config.json").read_text()


def test_a_merged_export_of_adapters_on_language_and_tower_computes_the_same_in_plain_transformers(folder, tmp_path):
    policy = PolicyLoader(str(folder), lora=LoraSettings(r=2), train_vision=True).load()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                # At 0.3 the adapter is 4 times as large as its base, attention saturates and rounding alone, which is
                # another for A and B than for their sum with the base, comes out as up to 2e-4; here as 1e-6.
                parameter.normal_(std=0.05)
    export_policy(policy, tmp_path, merge_lora=False)
    export_policy(policy, tmp_path, merge_lora=True)  # an adapter left beside it would be added once more
    prompt = image_prompt("one", 3, (4, 4), 2, dtype=torch.float32)
    completion = torch.tensor([5, 6, 7])
    row = pack([(prompt.input_ids, [completion])], policy.device, [prompt])
    plain = PolicyLoader(str(folder)).load()
    with torch.no_grad():
        ours, before = policy(row)[0], plain(row)[0]
        plain.model = AutoModelForImageTextToText.from_pretrained(tmp_path)
        expected = padded_vision_logprobs(plain, [(prompt, [completion])])
    assert relative_distance(ours, expected) < 1e-5
    assert relative_distance(ours, before) > 1e-2


def test_a_quantised_base_is_refused_in_8_bits_without_a_gpu_and_without_an_adapter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="int8 needs a GPU.*nf4 runs on a CPU too"):
        check_quantization("int8", LoraSettings(r=4))
    check_quantization("nf4", LoraSettings(r=4))
    with pytest.raises(UserError, match="lora=language"):
        check_quantization("nf4", None)
