"""No setting lies: every key of every config group changes something, and is refused where it cannot.

Each key has a declared effect. Where this machine can, a short run of the micro model is made with and without the
change and the declared part of what it leaves must differ. Where it cannot (devices, loggers of services), the value
must arrive at the boundary: the argument of the library's or our own constructor.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gspo_lightning import cli
from gspo_lightning.config import checks
from gspo_lightning.config.build import build, build_module
from gspo_lightning.errors import UserError
from gspo_lightning.objective.losses import LOSSES, SETTINGS
from tests.conf.probes import PROBES, Probe
from tests.conf.test_groups import CONF, given, of_file, resolved

ROOT = CONF.parent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BASE = ["experiment=micro", "max_rollouts=2", "data.prompts_per_rollout=4", "rollout.num_generations=4"]
# A finite task, so that the order of its rows matters.
ROWS = [
    "data=rows", f"data.task.source={ROOT}/tests/conf/letters.jsonl", "data.task.prompt_column=question",
    "data.task.num_validation=2", "data.max_prompt_length=64",
]  # fmt: skip
LENGTHY = (
    "+reward.functions.lengthy={_target_:gspo_lightning.rewards.RewardSpec,weight:1.0,timeout_s:null,"
    "function:{_target_:hydra.utils.get_method,path:tests.conf.test_every_key.lengthy}}"
)
COVARIANT = ["objective=clip_cov", "objective.clip_cov_ratio=0.2", "objective.clip_cov_lb=0.0"]
WEIGHTS, COMPLETIONS, METRICS, FILES, SCREEN, TOKENS = "weights", "completions", "metrics", "files", "screen", "tokens"


def lengthy(completions: list[str], **_: Any) -> list[float]:
    """A second reward function, so that there is a choice."""
    return [float(len(text)) for text in completions]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """What a run of the micro model leaves, by part."""
    cfg = given(*BASE, *overrides, run_dir=folder)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen):
        cli._train(cfg)
    rows = list(csv.DictReader((folder / "metrics.csv").open(newline="")))
    model = folder / "model" / "model.safetensors"
    adapter = folder / "model" / "adapter_model.safetensors"
    files = [p for p in folder.rglob("*") if p.is_file()]
    weights = load_file(model if model.exists() else adapter) if (folder / "model").exists() else {}
    return {
        WEIGHTS: {name: value.double().sum().item() for name, value in weights.items()},
        COMPLETIONS: [json.loads(line)["completion"] for line in (folder / "completions.jsonl").open()],
        METRICS: [{k: v for k, v in r.items() if not k.startswith(("time/", "perf/"))} for r in rows],
        FILES: {str(p.relative_to(folder)): p.name == "validation_after.json" and p.stat().st_size for p in files},
        TOKENS: "token_ids" in (folder / "completions.jsonl").read_text(),
        SCREEN: screen.getvalue().count("\n"),
    }


# key -> (the part that must differ, the change, what both runs have in common)
EXECUTED: dict[str, tuple[str, list[str], list[str]]] = {
    # Settings of single losses, unless a row below shows more.
    **{
        f"objective.{key}": (WEIGHTS, [f"objective.{key}=9.0"], [f"objective={loss}"])
        for loss, spec in LOSSES.items() for key in spec.reads if key in SETTINGS
    },
    "seed": (COMPLETIONS, ["seed=1"], []),
    "record_tokens": (TOKENS, ["record_tokens=true"], []),
    "overfit_rows": (COMPLETIONS, ["overfit_rows=4"], []),
    "max_rollouts": (METRICS, ["max_rollouts=1"], []),
    "num_epochs": (METRICS, ["num_epochs=0.2"], ROWS),
    "print_config": (SCREEN, ["print_config=false"], []),
    "checkpoint.every_n_rollouts": (FILES, ["checkpoint.every_n_rollouts=1"], []),
    "checkpoint.keep_last": (FILES, ["checkpoint.keep_last=1"], []),
    "checkpoint.keep_best": (FILES, ["checkpoint.keep_best=val/reward"], ["validation.every_n_rollouts=1"]),
    "export.enabled": (FILES, ["export.enabled=false"], []),
    "export.merge_lora": (FILES, ["export.merge_lora=true"], ["lora=language"]),
    "environment.environment": (COMPLETIONS, ["environment=guess_the_number"], [
        "data=secret_number", "reward=exact_match", "data.max_prompt_length=256", "data.task.num_validation=4",
        "data.prompts_per_rollout=4", "rollout.max_completion_length=40",
    ]),
    "mismatch.mismatch": (METRICS, ["mismatch=token_truncate"], []),
    "dynamic_sampling.max_draws": (METRICS, ["dynamic_sampling.max_draws=1"], []),
    "advantages.scale_rewards": (WEIGHTS, ["advantages.scale_rewards=none"], []),
    "advantages.baseline": (WEIGHTS, ["advantages.baseline=rloo"], ["advantages.scale_rewards=none", "optimizer.eps=1"]),
    "advantages.k": (WEIGHTS, ["advantages.k=3"], ["advantages=pass_at_k", "advantages.k=2", "optimizer.eps=1"]),
    "advantages.group_baseline": (
        WEIGHTS, ["advantages.group_baseline=true"], ["advantages=reinforce_plus_plus", "optimizer.eps=1"]
    ),
    "data.task.letters": (COMPLETIONS, ["data.task.letters=xyz"], []),
    "data.task.num_validation": (METRICS, ["data.task.num_validation=4"], []),
    "data.prompts_per_rollout": (METRICS, ["data.prompts_per_rollout=8"], []),
    "data.seed": (COMPLETIONS, ["data.seed=5"], ROWS),
    "data.validation_batch_size": (None, [], []),
    "objective.importance_sampling_level": (WEIGHTS, ["objective.importance_sampling_level=token"], []),
    "objective.loss_type": (WEIGHTS, ["objective.loss_type=dapo"], []),
    "objective.epsilon": (METRICS, ["objective.epsilon=0.0001"], ["max_rollouts=6"]),
    "objective.epsilon_high": (METRICS, ["objective.epsilon_high=0.000001"], ["max_rollouts=6"]),
    "objective.delta": (WEIGHTS, ["objective.delta=1.0002"], ["max_rollouts=4", "objective.epsilon_high=0.0001"]),
    "objective.beta": (WEIGHTS, ["objective.beta=0.1"], []),
    "objective.beta_end": (WEIGHTS, ["objective.beta_end=0.5"], []),
    "objective.kl_estimator": (WEIGHTS, ["objective.kl_estimator=k2"], ["objective.beta=0.1"]),
    "objective.kl_importance_weighted": (WEIGHTS, ["objective.kl_importance_weighted=true"], ["objective.beta=0.1"]),
    "objective.entropy_coef": (WEIGHTS, ["objective.entropy_coef=0.1"], []),
    "objective.entropy_target": (WEIGHTS, ["objective.entropy_target=9"], ["objective.entropy_coef=0.1"]),
    "objective.entropy_coef_delta": (WEIGHTS, ["objective.entropy_coef_delta=0.1"], ["objective.entropy_target=9"]),
    "objective.entropy_coef_min": (WEIGHTS, ["objective.entropy_coef_min=0.1"], [
        "objective.entropy_target=4.1", "objective.entropy_coef=0.2", "objective.entropy_coef_delta=0.2", "max_rollouts=6",
    ]),
    "objective.entropy_coef_max": (WEIGHTS, ["objective.entropy_coef_max=0.11"], ["objective.entropy_target=9", "objective.entropy_coef=0.1", "objective.entropy_coef_delta=0.1"]),
    "objective.mask_truncated_completions": (WEIGHTS, ["objective.mask_truncated_completions=true"], []),
    "objective.top_entropy_quantile": (WEIGHTS, ["objective.top_entropy_quantile=0.2"], ["objective.importance_sampling_level=sequence_token"]),
    "objective.off_policy_mask_threshold": (METRICS, ["objective.off_policy_mask_threshold=0.01"], ["optimizer.lr=0.05"]),
    "objective.max_completion_length": (WEIGHTS, ["objective.max_completion_length=99"], ["objective=dr_grpo", "optimizer.eps=1"]),
    "objective.clip_cov_ratio": (WEIGHTS, ["objective.clip_cov_ratio=0.5"], COVARIANT),
    "objective.clip_cov_lb": (WEIGHTS, ["objective.clip_cov_lb=-9.0"], COVARIANT),
    "objective.clip_cov_ub": (WEIGHTS, ["objective.clip_cov_ub=0.1"], COVARIANT),
    "objective.kl_cov_ratio": (WEIGHTS, ["objective.kl_cov_ratio=0.5"], ["objective=kl_cov"]),
    "rollout.num_generations": (COMPLETIONS, ["rollout.num_generations=2"], []),
    "rollout.max_completion_length": (COMPLETIONS, ["rollout.max_completion_length=3"], []),
    "rollout.temperature": (COMPLETIONS, ["rollout.temperature=0.3"], []),
    "rollout.top_p": (COMPLETIONS, ["rollout.top_p=0.3"], []),
    "rollout.top_k": (COMPLETIONS, ["rollout.top_k=2"], []),
    "rollout.min_p": (COMPLETIONS, ["rollout.min_p=0.5"], []),
    "rollout.stop": (COMPLETIONS, ["rollout.stop=[a,b,c,d,e]"], []),
    "rollout.engine.max_concurrent": (None, [], []),
    "update.num_iterations": (WEIGHTS, ["update.num_iterations=2"], []),
    "update.num_minibatches": (WEIGHTS, ["update.num_minibatches=4"], []),
    "update.max_tokens_per_microbatch": (None, [], []),
    "update.max_grad_norm": (WEIGHTS, ["update.max_grad_norm=0.001"], ["optimizer.eps=1"]),
    "update.keep_zero_advantage": (METRICS, ["update.keep_zero_advantage=true"], ["data=micro_digit", "reward=last_integer"]),
    "update.old_logprobs": (WEIGHTS, ["update.old_logprobs=sampler"], []),
    "update.log_entropy": (METRICS, ["update.log_entropy=true"], []),
    "update.ref_sync_every_n_rollouts": (WEIGHTS, ["update.ref_sync_every_n_rollouts=1"], ["objective.beta=0.5", "max_rollouts=4"]),
    "update.ref_model_mixup_alpha": (WEIGHTS, ["update.ref_model_mixup_alpha=0.1"],
                                     ["objective.beta=0.5", "update.ref_sync_every_n_rollouts=1", "max_rollouts=4"]),
    "optimizer.lr": (WEIGHTS, ["optimizer.lr=0.1"], []),
    "optimizer.betas": (WEIGHTS, ["optimizer.betas=[0.5,0.5]"], []),
    "optimizer.eps": (WEIGHTS, ["optimizer.eps=0.1"], []),
    "optimizer.weight_decay": (WEIGHTS, ["optimizer.weight_decay=0.5"], []),
    "scheduler.name": (WEIGHTS, ["scheduler=linear"], []),
    "scheduler.warmup_ratio": (WEIGHTS, ["scheduler.warmup_ratio=0.9"], []),
    "scheduler.min_ratio": (WEIGHTS, ["scheduler.min_ratio=0.9"], ["scheduler=cosine"]),
    "validation.num_generations": (METRICS, ["validation.num_generations=4"], []),
    "validation.threshold": (METRICS, ["validation.threshold=0.01"], []),
    "validation.num_samples": (FILES, ["validation.num_samples=1"], []),
    "validation.reward": (METRICS, ["validation.reward=lengthy"], [LENGTHY]),
    "validation.every_n_rollouts": (METRICS, ["validation.every_n_rollouts=1"], []),
    "lora.r": (WEIGHTS, ["model.lora.r=2"], ["lora=language"]),
    "lora.alpha": (WEIGHTS, ["model.lora.alpha=1"], ["lora=language"]),
    "lora.target_modules": (WEIGHTS, ["model.lora.target_modules='.*o_proj'"], ["lora=language"]),
    "lora.use_rslora": (WEIGHTS, ["model.lora.use_rslora=true"], ["lora=language"]),
    "lora.init_lora_weights": (WEIGHTS, ["model.lora.init_lora_weights=gaussian"], ["lora=language"]),
    "reward.functions": (METRICS, ["reward.functions.letter_share.weight=2.0"], []),
    "reward.combine": (WEIGHTS, ["reward.combine=normalize_then_sum"], ["advantages.scale_rewards=batch", "optimizer.eps=1"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by their overrides; what several keys have in common is made once."""
    made: dict[tuple[str, ...], dict[str, Any]] = {}

    def get(*overrides: str) -> dict[str, Any]:
        if overrides not in made:
            torch.manual_seed(0)
            made[overrides] = run(tmp_path_factory.mktemp("run"), *overrides)
        return made[overrides]

    return get


