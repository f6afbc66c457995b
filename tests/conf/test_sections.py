"""What a config must have, which of its numbers may be what, and choices of groups that are none."""

from __future__ import annotations

import math
import re
import sys
from datetime import timedelta
from multiprocessing import Pipe

import pytest
import torch
from omegaconf import open_dict

from gspo_lightning import cli
from gspo_lightning.callbacks.time_limit import TimeLimit
from gspo_lightning.config import checks
from gspo_lightning.config.build import build_trainer
from gspo_lightning.config.groups import check_overrides
from gspo_lightning.config.optimizer import check_optimizer
from gspo_lightning.config.resolve import resolve
from gspo_lightning.config.sections import choices_of
from gspo_lightning.errors import LONGEST_S, UserError
from gspo_lightning.rewards import RewardSpec
from gspo_lightning.rewards.mathematics import MathVerify
from gspo_lightning.training.update import UpdateSettings
from tests.conf.test_groups import given, resolved

MICRO = ["experiment=micro", "logger=none"]


def refusal(*overrides):
    with pytest.raises(UserError) as refused:
        checks.check(resolved(*MICRO, *overrides))
    return str(refused.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("~trainer.devices", "trainer.devices: is missing; give it a value"),
        ("~rollout.num_generations", "rollout.num_generations: is missing; give it a value"),
        ("~rollout.engine", "rollout.engine: is missing; give it a value"),
        ("~seed", "seed: is missing; give it a value"),
        ("~max_rollouts", "max_rollouts: is missing; give it a value"),
        ("~checkpoint.grace_s", "checkpoint.grace_s: is missing; give it a value"),
        ("~environment", "environment: is missing; choose one of calculator, guess_the_number, none, tools"),
        ("logger=[]", "logger: is missing; choose one of csv, mlflow, none, tensorboard, wandb"),
        ("scheduler=[]", "scheduler: is missing; choose one of constant, cosine, linear"),
        ("optimizer=[]", "optimizer._target_: is missing; choose one of adamw, adamw_8bit, paged_adamw_8bit"),
        (
            "rollout.engine=abc",
            "rollout.engine='abc' must be a section with a _target_; choose one with rollout=: replay, transformers, vllm, "
            "vllm_server",
        ),
        ("data.task=abc", "data.task='abc' has the wrong type; expected a section that builds a Task"),
        ("ckpt_path=1", "ckpt_path=1 has the wrong type; expected text or null"),
        ("export.push_to_hub=1", "export.push_to_hub=1 has the wrong type; expected text or null"),
        ("model.dtype=half", "model.dtype='half' is not one of float32, bfloat16, float64"),
    ],
)
def test_what_is_missing_or_no_section_is_named_with_what_there_is(override, line):
    assert refusal(override) == line


@pytest.mark.parametrize("group", ["experiment", "debug", "hparams_search"])
def test_a_file_without_the_line_that_makes_its_settings_those_of_the_root_is_told_of_it(group):
    line = f"{group}: the file that is chosen must begin with the line `# @package _global_`"
    assert refusal(f"+{group}.max_rollouts=2") == line
    own = given(*MICRO)
    with open_dict(own):  # a variable of the user's own, as a file with that line may have
        own[group], own.checkpoint.keep_best = "val/reward", f"${{{group}}}"
    assert resolve(own)["checkpoint"]["keep_best"] == "val/reward"


def test_early_stopping_by_what_no_validation_measures_is_refused_before_the_run():
    def stopping(metric):
        node = f"{{_target_: lightning.pytorch.callbacks.EarlyStopping, mode: max, monitor: {metric}}}"
        return [f"+callbacks.es={node}", "validation.every_n_rollouts=1"]

    measured = "val/accuracy, val/sampled_accuracy, val/pass@2, val/reward, val/mean_tokens"
    line = f"callbacks.es.monitor=val/rewardd: validation does not measure it; it measures {measured}"
    assert refusal(*stopping("val/rewardd")) == line
    for metric in ("val/mean_tokens", "val/accuracy/sums", "reward/mean", "val/rewardd, strict: false"):
        checks.check(resolved(*MICRO, *stopping(metric)))
    plain = resolved(*MICRO, *stopping("val/rewardd"))
    plain["callbacks"]["mine"] = {"_target_": "mine.Callback"}  # which may log what it likes
    checks._check_callbacks(plain)


