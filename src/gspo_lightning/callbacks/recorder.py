"""The run's files: ``metrics.csv``, ``completions.jsonl`` and the validations before and after.

The files are written and flushed before the checkpoint that counts them, so after a crash they may be ahead of it,
never behind. A resumed run takes over exactly the rows its checkpoint knows: no duplicate, none lost.
"""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L

from gspo_lightning.types import ScoredRollout


class MetricsTable:
    """A CSV file with one row per rollout; columns may appear later, the newest row may be completed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.rows = 0
        self._last_offset = 0
        self._last_row: dict[str, Any] = {}

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row; one with the step of the newest row completes that instead."""
        if self.rows and self._last_row["step"] == row["step"]:
            row = {**self._last_row, **row}
            os.truncate(self.path, self._last_offset)
            self.rows -= 1
        new = [name for name in row if name not in self.columns]
        if new:
            self._widen(new)
        with self.path.open("a", newline="") as file:
            self._last_offset = file.tell()
            csv.writer(file).writerow([_cell(row.get(name)) for name in self.columns])
            file.flush()
        self.rows, self._last_row = self.rows + 1, row

    def take_over(self, source: Path, rows: int) -> None:
        """Begins with the first ``rows`` rows of ``source``."""
        with source.open(newline="") as file:
            lines = list(csv.reader(file))
        self.columns, kept = lines[0], lines[1 : rows + 1]
        self._replace(kept)
        self.rows = len(kept)
        if kept:
            self._last_row = dict(zip(self.columns, kept[-1], strict=False))
            self._last_row["step"] = int(self._last_row["step"])
            self._last_offset = self.path.stat().st_size - len(_line(kept[-1]).encode())

    def _widen(self, new: list[str]) -> None:
        kept: list[list[str]] = []
        if self.path.exists() and self.columns:
            with self.path.open(newline="") as file:
                kept = list(csv.reader(file))[1:]
        self.columns += new
        self._replace(kept)

    def _replace(self, rows: list[list[str]]) -> None:
        padded = (row + [""] * (len(self.columns) - len(row)) for row in rows)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(_line(self.columns) + "".join(map(_line, padded)))
        os.replace(temporary, self.path)


def _cell(value: Any) -> str:
    return "" if value is None else repr(value)


def _line(cells: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()


class RunRecorder(L.Callback):
    """Writes the run's files into ``run_dir``; on resume takes over those of ``resume_dir``. Rank 0 only."""

    def __init__(self, run_dir: str | Path, resume_dir: str | Path | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.resume_dir = None if resume_dir is None else Path(resume_dir)
        self.table = MetricsTable(self.run_dir / "metrics.csv")
        self.completions = self.run_dir / "completions.jsonl"
        self.completions_bytes = 0

    def state_dict(self) -> dict[str, Any]:
        """How much of the files belongs to the checkpoint."""
        return {"rows": self.table.rows, "completions_bytes": self.completions_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the rows of the run that wrote the checkpoint, and the validation before it."""
        source = self.resume_dir or self.run_dir
        try:
            self.table.take_over(source / "metrics.csv", state_dict["rows"])
            log = (source / "completions.jsonl").read_bytes()[: state_dict["completions_bytes"]]
            before = (source / "validation_before.json").read_text()
        except OSError as error:
            warnings.warn(f"{error.filename} is missing: the records of this run begin at the checkpoint", stacklevel=2)
            return
        self.completions.write_bytes(log)
        self.completions_bytes = len(log)
        (self.run_dir / "validation_before.json").write_text(before)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """One row of metrics, one line per completion."""
        if trainer.is_global_zero:
            self.table.write({"step": pl_module.rollouts_done, **pl_module.last_metrics})
            self._log_completions(pl_module.rollouts_done, pl_module.last_scored)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Validation columns of the row of this rollout; before and after training, the samples too."""
        if not trainer.is_global_zero:
            return
        step = pl_module.rollouts_done
        self.table.write({"step": step, **pl_module.last_validation})
        content = {"step": step, "metrics": pl_module.last_validation, "samples": pl_module.validation_samples}
        name = "validation_before.json" if step == 0 else "validation_after.json"
        (self.run_dir / name).write_text(json.dumps(content, ensure_ascii=False, indent=1))

    def _log_completions(self, step: int, scored: ScoredRollout) -> None:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in completion_entries(step, scored))
        with self.completions.open("ab") as file:
            file.write(lines.encode("utf-8", "backslashreplace"))
            file.flush()
            self.completions_bytes = file.tell()


def completion_entries(step: int, scored: ScoredRollout) -> list[dict[str, Any]]:
    """One flat record per completion of a rollout."""
    entries = []
    for b, (prompt, group) in enumerate(zip(scored.prompts, scored.completions, strict=True)):
        for g, completion in enumerate(group):
            values = scored.rewards_by_function[b, g].tolist()
            entries.append(
                {
                    "step": step,
                    "uid": prompt.uid,
                    "prompt": prompt.prompt,
                    "completion": completion.text,
                    "rewards": {n: None if v != v else v for n, v in zip(scored.reward_names, values, strict=True)},
                    "reward": scored.rewards[b, g].item(),
                    "advantage": scored.advantages[b, g].item(),
                    "finish_reason": completion.finish_reason,
                    "tokens": len(completion.token_ids),
                }
            )
    return entries