@pytest.mark.parametrize("key", [k for k, (part, _, _) in EXECUTED.items() if part])
def test_the_key_changes_what_it_says(key, runs):
    part, change, common = EXECUTED[key]
    differs = runs(*common, *change)[part] != runs(*common)[part]
    assert differs, f"{change} changes no {part} of a short run with {common}: EXECUTED needs a row in which it does"


@pytest.mark.parametrize("key", [k for k, (part, _, _) in EXECUTED.items() if part is None])
def test_the_key_arrives_at_its_constructor_and_nothing_else_changes(key, runs):
    """Settings of memory and speed: the run must stay the same to the last bit."""
    group, name = key.split(".", 1)
    plain = resolved(*BASE, f"{key}=64")
    owner = build_module(plain) if group != "data" else build(plain["data"])
    holder = {"rollout.engine.max_concurrent": "engine", "update.max_tokens_per_microbatch": "update_settings"}.get(key)
    assert getattr(getattr(owner, holder) if holder else owner, name.rsplit(".", 1)[-1]) == 64


# Keys that are no argument of anything -> the test that shows what they do.
ELSEWHERE = {
    "ckpt_path": "tests/end_to_end/test_command_line.py",
    "dry_run": "tests/report/test_estimate.py",
    "export.push_to_hub": "tests/report/test_model_card.py",
    "export.private": "tests/report/test_model_card.py",
    "checkpoint.grace_s": "tests/end_to_end/test_command_line.py",
    "lora.lora": "tests/conf/test_every_key.py",
    "environment.data.chat_template_kwargs": "tests/dialogue/test_tool_command.py",
    "lora.lora.adapter": "tests/policy/test_adapter.py",
    "lora.lora.target_parameters": "tests/policy/test_adapter.py",
    "allow_no_effect": "tests/conf/test_every_key.py",
    "traceback": "tests/end_to_end/test_command_line.py",
    "rollout.repetition_penalty": "tests/bad_input/cases.py",  # refused in training, see there
}
SERVER = "gspo_lightning.rollout.VLLMServerEngine"
SERVER_TESTS = "tests/rollout/test_vllm_server.py"
# (``_target_``, argument) -> file and test that shows the effect, where it takes a fault to see it.
SHOWN = {
    (SERVER, "ready_timeout_s"): (SERVER_TESTS, "test_a_server_that_never_comes_up_is_named"),
    (SERVER, "request_timeout_s"): (SERVER_TESTS, "test_a_fault_anywhere_loses_nothing_and_counts_nothing_twice"),
    (SERVER, "give_up_after_s"): (SERVER_TESTS, "test_with_no_server_left_the_run_stops_in_bounded_time_with_one_line"),
    (SERVER, "max_attempts"): (SERVER_TESTS, "test_a_prompt_that_no_server_can_answer_ends_the_run"),
    (SERVER, "max_in_flight"): ("tests/rollout/test_server_pool.py", "test_a_server_is_asked_so_many_prompts_at_a_time"),
    (SERVER, "pause_s"): (SERVER_TESTS, "test_a_server_that_failed_rests_for_the_pause_and_then_longer"),
    ("gspo_lightning.UpdateSettings", "max_nonfinite_steps"): (
        "tests/training/test_update.py", "test_a_nonfinite_gradient_never_reaches_the_weights_and_ends_the_run_after_a_while"
    ),
    ("gspo_lightning.rewards.RewardSpec", "weight"): ("tests/rewards/test_reward_set.py", "test_combination_by_weight"),
    ("gspo_lightning.rewards.RewardSpec", "timeout_s"): ("tests/rewards/test_workers.py", "timeout_s"),
    ("gspo_lightning.rollout.ReplayEngine", "run"): ("tests/end_to_end/test_replay.py", "rollout.engine.run="),
    ("hydra.utils.get_method", "path"): ("tests/conf/test_every_key.py", "path:tests.conf.test_every_key.lengthy"),
}  # fmt: skip


