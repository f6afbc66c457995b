"""`summary.json` and the tables at the end of a run."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gspo_lightning.errors import UserError
from gspo_lightning.report.files import Series, read_json, read_metrics
from gspo_lightning.report.machine import machine_facts
from gspo_lightning.screen import counted, visible


def write_summary(run_dir: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes ``summary.json`` with flat keys and returns it.

    To ``facts`` it adds accuracies and rewards before and after, ``peak_gpu_gb`` (the largest of ``metrics.csv``; null
    on a CPU), and the machine (`machine_facts`). A number that is not finite becomes null. A damaged validation is set
    aside, with a warning: a run that has trained to its end is summed up without it.
    """
    summary = dict(facts)
    for when in ("before", "after"):
        metrics = _validation(run_dir / f"validation_{when}.json").get("metrics", {})
        summary[f"val_accuracy_{when}"] = metrics.get("val/accuracy")
        summary[f"val_sampled_{when}"] = metrics.get("val/sampled_accuracy")
        summary[f"val_reward_{when}"] = metrics.get("val/reward")
    peaks = [value for _, value in read_metrics(run_dir).get("perf/peak_gpu_gb", [])]
    summary |= {"peak_gpu_gb": max(peaks, default=None), **machine_facts()}
    for key, value in summary.items():
        if isinstance(value, float) and not math.isfinite(value):
            summary[key] = None
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _validation(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except UserError as error:
        damaged = path.with_name(f"{path.name}.damaged")
        os.replace(path, damaged)
        reason = str(error).partition(";")[0]
        warnings.warn(f"{reason}; it is {damaged.name} now, summary and report go without it", stacklevel=3)
        return {}


def print_result_table(console: Console, run_dir: Path, report: Path) -> None:
    """Prints held-out accuracy before and after, time, speed by phase and memory, and below the paths of the files.

    A path stays in one line, however long, so that it can be copied.
    """
    summary, metrics = read_json(run_dir / "summary.json"), read_metrics(run_dir)
    table = Table(title="What the run did", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, label in (
        ("val_accuracy", "held-out accuracy, greedy"),
        ("val_sampled", "held-out accuracy, sampled"),
    ):
        table.add_row(label, _change(summary[f"{key}_before"], summary[f"{key}_after"]))
    minutes, seconds = divmod(round(summary["wall_s"]), 60)
    table.add_row("training time", f"{minutes} min {seconds} s, {counted(summary['steps'], 'rollout')}")
    table.add_row(
        "speed",
        f"rollout {_speed(metrics, 'rollout', 'rollout')}, update {_speed(metrics, 'train', 'update')}",
    )
    if (on_gpu := summary.get("peak_gpu_gb")) is not None:
        table.add_row("peak GPU memory", f"{on_gpu:.2f} GiB")
    table.add_row("peak memory of the process", f"{summary['peak_rss_gb']:.2f} GiB")
    if "best_metric" in summary:
        table.add_row("best checkpoint", _text(_best(summary, run_dir / "checkpoints" / "best.ckpt")))
    console.print(table)
    model = summary["export_dir"] or "not exported (export.enabled=false)"
    for what, place in (("trained model", model), ("report", report)):
        console.print(Text.assemble((what, "bold"), ": ", _text(place)), soft_wrap=True)


def print_evaluation(console: Console, model: str, metrics: dict[str, float], samples: list[dict[str, Any]]) -> None:
    """Prints accuracies of a model on held-out prompts, and some of its greedy completions."""
    table = Table(title=_text(f"Held-out evaluation of {model}"), title_justify="left")
    table.add_column("metric", style="bold")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    examples = Table(title="Greedy completions", title_justify="left")
    for column in ("prompt", "completion", "answer", "reward", "right"):
        examples.add_column(column)
    for sample in samples:
        answer = "" if sample["answer"] is None else sample["answer"]  # a row may have none
        texts = map(_text, (sample["prompt"], sample["completion"], answer))
        examples.add_row(*texts, f"{sample['reward']:.2f}", "yes" if sample["right"] else "no")
    console.print(examples)


def phase_speed(metrics: dict[str, Series], rate: str, phase: str) -> float | None:
    """Tokens per second of a phase over the run; None if it never ran. Phases run ahead count their ``_ahead`` seconds.

    Args:
        metrics: columns of ``metrics.csv``.
        rate: the column ``perf/<rate>_tokens_per_s``.
        phase: the column ``time/<phase>_s``.
    """
    seconds = dict([*metrics.get(f"time/{phase}_s", []), *metrics.get(f"time/{phase}_ahead_s", [])])
    rates = dict(metrics.get(f"perf/{rate}_tokens_per_s", []))
    both = seconds.keys() & rates.keys()
    tokens = math.fsum(seconds[step] * rates[step] for step in both)
    return tokens / math.fsum(seconds[step] for step in both) if tokens > 0 else None


def _text(value: Any) -> Text:
    """The value as text without markup of the table or control sequences of the terminal."""
    return Text(visible(str(value)))


def _speed(metrics: dict[str, Series], rate: str, phase: str) -> str:
    value = phase_speed(metrics, rate, phase)
    return "idle" if value is None else f"{value:.0f} tokens/s"


def _best(summary: dict[str, Any], path: Path) -> str:
    if summary["best_rollout"] is None:
        return f"none: {summary['best_metric']} was no number"
    return f"rollout {summary['best_rollout']}, {summary['best_metric']}={summary['best_value']:.4g}: {path}"


def _change(before: float | None, after: float | None) -> str:
    gain = "" if before is None or after is None else f"  ({after - before:+.3f})"
    return f"{as_text(before)} -> {as_text(after)}{gain}"


def as_text(value: float | None) -> str:
    """A reward as tables and cards show it."""
    return "not measured" if value is None else f"{value:.3f}"
