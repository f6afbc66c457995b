"""Architectures as their configs make them: which pack, which run padded, and what an adapter leaves alone."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.check import choose_forward
from gspo_lightning.policy.fake import fake_policy
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.check import choose_decoding
from gspo_lightning.rollout.weights import check_base
from gspo_lightning.training.sampling_checks import check_rotation
from gspo_lightning.types import SamplingParams
from tests.support import flat_gradient, make_prompt, padded_logprobs, random_groups, relative_distance

WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE_HEADS, EXPERTS = {"head_dim": 16}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL, ALTERNATING = {"num_local_experts": 4, "num_experts_per_tok": 2}, ["sliding_attention", "full_attention"]
SLIDING = {"sliding_window": 5, "layer_types": ALTERNATING}
LATENT = {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Model type of transformers, and what makes it different, in small. A window of 5 is shorter than the prompts.
PACKED = {
    "llama: as many key heads as query heads": {"num_key_value_heads": 4},
    "llama: one key head": {"num_key_value_heads": 1},
    "llama: Llama 3's rotation, tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama: yarn, biases": {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "mixtral": {**LOCAL, "sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": WIDE_HEADS,
    "qwen3_moe": {**EXPERTS, **WIDE_HEADS, "norm_topk_prob": True},
    "gemma": WIDE_HEADS,
    "gemma3_text": {**WIDE_HEADS, **SLIDING, "query_pre_attn_scalar": 24},
    "phi3": {"sliding_window": 5, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "olmo2": {"num_key_value_heads": 4},
    "olmo3": SLIDING,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "starcoder2": {"sliding_window": 5, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    "glm4": {**WIDE_HEADS, "partial_rotary_factor": 0.5},
    "exaone4": {"sliding_window": 5, "sliding_window_pattern": 2},
    "helium": {"head_dim": 8},
    "seed_oss": {**WIDE_HEADS, "residual_dropout": 0.0, "attention_dropout": 0.0},
    "gpt_oss": {**WIDE_HEADS, **SLIDING, **LOCAL},
}
# They change keys and values after the cache, so that their own `generate` samples.
GENERATED = {
    "diffllama": {},
    "glm4_moe_lite": {  # GLM-4.7-Flash: values as wide as queries
        **LATENT, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "mlp_layer_types": ["dense", "sparse"],
    },
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
PADDED = {
    "deepseek_v3": LATENT,  # values smaller than queries
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},  # the head scales its logits
    "cohere": {"logit_scale": 0.25},
    "stablelm": {"partial_rotary_factor": 0.5, "hidden_size": 64, "qk_layernorm": True, "use_parallel_residual": True},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0},
    "gpt_neox": {"classifier_dropout": 0.0},
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},  # a bias of the head, which begins with zeros and is trained
    "falcon": {},  # a table of attentions of its own
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
FLOAT32_PARTS = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe_lite", "deepseek_v3"), 1e-9),  # routers
    "jetmoe": 1e-7, "cohere": 1e-7,  # a router, norms
}  # fmt: skip
"""Gradients of what transformers computes in float32 whatever the weights are; all else is in float64 throughout."""
OWN_NAMES = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}}


def config_of(name, **more):
    kind = name.partition(":")[0]
    usual = {"num_key_value_heads": 2, **WIDTH, "max_position_embeddings": 256}
    settings = OWN_NAMES.get(kind, usual) | (PACKED | GENERATED | PADDED)[name] | more
    return AutoConfig.for_model(kind, **settings)


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
@pytest.mark.filterwarnings("ignore:.*sampling by the model's own generate")
@pytest.mark.parametrize("name", [*PACKED, *GENERATED, *PADDED])
def test_it_trains_and_samples_as_the_model_alone_does(name, saved):
    policy = PolicyLoader(saved(config_of(name)), dtype="float64").load()
    choose_forward(policy)
    choose_decoding(policy)
    assert (policy.is_padded, not policy.caches_are_exact) == (name in PADDED, name in GENERATED)
    # Blocks of one shape in one batch, and others.
    groups = random_groups([(7, [3, 5, 2]), (9, [4, 4]), (7, [3, 5, 2])], policy.output_weight.shape[0])
    logprobs, _ = policy(pack(groups, torch.device("cpu")), 0.7)
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logprobs @ weights).backward()
    ours = flat_gradient(policy)
    policy.zero_grad()
    expected, _ = padded_logprobs(policy.base_model, groups, temperature=0.7)
    (expected @ weights).backward()
    assert relative_distance(logprobs, expected) < 1e-14
    assert relative_distance(ours, flat_gradient(policy)) < FLOAT32_PARTS.get(name, 1e-13)
    prompts = [make_prompt(torch.arange(5, 5 + n), uid=f"t:{n}") for n in (3, 9)]
    rollout = TransformersEngine().generate(policy, prompts, SamplingParams(3, 6, temperature=0.7), 0)
    sampled = [(p.input_ids, [c.token_ids for c in g]) for p, g in zip(prompts, rollout.completions, strict=True)]
    with torch.no_grad():
        own = policy(pack(sampled, torch.device("cpu")), 0.7)[0]
    theirs = torch.cat([c.sampler_logprobs for g in rollout.completions for c in g])
    assert (own - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("name", PACKED)
def test_under_bfloat16_autocast_its_rounding_is_that_of_the_model_alone(name, saved):
    """By the distance from float64. Rounding is random: of two equally good results one may be twice as far away."""
    path = saved(config_of(name))
    groups = random_groups([(7, [3, 5, 2]), (9, [4, 4]), (7, [3, 5, 2])], 16)

    def result(dtype: str, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        policy = PolicyLoader(path, dtype=dtype).load()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "float32"):
            row = pack(groups, torch.device("cpu"))
            logprobs, _ = policy(row, 0.7) if packed else padded_logprobs(policy.base_model, groups, temperature=0.7)
        weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (logprobs.double() @ weights).backward()
        return logprobs.detach().double(), flat_gradient(policy).double()

    exact, ours, theirs = result("float64", True), result("float32", True), result("float32", False)
    for right, near, also_near in zip(exact, ours, theirs, strict=True):
        assert relative_distance(near, right) < 3 * relative_distance(also_near, right)


def test_what_runs_padded_says_so_and_is_not_estimated(saved):
    loader = PolicyLoader(saved(config_of("gpt2")))
    with pytest.warns(
        UserWarning, match="model type gpt2 names its layers or attends in a way that packing does not know; falling"
    ):
        loader.load()
    with pytest.raises(UserError, match="dry_run=true: models of type gpt2 run padded, which cannot be estimated"):
        fake_policy(loader)
    with pytest.raises(UserError, match="model.compile=true: the layers of GPT2LMHeadModel are not known"):
        PolicyLoader(loader.path, compile=True).load()


def test_routers_that_draw_at_random_in_training_are_refused(saved):
    path = saved(config_of("mixtral", router_jitter_noise=0.1))
    with pytest.raises(UserError, match=r"'\+model.overrides=\{router_jitter_noise: 0.0\}' to the command line"):
        PolicyLoader(path).load()
    PolicyLoader(path, overrides={"router_jitter_noise": 0.0}).load()
    with pytest.raises(UserError, match="models of type phimoe draw the experts of a token at random in training"):
        PolicyLoader(saved(AutoConfig.for_model("phimoe", **WIDTH, **LOCAL, num_key_value_heads=2))).load()


def test_a_model_that_takes_no_other_attention_runs_padded(saved):
    """XGLM; in float32, as its own attention has no float64."""
    small = {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
    path = saved(AutoConfig.for_model("xglm", **small, dropout=0.0, attention_dropout=0.0))
    with pytest.warns(
        UserWarning, match="model type xglm names its layers or attends in a way that packing does not know; falling"
    ):
        policy = PolicyLoader(path).load()
    choose_forward(policy)
    alone = AutoModelForCausalLM.from_pretrained(path)
    groups = random_groups([(7, [3, 5, 2]), (9, [4, 4])], policy.output_weight.shape[0])
    with torch.no_grad():
        found, expected = policy(pack(groups, torch.device("cpu")))[0], padded_logprobs(alone, groups)[0]
    assert relative_distance(found, expected) < 1e-6


def test_a_window_that_attention_is_not_told_of_runs_padded_however_wide_it_is(saved):
    wide = {"use_sliding_window": True, "sliding_window": 2000, "max_window_layers": 2}
    policy = PolicyLoader(saved(config_of("qwen2_moe", **wide))).load()
    with pytest.warns(UserWarning, match="Qwen2MoeForCausalLM: its attention is not told of the sliding window, which"):
        choose_forward(policy)
    assert policy.is_padded


def test_recomputed_activations_are_refused_where_the_model_keeps_them_all(saved):
    path = saved(config_of("jetmoe"))
    with pytest.raises(UserError, match="gradient_checkpointing=true: JetMoeForCausalLM does not support it; set it"):
        PolicyLoader(path, gradient_checkpointing=True).load()


def trained_names(policy):
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def test_an_adapter_leaves_routers_alone_and_is_not_merged_into_experts(saved):
    policy = PolicyLoader(saved(config_of("mixtral")), lora=LoraSettings(r=2)).load()
    trained = {name.split(".lora_")[0].rpartition("layers.")[2] for name in trained_names(policy)}
    assert {"0.self_attn.q_proj", "1.self_attn.o_proj", "0.mlp.experts"} <= trained
    assert not [name for name in trained if "gate" in name.split(".")]
    with suppress(torch.OutOfMemoryError), policy.adapter_disabled():  # the reference, of a row that is cut afterwards
        raise torch.OutOfMemoryError
    assert {name.split(".lora_")[0].rpartition("layers.")[2] for name in trained_names(policy)} == trained
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
        UserError, match=f"prompts of {limit - 5} and completions of 6 tokens exceed {limit}, beyond which this model"
    ):
        check_rotation(config, limit - 5, 6)