def test_no_key_is_without_a_declared_effect():
    """Every leaf of every group is executed here, probed, or shown by a test that is named."""
    undeclared = [leaf for leaf in leaves() if not declared(*leaf[1:])]
    assert not undeclared, f"declare what these change: {undeclared}"


def test_every_key_that_is_said_to_be_tested_elsewhere_is_named_there():
    for key, file in ELSEWHERE.items():
        assert key.rsplit(".", 1)[-1] in (ROOT / file).read_text(), f"{file} does not mention {key}"
    for key, (file, name) in SHOWN.items():
        assert name in (ROOT / file).read_text(), f"{file} has no {name}, which shows {key}"


def test_a_setting_without_effect_is_refused_and_a_warning_when_allowed():
    with pytest.raises(UserError, match="objective.delta cannot act.*allow_no_effect=true"):
        checks.check(resolved(*BASE, *SINGLE, "objective.delta=9.0"))
    with pytest.warns(UserWarning, match="objective.delta cannot act"):
        checks.check(resolved(*BASE, *SINGLE, "objective.delta=9.0", "allow_no_effect=true"))


def test_one_step_off_a_clip_acts_with_one_optimizer_step_per_rollout():
    ahead = [*BASE, "update.num_minibatches=1", "rollout=vllm_server", "rollout.engine.staleness=1"]
    checks.check(resolved(*ahead))
    with pytest.raises(UserError, match="objective.epsilon cannot act"):
        checks.check(resolved(*ahead, "rollout.engine.staleness=0"))


