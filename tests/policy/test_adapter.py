"""LoRA settings: each is what its formula says, or refused; and an exported adapter that is trained on."""

from __future__ import annotations

import functools
import json
import math
import re

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.export import export_policy
from gspo_lightning.policy.fake import _without_weights
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.rollout.adapter_proof import adapter_parts
from gspo_lightning.rollout.weights import (
    adapter_scale,
    load_weights,
    named_weights,
    save_adapter,
    save_weights,
    trained_parameters,
)
from tests.command_line import metrics, run
from tests.support import padded_logprobs, random_groups, relative_distance

MICRO = "bundled:micro"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GROUPS = random_groups([(12, (7, 3)), (5, (4,))], 90)


def shaken(path=MICRO, lora=None, dtype="float64"):
    policy = PolicyLoader(path, dtype=dtype, lora=lora).load()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(policy):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@torch.no_grad()
def logprobs(policy):
    return policy(pack(GROUPS, torch.device("cpu")))[0]


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8), (3, 7)])
def test_rank_stabilised_weights_for_vllm_are_w_plus_ba_times_alpha_by_the_root_of_r(rank, alpha, tmp_path):
    policy = shaken(lora=LoraSettings(r=rank, alpha=alpha, use_rslora=True))
    own = {name: value.detach() for name, value in policy.base_model.named_parameters()}
    merged = dict(named_weights(policy, torch.float64))
    adapted = [name.removesuffix(".lora_A.default.weight") for name in own if ".lora_A." in name]
    assert len(adapted) == 14  # 7 products of each of 2 layers
    for stem in adapted:
        a, b = (own[f"{stem}.lora_{half}.default.weight"] for half in "AB")
        expected = own[f"{stem}.base_layer.weight"] + (alpha / math.sqrt(rank)) * b @ a
        assert relative_distance(merged[f"{stem}.weight"], expected) < 1e-14, stem
    assert adapter_scale(policy) == pytest.approx(alpha / math.sqrt(rank), rel=1e-15)
    (part,) = adapter_parts(policy)
    assert part.size == pytest.approx((0.2 * math.sqrt(rank) / alpha) ** 0.5)
    # The two ways to vLLM: the file of all weights, and the adapter's own config, which vLLM reads its scale from.
    save_weights(policy, torch.float64, tmp_path / "all")
    assert all(torch.equal(value, merged[name]) for name, value in load_weights(tmp_path / "all"))
    settings = json.loads((save_adapter(policy, tmp_path / "one") / "adapter_config.json").read_text())
    assert (settings["use_rslora"], settings["r"], settings["lora_alpha"]) == (True, rank, alpha)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_model(MICRO)), dtype=torch.float64)
    plain.load_state_dict({**merged, "lm_head.weight": merged["model.embed_tokens.weight"]})
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, expected = (torch.log_softmax(model(input_ids=ids).logits, -1) for model in (policy.model, plain))
    assert relative_distance(found, expected) < 1e-6


def test_gaussian_values_of_a_have_the_standard_deviation_one_by_r_and_training_begins_at_the_model():
    torch.manual_seed(0)
    policy = PolicyLoader(MICRO, dtype="float64", lora=LoraSettings(r=4, init_lora_weights="gaussian")).load()
    halves = {half: [p for n, p in policy.named_parameters() if f"lora_{half}" in n] for half in "AB"}
    values = torch.cat([p.detach().flatten() for p in halves["A"]])
    assert values.std().item() == pytest.approx(1 / 4, rel=0.05)  # of 4,000 normal numbers
    assert values.abs().max() > 0.5  # a uniform distribution with this deviation ends at 0.43
    assert not any(p.any() for p in halves["B"])
    assert torch.equal(logprobs(policy), logprobs(PolicyLoader(MICRO, dtype="float64").load()))


def test_adapters_on_stacked_experts_are_w_plus_ba_of_each_expert_through_the_packed_pass():
    lora = LoraSettings(r=2, alpha=6, target_modules=["o_proj"], target_parameters=EXPERTS)
    policy = shaken("bundled:micro-gpt-oss", lora)
    own = dict(policy.base_model.named_parameters())
    folder = resolve_model("bundled:micro-gpt-oss")
    plain = PolicyLoader(folder, dtype="float64").load()
    with torch.no_grad():
        for layer in range(4):
            stem = f"model.layers.{layer}.mlp.experts"
            # peft's outer adapter is that of the last name. A has the ranks of an expert in a row, B has them 4 apart.
            for name, at in (("gate_up_proj", f"{stem}.base_layer"), ("down_proj", stem)):
                a, b = (own[f"{at}.lora_{half}.default.weight"] for half in "AB")
                weight = plain.base_model.get_parameter(f"{stem}.{name}")  # (expert, in, out)
                for expert in range(4):
                    weight[expert] += 3 * (b.view(-1, 2, 4)[..., expert] @ a.view(4, 2, -1)[expert]).T
            stem = f"model.layers.{layer}.self_attn.o_proj"
            a, b = (own[f"{stem}.lora_{half}.default.weight"] for half in "AB")
            plain.base_model.get_parameter(f"{stem}.weight").add_(3 * b @ a)
    assert relative_distance(logprobs(policy), logprobs(plain)) < 1e-9
    assert relative_distance(logprobs(policy), logprobs(PolicyLoader(folder, dtype="float64").load())) > 1e-3


