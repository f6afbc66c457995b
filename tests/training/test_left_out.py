"""A run that goes on with weights that its checkpoint leaves out: those of another model are said, another factor refused."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.policy.load import LoraSettings
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer

LORA = LoraSettings(r=4, alpha=8)


def fit(folder, settings, ckpt_path=None):
    """One rollout, or one more; returns the Trainer."""
    runs = trainer()
    module = build_module(folder, replace(settings, rollouts=2 if ckpt_path else 1))
    runs.fit(module, Batches(scripted_prompts(), 2).loader(), ckpt_path=ckpt_path, weights_only=True)
    return runs


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_goes_on_with_the_factor_that_it_was_trained_with(micro_model_dir, tmp_path):
    """8 / 4 = 2 in rsLoRA's words: 4 / sqrt(4)."""
    path = tmp_path / "1.ckpt"
    fit(micro_model_dir, Settings(lora=LORA)).save_checkpoint(path)
    fit(micro_model_dir, Settings(lora=LoraSettings(r=4, alpha=4, use_rslora=True)), path)
    for other, factor in ((replace(LORA, alpha=10), "2.5"), (replace(LORA, use_rslora=True), "4")):
        line = f"^model.lora.alpha: the checkpoint's adapter is multiplied by 2, and this run's by {factor}; keep alpha"
        with pytest.raises(UserError, match=line):
            fit(micro_model_dir, Settings(lora=other), path)


@pytest.mark.parametrize(
    ("settings", "hangs_on_the_model"),
    [
        (Settings(), False),
        (Settings(lora=LORA), True),
        (Settings(objective={"beta": 0.1}), True),
        (Settings(objective={"beta": 0.1}, update={"ref_sync_every_n_rollouts": 1}), False),  # saved, since it moves
    ],
)
def test_the_model_of_weights_that_are_not_saved_is_compared(settings, hangs_on_the_model, micro_model_dir, tmp_path):
    path, other = tmp_path / "1.ckpt", tmp_path / "other"
    shutil.copytree(micro_model_dir, other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(micro_model_dir, settings).save_checkpoint(path)
    for folder in (micro_model_dir, other):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(folder, settings, path)
        line = (
            f"ckpt_path: that run had model.path={micro_model_dir}, and this one has {other}, from which the weights "
        )
        said = [w for w in caught if str(w.message).startswith(line)]
        assert len(said) == (hangs_on_the_model and folder == other)
