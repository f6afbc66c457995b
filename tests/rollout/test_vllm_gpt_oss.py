"""gpt-oss in vLLM: experts and attention sinks follow the policy, which `reload_weights` alone does not see to."""

from __future__ import annotations

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.micro import build_micro_tokenizer
from gspo_lightning.rollout import VLLMEngine, WeightSyncError, vllm_worker
from tests.rollout.test_vllm_engine import SAMPLING, largest_difference, move
from tests.support import make_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

PROMPTS = [make_prompt(torch.arange(n, n + 40) % 90 + 3, uid=f"t:{n}") for n in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt_oss")
    tokenizer = build_micro_tokenizer()
    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32",
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("sinks"):
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture()
def engine(folder):
    one = VLLMEngine(str(folder), 48, 12, dtype="float32", kv_cache_gb=0.05, max_num_seqs=16)
    yield one
    one.close()


def test_experts_and_sinks_follow_the_policy(folder, engine):
    policy = PolicyLoader(str(folder)).load()
    for seed in range(3):
        assert largest_difference(policy, engine.generate(policy, PROMPTS, SAMPLING, seed)) < 1e-4
        move(policy, seed)


def test_trap_3_without_loading_what_reload_skips_the_experts_stay_old(folder, engine, monkeypatch):
    policy = PolicyLoader(str(folder)).load()
    monkeypatch.setattr(vllm_worker, "load_what_reload_skips", lambda model, weights: None)
    with pytest.raises(WeightSyncError):
        engine.generate(policy, PROMPTS, SAMPLING, seed=0)
