"""Putting runs together: the interval by hand, settings that differ, seeds that do not count, damaged folders."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from gspo_lightning.errors import UserError
from gspo_lightning.report.runs import (
    _T95,
    differing_settings,
    find_runs,
    flatten,
    group_runs,
    mean_and_halfwidth,
    without_repeats,
)


def write_run(folder: Path, rewards: list[float], seed: int = 0, lr: float = 0.1, **settings) -> Path:
    folder.mkdir(parents=True)
    config = {"seed": seed, "data": {"seed": seed}, "optimizer": {"lr": lr}, "logger": {"save_dir": str(folder)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | settings))
    rows = "".join(f"{step},{reward}\n" for step, reward in enumerate(rewards, start=1))
    (folder / "metrics.csv").write_text("step,reward/mean\n" + rows)
    return folder


def test_the_interval_is_that_of_students_t_worked_out_by_hand():
    # 1, 2, 6: mean 3, deviations -2, -1, 3, variance 14 / 2 = 7; half-width 4.3027 * sqrt(7 / 3).
    mean, half = mean_and_halfwidth([1.0, 2.0, 6.0])
    assert mean == 3.0 and half == pytest.approx(4.3027 * math.sqrt(7 / 3), rel=1e-12)


def test_a_single_run_has_no_interval():
    mean, half = mean_and_halfwidth([0.5])
    assert mean == 0.5 and math.isnan(half)


@pytest.mark.parametrize("freedom", [1, 2, 5, 17, 30, 45])
def test_the_quantiles_leave_two_and_a_half_percent_above(freedom):
    """Integrates the density of Student's t numerically; above 30 degrees the formula is good to three digits."""
    values = [0.0] * (freedom - 1) + [1.0, -1.0]
    variance = 2.0 / freedom
    quantile = mean_and_halfwidth(values)[1] / math.sqrt(variance / (freedom + 1))
    angle = torch.linspace(0, math.atan(quantile / math.sqrt(freedom)), 200_001, dtype=torch.float64)
    # With x = sqrt(v) tan(a) the density becomes a power of the cosine.
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    inside = 2 * constant * torch.trapezoid(torch.cos(angle) ** (freedom - 1), angle).item()
    assert inside == pytest.approx(0.95, abs=5e-6 if freedom <= len(_T95) else 5e-4)


def test_runs_that_differ_in_their_seed_alone_are_one_group(tmp_path):
    for seed in (1, 2):
        for number, lr in enumerate((0.1, 0.2)):
            write_run(tmp_path / f"{seed}-{number}", [1.0], seed, lr)
    runs, without = find_runs([tmp_path])
    assert differing_settings(runs) == ["optimizer.lr"] and not without
    groups = group_runs(runs)
    assert [(g.settings, [r.settings["seed"] for r in g.runs]) for g in groups] == [
        ({"optimizer.lr": 0.1}, [1, 2]),
        ({"optimizer.lr": 0.2}, [1, 2]),
    ]
    assert groups[0].label == "lr=0.1"


def test_a_setting_that_repeats_another_is_named_once_and_one_that_only_differs_too_is_not_hidden(tmp_path):
    for number, (path, level) in enumerate((("a", 1), ("b", 2))):
        write_run(
            tmp_path / str(number), [1.0], model={"path": path}, data={"seed": 0, "model_path": path}, level=level
        )
    assert differing_settings(find_runs([tmp_path])[0]) == ["level", "data.model_path"]


@pytest.mark.parametrize("values", [(1, 2), (True, 2)])
def test_a_setting_that_happens_to_equal_the_seed_is_not_hidden(values, tmp_path):
    for seed, value in enumerate(values, start=1):
        write_run(tmp_path / str(seed), [1.0], seed, update={"num_iterations": value})
    groups = group_runs(find_runs([tmp_path])[0])
    assert [group.settings for group in groups] == [{"update.num_iterations": value} for value in values]


def test_what_a_run_writes_and_prints_does_not_tell_runs_apart(tmp_path):
    table = {"_target_": "Table", "every_n_rollouts": 10}
    write_run(
        tmp_path / "0", [1.0], 0, logger={}, print_config=True, record_tokens=False, callbacks={"progress": table}
    )
    more = {"progress": None, "completions": table}
    write_run(tmp_path / "1", [1.0], 1, logger=None, print_config=False, record_tokens=True, callbacks=more)
    write_run(tmp_path / "2", [1.0], 2, logger={"csv": {"name": "csv"}}, ckpt_path="x", callbacks=more)
    (group,) = group_runs(find_runs([tmp_path])[0])
    assert not group.settings and len(group.runs) == 3


def test_a_run_counts_once_however_many_of_the_folders_hold_it(tmp_path):
    for number, after in ((0, 1.0), (1, 2.0), (2, 6.0)):
        write_run(tmp_path / "D" / str(number), [after], seed=number)
        (tmp_path / "D" / str(number) / "summary.json").write_text(f'{{"after": {after}}}')
    (tmp_path / "D" / "3").mkdir()
    (tmp_path / "D" / "multirun.yaml").touch()
    (tmp_path / "link").symlink_to(tmp_path / "D")
    sweep = tmp_path / "D"
    for folders in ([sweep, sweep], [sweep, sweep / "0"], [sweep, tmp_path / "link", sweep / ".." / "D"]):
        runs, without = find_runs(folders)
        assert [run.folder.name for run in runs] == ["0", "1", "2"] and without == [sweep / "3"]
        (group,) = group_runs(runs)
        # 1, 2, 6: see above; counted twice, the half-width would be 2.45 and not 6.57.
        mean, half = mean_and_halfwidth(group.values("after"))
        assert (mean, half) == (3.0, pytest.approx(4.3027 * math.sqrt(7 / 3), rel=1e-12))
    assert [run.folder.name for run in find_runs([sweep / "2", sweep])[0]] == ["2", "0", "1"]