REFUSED = {
    "dropout": (0.1, "model.lora.dropout must be 0: dropout makes old and new log-probabilities differ"),
    "lora_dropout": (0.05, "model.lora.lora_dropout must be 0: dropout makes old and new log-probabilities differ"),
    "use_dora": (True, "model.lora.use_dora=true: what vLLM gets is .* without DoRA's magnitudes"),
    "modules_to_save": (["lm_head"], "model.lora.modules_to_save=.*would not be in what vLLM gets"),
    "init_lora_weights": ("pissa", "model.lora.init_lora_weights=pissa: training would not begin at the model"),
    "r": (0, "must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_exact_is_refused_with_the_reason(name):
    value, line = REFUSED[name]
    with pytest.raises(UserError, match=line):
        LoraSettings(**{name: value})


def test_a_rank_above_that_of_every_layer_is_refused(micro_model_dir):
    load = functools.partial(PolicyLoader, str(micro_model_dir))
    load(lora=LoraSettings(r=64)).load()
    with pytest.raises(
        UserError, match="^model.lora.r=65 is above 64, the highest rank that a layer of this model has"
    ):
        load(lora=LoraSettings(r=65)).load()


@pytest.mark.parametrize(("r", "line"), [(2, "set model.lora.r=8 model.lora.alpha=8$"), (8, "has no adapter_model")])
def test_an_estimate_refuses_the_adapters_that_a_run_would_refuse(r, line, micro_model_dir, tmp_path):
    """What peft does not write into an adapter's config is its default."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if r == 2:
        (tmp_path / "adapter_model.safetensors").touch()
    loader = PolicyLoader(str(micro_model_dir), lora=LoraSettings(r=r, adapter=str(tmp_path)))
    for load in (loader.load, functools.partial(_without_weights, loader)):
        with pytest.raises(UserError, match=line):
            load()


def test_first_values_that_an_adapter_replaces_are_refused():
    with pytest.raises(UserError, match="init_lora_weights=gaussian has no effect"):
        LoraSettings(init_lora_weights="gaussian", adapter="model")
    with pytest.raises(UserError, match="init_lora_weights=False: training would not begin"):
        LoraSettings(init_lora_weights=False)


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["q_proj", "lm_head"], "output embedding would never be trained"),
        (["q_proj", "embed_tokens"], r"also the output embedding's \(tied\)"),
    ],
)
def test_adapters_on_embeddings_that_are_read_without_them_are_refused(names, line):
    with pytest.raises(UserError, match=line):
        PolicyLoader(MICRO, lora=LoraSettings(target_modules=names)).load()


KINDS = {
    "plain": (MICRO, LoraSettings(r=3, alpha=5)),
    "rsLoRA": (MICRO, LoraSettings(r=3, alpha=5, use_rslora=True)),
    "experts": ("bundled:micro-gpt-oss", LoraSettings(r=2, target_parameters=EXPERTS)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_is_gone_on_from_with_all_its_bits(kind, tmp_path, recwarn):
    path, lora = KINDS[kind]
    first = shaken(path, lora)
    export_policy(first, tmp_path, merge_lora=False)
    again = PolicyLoader(path, dtype="float64", lora=_with(lora, adapter=str(tmp_path))).load()
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in first.named_parameters() if p.requires_grad
    ]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), first.parameters(), strict=True))
    assert torch.equal(logprobs(again), logprobs(first))
    assert not [w for w in recwarn if "was trained on" in str(w.message)]


def _with(lora, **changes):
    return LoraSettings(**{**vars(lora), **changes})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_policy(shaken(lora=KINDS["rsLoRA"][1]), tmp_path_factory.mktemp("model"), merge_lora=False)


def test_an_adapter_of_other_settings_or_another_model_is_refused(exported, micro_model_dir, tmp_path):
    def load(path=MICRO, **changes):
        return PolicyLoader(path, lora=_with(KINDS["rsLoRA"][1], **{"adapter": str(exported), **changes})).load()

    with pytest.raises(UserError, match=r"set model\.lora\.r=3 model\.lora\.alpha=5 model\.lora\.use_rslora=True$"):
        load(r=4, alpha=8, use_rslora=False)
    with pytest.raises(UserError, match="20 weights have no place in the model"):
        load(target_modules=["q_proj", "k_proj"])
    with pytest.raises(UserError, match="does not fit the model"):
        load("bundled:micro-gpt-oss")
    with pytest.raises(UserError, match="holds no adapter"):
        load(adapter=str(tmp_path))
    with pytest.warns(UserWarning, match=f"was trained on .*, and is put on {micro_model_dir}"):
        load(str(micro_model_dir))


def of_peft(folder, **settings):
    """The folder of an adapter that peft alone has made and trained, in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(MICRO), dtype=torch.float32)
    named = {"target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"} | settings
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **named))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"init_lora_weights": "pissa"}, "began with init_lora_weights=pissa, which changed the base too; merge it"),
        (
            {"init_lora_weights": "olora"},
            r"=olora, which changed the base too; merge it .* \(python -m gspo_lightning.policy",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, r"=pissa_niter_4, which .*; merge it into its base \(where it was"),
        ({"alora_invocation_tokens": [5, 6]}, r"with alora_invocation_tokens=\[5, 6\] is refused"),
        ({"trainable_token_indices": [5]}, r"with trainable_token_indices=\[5\] is refused"),
    ],
)
def test_an_adapter_that_would_be_another_function_here_than_in_peft_is_refused(settings, line, tmp_path):
    lora = LoraSettings(r=4, alpha=8, target_modules=["q_proj", "o_proj"], adapter=str(of_peft(tmp_path, **settings)))
    with pytest.raises(UserError, match=line):
        PolicyLoader(MICRO, lora=lora).load()