def test_a_group_of_the_users_own_that_leaves_a_default_out_is_accepted():
    checks.check(resolved(*MICRO, "~rollout.top_p", "~rollout.min_p", "~update.log_entropy"))


@pytest.mark.parametrize(
    "key",
    [
        "rollout.temperature", "objective.epsilon", "objective.epsilon_high", "objective.delta", "objective.beta",
        "objective.beta_end", "objective.entropy_coef", "objective.off_policy_mask_threshold", "validation.threshold",
        "update.max_grad_norm", "update.ref_model_mixup_alpha", "objective.tau_positive", "scheduler.warmup_ratio",
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused_where_a_comparison_would_let_it_pass(key):
    assert refusal(f"++{key}=nan") == f"{key}=nan must be a finite number"
    assert refusal(f"++{key}=-inf") == f"{key}=-inf must be a finite number"


def test_a_setting_of_the_engine_that_is_no_number_is_refused_and_an_endless_wait_is_not():
    servers = ["rollout=vllm_server", "rollout.engine.give_up_after_s=inf"]
    assert (
        refusal(*servers, "rollout.engine.ready_timeout_s=nan") == "rollout.engine.ready_timeout_s=nan must be a number"
    )
    checks.check(resolved(*MICRO, *servers))


def test_infinity_stands_for_a_limit_that_is_lifted_and_for_nothing_else():
    checks.check(resolved(*MICRO, "update.max_grad_norm=inf", "objective.epsilon_high=inf"))
    for key in ("rollout.temperature", "objective.beta", "objective.entropy_coef", "validation.threshold"):
        assert refusal(f"{key}=inf") == f"{key}=inf must be a finite number"
    assert refusal("rollout.temperature=101").startswith("rollout.temperature=101 must be at most 100: ")
    checks.check(resolved(*MICRO, "rollout.temperature=100"))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.validation_batch_size=0", "data.validation_batch_size=0 must be at least 1"),
        ("data.validation_batch_size=-1", "data.validation_batch_size=-1 must be at least 1"),
        ("data.task.num_validation=-1", "data.task.num_validation=-1 must be at least 0"),
        ("update.max_nonfinite_steps=0", "update.max_nonfinite_steps=0 must be at least 1"),
        ("update.max_grad_norm=-1", "update.max_grad_norm=-1 must be above 0 (inf: no clip)"),
        ("update.max_grad_norm=0", "update.max_grad_norm=0 must be above 0 (inf: no clip)"),
        ("objective.max_completion_length=0", "objective.max_completion_length=0 must be at least 1"),
        ("+trainer.max_steps=0", "trainer.max_steps is not a setting here: set max_rollouts or num_epochs"),
        ("+trainer.min_steps=9", "trainer.min_steps is not a setting here: set max_rollouts or num_epochs"),
        ("+trainer.fast_dev_run=true", "trainer.fast_dev_run is not a setting here: debug=fast runs every part once"),
        (
            "+trainer.limit_val_batches=0.5",
            "trainer.limit_val_batches=0.5 is a fraction, but validation batches are a stream; give their count",
        ),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(override, line):
    assert refusal(override) == line


def test_held_out_rows_are_counted_in_every_task_of_a_mixture_and_beside_a_task_that_is_a_name():
    mixture = ["data=mixture", "data.task.tasks.sums.num_validation=-2"]
    assert refusal(*mixture) == "data.task.tasks.sums.num_validation=-2 must be at least 0"
    named = ["data=reasoning_gym", "data.task=gcd", "data.num_validation=-3"]
    assert refusal(*named) == "data.num_validation=-3 must be at least 0"


def test_the_settings_of_an_update_are_refused_in_a_program_too():
    for norm in (0.0, -1.0, math.nan):
        with pytest.raises(UserError, match=r"^update.max_grad_norm=.* must be above 0"):
            UpdateSettings(max_grad_norm=norm)
    assert UpdateSettings(max_grad_norm=math.inf).max_grad_norm == math.inf
    with pytest.raises(UserError, match="^update.max_nonfinite_steps=0 must be at least 1$"):
        UpdateSettings(max_nonfinite_steps=0)


def test_a_limit_of_time_is_above_zero_and_read_before_anything_is_loaded():
    assert refusal("trainer.max_time={seconds:-1}") == "trainer.max_time={'seconds': -1} must be above 0"
    assert refusal("trainer.max_time='00:00:00:00'") == "trainer.max_time='00:00:00:00' must be above 0"
    # How the wrong name is described differs between versions of Python.
    assert re.match("trainer.max_time={'hour': 1}: .*'hour'", refusal("trainer.max_time={hour:1}"))
    with pytest.raises(UserError, match="must be above 0"):
        TimeLimit(timedelta(seconds=-5))
    plain = resolved(*MICRO, "trainer.max_time={seconds:90}")
    checks.check(plain)
    (limit,) = (c for c in build_trainer(plain, []).callbacks if isinstance(c, TimeLimit))
    assert limit.time_remaining() == 90.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9] has the wrong type; expected a list of 2 values"),
        (["optimizer.betas=[0.9,0.9,0.9]"], "expected a list of 2 values"),
        (["optimizer.fused=false", "+optimizer.differentiable=true"], "AdamW rejects its settings (a leaf Variable"),
        (["optimizer.lr=inf"], "optimizer: a step of torch.optim.AdamW with these settings makes weights infinite"),
    ],
)
def test_an_optimizer_is_asked_for_a_step(settings, says):
    assert says in refusal(*settings)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("LBFGS", "LBFGS doesn't support per-parameter options (parameter groups)"),
        ("SparseAdam", "SparseAdam does not support dense gradients, please consider Adam instead"),
    ],
)
def test_an_optimizer_that_cannot_step_over_matrices_and_vectors_is_refused(name, why):
    node = {"_target_": f"torch.optim.{name}", "_partial_": True, "lr": 0.1}
    with pytest.raises(UserError) as refused:
        checks.check({**resolved(*MICRO), "optimizer": node})
    assert str(refused.value) == f"optimizer: torch.optim.{name} rejects its settings ({why})"


