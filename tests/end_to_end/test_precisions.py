"""Adapters over a base in bfloat16 stay in float32; with them, 4-bit bases and 8-bit moments a resumed run is the same."""

from __future__ import annotations

import functools

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from gspo_lightning import __version__
from gspo_lightning.errors import UserError
from gspo_lightning.policy.load import LoraSettings
from tests.conf.test_every_key import run
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer, update_of
from tests.support import relative_distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_under_bf16_true_every_entry_of_the_adapter_moves(micro_model_dir):
    adamw = functools.partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)
    settings = Settings(dtype="float32", lora=LoraSettings(r=4), optimizer=adamw, rollouts=3)
    torch.manual_seed(0)
    module = build_module(micro_model_dir, settings)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.policy.named_parameters() if "lora_A" in n}
    buffers = {name: buffer.clone() for name, buffer in module.policy.named_buffers()}
    prompts = scripted_prompts()
    trainer(precision="bf16-true").fit(module, Batches(prompts, 3).loader())
    after = dict(module.policy.named_parameters())
    assert {p.dtype for n, p in after.items() if "lora" in n} == {torch.float32}
    assert {p.dtype for n, p in after.items() if "lora" not in n} == {torch.bfloat16}
    # Rotary frequencies: in bfloat16 they would be off by up to 0.4 %, radians at position 2048.
    assert {n.rsplit(".")[-1] for n in buffers} == {"inv_freq", "original_inv_freq"}
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.policy.named_buffers())
    # Three steps at 1e-5 from numbers near 0.1, which are no numbers of bfloat16: its neighbours are 4e-4 away.
    moved = torch.cat([(after[n] - p).flatten() for n, p in before.items()])
    assert (moved != 0).double().mean() > 0.99
    assert moved.abs().max() < 4e-5


def test_under_bf16_true_means_are_over_all_completions(micro_model_dir):
    """Its dtype of new tensors has no 257: a count in it would be 256."""
    prompts = scripted_prompts(count=1, generations=257)
    lengths = [len(c.token_ids) for c in prompts[0].sample["completions"]]
    settings = Settings(dtype="float32", lora=LoraSettings(r=2))
    _, module = update_of(micro_model_dir, settings, prompts, precision="bf16-true")
    assert module.last_metrics["completion/mean_tokens"] == sum(lengths) / 257


CASES = {
    "adapter over bfloat16": ["lora=language", "trainer.precision=bf16-true"],
    "adapter over 4 bits, 8-bit optimizer": ["lora=language", "model.quantization=nf4", "optimizer=adamw_8bit"],
    "8-bit moments": ["optimizer=adamw_8bit"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bit_identical(case, tmp_path):
    common = [*CASES[case], "checkpoint.every_n_rollouts=2"]
    run(tmp_path / "whole", *common, "max_rollouts=4")
    run(tmp_path / "half", *common, "max_rollouts=2")
    half = torch.load(tmp_path / "half" / "checkpoints" / "last.ckpt", weights_only=True)
    assert half["gspo_lightning"]["version"] == __version__
    run(tmp_path / "half", *common, "max_rollouts=4", "ckpt_path=auto")
    name = "adapter_model" if "lora=language" in common else "model"
    whole, resumed = (load_file(tmp_path / f / "model" / f"{name}.safetensors") for f in ("whole", "half"))
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    moments, again = (
        [value for value in tree_leaves(saved["optimizer_states"][0]["state"]) if isinstance(value, torch.Tensor)]
        for saved in (
            torch.load(tmp_path / f / "checkpoints" / "last.ckpt", weights_only=True) for f in ("whole", "half")
        )
    )
    # Those of the small matrices of an adapter are in float32 whatever the optimizer.
    assert (torch.uint8 in {value.dtype for value in moments}) == (case == "8-bit moments")
    assert len(moments) == len(again) and all(map(torch.equal, moments, again))


def test_moments_in_eight_bits_follow_those_of_float32(micro_model_dir):
    """Matrices of 4096 entries and more have their moments in 8 bits, in blocks."""
    settings = {"lr": 1e-3, "weight_decay": 0.0}
    eight, plain = (
        update_of(micro_model_dir, Settings(dtype="float32", optimizer=functools.partial(kind, **settings), rollouts=6))
        for kind in (bitsandbytes.optim.AdamW8bit, torch.optim.AdamW)
    )
    assert 1e-4 < relative_distance(eight[0], plain[0]) < 0.15


def test_the_checkpoint_of_another_optimizer_is_refused(tmp_path):
    run(tmp_path, "max_rollouts=1")
    with pytest.raises(UserError, match="optimizer: the checkpoint was saved with AdamW, not AdamW8bit"):
        run(tmp_path, "max_rollouts=2", "optimizer=adamw_8bit", "ckpt_path=auto")


def test_without_an_adapter_nothing_is_widened(micro_model_dir):
    """In float32 the weights would not fit their activations."""
    module = build_module(micro_model_dir, Settings(dtype="float32"))
    module.configure_model()
    module.to(torch.bfloat16)
    assert {p.dtype for p in module.policy.parameters()} == {torch.bfloat16}
