"""The files that `evaluate.py` writes: metrics to keep and compare, and every completion they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo_lightning.callbacks.files import replace_file
from gspo_lightning.callbacks.recorder import to_json
from gspo_lightning.redact import redacted
from gspo_lightning.report.machine import machine_facts

EVALUATION = "evaluation.json"


class HeldOutLog:
    """Writes a line per held-out completion to ``held_out.jsonl``; see `Validator.log`.

    Each rank writes the completions of its own prompts: rank 0 to that file, rank r to ``held_out.rank<r>.jsonl``.

    Args:
        folder: exists. An earlier evaluation's log in it is replaced when the first completions are written.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / (f"held_out.rank{rank}.jsonl" if rank else "held_out.jsonl")
        self._is_new = True

    def __call__(self, records: list[dict[str, Any]]) -> None:
        """Appends the records, in their order."""
        lines = "".join(to_json(record) + "\n" for record in records)
        if self._is_new:
            self.path.unlink(missing_ok=True)
        self._is_new = False
        with self.path.open("ab") as file:
            file.write(lines.encode("utf-8", "backslashreplace"))


def write_evaluation(folder: Path, plain: dict[str, Any], metrics: dict[str, float]) -> Path:
    """Writes ``evaluation.json``: model, metrics, machine and the config without secrets. Returns its path.

    Args:
        folder: exists.
        plain: the resolved config.
        metrics: means over all held-out prompts of all ranks.
    """
    content = {
        "model": plain["model"]["path"],
        "metrics": metrics,
        "machine": machine_facts(),
        "config": redacted(plain),
    }
    replace_file(folder / EVALUATION, to_json(content, indent=1) + "\n")
    return folder / EVALUATION
