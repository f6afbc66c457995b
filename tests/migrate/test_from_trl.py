"""From a GRPOConfig to ours: every field is known, the result composes and passes the checks, and says what it changed."""

from __future__ import annotations

import io
import json
import math
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from gspo_lightning.config import checks
from gspo_lightning.config.build import rollouts_of_epochs
from gspo_lightning.errors import UserError
from gspo_lightning.migrate import convert, parse_config
from gspo_lightning.migrate.__main__ import command, experiment_yaml, main, overrides
from gspo_lightning.migrate.trl_table import BETTER, COMPUTED, DEFAULTS, NONE, RENAMED
from tests.conf.test_groups import resolved

ROOT = Path(__file__).parents[2]
FIELDS = (Path(__file__).parent / "trl_1_16_0_fields.txt").read_text().split()
SAMPLE = (Path(__file__).parent / "gspo_sample.py.txt").read_text()
OLDER = {"max_prompt_length", "warmup_ratio"}
GIVEN = {"data": "rows", "model": "path"}


def completed(given):
    result = convert(given)
    result.groups |= {"data": "rows", "model": "path", "logger": "none"}
    result.settings |= {"model.path": "bundled:micro", "data.task.source": "prompts.jsonl"}
    return result


def checked(given):
    plain = resolved(*overrides(completed(given)))
    checks.check(plain)
    return plain


def assert_becomes(given, expected):
    plain = checked(given)
    for key, value in expected.items():
        node = plain
        for part in key.split("."):
            node = node[part]
        assert node == value, key


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
    assert resolved(*words[2:]) == resolved("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")


