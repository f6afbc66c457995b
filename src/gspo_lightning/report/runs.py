"""Finished and unfinished runs as data: their settings, their curves, and the settings in which they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gspo_lightning.errors import UserError
from gspo_lightning.report.config_tree import looked_up
from gspo_lightning.report.files import Series, config_of, read_metrics, read_summary

_PLACES = (
    "logger.", "ckpt_path.", "traceback.", "print_config.", "record_tokens.", "checkpoint.", "export.",
    "callbacks.progress.", "callbacks.completions.",
)  # fmt: skip
"""Settings of what a run reads, writes and prints, not of how it trains."""
_OF_THE_MACHINE = ("time/", "perf/")
"""What the columns of `metrics.csv` begin with that no run repeats."""

_T95 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
"""97.5 % quantiles of Student's t with 1, 2, ... 30 degrees of freedom."""


@dataclass(frozen=True)
class Run:
    """The content of one run folder."""

    folder: Path
    settings: dict[str, Any]
    """Dotted key -> value in its ``config.yaml``."""
    metrics: dict[str, Series]
    summary: dict[str, Any]


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in their seed."""

    settings: dict[str, Any]
    """The settings in which the groups differ, with this group's values."""
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The settings as text, each with the last part of its key only."""
        words = (f"{key.rsplit('.', 1)[-1]}={value}" for key, value in self.settings.items())
        return ", ".join(words) or "all runs"

    def values(self, key: str) -> list[float]:
        """The values of a number in the summaries, from the runs that have it."""
        found = (run.summary.get(key) for run in self.runs)
        return [float(value) for value in found if isinstance(value, int | float)]

    def curve(self, metric: str) -> list[tuple[float, list[float]]]:
        """(step, one value per run) at the steps where every run that measured ``metric`` has it."""
        tables = [dict(run.metrics[metric]) for run in self.runs if metric in run.metrics]
        if not tables:
            return []
        steps = sorted(set.intersection(*(set(table) for table in tables)))
        return [(step, [table[step] for table in tables]) for step in steps]


def mean_and_halfwidth(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval by Student's t; half the width is NaN for one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = _T95[count - 2] if count - 2 < len(_T95) else 1.96 + 2.5 / (count - 1)
    return mean, quantile * math.sqrt(variance / count)


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """Runs at any depth below ``folders``, and the folders of a sweep in which no run was recorded.

    A run counts once, however many of the folders hold it, or a copy of it: counted twice, it would make an interval
    narrower.

    Raises:
        UserError: a folder is missing, or there is no run in any of them.
    """
    runs: dict[Path, Run] = {}
    without: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder")
        found = sorted({path.parent for path in folder.rglob("metrics.csv")} - _logger_folders(folder), key=_natural)
        for path in found:
            if path.resolve() in runs:
                continue
            run = _read_run(path)
            if not any(_is_copy(run, other) for other in runs.values()):
                runs[path.resolve()] = run
        if (folder / "multirun.yaml").exists():
            for job in _jobs_without(folder, found):
                without.setdefault(job.resolve(), job)
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))}: contains no run (a folder with metrics.csv and config.yaml)")
    return list(runs.values()), list(without.values())


def without_repeats(runs: Sequence[Run]) -> tuple[list[Run], list[tuple[Run, Run]]]:
    """The runs without those that repeat another, or its first rollouts; and each of these with the one that stays.

    Two runs of equal settings and seed have measured the same thing if all their numbers are equal but those of the
    machine: as two samples they would make an interval narrower, or zero. What is not deterministic differs, and stays.
    """
    kept: list[Run] = []
    repeats: list[tuple[Run, Run]] = []
    for run in sorted(runs, key=lambda run: (not run.summary, -_rows(run))):  # the one that came furthest stays
        if (other := next((other for other in kept if _repeats(run, other)), None)) is None:
            kept.append(run)
        else:
            repeats.append((run, other))
    order = {id(run): place for place, run in enumerate(runs)}
    return sorted(kept, key=lambda run: order[id(run)]), repeats


def _rows(run: Run) -> int:
    return max(map(len, run.metrics.values()), default=0)


def _repeats(run: Run, other: Run) -> bool:
    """Whether they have the same settings, and the same numbers at the rollouts that both have, at least one."""
    if _that_train(run) != _that_train(other):
        return False
    compared = [name for name in run.metrics if name in other.metrics and not name.startswith(_OF_THE_MACHINE)]
    pairs = [(dict(run.metrics[name]), dict(other.metrics[name])) for name in compared]
    shared = [(mine[step], theirs[step]) for mine, theirs in pairs for step in mine.keys() & theirs.keys()]
    return bool(shared) and all(mine == theirs for mine, theirs in shared)


def _that_train(run: Run) -> dict[str, str]:
    return {key: repr(value) for key, value in run.settings.items() if not f"{key}.".startswith(_PLACES)}


def _is_copy(run: Run, other: Run) -> bool:
    """Whether a folder was copied: two runs never take the same times, whatever else repeats."""
    return bool(run.metrics) and run.metrics == other.metrics and run.settings == other.settings


def _jobs_without(folder: Path, found: Sequence[Path]) -> Iterator[Path]:
    """Folders below a sweep's, or a part of its, whose job recorded nothing, in order.

    Numbered ones, and of other names (``hydra.sweep.subdir``) those that are empty or hold settings, as jobs that fail
    leave them.
    """
    for path in sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=_natural):
        if path in found:
            continue
        left = {inner.name for inner in path.iterdir() if not inner.name.startswith(".")}
        holds_runs = any(path in run.parents for run in found)
        if not holds_runs and (path.name.isdigit() or not left or "config.yaml" in left):
            yield path
        else:
            yield from _jobs_without(path, found)


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Groups of runs that differ only in the seed, in the order of their first member."""
    keys = differing_settings(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr([run.settings.get(key) for key in keys]), []).append(run)
    return [RunGroup({key: group[0].settings.get(key) for key in keys}, tuple(group)) for group in groups.values()]


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Keys whose values differ between runs, except the seed, other seeds that are equal to it, and places of files.

    Of keys with equal values in every run (one interpolates the other) only the shortest is named.
    """
    every = sorted({key for run in runs for key in run.settings}, key=lambda key: (key.count("."), key))
    seeds = [run.settings.get("seed") for run in runs]
    seen: set[str] = set()
    chosen = []
    for key in every:
        values = [run.settings.get(key) for run in runs]
        column = repr(values)
        is_seed = "seed" in key.rsplit(".", 1)[-1] and values == seeds  # of another setting it would be by chance
        if f"{key}.".startswith(_PLACES) or column in seen or is_seed:
            continue
        if any(repr(value) != repr(values[0]) for value in values):
            seen.add(column)
            chosen.append(key)
    return chosen


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay values, and a lookup node becomes the path it names."""
    if (path := looked_up(node)) is not None:
        return {prefix: path}
    if not isinstance(node, Mapping) or not node:
        return {prefix: node}
    parts = (flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in node.items())
    return {key: value for part in parts for key, value in part.items()}


def _read_run(folder: Path) -> Run:
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{path}: is missing, so the run cannot be told apart from others")
    return Run(
        folder,
        flatten(OmegaConf.to_container(config_of(path))),
        read_metrics(folder),
        read_summary(folder),
    )


def _logger_folders(folder: Path) -> set[Path]:
    """Folders of Lightning's CSVLogger, which writes its own metrics.csv per start inside the run's folder."""
    paths = {path.parent for path in folder.rglob("metrics.csv")}
    return {path for path in paths if paths & set(path.parents) and not (path / "config.yaml").exists()}


def _natural(path: Path) -> tuple[int, str, str]:
    name = path.name
    return (int(name) if name.isdigit() else -1, str(path.parent), name)
