"""An export is what plain transformers loads."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo_lightning.policy.export import export_policy
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from tests.support import relative_distance


@pytest.mark.parametrize("kind", ["all weights", "merged", "adapter"])
def test_settings_of_generate_that_transformers_refuses_to_save_are_exported_as_they_were(
    kind, micro_model_dir, tmp_path
):
    """A temperature without ``do_sample``: transformers loads such models, of which there are many."""
    folder = shutil.copytree(micro_model_dir, tmp_path / "model")
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    policy = PolicyLoader(str(folder), lora=None if kind == "all weights" else LoraSettings(r=2)).load()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    out = export_policy(policy, tmp_path / "out", merge_lora=kind == "merged")
    assert (out / "generation_config.json").exists() == (kind != "adapter")
    assert policy.base_model.generation_config.temperature == 0.6
    if kind != "adapter":
        assert settings.items() <= json.loads((out / "generation_config.json").read_text()).items()
        ids = torch.arange(5, 30)[None]
        with torch.no_grad():
            found, expected = (
                m(input_ids=ids).logits for m in (AutoModelForCausalLM.from_pretrained(out), policy.model)
            )
        assert relative_distance(found, expected) < 1e-5


def test_a_layer_that_keeps_a_state_of_its_last_forward_is_merged(micro_model_dir, tmp_path):
    """As RecurrentGemma's do: the state hangs on the graph of that forward."""
    policy = PolicyLoader(str(micro_model_dir), lora=LoraSettings(r=2)).load()
    layer = policy.base_model.model.layers[0]
    layer.recurrent_states = 2 * next(p for p in policy.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(policy.model)
    out = export_policy(policy, tmp_path / "out", merge_lora=True)
    assert (out / "model.safetensors").exists() and layer.recurrent_states.is_leaf


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)])
def test_who_may_read_the_config_of_an_export_may_read_its_weights(micro_model_dir, tmp_path, umask, mode, lora):
    policy = PolicyLoader(str(micro_model_dir), lora=lora).load()
    before = os.umask(umask)
    try:
        export_policy(policy, tmp_path / "model", merge_lora=False)
    finally:
        os.umask(before)
    weights = "model.safetensors" if lora is None else "adapter_model.safetensors"
    modes = {name: (tmp_path / "model" / name).stat().st_mode & 0o777 for name in (weights, "tokenizer_config.json")}
    assert modes == {weights: mode, "tokenizer_config.json": mode}
