"""What goes wrong is said once, with its cause and a remedy, and only when it does."""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from gspo_lightning.callbacks import health as health_module
from gspo_lightning.callbacks.health import CHECKS, METRICS, Facts, Health
from gspo_lightning.errors import UserError
from gspo_lightning.training.update import UpdateSettings

GOOD = {
    "reward/mean": 0.5, "silent_frac": 0.2, "clip_frac_low": 0.05, "clip_frac_high": 0.05, "ratio/p1": 0.98,
    "ratio/p99": 1.02, "gspo/ratio_noise_floor": 1e-3, "entropy": 1.0, "completion/truncated_frac": 0.1,
    "sampler_mismatch/abs_mean": 0.01, "grad_norm": 1.0,
}  # fmt: skip


def series(**changes):
    """15 good rollouts, of which the last have other values of some metrics; NaN: a metric is missing."""
    rows = [dict(GOOD) for _ in range(15)]
    for name, values in changes.items():
        for row, value in zip(rows[-len(values) :], values, strict=True):
            row[name.replace("__", "/")] = value
    return [{name: value for name, value in row.items() if value == value} for row in rows]


def found(rows, clip=(0.97, 1.04), by_sequence=True, patience=3):
    health = Health(patience)
    said = []
    for end in range(1, len(rows) + 1):
        said += [(end, name, line) for name, line in health.findings(Facts(rows[:end], patience, clip, by_sequence))]
    return said


CASES = {
    "noise_floor": ({"gspo__ratio_noise_floor": [0.0151]}, 15, "objective.epsilon"),
    "clip_never_acts": (
        {"clip_frac_low": [math.nan] * 12 + [0.0] * 3, "clip_frac_high": [math.nan] * 12 + [0.0] * 3},
        15,
        "no ratio was clipped in 3 rollouts: ratio/p1=0.98 and ratio/p99=1.02 lie inside [0.97, 1.04]",
    ),
    "clip_takes_most": ({"clip_frac_low": [0.3] * 3, "clip_frac_high": [0.3] * 3}, 15, "optimizer.lr"),
    "no_signal": ({"silent_frac": [1.0] * 3}, 15, "reward/mean=0.5"),
    "reward_collapse": ({"reward__mean": [0.1] * 4 + [0.9] * 5 + [0.4] * 3}, 15, "0.9 to 0.4"),
    "entropy_collapse": ({"entropy": [0.09]}, 15, "rollout.temperature"),
    "length_explosion": ({"completion__truncated_frac": [0.6, 0.7, 0.8]}, 15, "rollout.max_completion_length"),
    "mismatch": ({"sampler_mismatch__abs_mean": [0.11]}, 15, "mismatch=token_truncate"),
    "gradient_spike": ({"grad_norm": [10.1]}, 15, "optimizer.lr"),
}


def test_every_check_has_a_case_and_a_good_run_says_nothing():
    assert set(CASES) == {check.__name__ for check in CHECKS}
    assert found(series()) == []


@pytest.mark.parametrize("name", CASES)
def test_said_when_it_begins_with_a_remedy(name):
    changes, when, text = CASES[name]
    if name == "reward_collapse":  # the first rollouts are the low ones
        changes = {"reward__mean": [0.1] * 7 + [0.9] * 5 + [0.4] * 3}
    said = found(series(**changes))
    assert [(end, n) for end, n, _ in said] == [(when, name)]
    assert text in said[0][2] and "\n" not in said[0][2]


@pytest.mark.parametrize(
    "changes",
    [
        {"gspo__ratio_noise_floor": [0.0149]},
        {"clip_frac_low": [math.nan] * 13 + [0.0] * 2, "clip_frac_high": [math.nan] * 13 + [0.0] * 2},
        {"clip_frac_low": [0.0] * 15},
        {"clip_frac_low": [0.0] * 14, "clip_frac_high": [0.0] * 14},
        {"silent_frac": [1.0, 0.9, 1.0]},
        {"reward__mean": [0.1] * 7 + [0.9] * 5 + [0.6] * 3},
        {"entropy": [0.11]},
        {"sampler_mismatch__abs_mean": [0.09]},
        {"grad_norm": [9.9]},
    ],
)
def test_just_short_of_it_nothing_is_said(changes):
    assert found(series(**changes)) == []


