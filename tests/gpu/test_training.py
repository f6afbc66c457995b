"""On CUDA: updates equal those of a CPU, quantised bases, 8-bit moments, real lack of memory, and resuming."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from gspo_lightning import cli
from gspo_lightning.distributed.sharding import FSDP2Strategy
from gspo_lightning.packing import pack
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.types import Completion, Prompt
from tests.conf.test_groups import given
from tests.scripted import Settings, update_of
from tests.support import random_groups, relative_distance

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]

GPU = {"accelerator": "gpu"}
FLOAT32 = Settings(dtype="float32", objective={"importance_sampling_level": "sequence"})


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)], ids=["full", "LoRA"])
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_an_update_equals_that_of_a_cpu_in_float64(strategy, lora, micro_model_dir):
    objective = {**FLOAT32.objective, "beta": 0.1}
    torch.manual_seed(0)  # of the adapter
    exact, _ = update_of(micro_model_dir, Settings(objective=objective, lora=lora))
    torch.manual_seed(0)
    chosen = FSDP2Strategy() if strategy == "fsdp" else strategy
    ours, _ = update_of(micro_model_dir, replace(FLOAT32, objective=objective, lora=lora), **GPU, strategy=chosen)
    assert relative_distance(ours.double(), exact) < 1e-5
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_four_bits_computes_what_its_dequantised_weights_do(checkpointing, micro_model_dir):
    """As near to the dequantised weights in float32 as those are in bfloat16, in which the products are."""
    lora = LoraSettings(r=4)
    quantised = PolicyLoader(
        str(micro_model_dir), quantization="nf4", lora=lora, gradient_checkpointing=checkpointing, dtype="bfloat16"
    ).load().to("cuda")  # fmt: skip
    weights = {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in quantised.base_model.named_modules()
        if isinstance(module, Linear4bit)
    }
    found = [outcome(quantised)]
    for dtype in ("bfloat16", "float32"):
        plain = PolicyLoader(str(micro_model_dir), lora=lora, dtype=dtype).load().to("cuda")
        for name, weight in weights.items():
            target = plain.base_model.get_submodule(name).weight
            target.data = weight.to(target.dtype)
        found.append(outcome(plain))
    for ours, bfloat16, exact in zip(*found, strict=True):
        assert relative_distance(ours, exact) < 1.5 * relative_distance(bfloat16, exact)


def outcome(policy):
    """Log-probabilities and the gradient of the adapter, which is set to fixed numbers."""
    generator = torch.Generator().manual_seed(0)
    adapters = [p for name, p in sorted(policy.named_parameters()) if "lora" in name]
    for adapter in adapters:
        adapter.data = (0.05 * torch.randn(adapter.shape, generator=generator)).to(adapter.device, adapter.dtype)
    logprobs, _ = policy(pack(random_groups([(5, [4, 7]), (9, [6])], 90), torch.device("cuda")))
    logprobs.sum().backward()
    return logprobs.detach().double(), torch.cat([p.grad.flatten() for p in adapters]).double()


def of_long_completions(length, generations=16):
    """Settings and prompts of one large micro-batch."""
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(3, 90, (count,), generator=generator)

    prompts = []
    for number in range(2):
        drawn = [ids(length) for _ in range(generations)]
        completions = [Completion(c, "", torch.zeros(len(c)), "stop") for c in drawn]
        rewards = torch.rand(generations, generator=generator).tolist()
        row = {"completions": completions, "scripted": list(enumerate(rewards))}
        prompts.append(Prompt(f"p{number}", "", ids(20), row))
    return replace(FLOAT32, update={"max_tokens_per_microbatch": 2**16}, longest=length), prompts


def test_memory_that_runs_out_cuts_micro_batches_and_changes_no_gradient(micro_model_dir):
    settings, prompts = of_long_completions(1500)
    enough, module = update_of(micro_model_dir, settings, prompts, **GPU)
    assert module.counts["oom_splits"] == 0
    total = torch.cuda.get_device_properties(0).total_memory
    peak = torch.cuda.max_memory_allocated()
    del module
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    try:
        little, module = update_of(micro_model_dir, settings, prompts, **GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert module.counts["oom_splits"] > 0
    assert relative_distance(little, enough) < 1e-5


def test_moments_in_eight_bits_follow_those_of_float32(micro_model_dir):
    # Matrices of 4096 entries and more have their moments in 8 bits, in blocks.
    eight = functools.partial(bitsandbytes.optim.AdamW8bit, lr=1e-3, weight_decay=0.0)
    paged = functools.partial(bitsandbytes.optim.PagedAdamW8bit, lr=1e-3, weight_decay=0.0)
    plain = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, fused=True)
    steps = {
        name: update_of(micro_model_dir, Settings(dtype="float32", optimizer=optimizer, rollouts=6), **GPU)[0]
        for name, optimizer in (("eight", eight), ("paged", paged), ("plain", plain))
    }
    assert relative_distance(steps["eight"], steps["plain"]) < 0.15
    assert relative_distance(steps["paged"], steps["eight"]) < 1e-3  # the same but for the order of a GPU's sums


def train(folder, *arguments):
    """As ``python train.py`` does, in this process: the kernels are compiled once for all runs."""
    settings = ["hydra.mode=RUN", "experiment=micro", "trainer.accelerator=gpu", "print_config=false", *arguments]
    cfg = given(*settings, run_dir=folder)
    try:
        cli._train(cfg)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return load_file(next((folder / "model").glob("*model.safetensors")))


CASES = {
    "full": [],
    "bfloat16 products": ["trainer.precision=bf16-mixed"],
    "LoRA in 4 bits, 8-bit moments": ["lora=language", "model.quantization=nf4", "optimizer=adamw_8bit"],
    "FSDP2": ["trainer=fsdp", "trainer.accelerator=gpu", "trainer.devices=1"],
    "compiled": ["model.compile=true"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bit_identical(case, tmp_path):
    common = [*CASES[case], "checkpoint.every_n_rollouts=3"]
    whole = train(tmp_path / "whole", *common, "max_rollouts=6")
    train(tmp_path / "half", *common, "max_rollouts=3")
    resumed = train(tmp_path / "half", *common, "max_rollouts=6", "ckpt_path=auto")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_micro_model_learns(tmp_path):
    train(tmp_path, "max_rollouts=30")
    before, after = (
        json.loads((tmp_path / f"validation_{when}.json").read_text())["metrics"]["val/sampled_accuracy"]
        for when in ("before", "after")
    )
    assert before == 0.0 and after >= 0.5  # 0.75 on a CPU
