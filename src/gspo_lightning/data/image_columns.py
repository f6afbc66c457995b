"""Reads pictures in columns of a dataset without decoding them, and puts them into the conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gspo_lightning.data.columns import as_mapping, parts_of
from gspo_lightning.errors import UserError
from gspo_lightning.types import Messages


def with_images(prompt: str | Messages, values: Sequence[Any], where: str) -> Messages:
    """The conversation with the pictures of the row's columns in its image parts, each decoded when it is used.

    Raises:
        UserError: the prompt is plain text, or its image parts and the pictures differ in number.
    """
    if isinstance(prompt, str):
        raise UserError(f"{where}: a plain prompt has no place for images; set data.task.conversational=true")
    pictures = [picture for value in values for picture in (value if isinstance(value, list | tuple) else [value])]
    contents = [message.get("content") for message in prompt]
    if isinstance(contents[-1], str) and not any(parts_of(message) for message in prompt):
        parts: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
        return [*prompt[:-1], {**prompt[-1], "content": [*parts, {"type": "text", "text": contents[-1]}]}]
    places = sum(_is_image(part) for content in contents if isinstance(content, list) for part in content)
    if places != len(pictures):
        raise UserError(f"{where}: {places} image placeholders for {len(pictures)} images; give one image for each")
    following = iter(pictures)
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": next(following)} if _is_image(part) else part for part in message["content"]
            ],
        }
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def encoded_images(rows: Any, columns: Sequence[str]) -> Any:
    """The dataset with the pictures in these columns, at any depth, left as bytes: comparing must not decode them."""
    if not hasattr(rows, "cast_column"):
        return rows
    for column in columns:
        feature = rows.features.get(column)
        if (encoded := _encoded(feature)) != feature:
            rows = rows.cast_column(column, encoded)
    return rows


def _encoded(feature: Any) -> Any:
    """The type of a column of ``datasets``, with pictures as bytes."""
    import datasets

    if isinstance(feature, datasets.Image):
        return replace(feature, decode=False)
    if isinstance(feature, dict):
        return {name: _encoded(item) for name, item in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return replace(feature, feature=_encoded(feature.feature))
    return feature


def kept_rows(rows: Any, patterns: Mapping[str, str], source: str) -> Any:
    """The rows whose columns match the patterns.

    Raises:
        UserError: a pattern is malformed, a column missing, or nothing is left.
    """
    if not patterns:
        return rows
    index = range(len(rows))
    for column, pattern in patterns.items():
        values = _column(rows, column, source)
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f"data.task.keep_rows.{column}={pattern!r}: not a regular expression ({error})") from error
        index = [i for i in index if values[i] is not None and compiled.fullmatch(str(values[i]))]  # type: ignore[assignment]
    if not index:
        raise UserError(f"{source}: data.task.keep_rows leaves no row")
    return rows.select(index) if hasattr(rows, "select") else [rows[i] for i in index]


def _column(rows: Any, column: str, source: str) -> Sequence[Any]:
    if hasattr(rows, "column_names"):
        if column not in rows.column_names:
            raise UserError(f"{source}: there is no column {column!r} (data.task.keep_rows)")
        return rows[column]
    return [as_mapping(row, f"{source} row {number}").get(column) for number, row in enumerate(rows)]
