"""Rows of local files and of hub datasets.

JSON and CSV are read by the standard library, not by ``datasets``, which guesses types (7 for "007", a date
for "2020-01-01"), fills a missing key with None, and names no line when it fails.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from logging import CRITICAL
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

from gspo_lightning.data.tasks import Row
from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home

_TEXT_SUFFIXES = (".json", ".jsonl", ".csv")
SUFFIXES = (*_TEXT_SUFFIXES, ".parquet")
_OF_SAVE_TO_DISK = ("state.json", "dataset_dict.json")


def is_file(source: str) -> bool:
    """Whether ``source`` means a file rather than a dataset of the hub."""
    return _kind(source)[0] in SUFFIXES or from_home(source).is_file()


def _kind(source: str) -> tuple[str, bool]:
    """The suffix in lower case, without a ``.gz`` after it, and whether there is one."""
    name = source.lower()
    return Path(name.removesuffix(".gz")).suffix, name.endswith(".gz")


def read_file(source: str) -> Sequence[Row]:
    """All rows of a JSON (a list of objects, or one per line), JSONL, CSV (values stay strings) or Parquet file.

    JSON, JSONL and CSV may be compressed (``.jsonl.gz``).

    Raises:
        UserError: the file is missing, of another kind, empty or malformed; names the file and the line.
    """
    rows = _rows_of(source)
    if not len(rows):
        raise UserError(f"{source}: the dataset is empty")
    return rows


def _rows_of(source: str) -> Sequence[Row]:
    path = from_home(source)
    kind, zipped = _kind(source)
    if kind not in (_TEXT_SUFFIXES if zipped else SUFFIXES):
        raise UserError(f"{source}: unknown file type; use one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as probe:
            empty = not probe.read(1)
        return [] if empty else _read_parquet(path) if kind == ".parquet" else _read_text(path, kind, source)
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError, zlib.error) as error:  # the last two: a compressed file that is cut short or damaged
        raise UserError(f"{source}: cannot read the file ({getattr(error, 'strerror', None) or error})") from error


def read_hub(source: str, config_name: str | None, split: str) -> Sequence[Row]:
    """A split of a dataset of the Hugging Face hub, or of a local folder that ``datasets`` understands or wrote.

    JSON and CSV files of a folder are read as by `read_file` if a whole split is requested; a file of a split may be
    empty.

    Raises:
        UserError: it cannot be found, reached or read, or is empty; names dataset, split and cause.
    """
    import datasets

    folder = from_home(source)
    try:
        if any((folder / name).is_file() for name in _OF_SAVE_TO_DISK):
            rows = with_class_names(_saved(datasets.load_from_disk(str(folder)), source, config_name, split))
        elif files := _text_files(folder, config_name, split):
            rows = [row for file in files for row in _rows_of(file)]
        else:
            rows = with_class_names(datasets.load_dataset(os.path.expanduser(source), config_name, split=split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"data.task.source={source}, split {split}: cannot load it: {_cause(error)}") from error
    if not len(rows):
        raise UserError(f"data.task.source={source}, split {split}: the dataset is empty")
    return rows


def _text_files(folder: Path, config_name: str | None, split: str) -> list[str]:
    """The JSON and CSV files of a split of a local folder, unless its README says how to read them."""
    import datasets

    if not folder.is_dir():
        return []
    with TemporaryDirectory() as empty:  # a cache of earlier runs would define features, as a README may
        builder = datasets.load_dataset_builder(str(folder), config_name, cache_dir=empty)
    config = builder.config
    files = [str(file) for file in (config.data_files or {}).get(split, [])]
    names = {name: getattr(config, name) for name in ("name", "version", "data_dir", "data_files", "description")}
    as_it_is = builder.info.features is None and config == type(config)(**names)
    is_text = all(_kind(file)[0] in _TEXT_SUFFIXES and Path(file).is_file() for file in files)
    return files if as_it_is and is_text else []


def _saved(saved: Any, source: str, config_name: str | None, split: str) -> Any:
    """A split of what ``save_to_disk`` wrote; a single dataset is ``train``, and the name of its own split."""
    if config_name is not None:
        raise UserError(
            f"data.task.config_name={config_name} has no effect on a folder of save_to_disk; set it to null"
        )
    splits = saved if isinstance(saved, dict) else {"train": saved, str(saved.split or "train"): saved}
    if split not in splits:
        raise UserError(
            f"data.task.source={source}: there is no split {split}; the folder has {', '.join(splits)}, which cannot "
            "be sliced"
        )
    return splits[split]


def with_class_names(rows: Any) -> Sequence[Row]:
    """The rows with class numbers replaced by names, which a reward compares; -1, for no class, becomes null."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.ClassLabel):
            numbers = rows[name]
            names = [None if number is None or number < 0 else feature.int2str(number) for number in numbers]
            rows = rows.remove_columns(name).add_column(name, names)
    return rows


def _read_text(path: Path, kind: str, source: str) -> Sequence[Row]:
    reader = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}[kind]
    opened = gzip.open if _kind(source)[1] else open
    with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
        return list(reader(stream, source))


def _read_jsonl(stream: TextIO, source: str) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _object(_parse(line, f"{source} line {number}"), f"{source} line {number}")


def _read_json(stream: TextIO, source: str) -> Iterator[Row]:
    text = stream.read()
    if _is_lines(text):
        stream.seek(0)
        yield from _read_jsonl(stream, source)
        return
    content = _parse(text, source)
    if not isinstance(content, list):
        raise UserError(f"{source}: expected a list of objects, found one {type(content).__name__}")
    for number, item in enumerate(content):
        yield _object(item, f"{source} row {number}")


def _is_lines(text: str) -> bool:
    """Whether a JSON file has an object per line, as ``datasets`` allows: the first line is one, and more follow."""
    first = re.match(r"\s*(\{[^\n]*)\n\s*\S", text)
    if first is None:
        return False
    try:
        json.loads(first[1])
    except (RecursionError, ValueError):
        return False
    return True


def _read_csv(stream: TextIO, source: str) -> Iterator[Row]:
    reader = csv.DictReader(stream, strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # of the whole process; Python's own is 131072 characters
    try:
        names = reader.fieldnames or ()
        if twice := [name for number, name in enumerate(names) if name in names[:number]]:
            raise UserError(f"{source} line 1: two columns are named {twice[0]!r}; rename one")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{source} line {reader.line_num}: the number of fields differs from the header's")
            yield row
    except csv.Error as error:
        raise UserError(f"{source} line {reader.reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _cause(error: Exception) -> str:
    """The first line of an error of ``datasets``, which says of many no more than that there was one, but chains it."""
    found = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return (str(found).strip().splitlines() or [type(found).__name__])[0]


def _read_parquet(path: Path) -> Sequence[Row]:
    import datasets
    from pyarrow.parquet import read_metadata  # type: ignore[import-untyped]

    said = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(CRITICAL)  # it prints its own line about a broken file
    try:
        if not read_metadata(path).num_rows:  # which datasets does not read
            return []
        return with_class_names(datasets.load_dataset("parquet", data_files=str(path), split="train"))
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_cause(error)})") from error
    finally:
        datasets.logging.set_verbosity(said)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError(f"{where}: not readable JSON: brackets are nested too deeply") from error
    except ValueError as error:  # malformed, or an integer of more digits than Python takes
        raise UserError(f"{where}: not valid JSON ({error})") from error


def _object(item: Any, where: str) -> Row:
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object with columns, found {type(item).__name__}")
    return item
