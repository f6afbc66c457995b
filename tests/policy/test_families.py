"""Architectures as their configs make them: which pack, which run padded, and what an adapter leaves alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.check import choose_forward
from gspo_lightning.policy.fake import fake_policy
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.weights import check_base
from gspo_lightning.trainer_checks import check_rotation
from gspo_lightning.types import SamplingParams
from tests.support import flat_gradient, make_prompt, padded_logprobs, random_groups, relative_distance

WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "as many key heads as query heads": LlamaConfig(**WIDTH, num_key_value_heads=4),
    "one key head": LlamaConfig(**WIDTH, num_key_value_heads=1),
    "values smaller than queries": DeepseekV3Config(
        **WIDTH, num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
        first_k_dense_replace=1,
    ),
    "another name of the body": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0
    ),
    "another table of attentions": FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
}  # fmt: skip
PADDED = ("values smaller than queries", "another name of the body", "another table of attentions")


@pytest.fixture
def saved(micro_model_dir, tmp_path):
    """``saved(config)``: the folder of a random model with the micro model's tokenizer."""

    def make(config):
        tokenizer = AutoTokenizer.from_pretrained(micro_model_dir)
        tokenizer.save_pretrained(tmp_path)
        settings = config.to_dict() | {
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(type(config)(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        model.save_pretrained(tmp_path)
        return str(tmp_path)

    return make


@pytest.mark.filterwarnings("ignore:.*falling back to padded forwards")
@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_and_samples_as_the_model_alone_does(name, saved):
    policy = PolicyLoader(saved(CONFIGS[name]), dtype="float64").load()
    choose_forward(policy)
    assert policy.is_padded == (name in PADDED)
    # Blocks of one shape in one batch, and others.
    groups = random_groups([(7, [3, 5, 2]), (9, [4, 4]), (7, [3, 5, 2])], policy.output_weight.shape[0])
    logprobs, _ = policy(pack(groups, torch.device("cpu")), 0.7)
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logprobs @ weights).backward()
    ours = flat_gradient(policy)
    policy.zero_grad()
    expected, _ = padded_logprobs(policy.base_model, groups, temperature=0.7)
    (expected @ weights).backward()
    assert relative_distance(logprobs, expected) < 1e-9
    assert relative_distance(ours, flat_gradient(policy)) < 1e-6
    prompts = [make_prompt(torch.arange(5, 5 + n), uid=f"t:{n}") for n in (3, 9)]
    rollout = TransformersEngine().generate(policy, prompts, SamplingParams(3, 6, temperature=0.7), 0)
    sampled = [(p.input_ids, [c.token_ids for c in g]) for p, g in zip(prompts, rollout.completions, strict=True)]
    with torch.no_grad():
        own = policy(pack(sampled, torch.device("cpu")), 0.7)[0]
    theirs = torch.cat([c.sampler_logprobs for g in rollout.completions for c in g])
    assert (own - theirs).abs().max() < 1e-5


def test_what_runs_padded_says_so_and_is_not_estimated(saved):
    loader = PolicyLoader(saved(CONFIGS["another name of the body"]), overrides={"attn_pdrop": 0.0})
    with pytest.warns(
        UserWarning, match="model type gpt2 names its layers in a way that packing does not know; falling"
    ):
        loader.load()
    with pytest.raises(UserError, match="dry_run=true: models of type gpt2 run padded, which is not estimated"):
        fake_policy(loader)
    with pytest.raises(UserError, match="model.compile=true: the layers of GPT2LMHeadModel are not known"):
        PolicyLoader(loader.path, compile=True).load()


def test_an_adapter_leaves_routers_alone_and_is_not_merged_into_experts(saved):
    config = MixtralConfig(**WIDTH, num_key_value_heads=2, num_local_experts=4)
    policy = PolicyLoader(saved(config), lora=LoraSettings(r=2)).load()
    trained = {
        name.split(".lora_")[0].rpartition("layers.")[2] for name, p in policy.named_parameters() if p.requires_grad
    }
    assert {"0.self_attn.q_proj", "1.self_attn.o_proj", "0.mlp.experts"} <= trained
    assert not [name for name in trained if "gate" in name.split(".")]
    check_base(policy, "adapter")
    with pytest.raises(UserError, match="lora_sync=merged does not know adapters on the stacked weights of experts"):
        check_base(policy, "merged")


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 64),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 16,
            },
            16,
        ),
        ({"rope_type": "yarn", "factor": 2.0}, None),
        ({"rope_type": "default"}, None),
    ],
)
def test_a_rotation_that_hangs_on_the_longest_sequence_is_refused_beyond_its_limit(rope, limit):
    config = AutoConfig.for_model(
        "llama", **WIDTH, max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope}
    )
    if limit is None:
        check_rotation(config, 1000, 1000)
        return
    check_rotation(config, limit - 6, 6)
    with pytest.raises(
        UserError, match=f"prompts of {limit - 5} and completions of 6 tokens pass {limit}, where this model"
    ):
        check_rotation(config, limit - 5, 6)