SINGLE = ["update.num_minibatches=1", "objective.epsilon=null", "objective.epsilon_high=null"]


def leaves() -> Iterator[tuple[str, str, str | None, str]]:
    """(file, key from the group's root, ``_target_`` that takes it, name of the argument) of every setting."""
    for file in [CONF / "train.yaml", *sorted(CONF.glob("*/*.yaml"))]:
        group = file.parent.name
        if group in ("experiment", "hydra", "hparams_search", "debug"):
            continue  # these only set keys of other groups
        node = yaml.safe_load(file.read_text()) if file.stem == "train" else of_file(file)
        node = {k: v for k, v in node.items() if k not in ("defaults", "hydra")}
        prefix = "" if file.stem == "train" else f"{group}."
        base = {"trainer": "lightning.Trainer"}.get(group)  # ddp and its like add to the default
        for key, target in walk(node, base):
            yield file.stem, prefix + key, target, key.rsplit(".", 1)[-1]


MAPPINGS = {"columns", "weights", "patterns", "keep_rows", "overrides", "chat_template_kwargs"}
"""Arguments that are mappings of the user's own."""


def walk(node: dict[str, Any], target: str | None) -> Iterator[tuple[str, str | None]]:
    target = node.get("_target_", target)
    for name, value in node.items():
        if name.startswith("_"):
            continue
        if isinstance(value, dict) and value and name not in MAPPINGS:
            yield from ((f"{name}.{key}", inner) for key, inner in walk(value, None))
        else:
            yield name, target


