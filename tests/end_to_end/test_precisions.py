"""Adapters over a base in bfloat16: they stay in float32, every update reaches them, and a resumed run is the same."""

from __future__ import annotations

import functools

import pytest
import torch
from safetensors.torch import load_file

from gspo_lightning.errors import UserError
from gspo_lightning.policy.load import LoraSettings
from tests.conf.test_every_key import run
from tests.training import Batches, Settings, build_module, scripted_prompts, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NARROW = ["lora=language", "trainer.precision=bf16-true", "checkpoint.every_n_rollouts=2"]


def test_under_bf16_true_every_entry_of_the_adapter_moves(micro_model_dir):
    adamw = functools.partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)
    settings = Settings(dtype="float32", lora=LoraSettings(r=4), optimizer=adamw, rollouts=3)
    torch.manual_seed(0)
    module = build_module(micro_model_dir, settings)
    module.configure_model()
    before = {n: p.detach().clone() for n, p in module.policy.named_parameters() if "lora_A" in n}
    prompts = scripted_prompts()
    trainer(precision="bf16-true").fit(module, Batches(prompts, 3).loader())
    after = dict(module.policy.named_parameters())
    assert {p.dtype for n, p in after.items() if "lora" in n} == {torch.float32}
    assert {p.dtype for n, p in after.items() if "lora" not in n} == {torch.bfloat16}
    # Three steps at 1e-5 from numbers near 0.1, which are no numbers of bfloat16: its neighbours are 4e-4 away.
    moved = torch.cat([(after[n] - p).flatten() for n, p in before.items()])
    assert (moved != 0).double().mean() > 0.99
    assert moved.abs().max() < 4e-5


def test_a_resumed_run_is_bit_identical(tmp_path):
    run(tmp_path / "whole", *NARROW, "max_rollouts=4")
    run(tmp_path / "half", *NARROW, "max_rollouts=2")
    run(tmp_path / "half", *NARROW, "max_rollouts=4", "ckpt_path=auto")
    whole, resumed = (load_file(tmp_path / f / "model" / "adapter_model.safetensors") for f in ("whole", "half"))
    assert {value.dtype for value in whole.values()} == {torch.float32}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_checkpoint_of_another_optimizer_is_refused(tmp_path):
    run(tmp_path, "max_rollouts=1")
    with pytest.raises(UserError, match="optimizer: the checkpoint was saved with AdamW, not AdamW8bit"):
        run(tmp_path, "max_rollouts=2", "optimizer=adamw_8bit", "ckpt_path=auto")


def test_without_an_adapter_nothing_is_widened(micro_model_dir):
    """A module of one's own may train all weights in bfloat16; in float32 they would not fit their activations."""
    module = build_module(micro_model_dir, Settings(dtype="float32"))
    trainer(precision="bf16-true").fit(module, Batches(scripted_prompts()).loader())
    assert {p.dtype for p in module.policy.parameters()} == {torch.bfloat16}
