"""`scripts/merge_adapter.py` writes what a run with `export.merge_lora=true` would have, and refuses what it cannot."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_lightning.errors import UserError
from gspo_lightning.policy.export import export_policy
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.merge import main, merge_adapter
from gspo_lightning.report.model_card import whole_card
from tests.command_line import ROOT, run
from tests.policy.test_adapter import of_peft
from tests.policy.test_families import config_of
from tests.support import relative_distance

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "plain": ("bundled:micro", LoraSettings(r=3, alpha=6)),
    "rsLoRA": ("bundled:micro", LoraSettings(r=3, alpha=6, use_rslora=True)),
    "some modules": ("bundled:micro", LoraSettings(r=2, target_modules=["q_proj", "up_proj"])),
    "stacked experts": ("bundled:micro-gpt-oss", LoraSettings(r=2, alpha=4, target_parameters=EXPERTS)),
}


def random_adapter(path, lora, dtype="float32"):
    """A policy whose adapter moves the model well beyond rounding."""
    policy = PolicyLoader(path, dtype=dtype, lora=lora).load()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    policy = random_adapter(*KINDS["plain"])
    return export_policy(policy, tmp_path_factory.mktemp("adapter") / "model", merge_lora=False)


@pytest.fixture
def own(adapter, tmp_path):
    """A copy of the adapter's folder to change."""
    return shutil.copytree(adapter, tmp_path / "model")


def set_config(folder, **entries):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_base_and_adapter_and_the_files_are_those_of_a_merged_export(kind, tmp_path):
    policy = random_adapter(*KINDS[kind])
    export_policy(policy, tmp_path / "adapter", merge_lora=False)
    export_policy(policy, tmp_path / "exported", merge_lora=True)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    names = {file.name for file in (tmp_path / "exported").iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == names >= {"generation_config.json"}
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    apart = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    ids = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = merged(input_ids=ids).logits, apart(input_ids=ids).logits
        base = apart.get_base_model()
        with apart.disable_adapter():
            without = base(input_ids=ids).logits
    assert relative_distance(without, expected) > 0.1
    assert relative_distance(found, expected) < 2e-6
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == policy.tokenizer.get_vocab()


def test_a_merged_run_is_that_of_merge_lora_to_the_last_byte_card_included(tmp_path):
    options = ["experiment=micro", "lora=language", "model.lora.use_rslora=true", "optimizer.lr=0.02", "max_rollouts=1"]
    run(*options, f"hydra.run.dir={tmp_path / 'apart'}")
    last = f"ckpt_path={tmp_path / 'apart/checkpoints/last.ckpt'}"
    run(*options, "export.merge_lora=true", last, f"hydra.run.dir={tmp_path / 'whole'}")
    done = run(tmp_path / "apart" / "model", tmp_path / "merged", script="scripts/merge_adapter.py")
    assert done.stdout.startswith(f"merged {tmp_path / 'apart' / 'model'} into ")
    assert "warning" not in done.stderr
    names = {file.name for file in (tmp_path / "whole" / "model").iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == names >= {"README.md"}
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "whole" / "model" / name).read_bytes(), name
    start = load_file(PolicyLoader("bundled:micro").load().base_model.name_or_path + "/model.safetensors")
    end = load_file(tmp_path / "merged" / "model.safetensors")
    assert any(not torch.equal(end[name], start[name]) for name in end)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("model: {dtype: bfloat16}", torch.bfloat16),
        ("model: {dtype: float32}\ntrainer: {precision: bf16-true}", torch.bfloat16),
        ("model: {dtype: float64, overrides: {rms_norm_eps: 0.5}}", torch.float64),
        (None, torch.float32),
    ],
)
def test_dtype_and_overrides_are_those_of_the_run(config, expected, own, tmp_path):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    merge_adapter(own, tmp_path / "merged")
    assert {value.dtype for value in load_file(tmp_path / "merged" / "model.safetensors").values()} == {expected}
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (written["rms_norm_eps"] == 0.5) == ("overrides" in str(config))


def test_a_base_that_the_run_had_quantised_is_merged_with_a_warning(own, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {quantization: nf4}")
    with pytest.warns(UserWarning, match="trained on its base in nf4"):
        merge_adapter(own, tmp_path / "merged")


def refused(adapter, target, match, **options):
    with warnings.catch_warnings(), pytest.raises(UserError, match=match):
        warnings.simplefilter("ignore")
        merge_adapter(adapter, target, **options)
    assert not list(target.parent.glob(".*.tmp")), "leftovers"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("../config.yaml", b"\xff", "config.yaml of the adapter's run cannot be read ('utf-8' codec"),
        ("../config.yaml", b"a: [", "config.yaml of the adapter's run cannot be read (while parsing"),
        (
            "../config.yaml",
            b"model: {dtype: float7}",
            "config.yaml of the adapter's run has model.dtype=float7, which is",
        ),
        ("tokenizer.json", b"\xff", "model: the tokenizer next to the adapter cannot be used ("),
        ("adapter_model.safetensors", b"\xff", "model does not fit the model (SafetensorError: "),
    ],
)
def test_a_broken_file_of_the_adapter_is_named_in_one_line(name, content, line, own, tmp_path):
    (own / name).write_bytes(content)
    refused(own, tmp_path / "out", re.escape(line))


