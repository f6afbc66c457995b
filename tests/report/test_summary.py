"""summary.json and the table at the end of a run."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from gspo_lightning.report import print_evaluation, print_result_table, render_report, write_summary
from gspo_lightning.report.summary import phase_speed

FACTS = {"seed": 3, "steps": 30, "wall_s": 169.7, "train_tokens": 14054, "tokens_per_s": 195.25,
         "peak_rss_gb": 3.9, "export_dir": "/tmp/[bold]run/model"}  # fmt: skip


def write_validation(folder, when, greedy, sampled):
    metrics = {"val/accuracy": greedy, "val/sampled_accuracy": sampled, "val/reward": sampled}
    (folder / f"validation_{when}.json").write_text(json.dumps({"step": 0, "metrics": metrics, "samples": []}))


def screen(width=100):
    return Console(file=io.StringIO(), width=width, color_system=None)


def test_the_summary_is_flat_strict_json_with_accuracies_and_machine(tmp_path):
    write_validation(tmp_path, "before", 0.25, 0.125)
    write_validation(tmp_path, "after", 0.75, 0.5)
    returned = write_summary(tmp_path, {**FACTS, "odd": float("nan")})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == returned
    assert {**FACTS, "odd": None}.items() <= summary.items()
    accuracies = {k: v for k, v in summary.items() if k.startswith("val_")}
    assert accuracies == {
        "val_accuracy_before": 0.25, "val_sampled_before": 0.125, "val_reward_before": 0.125,
        "val_accuracy_after": 0.75, "val_sampled_after": 0.5, "val_reward_after": 0.5,
    }  # fmt: skip
    assert not [value for value in summary.values() if isinstance(value, dict | list)]
    assert summary["cpu"] and summary["python"] and 1 <= summary["cpu_count"] <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({}, None),
        (
            {"best_metric": "val/accuracy", "best_value": 0.8125, "best_rollout": 20},
            "rollout 20, val/accuracy=0.8125: checkpoints/best.ckpt",
        ),
        (
            {"best_metric": "val/accuracy", "best_value": None, "best_rollout": None},
            "none: val/accuracy was no number",
        ),
    ],
    ids=["not asked for", "there", "none"],
)
def test_the_best_checkpoint_is_in_the_summary_and_in_the_table(facts, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, console = Path(), screen()
    assert write_summary(folder, FACTS | facts).items() >= facts.items()
    print_result_table(console, folder, folder / "report.html")
    shown = [row for row in console.file.getvalue().splitlines() if "best checkpoint" in row]
    assert [row.strip(" │").split("│")[1].strip() for row in shown] == ([line] if line else [])


def test_without_validations_the_accuracies_are_null(tmp_path):
    summary = write_summary(tmp_path, FACTS)
    assert summary["val_accuracy_before"] is None and summary["val_sampled_after"] is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"step": 0, "metr', "is not JSON (Unterminated string starting at: line 1 column 13 (char 12))"),
        (b"\xff{}", "cannot be read (it is not UTF-8)"),
        (b"[]", "holds no JSON object"),
    ],
)
def test_a_damaged_validation_does_not_cost_the_summary_and_the_report_of_a_whole_run(content, reason, tmp_path):
    write_validation(tmp_path, "after", 0.75, 0.5)
    path = tmp_path / "validation_before.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning) as caught:
        write_summary(tmp_path, FACTS)
    assert [str(warning.message) for warning in caught] == [
        f"{path}: {reason}; it is validation_before.json.damaged now, summary and report go without it"
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["val_accuracy_before"], summary["val_accuracy_after"]) == (None, 0.75)
    assert path.with_name("validation_before.json.damaged").read_bytes() == content
    assert render_report(tmp_path).exists()


def test_the_table_says_what_changed_how_fast_and_where_everything_is(tmp_path):
    write_validation(tmp_path, "before", 0.25, 0.125)
    write_validation(tmp_path, "after", 0.75, 0.5)
    write_summary(tmp_path, FACTS)
    header = "step,time/rollout_s,perf/rollout_tokens_per_s,time/update_s,perf/train_tokens_per_s"
    (tmp_path / "metrics.csv").write_text(f"{header}\n1,1.0,100.0,0.0,0.0\n2,3.0,500.0,0.0,0.0\n")
    console = screen()
    print_result_table(console, tmp_path, tmp_path / "report.html")
    text = console.file.getvalue()
    assert "0.250 -> 0.750  (+0.500)" in text and "0.125 -> 0.500  (+0.375)" in text
    assert "2 min 50 s, 30 rollouts" in text and "3.90 GiB" in text
    assert "rollout 400 tokens/s, update idle" in text
    assert text.splitlines()[-2:] == ["trained model: /tmp/[bold]run/model", f"report: {tmp_path / 'report.html'}"]


def test_a_long_path_is_one_line(tmp_path):
    write_summary(tmp_path, FACTS)
    console = screen()
    report = tmp_path / ("long" * 30) / "report.html"
    print_result_table(console, tmp_path, report)
    assert console.file.getvalue().splitlines()[-1] == f"report: {report}"


def test_memory_of_the_gpu_and_of_the_process_are_called_so(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,perf/peak_gpu_gb\n0,\n1,10.5\n2,30.25\n3,20.0\n")
    assert write_summary(tmp_path, FACTS)["peak_gpu_gb"] == 30.25  # a run that goes on is a process that begins at 0
    console = screen()
    print_result_table(console, tmp_path, tmp_path / "report.html")
    rows = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "│ peak GPU memory │ 30.25 GiB │" in rows and "│ peak memory of the process │ 3.90 GiB │" in rows


def test_without_a_gpu_there_is_no_row_of_its_memory(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,perf/peak_rss_gb\n1,3.9\n")
    assert write_summary(tmp_path, FACTS)["peak_gpu_gb"] is None
    console = screen()
    print_result_table(console, tmp_path, tmp_path / "report.html")
    text = console.file.getvalue()
    assert "peak memory of the process" in text and "GPU" not in text


def test_speed_is_all_tokens_by_all_seconds_and_not_a_mean_of_rates():
    metrics = {
        "time/update_s": [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)],
        "perf/train_tokens_per_s": [(1.0, 100.0), (2.0, 500.0)],
    }
    assert phase_speed(metrics, "train", "update") == pytest.approx((100 + 1500) / 4)
    assert phase_speed({}, "train", "update") is None


def test_the_speed_of_rollouts_generated_ahead_is_by_the_time_they_took():
    """The first was waited for, the second took 4 s of which 0.5 s were waited for; that of the third is unknown."""
    metrics = {
        "time/rollout_s": [(1.0, 2.0), (2.0, 0.5), (3.0, 0.25)],
        "time/rollout_ahead_s": [(2.0, 4.0)],
        "perf/rollout_tokens_per_s": [(1.0, 300.0), (2.0, 150.0)],
    }
    assert phase_speed(metrics, "rollout", "rollout") == pytest.approx((600 + 600) / 6)


def test_an_evaluation_shows_completions_as_they_are(tmp_path):
    console = screen()
    sample = {"prompt": "[red]2+2", "completion": "[/b] 4", "answer": None, "reward": 0.25, "right": True}
    print_evaluation(console, "my/[model]", {"val/accuracy": 0.12345}, [sample])
    text = console.file.getvalue()
    assert "[red]2+2" in text and "[/b] 4" in text and "0.1235" in text and "my/[model]" in text
    assert "0.25" in text and "yes" in text and "None" not in text
