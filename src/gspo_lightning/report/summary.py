"""`summary.json` and the tables at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gspo_lightning.report.files import read_json, read_metrics


def write_summary(run_dir: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes ``facts`` and the accuracies before and after as flat keys into ``summary.json``, and returns them."""
    summary = dict(facts)
    for when in ("before", "after"):
        metrics = read_json(run_dir / f"validation_{when}.json").get("metrics", {})
        summary[f"val_accuracy_{when}"] = metrics.get("val/accuracy")
        summary[f"val_sampled_{when}"] = metrics.get("val/sampled_accuracy")
        summary[f"val_reward_{when}"] = metrics.get("val/reward")
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def print_result_table(console: Console, run_dir: Path, report: Path) -> None:
    """Held-out accuracy before and after, time, speed by phase, memory, and where everything is."""
    summary, metrics = read_json(run_dir / "summary.json"), read_metrics(run_dir)
    table = Table(title="What the run did", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    for key, label in (("val_accuracy", "held-out accuracy, greedy"), ("val_sampled", "held-out accuracy, sampled")):
        before, after = summary[f"{key}_before"], summary[f"{key}_after"]
        table.add_row(label, f"{_number(before)} -> {_number(after)}")
    minutes, seconds = divmod(summary["wall_s"], 60)
    table.add_row("training time", f"{int(minutes)} min {seconds:.0f} s, {summary['steps']} rollouts")
    table.add_row("speed", f"{_mean_rate(metrics, 'rollout')}, {_mean_rate(metrics, 'train')}")
    table.add_row("peak memory", f"{summary['peak_rss_gb']:.2f} GiB")
    table.add_row("trained model", str(summary["export_dir"] or "not exported (export.enabled=false)"))
    table.add_row("report", str(report))
    console.print(table)


def print_evaluation(console: Console, model: str, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
    """Accuracies of a model on held-out prompts, and some of its greedy completions."""
    table = Table(title=f"Held-out evaluation of {escape(model)}", title_justify="left")
    table.add_column("metric", style="bold")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    examples = Table(title="Greedy completions", title_justify="left")
    for column in ("prompt", "completion", "answer", "reward"):
        examples.add_column(column)
    for sample in samples:
        examples.add_row(
            escape(str(sample["prompt"])), escape(sample["completion"]), escape(str(sample["answer"])), f"{sample['reward']:.2f}"
        )
    console.print(examples)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _mean_rate(metrics: dict[str, list[tuple[float, float]]], phase: str) -> str:
    values = [value for _, value in metrics.get(f"perf/{phase}_tokens_per_s", []) if value > 0]
    name = {"rollout": "rollout", "train": "update"}[phase]
    return f"{name} {sum(values) / len(values):.0f} tokens/s" if values else f"{name} idle"