def test_a_card_that_is_no_text_does_not_stop_a_merge(own, tmp_path):
    (own / "README.md").write_bytes(b"\xff")
    merge_adapter(own, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_cannot_be_merged_is_refused_in_one_line(own, micro_model_dir, tmp_path):
    out = tmp_path / "out"
    refused(tmp_path, out, r"holds no adapter \(its model/ does\): adapter_config.json is not there")
    refused(micro_model_dir, out, "holds no adapter: adapter_config.json is not there")
    refused(own, own, "model is there already; name a folder that is not")
    refused(
        own, out, "the base of .*, /nowhere, cannot be used: model folder '/nowhere' does not .*--base", base="/nowhere"
    )
    refused(own, out, r"does not fit .*micro-gpt-oss.* --base names another|does not fit", base="bundled:micro-gpt-oss")
    quantised = shutil.copytree(micro_model_dir, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (quantised / "config.json").write_text(json.dumps(config))
    refused(own, out, "quantised holds quantised weights, in which the adapter would be rounded", base=str(quantised))
    tensors = load_file(own / "adapter_model.safetensors")
    first = min(tensors)
    save_file({name: value for name, value in tensors.items() if name != first}, own / "adapter_model.safetensors")
    refused(own, out, f"1 weight is not there, the first is {first.removesuffix('.weight')}")
    save_file({**tensors, "surplus.lora_A.weight": torch.zeros(1)}, own / "adapter_model.safetensors")
    refused(own, out, "1 weight has no place in the model, the first is surplus")
    (own / "adapter_model.safetensors").unlink()
    refused(own, out, "has no adapter_model.safetensors")
    set_config(own, peft_type="IA3")
    refused(own, out, "is of no LoRA adapter")
    set_config(own, peft_type="LORA", base_model_name_or_path=None)
    (own / "adapter_model.safetensors").touch()
    refused(own, out, "does not say which model it is for; name it with --base")
    (own / "adapter_config.json").write_text("{")
    refused(own, out, "adapter_config.json cannot be read")
    assert not out.exists()


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({"alora_invocation_tokens": [5]}, r"with alora_invocation_tokens=\[5\] cannot be merged; keep the adapter"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "with layer_replication=.* cannot be merged; keep the adapter"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights=pissa_niter_4, .* cannot be repeated; merge it where",
        ),
        ({"init_lora_weights": "corda"}, "init_lora_weights=corda, which changed the base in a way that cannot be"),
    ],
)
def test_an_adapter_that_is_no_change_of_known_weights_is_refused(entries, line, own, tmp_path):
    set_config(own, **entries)
    refused(own, tmp_path / "out", line)


@pytest.mark.parametrize("first", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_merged_into_that_base(first, tmp_path):
    folder = of_peft(tmp_path / "adapter", init_lora_weights=first)
    merge_adapter(folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    apart = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 90, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative_distance(merged(input_ids=ids).logits, apart(input_ids=ids).logits) < 2e-6


@pytest.mark.parametrize("names", [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"]])
def test_an_adapter_on_one_of_two_tied_embeddings_is_not_added_to_both(names, tmp_path):
    folder = of_peft(tmp_path / "adapter", target_modules=names)
    refused(folder, tmp_path / "out", r"whose two embeddings are one matrix \(tied\), so that it cannot be merged")


def test_the_command_prints_one_line_and_exits_with_2(adapter, tmp_path, capsys):
    assert main([str(adapter), str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is there already; name a folder that is not\n"
    assert (ROOT / "scripts" / "merge_adapter.py").is_file()


def test_the_card_of_an_adapter_becomes_that_of_a_model():
    card = "---\nlibrary_name: peft\n---\n\n# An adapter for me/base, trained by GSPO\n"
    assert whole_card(card) == "---\nlibrary_name: transformers\n---\n\n# me/base, trained by GSPO\n"
    assert whole_card("# Model Card for Model ID\n") is None  # peft's own


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacked_experts_with_other_names_on_the_disk_merge_to_the_policys_logits(family, micro_model_dir, tmp_path):
    config = config_of(family, vocab_size=100, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    AutoTokenizer.from_pretrained(micro_model_dir).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    policy = random_adapter(str(tmp_path / "base"), LoraSettings(r=2, alpha=4, target_parameters=EXPERTS))
    export_policy(policy, tmp_path / "adapter", merge_lora=False)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.randint(3, 90, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=ids).logits for m in (merged, policy.model))
        with policy.adapter_disabled():
            without = policy.model(input_ids=ids).logits
    assert relative_distance(without, expected) > 0.1
    assert relative_distance(found, expected) < 2e-6
