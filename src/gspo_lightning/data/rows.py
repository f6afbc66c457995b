"""A task from existing rows: a file, a dataset of the hub, or a Python iterable."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gspo_lightning.data.columns import (
    as_mapping,
    checked_prompt,
    column_of,
    extract,
    fill_template,
    template_columns,
)
from gspo_lightning.data.files import is_file, read_file, read_hub, with_class_names
from gspo_lightning.data.image_columns import encoded_images, images_of, kept_rows, with_images
from gspo_lightning.data.prompt_keys import PromptKeys
from gspo_lightning.data.stream import asked
from gspo_lightning.data.tasks import Row
from gspo_lightning.errors import UserError
from gspo_lightning.rewards.calling import GIVEN
from gspo_lightning.types import Messages


@dataclass(frozen=True)
class RowsTask:
    """Rows of a file (JSON, JSONL, CSV, Parquet), of a dataset of the hub, or of a Python iterable.

    Each row becomes a prompt by ``prompt_column`` (a string, or a list of messages) or by ``template``, a
    format string over the columns. ``num_validation`` rows are held out, chosen by a fixed shuffle that does
    not depend on the run's seed; a training row whose prompt equals a held-out one is left out, with a
    warning that counts them.

    A column may be blank, but not if a reward needs it, which the data module checks.

    Mistakes raise ``UserError`` when rows are first read: constructing the task reads nothing.
    """

    source: str | Iterable[Row]
    """A path, a hub name, or the rows themselves."""
    name: str = "rows"
    """Name of the task, part of every uid."""
    split: str = "train"
    config_name: str | None = None
    """Configuration of a hub dataset, such as ``main``."""
    validation_split: str | None = None
    """A split of the same hub dataset, or a file, from which held-out rows are taken instead of ``source``."""
    num_validation: int | None = 64
    """Number of held-out rows; None takes all of ``validation_split``."""
    prompt_column: str = "prompt"
    template: str | None = None
    """Format string over the columns, such as ``"{question} Answer with just the number."``; replaces
    ``prompt_column``."""
    system_prompt: str | None = None
    conversational: bool = True
    """Whether a string prompt becomes a user message, so that the chat template applies."""
    image_columns: list[str] = field(default_factory=list)
    """Columns with an image, or a list of images, of the prompt: paths, bytes, PIL or columns of ``datasets``. They
    fill the image parts of the last message in order; if that message is a string they come before it."""
    keep_rows: dict[str, str] = field(default_factory=dict)
    """Column -> regular expression: rows whose value does not match it as a whole are left out."""
    columns: dict[str, str] = field(default_factory=dict)
    """New name -> column of the dataset, such as ``answer: solution``."""
    patterns: dict[str, str] = field(default_factory=dict)
    """Column -> regular expression; its first group replaces the value: ``answer: '####\\s*(\\S+)'``."""

    def __post_init__(self) -> None:
        for name in ("source", "validation_split"):
            if isinstance(path := getattr(self, name), os.PathLike):  # of a program
                object.__setattr__(self, name, os.fspath(path))

    @property
    def num_train_rows(self) -> int:
        """Number of rows that are not held out."""
        return len(self._train)

    def train_row(self, index: int) -> Row:
        """The row as a prompt; names the row if a column is missing."""
        number = self._train[index]
        return self._prompt_row(self._rows[number], f"{self._label} row {number}")

    def validation_rows(self) -> list[Row]:
        """The held-out rows as prompts."""
        label = self._label if self.validation_split is None else self.validation_split
        rows = self._validation_source
        return [self._prompt_row(rows[i], f"{label} row {i}") for i in self._held_out]

    # ---------------------------------------------------------------- which rows

    @property
    def _label(self) -> str:
        return self.source if isinstance(self.source, str) else self.name

    @cached_property
    def _rows(self) -> Sequence[Row]:
        if isinstance(self.source, str):
            self._refuse_ignored_settings()
            return self._read(self.source, self.split)
        rows: Any = _listed(self.source, f"data.task.source of task {self.name}")
        if hasattr(rows, "features"):  # of datasets
            rows = encoded_images(with_class_names(rows), self._prompt_columns)
        kept: Sequence[Row] = kept_rows(rows, self.keep_rows, self.name)
        return kept

    def _refuse_ignored_settings(self) -> None:
        if is_file(str(self.source)) and self.config_name is not None:
            raise UserError(f"data.task.config_name={self.config_name} has no effect on a file; set it to null")
        if is_file(str(self.source)) and self.split != "train":
            raise UserError(f"data.task.split={self.split} has no effect on a file; leave it out")

    @cached_property
    def _validation_source(self) -> Sequence[Row]:
        split = self.validation_split
        if split is None:
            return self._rows
        if is_file(split):
            return self._read(split, "")
        if not isinstance(self.source, str) or is_file(self.source):
            raise UserError(f"data.task.validation_split={split}: the source has no splits; name a file")
        return self._read(self.source, split)

    def _read(self, source: str, split: str) -> Sequence[Row]:
        rows: Any = read_file(source) if is_file(source) else read_hub(source, self.config_name, split)
        rows = encoded_images(rows, self._prompt_columns)
        return kept_rows(rows, self.keep_rows, source)

    @cached_property
    def _held_out(self) -> list[int]:
        """Row numbers in ``_validation_source``, by a fixed shuffle: files are often sorted."""
        size, wanted = len(self._validation_source), self.num_validation
        if wanted is not None and wanted < 0:
            raise UserError(f"data.task.num_validation={wanted} must be at least 0")
        if self.validation_split is None and (wanted is None or wanted >= size):
            raise UserError(f"data.task.num_validation={wanted} must be less than the {size} rows there are")
        order = list(range(size))
        random.Random("held-out rows").shuffle(order)
        return order[:wanted]

    @cached_property
    def _train(self) -> list[int]:
        self._say_what_rewards_do_not_get()
        held_out = {self._held_out_key(i) for i in self._held_out}
        mine = set(self._held_out) if self.validation_split is None else set()
        rest = [i for i in range(len(self._rows)) if i not in mine]
        if not held_out:  # nothing to compare with, so no image is decoded for it
            return rest
        keys = self._keys.of_rows(self._rows, self._label)
        train = [i for i in rest if keys[i] not in held_out]
        if not train:
            raise UserError(f"data.task.source={self._label}: every row has a held-out prompt; nothing is left")
        if len(train) < len(rest):
            warnings.warn(
                f"{len(rest) - len(train)} training rows of {self._label} are left out: their prompts are held out",
                stacklevel=3,  # not of functools, whose warnings are shown with a line of its code
            )
        return train

    def _say_what_rewards_do_not_get(self) -> None:
        """Warns of columns with the name of an argument that is something else, unless they have another name too."""
        named = _TAKEN.intersection(as_mapping(self._rows[0], f"{self._label} row 0"))
        for column in sorted(named.difference(self.columns.values(), self._prompt_columns)):
            warnings.warn(
                f"{self._label}: reward functions do not get the column {column}, since {column} is an argument that "
                f"they have anyway; '+data.task.columns={{my_{column}: {column}}}' gives it another name",
                stacklevel=4,  # as above
            )

    def _held_out_key(self, number: int) -> str:
        where = f"{self.validation_split or self._label} row {number}"
        row = as_mapping(self._validation_source[number], where)
        setting = "data.task.prompt_column" if self.template is None else "data.task.template"
        for name in self._prompt_columns:
            if name in self._keys.images:
                images_of(row, name, where)
            else:
                column_of(row, name, where, setting)
        return self._keys.of_held_out(row, where)

    @cached_property
    def _keys(self) -> PromptKeys:
        return PromptKeys(self._prompt_columns, {self.columns.get(name, name) for name in self.image_columns})

    @cached_property
    def _prompt_columns(self) -> list[str]:
        """The dataset's columns that the prompt is made of."""
        names = [self.prompt_column] if self.template is None else self._template_columns
        return [self.columns.get(name, name) for name in [*names, *self.image_columns]]

    @property
    def _template_columns(self) -> list[str]:
        return template_columns(str(self.template), bool(self.image_columns))

    # ---------------------------------------------------------------- from row to prompt

    def _prompt_row(self, row: Row, where: str) -> Row:
        out = dict(as_mapping(row, where))
        for new, old in self.columns.items():
            out[new] = column_of(row, old, where, f"data.task.columns.{new}")
        for column, pattern in self.patterns.items():
            text = str(column_of(out, column, where, "data.task.patterns"))
            out[column] = extract(pattern, text, column, where)
        if self.template is None:
            prompt = column_of(out, self.prompt_column, where, "data.task.prompt_column")
        else:
            prompt = fill_template(self.template, out, where, bool(self.image_columns))
        out["prompt"] = self._conversation(prompt, where)
        if self.image_columns:
            values = [images_of(out, name, where) for name in self.image_columns]
            out["prompt"] = with_images(out["prompt"], values, where)
        return out

    def _conversation(self, prompt: Any, where: str) -> str | Messages:
        checked = checked_prompt(prompt, where)
        if isinstance(checked, str) and not self.conversational:
            if self.system_prompt:
                raise UserError("data.task.system_prompt has no effect with data.task.conversational=false")
            return checked
        messages: Messages = [{"role": "user", "content": checked}] if isinstance(checked, str) else checked
        if not self.system_prompt:
            return messages
        if messages[0]["role"] == "system":
            raise UserError(f"{where}: the row has its own system message; remove data.task.system_prompt")
        return [{"role": "system", "content": self.system_prompt}, *messages]


