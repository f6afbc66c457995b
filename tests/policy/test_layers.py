"""``model.compile`` and ``model.gradient_checkpointing``: layers compute what the plain ones do, in training and while sampling."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.rollout import TransformersEngine, decoder, flash_cache
from gspo_lightning.rollout.steps import Steps
from gspo_lightning.types import SamplingParams
from tests.packing.test_flash import forward
from tests.support import flat_gradient, make_prompt, random_groups, relative_distance


def loaded(folder, **settings):
    return PolicyLoader(str(folder), dtype="float64", **settings).load()


@pytest.fixture
def compilations():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=torch._dynamo.config.allow_unspec_int_on_nn_module):
        yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_log_probabilities_and_gradients_are_those_of_plain_layers(checkpointing, micro_model_dir, compilations):
    policies = [loaded(micro_model_dir, compile=flag, gradient_checkpointing=checkpointing) for flag in (False, True)]
    graphs = []
    for seed, shapes in enumerate([[(7, [3, 5]), (4, [2])], [(11, [1, 6, 2])], [(5, [9])]]):
        outcomes = []
        for policy in policies:
            policy.zero_grad()
            logprobs, _ = policy(pack(random_groups(shapes, 90, seed), torch.device("cpu")))
            logprobs.sum().backward()
            outcomes.append((logprobs.detach(), flat_gradient(policy)))
        (plain, plain_gradient), (compiled, compiled_gradient) = outcomes
        assert relative_distance(compiled, plain) < 1e-7
        assert relative_distance(compiled_gradient, plain_gradient) < 1e-6
        graphs.append(compilations["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1] == graphs[2], "another row length compiled anew"


@pytest.mark.parametrize("cache", ["of CPUs", pytest.param("of GPUs", marks=pytest.mark.slow)])
def test_completions_are_those_of_plain_layers_and_every_layer_is_compiled(
    cache, micro_model_dir, compilations, tmp_path, monkeypatch
):
    if cache == "of GPUs":
        monkeypatch.setattr(flash_cache, "flash_forward", forward)
        monkeypatch.setattr(decoder, "cache_of", lambda policy, *settings: flash_cache.FlashCache(*settings))
        monkeypatch.setattr(decoder, "steps_of", Steps)
    # More layers than torch compiles graphs of one function: each has a number, which a cache asks for.
    config = AutoConfig.from_pretrained(micro_model_dir, num_hidden_layers=10)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for file in micro_model_dir.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    sampling = SamplingParams(num_generations=3, max_completion_length=12)
    prompts = [make_prompt([5, 6, 7], "a"), make_prompt([9, 4], "b")]
    policies = [loaded(tmp_path, compile=flag) for flag in (False, True)]
    rollouts = [TransformersEngine().generate(policy, prompts, sampling, seed=3) for policy in policies]
    plain, compiled = ([c.token_ids.tolist() for group in r.completions for c in group] for r in rollouts)
    assert compiled == plain
    policies[1](pack(random_groups([(7, [3, 5]), (4, [2])], 90), torch.device("cpu")))[0].sum().backward()
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 0
    assert compilations["unique_graphs"] < 20


def test_the_one_kernel_attention_is_refused_where_it_cannot_run(micro_model_dir, monkeypatch):
    with pytest.raises(UserError, match=r"model.attention=flex has no kernel for model.dtype=float64; use auto"):
        loaded(micro_model_dir, attention="flex")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"model.attention=flex needs a GPU, and there is none here; use auto"):
        PolicyLoader(str(micro_model_dir), attention="flex").load()


def test_recomputing_activations_changes_neither_completions_nor_gradients(micro_model_dir):
    sampling = SamplingParams(num_generations=3, max_completion_length=12)
    prompts = [make_prompt([5, 6, 7], "a"), make_prompt([9, 4], "b")]
    found = []
    for flag in (False, True):
        policy = loaded(micro_model_dir, gradient_checkpointing=flag)
        rollout = TransformersEngine().generate(policy, prompts, sampling, seed=3)
        assert policy.base_model.is_gradient_checkpointing is flag
        logprobs, _ = policy(pack(random_groups([(7, [3, 5]), (4, [2])], 90), torch.device("cpu")))
        logprobs.sum().backward()
        tokens = [c.token_ids.tolist() for group in rollout.completions for c in group]
        found.append((tokens, logprobs.detach(), flat_gradient(policy)))
    (plain_tokens, *plain), (tokens, *recomputed) = found
    assert tokens == plain_tokens
    for a, b in zip(recomputed, plain, strict=True):
        assert relative_distance(a, b) < 1e-12
