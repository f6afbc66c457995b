"""From a GRPOConfig to ours: every field is known, the result composes and passes the checks, and says what it changed."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from rich.console import Console

from gspo_lightning import config
from gspo_lightning.build import rollouts_of_epochs
from gspo_lightning.errors import UserError
from gspo_lightning.migrate import convert, parse_config
from gspo_lightning.migrate.__main__ import command, experiment_yaml, main, overrides
from gspo_lightning.migrate.trl_table import BETTER, COMPUTED, DEFAULTS, NONE, RENAMED

ROOT = Path(__file__).parents[2]
FIELDS = (Path(__file__).parent / "trl_1_16_0_fields.txt").read_text().split()
SAMPLE = (Path(__file__).parent / "gspo_sample.py.txt").read_text()
OLDER = {"max_prompt_length", "warmup_ratio"}
GIVEN = {"data": "rows", "model": "path"}


def resolved(*arguments, searchpath=None):
    extra = [f"hydra.searchpath=[file://{searchpath}]"] if searchpath else []
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*arguments, *extra], return_hydra_config=True)
    with open_dict(cfg):
        if cfg.hydra.runtime.get("output_dir", "???") is None or "output_dir" not in cfg.hydra.runtime:
            cfg.hydra.runtime.output_dir = "/nowhere"
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return config.resolve(cfg)


def completed(given):
    result = convert(given)
    result.groups |= {"data": "rows", "model": "path", "logger": "none"}
    result.settings |= {"model.path": "bundled:micro", "data.task.source": "prompts.jsonl"}
    return result


def checked(given):
    plain = resolved(*overrides(completed(given)))
    config.check(plain)
    return plain


def test_every_field_of_trl_has_exactly_one_place():
    assert len(FIELDS) > 180
    places = [*RENAMED, *COMPUTED, *BETTER, *NONE]
    assert len(places) == len(set(places))
    assert set(FIELDS) <= set(places), set(FIELDS) - set(places)
    assert set(places) - set(FIELDS) == OLDER
    assert set(DEFAULTS) <= set(FIELDS)


@pytest.mark.parametrize("key", sorted({*FIELDS, *OLDER}))
def test_a_field_alone_gets_one_verdict_with_a_reason(key):
    values = {**DEFAULTS, **{name: default for name, (default, _) in NONE.items()}}
    value = values.get(key, {"max_steps": 100, "warmup_ratio": 0.1, "max_prompt_length": 64}.get(key))
    (verdict,) = convert({key: value}).verdicts
    assert verdict.key == key and verdict.note and verdict.kind != "no counterpart"


@pytest.mark.filterwarnings("ignore:objective")
def test_the_sample_of_the_gspo_page_converts_without_a_remainder_into_a_run_whose_clip_acts():
    result = completed(parse_config(SAMPLE))
    assert not result.remainder and not result.blocking
    plain = checked(parse_config(SAMPLE))
    objective, update = plain["objective"], plain["update"]
    assert (objective["epsilon"], objective["epsilon_high"], objective["beta"]) == (3e-4, 4e-4, 0)
    assert (objective["importance_sampling_level"], objective["loss_type"]) == ("sequence", "dr_grpo")
    assert plain["optimizer"]["_target_"] == "bitsandbytes.optim.AdamW8bit"
    assert (plain["optimizer"]["lr"], plain["optimizer"]["betas"]) == (5e-6, [0.9, 0.99])
    assert plain["optimizer"]["weight_decay"] == 0.1
    assert (plain["scheduler"]["name"], plain["scheduler"]["warmup_ratio"]) == ("cosine", 0.1)
    assert plain["rollout"]["num_generations"] == 8 and plain["rollout"]["temperature"] == 0.9
    assert plain["data"]["max_prompt_length"] == plain["rollout"]["max_completion_length"] == 1024
    assert update["max_grad_norm"] == 0.1 and plain["num_epochs"] == 2 and plain["max_rollouts"] is None
    # 8 completions x 4 accumulated batches = 32 per rollout = 4 prompts of 8; one step in TRL, four here.
    assert plain["data"]["prompts_per_rollout"] == 4
    assert update["num_minibatches"] == 4 and update["num_iterations"] == 1
    (line,) = [line for line in result.added if line.startswith("update.num_minibatches=4")]
    assert "no clip could ever act" in line


def test_the_printed_command_and_the_yaml_are_the_same_run(tmp_path):
    result = completed(parse_config(SAMPLE))
    words = shlex.split(command(result).replace("\\\n", ""))
    assert words[:2] == ["python", "train.py"]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(experiment_yaml(result))
    assert resolved(*words[2:]) == resolved("experiment=mine", searchpath=tmp_path)


CASES = {
    "nothing given is TRL's defaults": (
        {}, {"optimizer.lr": 1e-6, "optimizer.betas": [0.9, 0.999], "objective.loss_type": "dapo", "objective.epsilon": 0.2,
             "objective.importance_sampling_level": "token", "rollout.temperature": 1.0, "scheduler.name": "linear",
             "rollout.max_completion_length": 512, "num_epochs": 3, "seed": 42, "data.prompts_per_rollout": 1,
             "update.num_iterations": 2},
    ),
    "two steps per generation are two minibatches": (
        {"per_device_train_batch_size": 16, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"data.prompts_per_rollout": 8, "update.num_minibatches": 2, "update.num_iterations": 1},
    ),
    "a generation batch": (
        {"generation_batch_size": 64, "per_device_train_batch_size": 16},
        {"data.prompts_per_rollout": 8, "update.num_minibatches": 4},
    ),
    "steps become rollouts": (
        {"max_steps": 100, "num_iterations": 2, "generation_batch_size": 16, "save_steps": 8, "eval_strategy": "steps", "eval_steps": 20},
        {"max_rollouts": 25, "num_epochs": None, "checkpoint.every_n_rollouts": 2, "validation.every_n_rollouts": 5},
    ),
    "warm-up in steps": (
        {"max_steps": 200, "warmup_steps": 10}, {"scheduler.warmup_ratio": 0.05},
    ),
    "warm-up as a share": ({"warmup_steps": 0.2}, {"scheduler.warmup_ratio": 0.2}),
    "the default clip of TRL at sequence level gives way to the paper's": (
        {"importance_sampling_level": "sequence"}, {"objective.epsilon": None, "objective.epsilon_high": None},
    ),
    "a clip that was asked for stays": (
        {"importance_sampling_level": "sequence", "epsilon": 3e-4}, {"objective.epsilon": 3e-4},
    ),
    "sapo": (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.9}, {"objective.loss_type": "sapo", "objective.tau_positive": 0.9, "objective.epsilon": None},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 4.0, "delta": 6.0},
        {"objective.epsilon": None, "objective.epsilon_high": 4.0, "objective.delta": None},
    ),
    "a reference": (
        {"beta": 0.04}, {"objective.beta": 0.04, "objective.kl_importance_weighted": True},
    ),
    "a moving reference": (
        {"beta": 0.04, "sync_ref_model": True, "ref_model_sync_steps": 64, "generation_batch_size": 32},
        {"update.ref_sync_every_n_rollouts": 16, "update.ref_model_mixup_alpha": 0.6},
    ),
    "chosen tokens and sequences": (
        {"top_entropy_quantile": 0.2, "off_policy_mask_threshold": 0.5},
        {"objective.top_entropy_quantile": 0.2, "objective.off_policy_mask_threshold": 0.5},
    ),
    "advantages without a scale": ({"scale_rewards": False}, {"advantages.scale_rewards": "none"}),
    "rewards normalised one by one": (
        {"multi_objective_aggregation": "normalize_then_sum"}, {"reward.combine": "normalize_then_sum"},
    ),
    "a thinking switch": (
        {"chat_template_kwargs": {"enable_thinking": False}}, {"data.chat_template_kwargs.enable_thinking": False},
    ),
    "bf16": ({"bf16": True}, {"trainer.precision": "bf16-mixed"}),
    "no bf16": ({"bf16": False}, {"trainer.precision": "32-true"}),
    "a least rate": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"scheduler.name": "cosine", "scheduler.min_ratio": 0.1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), CASES.values(), ids=CASES.keys())
def test_what_a_config_becomes(given, expected):
    plain = checked(given)
    for key, value in expected.items():
        node = plain
        for part in key.split("."):
            node = node[part]
        assert node == value, key


BLOCKED = {
    "vespo": {"loss_type": "vespo"},
    "an adaptive entropy bonus": {"use_adaptive_entropy": True},
    "float16": {"fp16": True},
    "an unknown optimizer": {"optim": "lion_8bit"},
    "a schedule": {"lr_scheduler_type": "polynomial"},
    "unequal reward weights": {"reward_weights": [1.0, 0.5]},
}


@pytest.mark.parametrize("given", BLOCKED.values(), ids=BLOCKED.keys())
def test_what_would_change_the_result_is_never_dropped_in_silence(given, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(given))
    out = io.StringIO()
    assert main([str(tmp_path / "config.json")], Console(file=out, width=160)) == 1
    assert "no counterpart" in out.getvalue() and "python train.py" not in out.getvalue()
    assert f"error: {next(iter(given))} would change the result" in capsys.readouterr().err


def test_keys_that_train_nothing_are_named_and_do_not_stop_the_conversion():
    result = convert({"hub_strategy": "checkpoint", "hub_revision": "dev"})
    assert result.remainder == ["hub_strategy", "hub_revision"] and not result.blocking


def test_an_upload_goes_to_the_same_repository_and_is_public_only_where_that_is_asked_for():
    settings = convert({"push_to_hub": True, "hub_model_id": "me/x"}).settings
    assert settings["export.push_to_hub"] == "me/x" and "export.private" not in settings
    assert convert({"push_to_hub": True, "hub_model_id": "me/x", "hub_private_repo": False}).settings[
        "export.private"
    ] is False  # fmt: skip
    unnamed = convert({"push_to_hub": True})
    assert "export.push_to_hub" not in unnamed.settings and "export.push_to_hub=me/my-model" in " ".join(unnamed.added)
    assert "export.push_to_hub" not in convert({"hub_model_id": "me/x"}).settings


def test_three_ways_of_writing_give_the_same_keys():
    wanted = {"learning_rate": 5e-6, "report_to": "none", "beta": 0.0, "adam_beta2": 0.99}
    assert parse_config(json.dumps(wanted)) == wanted
    assert parse_config("learning_rate: 5e-6\nreport_to: none\nbeta: 0.0\nadam_beta2: 0.99\n") == wanted
    keywords = "learning_rate = 5e-6, # slow\nreport_to = 'none', beta = 0.0, adam_beta2 = 1 - 0.01,"
    assert parse_config(keywords) == wanted
    program = f"!pip install trl\nfrom trl import GRPOConfig\nrate = 5e-6\nargs = GRPOConfig({keywords.replace('5e-6', 'rate')})\n"
    assert parse_config(program) == wanted


REFUSED = {
    "code": ("GRPOConfig(output_dir=__import__('os').getcwd())", "output_dir=__import__('os').getcwd(): is not a literal"),
    "an unknown name": ("GRPOConfig(learning_rate=rate)", "rate is not assigned a literal above"),
    "a dictionary of keywords": ("GRPOConfig(**options, seed=1)", "without * and **"),
    "an unknown field": ("GRPOConfig(learning_rte=1)", "learning_rte: TRL 1.16.0's GRPOConfig has no such field"),
    "groups that do not fit": ("GRPOConfig(per_device_train_batch_size=6)", "no multiple of num_generations=8"),
    "both batch settings": ("GRPOConfig(generation_batch_size=8, steps_per_generation=1)", "exclude each other"),
    "a step of half a group": (
        "GRPOConfig(per_device_train_batch_size=4, steps_per_generation=2, gradient_accumulation_steps=1)",
        "does not hold whole groups",
    ),
    "prose": ("this is not a config", "the config"),
    "nothing": ("", "holds no keys"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as caught:
        convert(parse_config(text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_tool_prints_the_command_and_writes_the_yaml(tmp_path):
    (tmp_path / "sample.py").write_text(SAMPLE)
    out = io.StringIO()
    assert (
        main([str(tmp_path / "sample.py"), "--output", str(tmp_path / "mine.yaml")], Console(file=out, width=200)) == 0
    )
    assert "python train.py" in out.getvalue() and "override /objective: grpo" in (tmp_path / "mine.yaml").read_text()


def test_epochs_become_rollouts_of_a_finite_task_and_are_refused_on_an_endless_one():
    plain = {
        "num_epochs": 1.5,
        "max_rollouts": 30,
        "data": {"task": {"name": "x"}},
        "dynamic_sampling": {"max_draws": 0},
    }
    assert rollouts_of_epochs(plain, 10) == rollouts_of_epochs({**plain, "max_rollouts": None}, 10) == 15
    with pytest.warns(UserWarning, match=r"max_rollouts=4 ends the run before num_epochs=1.5 \(15 rollouts\)"):
        assert rollouts_of_epochs({**plain, "max_rollouts": 4}, 10) == 4
    assert rollouts_of_epochs({**plain, "num_epochs": None}, None) == 30
    with pytest.raises(UserError, match="never runs out"):
        rollouts_of_epochs(plain, None)
    with pytest.raises(UserError, match="dynamic_sampling.max_draws takes more rows"):
        rollouts_of_epochs({**plain, "dynamic_sampling": {"max_draws": 2}}, 10)
    with pytest.raises(UserError, match="above 0"):
        rollouts_of_epochs({**plain, "num_epochs": 0}, 10)