_TAKEN = GIVEN - {"environment_reward"}
"""Names that no column can have as an argument of a reward function; the other one is taken with an environment."""


class _OwnRows(Sequence[Row]):
    """Rows of an object of a user's own, such as a ``Dataset`` of torch: what its ``__getitem__`` raises is a line."""

    def __init__(self, source: Any, where: str) -> None:
        self.source, self.where = source, where

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if not index < len(self):  # where a loop over a sequence ends
            raise IndexError(index)
        name = type(self.source).__name__
        return asked(lambda: self.source[index], f"{self.where}: row {index}: {name}.__getitem__({index})")


def _listed(source: Any, where: str) -> Sequence[Row]:
    """The rows of a Python object; refuses an object without rows in a fixed order."""
    name = type(source).__name__
    if isinstance(source, Mapping):
        raise UserError(
            f"{where} is a {name} of {', '.join(map(str, source))}; give one of them, such as source['train']"
        )
    if hasattr(source, "iloc"):
        raise UserError(f"{where} is a {name}; give its rows: frame.to_dict('records')")
    rows = source
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        if not isinstance(source, Iterable):
            raise UserError(f"{where} is a {name}; give a path, the name of a dataset, or rows")
        rows = asked(lambda: list(source), f"{where}: the iteration of {name}")
    if not len(rows):
        raise UserError(f"{where}: the dataset is empty")
    if isinstance(rows, list | tuple) and isinstance(rows[0], str) and is_file(rows[0]):
        raise UserError(f"{where} is a {name} of files, such as {rows[0]}; give one, or the folder that holds them")
    return rows if isinstance(rows, list | tuple) or hasattr(rows, "features") else _OwnRows(rows, where)
