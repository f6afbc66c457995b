"""A task from rows that exist: a file, a dataset of the hub, or a Python list."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gspo_lightning.data.tasks import Row
from gspo_lightning.errors import UserError

_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class RowsTask:
    """Rows of a file (JSON, JSONL, CSV, Parquet), of a dataset of the hub, or given as a list.

    Each row becomes a prompt by ``prompt_column`` (a string, or a list of messages) or by ``template``, a format string
    over the columns. ``num_validation`` rows are held out, chosen by a fixed shuffle that does not depend on the run's
    seed, unless ``validation_split`` names a split or file of their own.
    """

    source: str | Sequence[Row]
    """A path, a hub name, or the rows themselves."""
    name: str = "rows"
    split: str = "train"
    config_name: str | None = None
    validation_split: str | None = None
    """A split of the same source, or a path; held-out rows then come from there."""
    num_validation: int = 64
    prompt_column: str = "prompt"
    template: str | None = None
    system_prompt: str | None = None
    conversational: bool = True
    """Turn a string prompt into a user message, so that the chat template applies."""
    columns: dict[str, str] = field(default_factory=dict)
    """New name -> column of the dataset, such as ``answer: solution``."""

    @property
    def num_train_rows(self) -> int:
        """Rows that are not held out."""
        return len(self._train)

    def train_row(self, index: int) -> Row:
        """The row as a prompt; names the row if a column is missing."""
        number = self._train[index]
        return self._prompt_row(self._rows[number], f"{self._label} row {number}")

    def validation_rows(self) -> list[Row]:
        """The held-out rows."""
        if self.validation_split is not None:
            rows = self._load(self.validation_split)[: self.num_validation]
            return [self._prompt_row(row, f"{self.validation_split} row {i}") for i, row in enumerate(rows)]
        return [self._prompt_row(self._rows[i], f"{self._label} row {i}") for i in self._held_out]

    @property
    def _label(self) -> str:
        return self.source if isinstance(self.source, str) else self.name

    @cached_property
    def _rows(self) -> Sequence[Row]:
        rows = self._load(self.split) if isinstance(self.source, str) else self.source
        if not len(rows):
            raise UserError(f"data.task.source={self._label}: the dataset is empty")
        return rows

    @cached_property
    def _order(self) -> list[int]:
        order = list(range(len(self._rows)))
        random.Random("held-out rows").shuffle(order)
        return order

    @cached_property
    def _held_out(self) -> list[int]:
        if self.num_validation >= len(self._rows):
            raise UserError(
                f"data.task.num_validation={self.num_validation} leaves nothing of {len(self._rows)} rows to train on"
            )
        return self._order[: self.num_validation]

    @cached_property
    def _train(self) -> list[int]:
        if self.validation_split is not None:
            return list(range(len(self._rows)))
        return sorted(set(range(len(self._rows))) - set(self._held_out))

    def _load(self, split: str) -> Sequence[Row]:
        import datasets

        source = split if Path(split).suffix in _LOADERS else str(self.source)
        path = Path(source)
        if path.suffix not in _LOADERS:
            return datasets.load_dataset(source, self.config_name, split=split)  # type: ignore[no-any-return]
        if not path.exists():
            raise UserError(f"data.task.source={source}: there is no such file")
        if not path.stat().st_size:
            raise UserError(f"data.task.source={source}: the file is empty")
        return datasets.load_dataset(_LOADERS[path.suffix], data_files=source, split="train")  # type: ignore[no-any-return]

    def _prompt_row(self, row: Row, where: str) -> Row:
        out = dict(row)
        for new, old in self.columns.items():
            out[new] = _column(row, old, where, f"data.task.columns.{new}")
        if self.template is not None:
            try:
                prompt: Any = self.template.format(**out)
            except KeyError as error:
                raise UserError(f"{where}: data.task.template needs column {error}; the row has {', '.join(row)}") from error
        else:
            prompt = _column(row, self.prompt_column, where, "data.task.prompt_column")
        out["prompt"] = self._conversation(prompt, where)
        return out

    def _conversation(self, prompt: Any, where: str) -> Any:
        if not prompt:
            raise UserError(f"{where}: the prompt is empty")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and self.conversational else prompt
        if isinstance(messages, list) and self.system_prompt:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        return messages


def _column(row: Row, column: str, where: str, key: str) -> Any:
    if column not in row:
        raise UserError(f"{where}: there is no column {column!r} ({key}); the row has {', '.join(row)}")
    return row[column]
