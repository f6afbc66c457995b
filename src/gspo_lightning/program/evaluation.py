"""The files that `evaluate.py` writes: metrics to keep and compare, and every completion they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspo_lightning.callbacks.files import replace_file
from gspo_lightning.callbacks.strict_json import to_json
from gspo_lightning.program.redact import redacted
from gspo_lightning.report.machine import machine_facts

EVALUATION = "evaluation.json"


class HeldOutLog:
    """Keeps a record of every held-out completion and writes them to ``held_out.jsonl``; see `Validator.log`.

    Each rank writes the completions of its own prompts: rank 0 to that file, rank r to ``held_out.rank<r>.jsonl``.
    Nothing is written before the end, so that an evaluation that fails leaves no folder.

    Args:
        folder: exists.
        rank: of this process.
        ranks: their number.
    """

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.path = folder / (f"held_out.rank{rank}.jsonl" if rank else "held_out.jsonl")
        self._others = [folder / f"held_out.rank{other}.jsonl" for other in range(1, ranks)]
        self._lines: list[str] = []

    def __call__(self, records: list[dict[str, Any]]) -> None:
        """Adds the records, in their order."""
        self._lines += [to_json(record) for record in records]

    def write(self) -> None:
        """Writes a line per record, in place of an earlier evaluation's; rank 0 removes those of more ranks."""
        if self.path.name == "held_out.jsonl":
            for path in set(self.path.parent.glob("held_out.rank*.jsonl")) - set(self._others):
                path.unlink(missing_ok=True)
        replace_file(self.path, "".join(line + "\n" for line in self._lines))


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
