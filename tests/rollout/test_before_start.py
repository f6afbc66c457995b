"""What vLLM engines refuse before they start, so these need neither vLLM nor a GPU."""

from __future__ import annotations

import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.errors import UserError
from gspo_lightning.rollout import VLLMEngine, VLLMServerEngine, vllm_engine
from gspo_lightning.rollout.weights import check_base
from gspo_lightning.types import SamplingParams
from tests.support import make_prompt, micro_policy

SAMPLING = SamplingParams(num_generations=3, max_completion_length=8, temperature=0.8)
PROMPTS = [make_prompt(torch.arange(5, 8), uid="t:0")]


def test_a_quantised_base_is_refused_where_the_adapter_is_merged_and_warned_of_else(micro_model_dir):
    policy = micro_policy(micro_model_dir, torch.float32)
    policy.base_model.is_quantized = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="lora_sync=merged cannot add the adapter to a quantised base"):
            check_base(policy, "merged")
    with pytest.warns(UserWarning, match=r"base is quantised .*: sampler_mismatch/abs_mean shows the difference"):
        check_base(policy, "adapter")
    policy.base_model.is_quantized = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_base(policy, "merged")


def vllm_in_process(folder, monkeypatch):
    """Not started, so vLLM need not be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return VLLMEngine("no-model", 64, 8, lora_sync="merged")


def vllm_of_servers(folder, monkeypatch):
    return VLLMServerEngine(["http://127.0.0.1:9"], 64, 8, sync_dir=str(folder), lora_sync="merged")


@pytest.mark.parametrize("make", [vllm_in_process, vllm_of_servers])
def test_engines_look_at_the_base_before_they_start(make, micro_model_dir, tmp_path, monkeypatch):
    policy = micro_policy(micro_model_dir, torch.float32)
    policy.base_model.is_quantized = True
    with pytest.raises(UserError, match="lora_sync=merged cannot add"):
        make(tmp_path, monkeypatch).generate(policy, PROMPTS, SAMPLING, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gpu", "ranks", "device", "refused"),
    [
        (True, 1, "cuda:0", None),
        (True, 1, "cuda", None),
        (False, 2, "cpu", None),
        (True, 1, "cuda:1", "the policy is on cuda:1; use rollout=vllm_server, or choose the GPU by CUDA_VISIBLE_DEVI"),
        (True, 2, "cuda:0", "on the first GPU alone, and 2 processes train; use rollout=vllm_server, or trainer.devi"),
        (True, 2, "cpu", "on the first GPU alone, and 2 processes train"),  # whole copies of a policy that is split
    ],
)
def test_the_engine_in_process_is_refused_on_gpus_it_would_not_take(gpu, ranks, device, refused, tmp_path, monkeypatch):
    engine = vllm_in_process(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(vllm_engine, "world_size", lambda: ranks)
    monkeypatch.setattr(vllm_engine, "check_base", lambda *_: (_ for _ in ()).throw(LookupError("next step")))
    with pytest.raises(UserError if refused else LookupError, match=refused or "next step"):
        engine.generate(SimpleNamespace(device=torch.device(device)), PROMPTS, SAMPLING, seed=0)
