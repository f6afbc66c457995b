"""The parts of the report. Whatever a model, a dataset or a user wrote passes through ``html.escape``."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gspo_lightning.report.config_tree import looked_up
from gspo_lightning.report.files import Series, config_of, text_of
from gspo_lightning.report.svg import format_number, line_chart


@dataclass(frozen=True)
class Chart:
    """Definition of a chart."""

    title: str
    unit: str
    lines: dict[str, str]
    """Name of a line -> column of ``metrics.csv``."""
    reach: tuple[float, ...] = ()
    """Values that the vertical axis reaches in any case."""


CHARTS = (
    Chart("Reward", "mean of the rollout", {"reward": "reward/mean"}),
    Chart(
        "Reward of all sampled completions",
        "mean, replaced groups included",
        {"reward": "dynamic_sampling/sampled_reward"},
    ),
    Chart("Reward of dialogues and their turns", "mean of the rollout", {"return": "dialogue/return"}),
    Chart(
        "Held-out accuracy",
        "share",
        {"greedy": "val/accuracy", "sampled": "val/sampled_accuracy"},
        (0.0, 1.0),
    ),
    Chart("Completion length", "tokens", {"mean": "completion/mean_tokens"}),
    Chart("Clipped", "share of the loss", {"below": "clip_frac_low", "above": "clip_frac_high"}, (0.0,)),
    Chart("Divergence", "KL, nats", {"from the sampling weights": "kl/old", "from the reference": "kl/ref"}),
    Chart(
        "Throughput",
        "tokens per second",
        {"rollout": "perf/rollout_tokens_per_s", "update": "perf/train_tokens_per_s"},
        (0.0,),
    ),
    Chart("Entropy", "nats per token", {"entropy": "entropy"}),
    Chart("Gradient norm", "before clipping", {"norm": "grad_norm"}, (0.0,)),
    Chart("Groups without signal", "share", {"all rewards equal": "silent_frac"}, (0.0, 1.0)),
    Chart(
        "Groups without signal, of all sampled groups",
        "share",
        {"all rewards equal": "dynamic_sampling/silent_frac"},
        (0.0, 1.0),
    ),
    Chart("Truncated completions", "share", {"at the length limit": "completion/truncated_frac"}, (0.0, 1.0)),
    Chart("Sampler versus trainer", "nats per token", {"mean difference": "sampler_mismatch/abs_mean"}, (0.0,)),
)
CONFIG_KEYS = {
    "model": "model.path",
    "precision": "trainer.precision",
    "importance sampling": "objective.importance_sampling_level",
    "loss": "objective.loss_type",
    "clip below": "objective.epsilon",
    "clip above": "objective.epsilon_high",
    "KL weight": "objective.beta",
    "learning rate": "optimizer.lr",
    "prompts per rollout": "data.prompts_per_rollout",
    "completions per prompt": "rollout.num_generations",
    "longest completion": "rollout.max_completion_length",
    "temperature": "rollout.temperature",
    "minibatches": "update.num_minibatches",
    "iterations": "update.num_iterations",
    "seed": "seed",
}
MACHINE_KEYS = {
    "processor": "cpu",
    "cores": "cpu_count",
    "threads": "threads",
    "memory, GiB": "memory_gb",
    "GPU": "gpu",
    "system": "os",
    "Python": "python",
    "torch": "torch",
}


def head(summary: dict[str, Any]) -> str:
    """Title and main numbers."""
    title = escape(str(summary.get("model", "A run")))
    if not summary:
        return f'<h1>{title}</h1><p class="soft">This run has not finished: there is no summary.json yet.</p>'
    cards = [
        _card("held-out accuracy, sampled", _change(summary, "val_sampled"), main=True),
        _card("held-out accuracy, greedy", _change(summary, "val_accuracy"), main=True),
        _card("training time", _minutes(summary.get("wall_s"))),
        _card("rollouts", _value(summary.get("steps"))),
        _card("tokens per second", _value(summary.get("tokens_per_s"), ".0f")),
        _card("peak memory of the process, GiB", _value(summary.get("peak_rss_gb"), ".2f")),
    ]
    if (on_gpu := summary.get("peak_gpu_gb")) is not None:
        cards.insert(-1, _card("peak GPU memory, GiB", _value(on_gpu, ".2f")))
    seed, precision = (escape(str(summary.get(key, "?"))) for key in ("seed", "precision"))
    facts = f'<p class="soft">seed {seed}, {precision}</p>'
    return f'<h1>{title}</h1>{facts}<div class="cards">{"".join(cards)}</div>'


def curves(metrics: dict[str, Series]) -> str:
    """All charts that have data."""
    steps = [step for series in metrics.values() for step, _ in series]
    span = (min(steps, default=0.0), max(steps, default=0.0))
    drawn = "".join(
        line_chart(
            chart.title,
            {name: metrics.get(column, []) for name, column in chart.lines.items()},
            chart.unit,
            span,
            chart.reach,
        )
        for chart in CHARTS
    )
    return f'<h2>Curves</h2><div class="charts">{drawn}</div>' if drawn else ""


def phases(metrics: dict[str, Series]) -> str:
    """Time of the rollouts by phase, as bars. A rollout generated ahead ran in parallel to the other phases."""
    totals = {
        name.removeprefix("time/").removesuffix("_s").replace("_", " "): sum(value for _, value in series)
        for name, series in metrics.items()
        if name.startswith("time/") and name != "time/rollout_ahead_s"
    }
    whole = totals.pop("step", 0.0)
    if whole <= 0.0:
        return ""
    totals["other"] = max(0.0, whole - sum(totals.values()))
    rows = "".join(
        f"<span>{escape(name)}</span>"
        f'<div><div class="bar" style="width:{100 * seconds / whole:.1f}%"></div></div>'
        f'<span class="num">{seconds:.1f} s, {seconds / whole:.0%}</span>'
        for name, seconds in sorted(totals.items(), key=lambda item: -item[1])
        if seconds >= 0.001 * whole
    )
    return f'<h2>Where the time went</h2><div class="phases">{rows}</div>'


def completions(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """Greedy completions of the same held-out prompts before and after training, in pairs; marks right ones."""
    if not before and not after:
        return ""
    pairs = []
    for first, second in zip_longest(before, after):
        if first and second and any(first.get(key) != second.get(key) for key in ("prompt", "images")):
            pairs += [_pair(first, None), _pair(None, second)]
        else:
            pairs.append(_pair(first, second))
    return f"<h2>Held-out prompts, greedy, before and after</h2>{''.join(pairs)}"


def settings(config: Path, summary: dict[str, Any]) -> str:
    """The main settings, the whole ``config.yaml`` folded away, and the machine."""
    parts = []
    if config.exists():
        text, tree = text_of(config), config_of(config)
        values = {label: _shown(OmegaConf.select(tree, key)) for label, key in CONFIG_KEYS.items()}
        details = f"<details><summary>The whole configuration</summary><pre>{escape(text)}</pre></details>"
        parts.append(f"<h2>Configuration</h2>{_facts(values)}{details}")
    machine = {label: summary.get(key) for label, key in MACHINE_KEYS.items()}
    if any(value is not None for value in machine.values()):
        parts.append(f"<h2>Machine</h2>{_facts(machine)}")
    return "".join(parts)


def _shown(value: Any) -> Any:
    path = looked_up(OmegaConf.to_container(value)) if OmegaConf.is_config(value) else None
    return value if path is None else path


def _facts(values: dict[str, Any]) -> str:
    known = {label: value for label, value in values.items() if value is not None}
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(str(value))}</dd>" for label, value in known.items())
    return f"<dl>{rows}</dl>"


def _pair(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    sample = after or before or {}
    answer = sample.get("answer")
    expected = "" if answer is None else f'<span class="tag">&ensp;expected: {escape(str(answer))}</span>'
    prompt = escape(str(sample["prompt"]))
    within = [str(uri) for uri in sample.get("images", []) if str(uri).startswith("data:image/")]  # no address
    images = "".join(f'<img alt="" src="{escape(uri)}">' for uri in within)
    ask = f'<div class="ask">{images}<span class="text" dir="auto">{prompt}</span>{expected}</div>'
    sides = _side("before", before) + _side("after", after)
    return f'<div class="pair">{ask}{sides}</div>'


def _side(when: str, sample: dict[str, Any] | None) -> str:
    if sample is None:
        return f'<div><div class="tag">{when}: not sampled</div></div>'
    style = "tag right" if sample.get("right") else "tag"
    tag = f'<div class="{style}">{when}, reward {_value(sample["reward"])}</div>'
    thinking = f'<div class="text tag">{escape(str(sample["thinking"]))}</div>' if sample.get("thinking") else ""
    return f'<div>{tag}{thinking}<div class="text" dir="auto">{escape(str(sample["completion"]))}</div></div>'


def _card(label: str, value: str, main: bool = False) -> str:
    return f'<div class="card{" main" if main else ""}"><span class="soft">{label}</span><b>{value}</b></div>'


def _change(summary: dict[str, Any], key: str) -> str:
    before, after = summary.get(f"{key}_before"), summary.get(f"{key}_after")
    return f"{_value(before, '.3f')} → {_value(after, '.3f')}"


def _minutes(seconds: float | None) -> str:
    return "?" if seconds is None else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def _value(value: float | None, spec: str = "") -> str:
    if value is None:
        return "?"
    return format(value, spec) if spec else format_number(value)