CASES = {
    "nothing given is TRL's defaults": (
        {}, {"optimizer.lr": 1e-6, "optimizer.betas": [0.9, 0.999], "objective.loss_type": "dapo", "objective.epsilon": 0.2,
             "objective.importance_sampling_level": "token", "rollout.temperature": 1.0, "scheduler.name": "linear",
             "rollout.max_completion_length": 512, "num_epochs": 3, "seed": 42, "data.prompts_per_rollout": 1,
             "update.num_iterations": 2},
    ),
    "the default clip of TRL at sequence level gives way to the paper's": (
        {"importance_sampling_level": "sequence"}, {"objective.epsilon": None, "objective.epsilon_high": None},
    ),
    "a clip that was asked for stays": (
        {"importance_sampling_level": "sequence", "epsilon": 3e-4}, {"objective.epsilon": 3e-4},
    ),
    "sapo": (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.9, "num_iterations": 2},
        {"objective.loss_type": "sapo", "objective.tau_positive": 0.9, "objective.epsilon": None},
    ),
    "sapo where the ratio is 1": (
        {"loss_type": "sapo", "sapo_temperature_pos": 0.9}, {"objective.loss_type": "sapo", "objective.tau_positive": 1.0},
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 4.0, "delta": 6.0},
        {"objective.epsilon": None, "objective.epsilon_high": 4.0, "objective.delta": None},
    ),
    "cispo's cap is epsilon where epsilon_high is not given": (
        {"loss_type": "cispo", "epsilon": 4.0}, {"objective.epsilon": None, "objective.epsilon_high": 4.0},
    ),
    "vespo": (
        {"loss_type": "vespo", "num_iterations": 2, "epsilon": 0.1, "delta": 2.0, "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 4, "vespo_lambda_neg": 0.5},
        {"objective.loss_type": "vespo", "objective.epsilon": None, "objective.delta": None, "objective.k_positive": 1.5, "objective.lambda_positive": 2.5,
         "objective.k_negative": 4, "objective.lambda_negative": 0.5, "objective.importance_sampling_level": "token"},
    ),
    "vespo where the ratio is 1": ({"loss_type": "vespo", "vespo_k_pos": 1.5}, {"objective.k_positive": 2.0}),
    "vespo whose ratio takes in another sampler": (
        {"loss_type": "vespo", "vespo_k_pos": 1.5, "use_vllm": True, "vllm_importance_sampling_mode": "token_truncate"},
        {"objective.k_positive": 1.5},
    ),
    "vespo at its defaults": (
        {"loss_type": "vespo", "importance_sampling_level": "sequence", "gradient_accumulation_steps": 8, "steps_per_generation": 8},
        {"objective.importance_sampling_level": "token", "update.num_minibatches": 1},
    ),
    "an entropy bonus that follows the entropy": (
        {"use_adaptive_entropy": True, "entropy_target": 0.6, "entropy_coef": 0.01, "entropy_coef_max": 0.1},
        {"objective.entropy_target": 0.6, "objective.entropy_coef": 0.01, "objective.entropy_coef_delta": 0.005,
         "objective.entropy_coef_min": 0.0, "objective.entropy_coef_max": 0.1},
    ),
    "the same at its defaults": ({"use_adaptive_entropy": True}, {"objective.entropy_target": 0.2, "objective.entropy_coef_max": 1.0}),
    "settings of one that is off": (
        {"use_adaptive_entropy": False, "entropy_target": 0.6, "entropy_coef": 0.01},
        {"objective.entropy_target": None, "objective.entropy_coef": 0.01},
    ),
    "a reference": (
        {"beta": 0.04}, {"objective.beta": 0.04, "objective.kl_importance_weighted": True},
    ),
    "a gradient that is not clipped": ({"max_grad_norm": 0.0}, {"update.max_grad_norm": math.inf}),
    "all of the vocabulary, as vLLM writes it": ({"top_k": -1}, {"rollout.top_k": 0}),
    "nothing where older releases allow it": (
        {"top_k": None, "max_grad_norm": None}, {"rollout.top_k": 0, "update.max_grad_norm": math.inf},
    ),
    "chosen tokens and sequences": (
        {"top_entropy_quantile": 0.2, "off_policy_mask_threshold": 0.5},
        {"objective.top_entropy_quantile": 0.2, "objective.off_policy_mask_threshold": 0.5},
    ),
    "chosen tokens under the ratio of a sequence": (
        {"top_entropy_quantile": 0.2, "importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"objective.top_entropy_quantile": 0.2, "objective.importance_sampling_level": "sequence_token"},
    ),
    "advantages without a scale": ({"scale_rewards": False}, {"advantages.scale_rewards": "none"}),
    "rewards normalised one by one": (
        {"multi_objective_aggregation": "normalize_then_sum"}, {"reward.combine": "normalize_then_sum", "advantages.scale_rewards": "batch"},
    ),
    "a thinking switch": (
        {"chat_template_kwargs": {"enable_thinking": False}}, {"data.chat_template_kwargs.enable_thinking": False},
    ),
    "a thinking switch in JSON": (
        {"chat_template_kwargs": '{"enable_thinking": true}'}, {"data.chat_template_kwargs.enable_thinking": True},
    ),
    "bf16": ({"bf16": True}, {"trainer.precision": "bf16-mixed"}),
    "no bf16": ({"bf16": False}, {"trainer.precision": "32-true"}),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), CASES.values(), ids=CASES.keys())
def test_what_a_config_becomes(given, expected):
    assert_becomes(given, expected)


BLOCKED = {
    "a loss that TRL does not have": {"loss_type": "gspo", "epsilon": 0.1},
    "a weight that grows with the ratio": {"vespo_lambda_neg": 0.0, "loss_type": "vespo"},
    "a weight that keeps what the policy has left": {"vespo_k_pos": 0, "loss_type": "vespo"},
    "float16": {"fp16": True},
    "an unknown optimizer": {"optim": "lion_8bit"},
    "a schedule": {"lr_scheduler_type": "polynomial", "warmup_ratio": 0.1},
    "a least rate of none": {"lr_scheduler_type": "cosine_with_min_lr"},
    "warm-up in steps of a run of epochs": {"warmup_steps": 10},
    "a penalty for repetition": {"repetition_penalty": 1.1},
    "unequal reward weights": {"reward_weights": [1.0, 0.5]},
    "single tokens of a gate per sequence": {
        "top_entropy_quantile": 0.2, "loss_type": "sapo", "importance_sampling_level": "sequence",
    },
}  # fmt: skip


