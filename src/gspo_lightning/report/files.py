"""Reading the files of a run."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gspo_lightning.errors import UserError

Series = list[tuple[float, float]]


def text_of(path: Path) -> str:
    """The content of a text file of a run.

    Raises:
        UserError: it is a folder, not UTF-8, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{path}: cannot be read ({why}); restore it, or move it away") from error


def config_of(path: Path) -> DictConfig:
    """The settings in a run's ``config.yaml``, unresolved.

    Raises:
        UserError: it cannot be read, or holds no settings.
    """
    text = text_of(path)
    try:
        content = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException, ValueError, AssertionError) as error:  # the last for a number alone
        cause = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({cause}); restore it, or move it away") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: holds no settings; restore it, or move it away")
    return content


def read_metrics(run_dir: Path) -> dict[str, Series]:
    """Column -> (step, value) of each row with a finite value there; empty if there is no ``metrics.csv``.

    Raises:
        UserError: the file cannot be read, has no steps, or a cell is not a number.
    """
    path = run_dir / "metrics.csv"
    series: dict[str, Series] = {}
    if not path.exists():
        return {}
    for line, row in enumerate(csv.DictReader(io.StringIO(text_of(path), newline="")), start=2):
        if None in row or not row.get("step"):
            raise UserError(f"{path}:{line}: is no row of a run's metrics; fix or remove that row")
        values = {name: _number(cell, f"{path}:{line}: column {name}") for name, cell in row.items() if cell}
        step = values.pop("step")
        for name, value in values.items():
            if math.isfinite(value):
                series.setdefault(name, []).append((step, value))
    return series


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file, empty if there is none.

    Raises:
        UserError: it is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(text_of(path))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); remove it and write the report again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; remove it and write the report again")
    return content


_NUMBERS = (
    "steps", "wall_s", "tokens_per_s", "peak_rss_gb", "peak_gpu_gb",
    *(f"val_{what}_{when}" for what in ("accuracy", "sampled", "reward") for when in ("before", "after")),
)  # fmt: skip
"""Keys of ``summary.json`` that are computed with."""


def read_summary(run_dir: Path) -> dict[str, Any]:
    """The content of ``summary.json``, empty if there is none.

    Raises:
        UserError: it is not a JSON object, or was changed by hand so that a number is none.
    """
    path = run_dir / "summary.json"
    summary = read_json(path)
    for key in _NUMBERS:
        if not _is_number(summary.get(key)):
            raise UserError(f"{path}: {key}={summary[key]!r} is neither a number nor null; correct it")
    return summary


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The completions in the file of a validation, empty if there is none.

    Raises:
        UserError: it is not a JSON object, or holds something else.
    """
    samples = read_json(path).get("samples", [])
    if not (isinstance(samples, list) and all(map(_is_sample, samples))):
        raise UserError(f"{path}: its samples are not those of a validation; restore it, or move it away")
    return samples


def _is_sample(sample: Any) -> bool:
    return (
        isinstance(sample, dict)
        and {"prompt", "completion", "reward"} <= sample.keys()
        and _is_number(sample["reward"])
        and isinstance(sample.get("images", []), list)
    )


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, or null for one that was not measured."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_number and math.isfinite(value))


def _number(cell: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise UserError(f"{where} is {cell!r}, not a number; fix or remove that row") from error
