"""The proof that an engine applies every part of an adapter, with engines that leave one out."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout import TransformersEngine, WeightSyncError
from gspo_lightning.rollout.adapter_proof import adapter_parts, refuse_left_out, shaken
from gspo_lightning.rollout.fingerprint import DEFAULT_TOLERANCE, PROBE_SAMPLING, Fingerprint, probe_prompt
from gspo_lightning.rollout.vllm_settings import lora_settings
from gspo_lightning.rollout.weights import checksum, trained_parameters
from tests.rollout.random_vlm import save_random_vlm

PARTS = ["the language model", "visual.blocks", "visual.merger"]


def loaded(folder, dtype="float32", train_vision=True):
    return PolicyLoader(str(folder), dtype=dtype, train_vision=train_vision, lora=LoraSettings(r=4, alpha=8)).load()


@pytest.fixture(scope="module")
def vlm_dir(smollm2_dir, tmp_path_factory):
    return save_random_vlm(tmp_path_factory.mktemp("vlm"), smollm2_dir, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def policy(vlm_dir):
    return loaded(vlm_dir)


@pytest.fixture(scope="module")
def engine_weights(vlm_dir):
    """The engine's own model, which computes in bfloat16."""
    return loaded(vlm_dir, "bfloat16")


def part_of(policy, name):
    (part,) = (part for part in adapter_parts(policy) if part.name == name)
    return part


def answer(policy, engine_weights, left_out):
    """What an engine samples that takes the adapter but for one part."""
    with torch.no_grad():
        for mine, theirs in zip(trained_parameters(engine_weights), trained_parameters(policy), strict=True):
            mine.copy_(theirs)
        for parameter in part_of(engine_weights, left_out).parameters if left_out else []:
            parameter.zero_()
    probe = probe_prompt(policy, 100)
    return probe, TransformersEngine().generate(engine_weights, [probe], PROBE_SAMPLING, seed=0).completions[0]


def test_parts_are_those_of_the_language_model_and_of_what_the_tower_is_made_of(vlm_dir, policy, micro_model_dir):
    assert [part.name for part in adapter_parts(policy)] == PARTS
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    for part in adapter_parts(policy):
        inside = {"visual." in names[id(parameter)] for parameter in part.parameters}
        assert inside == {part.name != "the language model"}
    numbers = [id(parameter) for part in adapter_parts(policy) for parameter in part.parameters]
    assert sorted(numbers) == sorted(id(parameter) for parameter in trained_parameters(policy))
    assert [part.name for part in adapter_parts(loaded(vlm_dir, train_vision=False))] == PARTS[:1]
    assert [part.name for part in adapter_parts(loaded(micro_model_dir, train_vision=False))] == PARTS[:1]


def test_vllm_is_asked_for_the_towers_part_where_there_is_one(vlm_dir, policy, micro_model_dir):
    without = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    assert lora_settings(policy) == {**without, "enable_tower_connector_lora": True}
    assert lora_settings(loaded(vlm_dir, train_vision=False)) == without
    assert lora_settings(loaded(micro_model_dir, train_vision=False)) == without


def test_random_values_make_up_for_the_scale_of_the_adapter(micro_model_dir):
    # 0.2 / (1 / 4): with the same values as at 8 / 4 the adapter would be lost in the rounding of bfloat16.
    policy = PolicyLoader(str(micro_model_dir), lora=LoraSettings(r=4, alpha=1)).load()
    assert [part.size for part in adapter_parts(policy)] == [pytest.approx(0.8**0.5)]


@pytest.mark.parametrize("name", PARTS)
def test_a_shaken_part_is_afterwards_as_it_was_and_the_others_are_at_all_times(name, policy):
    parts = {part.name: part.parameters for part in adapter_parts(policy)}
    before = {other: checksum(parameters) for other, parameters in parts.items()}
    with shaken(part_of(policy, name)):
        now = {other: checksum(parameters) for other, parameters in parts.items()}
        assert {other for other in parts if now[other] != before[other]} == {name}
        # The product is scaled by 8 / 4: 2 * 0.1 and 2 * 0.2 are the shares of what it is added to.
        size = 0.1**0.5 if name == "the language model" else 0.2**0.5
        for parameter in parts[name]:
            assert parameter.std().item() * parameter.shape[1] ** 0.5 == pytest.approx(size, rel=0.3)
    assert {other: checksum(parameters) for other, parameters in parts.items()} == before


@pytest.mark.parametrize("name", PARTS)
def test_an_engine_in_bfloat16_that_leaves_a_part_out_is_found_and_one_that_does_not_is_not(
    name, policy, engine_weights
):
    part = part_of(policy, name)
    with shaken(part):
        refuse_left_out(policy, part, *answer(policy, engine_weights, left_out=None))
        shaken_sum = checksum(trained_parameters(policy))
        with pytest.raises(
            WeightSyncError, match=rf"does not apply the adapter of {name}: .* rollout.engine.lora_sync=merged$"
        ):
            refuse_left_out(policy, part, *answer(policy, engine_weights, left_out=name))
        assert checksum(trained_parameters(policy)) == shaken_sum


def test_the_tolerance_of_bfloat16_alone_lets_a_tower_without_its_adapter_pass(policy, engine_weights):
    fingerprint = Fingerprint(DEFAULT_TOLERANCE[torch.bfloat16])
    with shaken(part_of(policy, "visual.blocks")):
        probe, completions = answer(policy, engine_weights, left_out="visual.blocks")
        assert 0.02 < fingerprint.check(policy, probe, completions, "an engine") < 0.25