@pytest.mark.parametrize("given", BLOCKED.values(), ids=BLOCKED.keys())
def test_what_would_change_the_result_is_never_dropped_in_silence(given, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(given))
    out = io.StringIO()
    assert main([str(tmp_path / "config.json")], Console(file=out, width=160)) == 1
    assert "no counterpart" in out.getvalue() and "python train.py" not in out.getvalue()
    assert f"error: {next(iter(given))} would change the result" in capsys.readouterr().err


def test_keys_that_train_nothing_are_named_and_do_not_stop_the_conversion():
    result = convert({"hub_strategy": "checkpoint", "hub_revision": "dev", "tf32": True, "torch_compile_mode": "x"})
    assert result.remainder == ["hub_strategy", "hub_revision", "tf32", "torch_compile_mode"] and not result.blocking


def test_what_has_no_effect_in_trl_is_said_to_have_none():
    def notes(given):
        return {verdict.key: (verdict.kind, verdict.note) for verdict in convert(given).verdicts}

    constant = notes({"lr_scheduler_type": "constant", "warmup_ratio": 0.1})
    assert constant["warmup_ratio"][0] == "same" and "no effect" in constant["warmup_ratio"][1]
    both = notes({"warmup_steps": 10, "warmup_ratio": 0.1, "max_steps": 100})
    assert both["warmup_ratio"] == ("same", "warmup_steps overrides it, as in TRL")
    assert notes({"eval_steps": 5})["eval_steps"] == ("same", "no effect without eval_strategy=steps, in TRL as here")
    assert notes({"report_to": "all"})["report_to"][0] == "better default"


def test_a_loss_without_a_clip_says_so_and_settings_of_other_losses_ask_for_nothing():
    def notes(given):
        return {verdict.key: (verdict.kind, verdict.note) for verdict in convert(given).verdicts}

    found = notes({
        "loss_type": "vespo", "importance_sampling_level": "sequence", "delta": 2.0, "vespo_k_pos": 2.0, "sapo_temperature_pos": 0.5,
    })  # fmt: skip
    assert found == {
        "loss_type": ("same", "objective.loss_type"),
        "importance_sampling_level": (
            "better default", "token: vespo has a ratio of its own, of the whole sequence; TRL warns and ignores it too",
        ),
        "delta": ("better default", "vespo has a smooth weight in place of the clip; TRL ignores it silently"),
        "vespo_k_pos": ("same", "no effect with one optimizer step per rollout: the ratio is 1, in TRL as here"),
        "sapo_temperature_pos": ("same", "no effect without loss_type=sapo, in TRL as here"),
    }  # fmt: skip
    other = convert({"loss_type": "grpo", "vespo_k_pos": 0.0})
    assert "objective.k_positive" not in other.settings and not other.blocking


def test_tokens_of_the_entropy_bonus_that_trl_leaves_out_are_named():
    quantile = {"top_entropy_quantile": 0.2}
    assert [n for n in convert({**quantile, "entropy_coef": 0.1}).added if n.startswith("note: the entropy bonus")]
    assert [n for n in convert({**quantile, "use_adaptive_entropy": True}).added if "are of all tokens" in n]
    assert not [n for n in convert({"entropy_coef": 0.1}).added if "all tokens" in n]
    assert not [n for n in convert(quantile).added if "all tokens" in n]


def test_the_cap_of_cispo_that_was_not_asked_for_is_named():
    (line,) = [line for line in convert({"loss_type": "cispo"}).added if "epsilon_high" in line]
    assert line.startswith("objective.epsilon_high=null: 5")


def test_what_depends_on_a_choice_without_counterpart_is_named_with_it():
    result = convert({"lr_scheduler_type": "polynomial", "warmup_ratio": 0.1, "lr_scheduler_kwargs": {"power": 2}})
    assert result.remainder == ["lr_scheduler_type", "warmup_ratio", "lr_scheduler_kwargs"]
    assert result.blocking == ["lr_scheduler_type"]


def test_an_upload_goes_to_the_same_repository_and_is_public_only_where_that_is_asked_for():
    settings = convert({"push_to_hub": True, "hub_model_id": "me/x"}).settings
    assert settings["export.push_to_hub"] == "me/x" and "export.private" not in settings
    assert convert({"push_to_hub": True, "hub_model_id": "me/x", "hub_private_repo": False}).settings[
        "export.private"
    ] is False  # fmt: skip
    unnamed = convert({"push_to_hub": True})
    assert "export.push_to_hub" not in unnamed.settings and "export.push_to_hub=me/my-model" in " ".join(unnamed.added)
    assert "export.push_to_hub" not in convert({"hub_model_id": "me/x"}).settings


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