def test_a_fall_within_the_noise_of_rollouts_is_no_collapse():
    noisy = [0.50, 0.44, 0.56, 0.47, 0.55, 0.62, 0.54, 0.66, 0.57, 0.65, 0.58, 0.66, 0.52, 0.58, 0.49]
    assert found(series(reward__mean=noisy)) == []


def test_a_collapse_is_one_of_the_return_where_turns_have_rewards():
    falls = [0.1] * 7 + [0.9] * 5 + [0.4] * 3
    (found_one,) = found(series(dialogue__return=falls, reward__mean=[0.0] * 15))
    assert found_one[:2] == (15, "reward_collapse") and found_one[2].startswith("dialogue/return fell from 0.9 to 0.4")
    assert found(series(dialogue__return=[0.5] * 15, reward__mean=falls)) == []


def test_once_while_it_lasts_and_again_when_it_comes_back():
    said = found(series(sampler_mismatch__abs_mean=[0.2, 0.2, 0.2, 0.0, 0.2]))
    assert [(end, name) for end, name, _ in said] == [(11, "mismatch"), (15, "mismatch")]


def test_the_noise_floor_is_of_sequence_ratios_and_clips_alone():
    rows = series(gspo__ratio_noise_floor=[0.5])
    assert found(rows, by_sequence=False) == [] and found(rows, clip=None) == []


def test_a_cap_from_above_alone_is_not_missed_where_it_does_not_act():
    never = series(clip_frac_low=[0.0] * 15, clip_frac_high=[0.0] * 15)
    assert [(end, name) for end, name, _ in found(never)] == [(3, "clip_never_acts")]
    assert found(never, clip=(0.0, 5.0)) == []


@pytest.mark.parametrize("outside", [{"ratio__p1": [0.85] * 15}, {"ratio__p99": [1.08] * 15}])
def test_ratios_beyond_a_bound_are_not_said_to_lie_inside(outside):
    """They moved against their advantages, where the loss has no clip."""
    assert found(series(clip_frac_low=[0.0] * 15, clip_frac_high=[0.0] * 15, **outside)) == []


def test_a_run_without_a_ratio_that_moves_is_not_told_that_nothing_is_clipped(capsys):
    """One optimizer step on a rollout sampled by the weights that take it: the ratio is exactly 1."""
    row = {"clip_frac_low": 0.0, "clip_frac_high": 0.0, "ratio/p1": 1.0, "ratio/p99": 1.0}
    objective = SimpleNamespace(ratio_bounds=(0.97, 1.04), importance_sampling_level="sequence")
    said = {}
    for steps in [(1, 1), (2, 1), (1, 2)]:
        for ahead in (None, "an engine"):
            update = UpdateSettings(*steps)
            module = SimpleNamespace(objective=objective, last_metrics=row, update_settings=update, ahead=ahead)
            Health(patience=1).on_train_batch_end(SimpleNamespace(is_global_zero=True, should_stop=False), module)
            said[steps, ahead] = "no ratio was clipped in 1 rollout:" in capsys.readouterr().out
    assert said.pop(((1, 1), None)) is False and len(said) == 5 and all(said.values())


def test_with_dynamic_sampling_the_reward_is_that_of_all_that_was_sampled():
    falls = [0.1] * 7 + [0.9] * 5 + [0.4] * 3
    (one,) = found(series(dynamic_sampling__sampled_reward=falls))
    assert one[:2] == (15, "reward_collapse") and one[2].startswith("dynamic_sampling/sampled_reward fell from 0.9 to")
    assert found(series(dynamic_sampling__sampled_reward=[0.25] * 15, reward__mean=falls)) == []
    (one,) = found(series(dynamic_sampling__sampled_reward=[0.25] * 15, silent_frac=[1.0] * 3))
    assert "in 3 rollouts (dynamic_sampling/sampled_reward=0.25): nothing is learnt; the task is" in one[2]


def test_two_with_other_settings_watch_one_run():
    L.Trainer(accelerator="cpu", logger=False, callbacks=[Health(3), Health(5), Health(5, ["no_signal"])])