@pytest.mark.parametrize("layers", [1, [1]])
def test_an_adapter_on_some_layers_is_taken_as_its_refusal_says(layers, tmp_path):
    folder = of_peft(tmp_path, layers_to_transform=layers)
    lora = LoraSettings(r=4, alpha=8, target_modules=["q_proj", "o_proj"], adapter=str(folder))
    with pytest.raises(UserError, match=r"on some layers alone \(layers_to_transform\); set ") as refused:
        PolicyLoader(MICRO, lora=lora).load()
    (override,) = re.findall(r'"(model\.lora\.target_modules=.*)"$', str(refused.value))
    (pattern,) = OverridesParser.create().parse_overrides([override])
    found = logprobs(PolicyLoader(MICRO, lora=_with(lora, target_modules=pattern.value())).load())
    with torch.no_grad():
        expected, _ = padded_logprobs(AutoPeftModelForCausalLM.from_pretrained(folder), GROUPS)
    assert relative_distance(found, expected) < 1e-6


@pytest.mark.parametrize("first", [True, False, "gaussian", "orthogonal", "mica"])
def test_an_adapter_of_peft_that_leaves_the_base_alone_is_what_it_is_in_peft(first, tmp_path):
    folder = of_peft(tmp_path, init_lora_weights=first)
    lora = LoraSettings(r=4, alpha=8, target_modules=["q_proj", "o_proj"], adapter=str(folder))
    found = logprobs(PolicyLoader(MICRO, lora=lora).load())
    with torch.no_grad():
        expected, _ = padded_logprobs(AutoPeftModelForCausalLM.from_pretrained(folder), GROUPS)
    assert relative_distance(found, expected) < 1e-6


def test_the_folder_of_an_adapter_as_a_model_names_both_ways(exported):
    line = rf"python -m gspo_lightning\.policy\.merge {exported} OUT.*lora=language model\.lora\.adapter={exported}"
    with pytest.raises(UserError, match=line):
        PolicyLoader(str(exported)).load_model()


def test_an_adapter_is_evaluated_as_it_was_in_training_and_trained_on(tmp_path):
    options = ["experiment=micro", "lora=language", "optimizer.lr=0.02", "max_rollouts=1"]
    run(*options, f"hydra.run.dir={tmp_path / 'first'}")
    ours = f"model.lora.adapter={tmp_path / 'first' / 'model'}"
    run(*options, ours, f"hydra.run.dir={tmp_path / 'evaluated'}", script="evaluate.py")
    found = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())["metrics"]
    last = metrics(tmp_path / "first")[-1]
    assert found["val/reward"] == pytest.approx(float(last["val/reward"]), abs=1e-9)
    run(*options, ours, f"hydra.run.dir={tmp_path / 'second'}")
    assert metrics(tmp_path / "second")[0]["val/reward"] == last["val/reward"]