@pytest.mark.parametrize("norm", [-1, -0.5, 0, None, math.nan])
def test_a_norm_at_which_transformers_does_not_clip_is_no_clip_here(norm):
    assert checked({"max_grad_norm": norm})["update"]["max_grad_norm"] == math.inf


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"reward_weights": 1}, "reward_weights=1 must be list"),
        ({"report_to": 1}, "report_to=1 must be str or list"),
        ({"max_steps": "x"}, "max_steps='x' must be int or float"),
        ({"save_steps": math.inf}, "save_steps=inf must be int or float"),
        ({"num_iterations": math.nan}, "num_iterations=nan must be at least 1"),
        ({"importance_sampling_level": None}, "importance_sampling_level=None: give a value; TRL's default is token"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(given, line):
    with pytest.raises(UserError) as refused:
        convert(given)
    assert str(refused.value) == line


def test_no_value_of_a_single_key_ends_in_a_traceback():
    values = (1, -1, 0, 1.5, "x", "", [1], [], ["a"], {}, True, None, math.nan, math.inf)
    around = ({}, {"use_vllm": True}, {"use_vllm": True, "vllm_mode": "server"}, {"sync_ref_model": True, "beta": 0.1})
    for key in (*RENAMED, *COMPUTED, *BETTER, *NONE):
        for given in ({**more, key: value} for more in around for value in values):
            try:
                convert(given)
            except UserError as refused:
                assert "\n" not in str(refused)


@pytest.mark.parametrize(
    ("text", "arguments", "line"),
    [
        ("beta: 0.1", ["--ranks", "0"], "--ranks 0 must be at least 1"),
        ("beta: 0.1", ["--ranks", "-1"], "--ranks -1 must be at least 1"),
        ("reward_weights: 1", [], "reward_weights=1 must be list"),
        ("beta: 0.1", ["--output", "/nowhere/x.yaml"], "--output /nowhere/x.yaml: cannot write there (No such file or directory); name a file"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(text, arguments, line, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert main([str(tmp_path / "c.yaml"), *arguments], Console(file=io.StringIO())) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_token_is_not_shown_and_nothing_reaches_the_terminal_as_something_it_obeys(tmp_path):
    given = {"hub_token": "hf_abcdef", "report_to": "\x1b]0;pwned\x07[b]", "run_name": "\x9b2J"}
    (tmp_path / "c.json").write_text(json.dumps(given))
    out = io.StringIO()
    model = ["--model", "m\x1b[2J", "--output", str(tmp_path / "mine.yaml")]
    assert main([str(tmp_path / "c.json"), *model], Console(file=out, width=200)) == 0
    rows = [[cell.strip() for cell in line.split("│")] for line in out.getvalue().splitlines() if "│" in line]
    assert [row[2] for row in rows if row[1] in given] == ["***", "␛]0;pwned␇[b]", "\\x9b2J"]
    assert "  'model.path='\"'\"'m␛[2J'\"'\"'' \\\n" in out.getvalue()
    assert "hf_abcdef" not in out.getvalue()
    assert {char for char in out.getvalue() if ord(char) < 32 or 127 <= ord(char) < 160} == {"\n"}
    assert OmegaConf.load(tmp_path / "mine.yaml").model.path == "m\x1b[2J"


def test_an_error_line_is_masked_and_fit_for_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    (tmp_path / "c.json").write_text(json.dumps({"hf_abcdef\x1b[2J": 1}))
    assert main([str(tmp_path / "c.json")], Console(file=io.StringIO())) == 2
    line = "error: ***␛[2J: TRL 1.16.0's GRPOConfig has no such field; remove it or correct its name\n"
    assert capsys.readouterr().err == line


def test_a_file_that_holds_a_number_alone_holds_no_config():
    with pytest.raises(UserError, match="^the config is neither JSON, YAML nor Python"):
        parse_config("1")
