"""A `LoraConfig` next to a GRPOConfig becomes our adapter, and what an adapter here cannot be is said."""

from __future__ import annotations

import dataclasses
import io

import pytest
from hydra import compose, initialize_config_dir
from peft import LoraConfig
from rich.console import Console

from gspo_lightning.errors import UserError
from gspo_lightning.migrate import convert, parse_lora
from gspo_lightning.migrate.__main__ import main, overrides
from tests.command_line import ROOT

GRPO = "args = GRPOConfig(learning_rate=1e-5, num_generations=8, steps_per_generation=4)\n"


def test_the_keys_of_a_script_become_ours_with_peft_s_defaults():
    rank = "rank = 4\npeft_config = LoraConfig(r=rank, target_modules=['q_proj'], use_rslora=True, task_type='CAUSAL_LM')\n"
    assert parse_lora(GRPO) is None
    given = parse_lora(GRPO + rank)
    result = convert({}, adapter=given)
    assert result.groups["lora"] == "language" and not result.blocking
    ours = {key: value for key, value in result.settings.items() if key.startswith("model.lora.")}
    assert ours == {
        "model.lora.r": 4, "model.lora.alpha": LoraConfig().lora_alpha, "model.lora.target_modules": ["q_proj"],
        "model.lora.use_rslora": True,
    }  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        lora = compose("train", [*overrides(result), "model=path"]).model.lora
    assert (lora.r, lora.alpha, lora.use_rslora, list(lora.target_modules)) == (4, 8, True, ["q_proj"])
    assert convert({}).groups.get("lora") is None


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(LoraConfig)])
def test_no_default_of_peft_is_refused_or_blocks(key):
    default = getattr(LoraConfig(), key)
    result = convert({}, adapter={key: "CAUSAL_LM" if key == "task_type" else default})
    assert not result.blocking, key


def test_modules_that_nobody_named_are_said():
    assert any("all-linear" in line for line in convert({}, adapter={"r": 8}).added)
    assert convert({}, adapter={"lora_alpha": 16}).settings["model.lora.r"] == LoraConfig().r == 8
    assert not any("all-linear" in line for line in convert({}, adapter={"target_modules": "all-linear"}).added)


@pytest.mark.parametrize("given", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_what_is_another_adapter_blocks(given):
    (key,) = given
    assert convert({}, adapter=given).blocking == [f"LoraConfig.{key}"]


def test_dropout_is_left_out_and_said():
    (verdict,) = convert({}, adapter={"lora_dropout": 0.05}).verdicts
    assert (verdict.key, verdict.kind) == ("LoraConfig.lora_dropout", "better default")
    assert "old and new log-probabilities" in verdict.note


def test_an_unknown_key_is_refused():
    with pytest.raises(UserError, match="LoraConfig.rank: no such setting"):
        convert({}, adapter={"rank": 8})


def test_the_command_names_the_adapter(tmp_path):
    out = io.StringIO()
    (tmp_path / "c.py").write_text(GRPO + "trainer = GRPOTrainer(peft_config=LoraConfig(r=16, lora_alpha=32))\n")
    assert main([str(tmp_path / "c.py")], Console(file=out, width=200)) == 0
    for part in ("LoraConfig.lora_alpha", "  lora=language", "  model.lora.r=16", "  model.lora.alpha=32"):
        assert part in out.getvalue()