class NeedsRanks(torch.optim.SGD):
    """An optimizer whose step is possible on several ranks alone."""

    def step(self, closure=None):
        raise AssertionError("it must not step here")


@pytest.mark.parametrize(
    ("settings", "on_gpu"),
    [
        ({"_target_": f"{__name__}.NeedsRanks"}, False),
        ({"_target_": "torch.optim.NAdam", "capturable": True}, True),  # for parameters on a GPU alone
    ],
)
def test_steps_that_another_machine_can_take_are_not_asked_for(settings, on_gpu):
    check_optimizer({**settings, "_partial_": True, "lr": 0.1}, on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("argument", "choices"),
    [
        ("logger=null", "csv, mlflow, none, tensorboard, wandb"),
        ("validation=1", "default"),
        ("+hparams_search=null", "clip_optuna"),
    ],
)
def test_what_names_no_file_of_a_group_gets_one_line_instead_of_hydras_traceback(argument, choices, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *MICRO, argument])
    with pytest.raises(SystemExit) as ended:
        cli.train_main()
    line = f"error: {argument}: not a choice of this group; leave it out, or choose one of {choices}\n"
    assert (ended.value.code, capfd.readouterr().err) == (2, line)


def test_choices_are_the_files_of_a_group_and_all_else_is_left_to_hydra():
    assert choices_of("scheduler") == ["constant", "cosine", "linear"]
    assert choices_of("ckpt_path") == choices_of("hydra.run.dir") == []
    check_overrides(["logger=csv", "logger=[csv,wandb]", "ckpt_path=null", "~logger", "seed=1,2", "hydra.run.dir=."])


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e12])
def test_a_limit_that_no_clock_of_a_reward_can_hold_is_refused(seconds):
    with pytest.raises(
        UserError, match=r"^RewardSpec.timeout_s=.* must be above 0 and at most 1000000; null means no limit$"
    ):
        RewardSpec(len, timeout_s=seconds)
    with pytest.raises(UserError, match=r"^MathVerify.item_timeout_s=.* must be above 0 and at most 1000000$"):
        MathVerify(item_timeout_s=seconds)


def test_the_longest_limit_of_a_reward_can_be_waited_for():
    reader, writer = Pipe(duplex=False)
    writer.send(1)
    assert reader.poll(LONGEST_S)
    with pytest.raises(OverflowError):
        reader.poll(10**4 * LONGEST_S)
