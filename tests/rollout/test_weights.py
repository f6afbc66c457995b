"""The checksum by which an engine knows whether it has the trainer's weights."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout import weights
from gspo_lightning.rollout.vllm_worker import WeightSync
from gspo_lightning.rollout.weights import checksum, load_weights, named_weights, save_weights, weight_parts
from tests.support import micro_policy

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64, torch.int8: torch.int8}


@pytest.mark.parametrize("dtype", list(INTEGERS))
@pytest.mark.parametrize("count", [64, 61], ids=["eight bytes at a time", "one by one"])
def test_any_flipped_bit_changes_it(dtype, count):
    generator = torch.Generator().manual_seed(0)
    tensors = [(100 * torch.randn(count, generator=generator)).to(dtype) for _ in range(3)]
    whole = checksum(tensors)
    bits = 8 * dtype.itemsize
    for position in (0, 1, 2, 3, count - 1):
        for bit in (0, 1, bits - 2, bits - 1):
            changed = [tensor.clone() for tensor in tensors]
            word = 1 << bit if bit < bits - 1 else -(1 << bit)
            changed[1].view(INTEGERS[dtype])[position] ^= torch.tensor(word, dtype=INTEGERS[dtype])
            assert not torch.equal(changed[1].view(INTEGERS[dtype]), tensors[1].view(INTEGERS[dtype]))
            assert checksum(changed) != whole, (position, bit)


def test_the_order_of_tensors_counts_and_their_place_in_memory_does_not():
    first, second = torch.arange(8.0), torch.arange(8.0, 16.0)
    assert checksum([first, second]) != checksum([second, first])
    shifted = torch.cat([torch.zeros(1), first])[1:]
    assert checksum([shifted, second]) == checksum([first, second])


@pytest.mark.parametrize("model", ["micro", "micro-gpt-oss"])
def test_weights_come_layer_by_layer_and_are_those_of_the_hub(model, tmp_path):
    policy = PolicyLoader(f"bundled:{model}", dtype="float64").load()
    policy.base_model.save_pretrained(tmp_path / "hub")
    hub = load_file(tmp_path / "hub" / "model.safetensors")
    parts = list(weight_parts(policy, torch.float64))
    assert len(parts) == 1 + policy.config.num_hidden_layers
    assert not any(".layers." in name for name in parts[0])
    for number, part in enumerate(parts[1:]):
        assert all(name.startswith(f"model.layers.{number}.") for name in part)
    ours = {name: value for part in parts for name, value in part.items()}
    assert ours.keys() == hub.keys() and all(torch.equal(ours[name], hub[name]) for name in hub)


def test_written_weights_are_read_again_with_their_checksum_and_no_file_holds_more_than_a_part(
    micro_model_dir, tmp_path
):
    policy = micro_policy(micro_model_dir, torch.float32)
    total = save_weights(policy, torch.bfloat16, tmp_path / "w")
    read = list(load_weights(tmp_path / "w"))
    assert total == checksum(value for _, value in read)
    expected = dict(named_weights(policy, torch.bfloat16))
    assert len(read) == len(expected) and all(torch.equal(value, expected[name]) for name, value in read)
    sizes = [sum(2 * v.numel() for v in part.values()) for part in weight_parts(policy, torch.float32)]
    files = sorted((tmp_path / "w").iterdir())
    assert [size <= file.stat().st_size < size + 4096 for size, file in zip(sizes, files, strict=True)] == [True] * 3


def test_no_layer_is_made_before_it_is_asked_for(micro_model_dir, monkeypatch):
    policy, made = micro_policy(micro_model_dir, torch.float32), []
    original = weights._weight
    monkeypatch.setattr(weights, "_weight", lambda policy, name: made.append(name) or original(policy, name))
    for number, _ in enumerate(weight_parts(policy, torch.bfloat16)):
        layers = {name.split(".")[2] for name in made if ".layers." in name}
        assert layers == {str(layer) for layer in range(number)}


def test_an_adapter_is_added_to_copies(micro_model_dir):
    policy = PolicyLoader(str(micro_model_dir), dtype="float64", lora=LoraSettings(r=2, alpha=6)).load()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    before = {name: value.clone() for name, value in policy.base_model.named_parameters()}
    merged = dict(named_weights(policy, torch.float64))
    stem = "model.layers.1.self_attn.q_proj"
    a, b = (before[f"{stem}.lora_{half}.default.weight"] for half in "AB")
    torch.testing.assert_close(merged[f"{stem}.weight"], before[f"{stem}.base_layer.weight"] + 3 * b @ a)
    assert not any("lora" in name or "base_layer" in name for name in merged)
    assert all(torch.equal(value, before[name]) for name, value in policy.base_model.named_parameters())


class Worker(WeightSync):
    """vLLM's, which counts what it is given as the version it is told."""

    def gspo_load_weights(self, weights, version):
        self.given, self.gspo_version = dict(weights()), version


def test_a_worker_takes_weights_for_a_version_only_with_its_checksum(micro_model_dir, tmp_path):
    policy, worker = micro_policy(micro_model_dir, torch.float32), Worker()
    total = save_weights(policy, torch.float32, tmp_path / "weights")
    assert worker.gspo_load_folder(str(tmp_path / "weights"), "one", str(total)) == {"checksum": total}
    assert worker.gspo_version == "one" and worker.given.keys() == dict(named_weights(policy, torch.float32)).keys()
    assert worker.gspo_load_folder(str(tmp_path / "weights"), "two", str(total + 1)) == {"checksum": total}
    assert worker.gspo_version is None


class Runner:
    """vLLM's, of a model without layers."""

    model_config = SimpleNamespace(hf_config=LlamaConfig(), dtype=torch.float32, logprobs_mode="processed_logprobs")
    lora_config = vllm_config = None

    def reload_weights(self, weights_iterator):
        dict(weights_iterator)

    def get_model(self):
        return torch.nn.Identity()


@pytest.mark.parametrize("whole", [True, False])
def test_a_worker_says_that_its_base_was_replaced_also_by_weights_that_did_not_arrive_whole(whole):
    worker = WeightSync()
    worker.model_runner = Runner()
    worker.gspo_set_version("an adapter")
    assert worker.gspo_status()["base_replaced"] is False
    with contextlib.nullcontext() if whole else pytest.raises(ZeroDivisionError):
        worker.gspo_load_weights(lambda: ((str(n), 1 / n) for n in range(int(whole), 2)), "all weights")
    status = worker.gspo_status()
    assert (status["base_replaced"], status["version"]) == (True, "all weights" if whole else None)
