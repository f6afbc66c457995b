"""What TRL counts in optimizer steps: batches, length, learning rates and intervals, by hand."""

from __future__ import annotations

import pytest

from gspo_lightning.migrate import convert
from tests.migrate.test_from_trl import assert_becomes

ONE_STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "num_generations": 8}
"""64 completions per rollout, all in one optimizer step of TRL; four minibatches of two prompts here."""
ACCELERATOR = {
    "split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True,
    "non_blocking": False, "gradient_accumulation_kwargs": None,
}  # fmt: skip
"""As TRL's `to_json_string` writes it where nothing was set."""

CASES = {
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
    "warm-up in steps beside a ratio of none": (
        {"max_steps": 500, "warmup_steps": 50, "warmup_ratio": 0.0}, {"scheduler.warmup_ratio": 0.1},
    ),
    "warm-up in steps goes before the ratio": (
        {"max_steps": 1000, "warmup_steps": 10, "warmup_ratio": 0.1}, {"scheduler.warmup_ratio": 0.01},
    ),
    "a ratio beside no steps": ({"warmup_steps": 0, "warmup_ratio": 0.1}, {"scheduler.warmup_ratio": 0.1}),
    "a constant rate has no warm-up": (
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.1, "lr_scheduler_kwargs": {"num_cycles": 1}},
        {"scheduler.name": "constant", "scheduler.warmup_ratio": 0.0},
    ),
    "a constant rate with warm-up": (
        {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1},
        {"scheduler.name": "constant", "scheduler.warmup_ratio": 0.1},
    ),
    "one step per rollout: intervals are TRL's, whatever minibatches are added": (
        {**ONE_STEP, "max_steps": 200, "save_steps": 50, "eval_strategy": "steps", "eval_steps": 50},
        {"update.num_minibatches": 4, "max_rollouts": 200, "checkpoint.every_n_rollouts": 50,
         "validation.every_n_rollouts": 50},
    ),
    "one step per rollout: a moving reference": (
        {**ONE_STEP, "beta": 0.04, "sync_ref_model": True, "ref_model_sync_steps": 64},
        {"update.num_minibatches": 4, "update.ref_sync_every_n_rollouts": 64},
    ),
    # 1000 steps are 250 rollouts; a tenth and a fifth of the steps are 100 and 200, which are 25 and 50 rollouts.
    "intervals as a share of the run": (
        {"generation_batch_size": 32, "max_steps": 1000, "save_steps": 0.1, "eval_strategy": "steps", "eval_steps": 0.2},
        {"max_rollouts": 250, "checkpoint.every_n_rollouts": 25, "validation.every_n_rollouts": 50},
    ),
    "validation takes the interval of the log": (
        {**ONE_STEP, "eval_strategy": "steps"}, {"validation.every_n_rollouts": 10},
    ),
    "no validation without its strategy": ({"eval_steps": 5}, {"validation.every_n_rollouts": None}),
    "a moving reference": (
        {"beta": 0.04, "sync_ref_model": True, "ref_model_sync_steps": 64, "generation_batch_size": 32},
        {"update.ref_sync_every_n_rollouts": 16, "update.ref_model_mixup_alpha": 0.6},
    ),
    "a least rate": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"scheduler.name": "cosine", "scheduler.min_ratio": 0.1},
    ),
    "a least rate that is no share": (
        {"learning_rate": 8e-6, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 2e-6}},
        {"scheduler.name": "cosine", "scheduler.min_ratio": 0.25},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), CASES.values(), ids=CASES.keys())
def test_what_a_config_becomes(given, expected):
    assert_becomes(given, expected)


def test_a_share_of_a_run_of_epochs_is_named_and_stops_nothing():
    shares = convert({"save_steps": 0.1, "eval_steps": 0.2, "eval_strategy": "steps"})  # of a run of epochs
    assert shares.remainder == ["save_steps", "eval_steps"] and not shares.blocking
    assert not {"checkpoint.every_n_rollouts", "validation.every_n_rollouts"} & set(shares.settings)
    assert "a share of the run" in shares.verdicts[0].note and "give max_steps" in shares.verdicts[0].note


def test_a_dumped_config_with_what_trl_derives_converts():
    derived = {"generation_batch_size": 64, "steps_per_generation": 8, "debug": [], "accelerator_config": ACCELERATOR}
    result = convert({**ONE_STEP, **derived})
    assert result.settings["data.prompts_per_rollout"] == 8 and not result.remainder
    assert convert({"accelerator_config": {"split_batches": True}}).blocking == ["accelerator_config"]
    two = convert({**ONE_STEP, "generation_batch_size": 128, "steps_per_generation": 8}, ranks=2)
    assert two.settings["data.prompts_per_rollout"] == 16