def test_curves_reach_as_far_as_every_run_of_the_setting(tmp_path):
    write_run(tmp_path / "a", [1.0, 2.0, 3.0], seed=1)
    write_run(tmp_path / "b", [3.0, 4.0], seed=2)
    (group,) = group_runs(find_runs([tmp_path])[0])
    assert group.curve("reward/mean") == [(1.0, [1.0, 3.0]), (2.0, [2.0, 4.0])]
    assert group.curve("nothing") == []


def test_jobs_of_a_sweep_without_a_record_are_named_and_jobs_come_in_numerical_order(tmp_path):
    for number in (10, 2):
        write_run(tmp_path / str(number), [1.0], lr=number)
    (tmp_path / "3").mkdir()
    (tmp_path / "multirun.yaml").touch()
    runs, without = find_runs([tmp_path])
    assert [run.folder.name for run in runs] == ["2", "10"]
    assert without == [tmp_path / "3"]


def test_a_failed_job_is_named_whatever_its_folder_is_called(tmp_path):
    write_run(tmp_path / "lr=0.1" / "seed=1", [1.0])
    for failed in ("lr=0.1/seed=2", "lr=0.2/seed=1", "lr=0.2/seed=2"):
        (tmp_path / failed).mkdir(parents=True)
    (tmp_path / "lr=0.2" / "seed=2" / "config.yaml").write_text("seed: 2\n")
    for other in (".submitit/1", "plots", "lr=0.1/seed=1/checkpoints"):
        (tmp_path / other).mkdir(parents=True)
    (tmp_path / "plots" / "mine.png").touch()
    (tmp_path / "multirun.yaml").touch()
    assert [str(p.relative_to(tmp_path)) for p in find_runs([tmp_path])[1]] == [
        "lr=0.1/seed=2", "lr=0.2/seed=1", "lr=0.2/seed=2"
    ]  # fmt: skip


def test_a_copy_of_a_run_is_not_another_run(tmp_path):
    """Its interval would be narrower by nothing that was measured."""
    folder = write_run(tmp_path / "a", [1.0, 2.0], seed=1)
    shutil.copytree(folder, tmp_path / "a (copy)")
    write_run(tmp_path / "b", [1.0, 2.0], seed=2)
    assert sorted(run.folder.name for run in find_runs([tmp_path])[0]) == ["a", "b"]


def test_a_run_that_repeats_another_number_for_number_is_no_second_sample(tmp_path):
    """A deterministic run started twice, and one that was stopped and resumed into another folder."""

    def timed(name, rewards, seconds, seed=1, **more):
        folder = write_run(tmp_path / name, rewards, seed, **more)
        lines = [f"{line},{seconds}" for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
        (folder / "metrics.csv").write_text("\n".join(["step,reward/mean,time/step_s", *lines, ""]))

    timed("first", [1.0, 2.0], 3.5)
    timed("again", [1.0, 2.0, 3.0], 4.5, logger={}, ckpt_path="first/checkpoints/last.ckpt")
    timed("other seed", [1.0, 2.0, 3.0], 3.5, seed=2)
    timed("other rate", [1.0, 2.0, 3.0], 3.5, lr=0.2)
    timed("not deterministic", [1.0, 2.5, 3.0], 3.5)
    write_run(tmp_path / "of no rollout", [], 1)
    runs, repeats = without_repeats(find_runs([tmp_path])[0])
    assert [(run.folder.name, other.folder.name) for run, other in repeats] == [("first", "again")]
    names = ["again", "not deterministic", "of no rollout", "other rate", "other seed"]
    assert sorted(run.folder.name for run in runs) == names
    (tmp_path / "again" / "metrics.csv").write_text("step,reward/mean\n1,1.0\n")
    assert [run.folder.name for run, _ in without_repeats(find_runs([tmp_path])[0])[1]] == ["again"]


def test_the_table_of_lightnings_own_csv_logger_is_not_a_run(tmp_path):
    folder = write_run(tmp_path / "a", [1.0])
    for place in (folder / "csv", folder / "csv" / "version_0"):  # the former as earlier versions had it
        place.mkdir()
        (place / "metrics.csv").write_text("epoch,step\n0,0\n")
    assert [run.folder for run in find_runs([tmp_path])[0]] == [folder]


def test_folders_without_runs_and_damaged_configs_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(UserError, match="contains no run"):
        find_runs([tmp_path])
    folder = write_run(tmp_path / "a", [1.0])
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="config.yaml: cannot be read"):
        find_runs([tmp_path])
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match="config.yaml: is missing"):
        find_runs([tmp_path])


def test_flatten_names_leaves_by_dotted_keys_and_keeps_lists_and_empty_mappings():
    assert flatten({"a": {"b": 1, "c": [1, {"d": 2}]}, "e": {}}) == {"a.b": 1, "a.c": [1, {"d": 2}], "e": {}}
    function = {"_target_": "hydra.utils.get_method", "path": "mine.loss"}
    assert flatten({"objective": {"loss_type": function}}) == {"objective.loss_type": "mine.loss"}