def test_unknown_checks_and_no_patience_are_refused():
    with pytest.raises(UserError, match="no check 'no_sgnal'; choose among noise_floor"):
        Health(stop_on=["no_sgnal"])
    with pytest.raises(UserError, match="patience=0"):
        Health(patience=0)


def test_a_state_that_comes_and_goes_is_said_three_times_and_no_more(capsys):
    health = Health(patience=1)
    objective = SimpleNamespace(ratio_bounds=None, importance_sampling_level="token")
    for silent in [1.0, 0.0] * 6:
        metrics = {"silent_frac": silent, "reward/mean": 0.0}
        module = SimpleNamespace(objective=objective, last_metrics=metrics)
        health.on_train_batch_end(SimpleNamespace(is_global_zero=True, should_stop=False), module)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("no group had two different rewards, or bests of k, in" in line for line in said)
    assert [line.endswith("(this keeps coming back and will not be reported again)") for line in said] == [
        False,
        False,
        True,
    ]


def test_every_metric_that_a_check_reads_is_kept():
    assert {*GOOD, "dialogue/return", "dynamic_sampling/sampled_reward"} == set(METRICS)


def played(rows, capsys, folder, cut_at=(), stop_on=()):
    """(rollout, line) of what is printed and the rollouts at which the run is told to end; resumed behind ``cut_at``."""
    health, said, stops = Health(3, list(stop_on)), [], []
    objective = SimpleNamespace(ratio_bounds=(0.97, 1.04), importance_sampling_level="sequence")
    update = UpdateSettings(1, 2)
    for rollout, row in enumerate(rows, start=1):
        trainer = SimpleNamespace(is_global_zero=True, should_stop=False)
        module = SimpleNamespace(objective=objective, last_metrics=row, update_settings=update, ahead=None)
        health.on_train_batch_end(trainer, module)
        said += [(rollout, line) for line in capsys.readouterr().out.splitlines()]
        stops += [rollout] if trainer.should_stop else []
        if rollout in cut_at:
            torch.save(health.state_dict(), folder / "state")
            health = Health(3, list(stop_on))
            health.load_state_dict(torch.load(folder / "state", weights_only=True))
    return said, stops


def a_run_that_goes_wrong():
    """Entropy, lengths, rewards and gradients leave what they were at first; a mismatch comes and goes."""
    rows = series(
        entropy=[0.09] * 4, completion__truncated_frac=[0.6, 0.7, 0.8], sampler_mismatch__abs_mean=[0.2, 0.0] * 4,
        reward__mean=[0.1] * 7 + [0.9] * 5 + [0.4] * 3, grad_norm=[10.1],
    )  # fmt: skip
    del rows[5]["entropy"]
    rows[6]["grad_norm"] = float("nan")
    return rows


@pytest.mark.parametrize("cut_at", [[7], [11], [12], [14], list(range(1, 15))], ids=str)
def test_a_resumed_run_is_warned_and_ended_as_one_never_cut(cut_at, capsys, tmp_path):
    rows, ends = a_run_that_goes_wrong(), ["reward_collapse", "length_explosion"]
    whole, stops = played(rows, capsys, tmp_path, stop_on=ends)
    assert [rollout for rollout, _ in whole] == [8, 10, 12, 12, 15, 15, 15] and stops == [15]
    assert [rollout for rollout, line in whole if "entropy fell from 1 to 0.09 nats" in line] == [12]
    assert played(rows, capsys, tmp_path, cut_at, ends) == (whole, stops)


def test_a_long_run_keeps_its_first_rollouts_and_the_newest(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(health_module, "MOST_ROWS", 8)
    health = Health()
    objective = SimpleNamespace(ratio_bounds=None, importance_sampling_level="token")
    for rollout in range(1, 21):
        module = SimpleNamespace(objective=objective, last_metrics={"reward/mean": float(rollout)})
        health.on_train_batch_end(SimpleNamespace(is_global_zero=True, should_stop=False), module)
    assert health.state_dict()["columns"]["reward/mean"] == [1, 2, 15, 16, 17, 18, 19, 20]


def test_a_gradient_after_rollouts_without_any_is_no_spike():
    assert [name for _, name, _ in found(series(grad_norm=[0.0] * 14 + [1.0]))] == []