def declared(key: str, target: str | None, name: str) -> bool:
    executed = key in EXECUTED or key in ELSEWHERE or key.replace("lora.lora.", "lora.") in EXECUTED
    return executed or (target, name) in probed() or (target, name) in SHOWN


@functools.cache
def plain_of(*overrides: str) -> dict[str, Any]:
    return resolved(*overrides, run_dir="/tmp")


def node_of(probe: Probe) -> dict[str, Any]:
    node: Any = plain_of(*probe.overrides)
    for part in probe.path.split("."):
        node = node[part]
    return copy.deepcopy({**node, **probe.common})


@functools.cache
def probed() -> set[tuple[str, str]]:
    """(``_target_``, argument) of everything that a probe changes."""
    return {(node_of(probe)["_target_"], name) for probe in PROBES for name in probe.changes}


@pytest.mark.parametrize(
    ("probe", "name"),
    [(p, name) for p in PROBES for name in p.changes],
    ids=lambda x: x if isinstance(x, str) else x.path,
)
def test_the_argument_changes_what_is_seen(probe, name, unchanged, tmp_path):
    before, again = unchanged(PROBES.index(probe))
    assert before == again, "what is observed is not reproducible"
    assert probe.observe({**node_of(probe), name: probe.changes[name]}, tmp_path) != before


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """What a probe sees of its node as the file has it, twice."""

    @functools.cache
    def observed(number: int) -> tuple[Any, Any]:
        probe = PROBES[number]
        first, second = (probe.observe(node_of(probe), tmp_path_factory.mktemp("probe")) for _ in range(2))
        return first, second

    return observed
