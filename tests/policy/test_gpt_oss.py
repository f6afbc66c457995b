"""gpt-oss on the shared-prefix path: sinks, alternating sliding windows, experts, and the harmony format."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig

from gspo_lightning.data.templating import encode_prompt
from gspo_lightning.errors import UserError
from gspo_lightning.packing import attention, pack
from gspo_lightning.policy import load
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.check import PackingMismatchError, check_packing
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.micro_gpt_oss import WINDOW
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.types import SamplingParams
from tests.support import flat_gradient, make_prompt, padded_logprobs, random_groups, relative_distance

ROOT = Path(__file__).parents[2]
MODEL = "bundled:micro-gpt-oss"
# Prompts and completions on both sides of the window, and a completion that begins inside and ends outside of it.
GROUPS = random_groups([(40, (30, 3, 18)), (5, (4, 25)), (17, (1,))], 100)


@pytest.fixture
def policy():
    return PolicyLoader(MODEL, dtype="float64").load()


@pytest.fixture
def eager():
    """The same weights through the attention that transformers ships for the model."""
    return AutoModelForCausalLM.from_pretrained(
        resolve_model(MODEL), dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).train()


def test_packed_equals_transformers_in_log_probabilities_and_gradients_routing_included(policy, eager):
    logprobs, _ = policy(pack(GROUPS, torch.device("cpu")), 0.7)
    expected, _ = padded_logprobs(eager, GROUPS, 0.7)
    weights = torch.randn(len(expected), dtype=torch.float64)
    (logprobs @ weights).backward()
    (expected @ weights).backward()
    assert relative_distance(logprobs, expected) < 1e-6
    for part in ("router", "experts", "sinks", "self_attn.q_proj"):
        ours, theirs = (
            torch.cat([p.grad.flatten() for name, p in model.named_parameters() if part in name])
            for model in (policy.base_model, eager)
        )
        assert theirs.norm() > 1e-3, part
        assert relative_distance(ours, theirs) < 1e-6, part
    assert relative_distance(flat_gradient(policy.base_model), flat_gradient(eager)) < 1e-6


def test_the_sampler_gives_the_log_probabilities_of_the_packed_pass_beyond_the_window(policy):
    prompts = [make_prompt(prompt, uid=str(n)) for n, (prompt, _) in enumerate(GROUPS)]
    rollout = TransformersEngine().generate(policy, prompts, SamplingParams(3, 2 * WINDOW, temperature=0.7), 1)
    groups = [
        (p.input_ids, [c.token_ids for c in group]) for p, group in zip(prompts, rollout.completions, strict=True)
    ]
    assert max(len(c) for _, completions in groups for c in completions) > WINDOW
    with torch.no_grad():
        own, _ = policy(pack(groups, torch.device("cpu")), 0.7)
    theirs = torch.cat([c.sampler_logprobs for group in rollout.completions for c in group])
    torch.testing.assert_close(own.float(), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-6), ("bfloat16", 0.01)])
@pytest.mark.parametrize("forgotten", ["window", "sinks"])
def test_the_first_use_check_passes_and_sees_a_forgotten_window_or_sink(forgotten, dtype, bound, monkeypatch):
    policy = PolicyLoader("bundled:micro-gpt-oss", dtype=dtype).load()
    assert check_packing(policy) < bound
    original = attention.shared_prefix_attention

    def without(*args, **kwargs):
        if forgotten == "window":
            return original(*args, **{**kwargs, "window": None})
        return original(*args, **{**kwargs, "sinks": torch.full_like(kwargs["sinks"], -1e9)})

    from gspo_lightning.policy import attention as policy_attention

    monkeypatch.setattr(policy_attention, "shared_prefix_attention", without)
    with pytest.raises(PackingMismatchError):
        check_packing(policy)


def test_reasoning_effort_reaches_the_harmony_prompt():
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    messages = [{"role": "user", "content": "hi"}]
    ids = encode_prompt(messages, tokenizer, {"reasoning_effort": "low"})
    assert tokenizer.decode(ids) == (
        "<|start|>system<|message|>Reasoning: low\n\n# Valid channels: analysis, commentary, final.<|end|>"
        "<|start|>user<|message|>hi<|end|><|start|>assistant"
    )


def test_every_end_of_harmony_ends_a_completion(policy):
    names = {policy.tokenizer.convert_ids_to_tokens(token) for token in policy.eos_token_ids}
    assert names == {"<|return|>", "<|endoftext|>", "<|call|>"}


def test_published_weights_are_expanded_from_mxfp4_and_never_quantised_again(monkeypatch):
    config = GptOssConfig()
    config.quantization_config = {"quant_method": "mxfp4"}
    asked = {}

    def from_pretrained(path, **kwargs):
        asked.update(kwargs)
        raise UserError("stop here")

    monkeypatch.setattr(load, "load_config", lambda path: config)
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(load, "resolve_model", lambda path: path)
    with pytest.raises(UserError, match="stop here"):
        PolicyLoader("openai/gpt-oss-20b").load_model()
    assert asked["quantization_config"].dequantize is True
    with pytest.raises(UserError, match="model.quantization=nf4: the experts of gpt_oss"):
        PolicyLoader("openai/gpt-oss-20b", quantization="nf4", lora=load.LoraSettings()).load_model()


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs a sandbox (apt-get install bubblewrap)")
def test_the_offline_recipe_runs_the_code_of_completions_and_learns_the_letter(tmp_path):
    command = [
        sys.executable,
        "train.py",
        "experiment=gspo_gpt_oss_tiny",
        f"hydra.run.dir={tmp_path}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "falling back" not in done.stderr
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    names, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    share = [float(row[names.index("reward/letter_share")]) for row in rows if row[names.index("reward/letter_share")]]
    judged = [float(row[names.index("reward/matmul")]) for row in rows if row[names.index("reward/matmul")]]
    assert len(share) == len(judged) == 15
    assert share[0] < 0.05 and share[-1] > 0.2
    assert max(judged) < 0
