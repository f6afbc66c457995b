"""Reads images in columns of a dataset without decoding them, and puts them into the conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gspo_lightning.data.columns import TOOL_ROLES, as_mapping, column_of, is_filled, parts_of
from gspo_lightning.data.tasks import Row
from gspo_lightning.errors import UserError
from gspo_lightning.rewards.functions import is_missing
from gspo_lightning.screen import counted
from gspo_lightning.types import Messages


def images_of(row: Row, column: str, where: str) -> Any:
    """The image, or the list of images, in a column of a row.

    Raises:
        UserError: the column is missing, null, NaN or blank.
    """
    key = "data.task.image_columns"
    if column in row and is_missing(value := row[column]):
        problem = "null" if value is None else "blank" if isinstance(value, str) else "NaN"
        raise UserError(
            f"{where}: column {column!r} is {problem} ({key}); give an image, an empty list where the row has none, "
            "or leave the row out"
        )
    return column_of(row, column, where, key)


PLACE = "<image>"
"""Stands for an image in the text of other trainers' files (verl, LLaMA-Factory, ms-swift)."""


def with_images(prompt: str | Messages, values: Sequence[Any], where: str) -> Messages:
    """The conversation with the images of the row's columns in its places, each decoded when it is used.

    Places are the image parts, or each ``<image>`` in messages that are all strings; without any the images come
    before the last message's text.

    Raises:
        UserError: the prompt is plain text, its places and the images differ in number, or an image part has an
            image of its own.
    """
    if isinstance(prompt, str):
        raise UserError(f"{where}: a plain prompt has no place for images; set data.task.conversational=true")
    images = [image for value in values for image in (value if isinstance(value, list | tuple) else [value])]
    places = [part for message in prompt for part in parts_of(message) if part["type"] == "image"]
    if any(is_filled(part) for part in places):
        raise UserError(
            f"{where}: an image part of the prompt already has an image, and so have data.task.image_columns; leave "
            "the part at {'type': 'image'}, or data.task.image_columns empty"
        )
    if isinstance(prompt[-1].get("content"), str) and not any(parts_of(message) for message in prompt):
        return _into_text(prompt, images, where)
    if len(places) != len(images):
        raise UserError(
            f"{where}: {counted(len(places), 'image placeholder')} for {counted(len(images), 'image')}; "
            "give one image for each"
        )
    following = iter(images)
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


def _into_text(prompt: Messages, images: Sequence[Any], where: str) -> Messages:
    """The conversation, whose messages have no parts, with an image for each ``<image>``; see `with_images`."""
    places = sum(_text_of(message).count(PLACE) for message in prompt)
    if not places:
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        return [*prompt[:-1], {**prompt[-1], "content": [*parts, {"type": "text", "text": prompt[-1]["content"]}]}]
    if places != len(images):
        raise UserError(
            f"{where}: the text has {PLACE} {counted(places, 'time')} for {counted(len(images), 'image')}; write it "
            "once for each, or not at all, and the images come before the text"
        )
    following = iter(images)
    return [
        {**message, "content": _filled(message["content"], following)} if PLACE in _text_of(message) else message
        for message in prompt
    ]


def _text_of(message: Mapping[str, Any]) -> str:
    """The text in which ``<image>`` stands for an image; what a tool returned is data."""
    content = message.get("content")
    return content if isinstance(content, str) and message["role"] not in TOOL_ROLES else ""


def _filled(text: str, images: Iterator[Any]) -> list[dict[str, Any]]:
    first, *others = text.split(PLACE)
    parts = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image", "image": next(images)}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def encoded_images(rows: Any, columns: Sequence[str]) -> Any:
    """The dataset with the images in these columns, at any depth, left as bytes: comparing must not decode them."""
    if not hasattr(rows, "cast_column"):
        return rows
    for column in columns:
        feature = rows.features.get(column)
        if (encoded := _encoded(feature)) != feature:
            rows = rows.cast_column(column, encoded)
    return rows


def _encoded(feature: Any) -> Any:
    """The type of a column of ``datasets``, with images as bytes."""
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
