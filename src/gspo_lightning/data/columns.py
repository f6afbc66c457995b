"""Reads columns of a row and checks prompts; every error names the row and the setting."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from gspo_lightning.data.mixture import TASK_COLUMN
from gspo_lightning.data.tasks import Row
from gspo_lightning.errors import UserError
from gspo_lightning.rewards.functions import is_missing
from gspo_lightning.types import Messages

TOOL_ROLES = ("tool", "ipython", "function")
"""Roles whose content may be any data, which a tool returned."""

_MEDIA = ("image", "video")

Needed = Mapping[str, str | Mapping[str, str]]
"""Column -> what needs it in every row, or a mapping from task of a mixture -> what needs it there."""


def template_columns(template: str, constant: bool = False) -> list[str]:
    """The columns a format string reads; ``constant``: it may read none, because the rows differ in their images.

    Raises:
        UserError: it is malformed, has no field, or has a field without a name.
    """
    hint = "put a column name in each pair of braces, and double the braces that are meant literally"
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"data.task.template={template!r}: {error}; {hint}") from error
    names = [re.split(r"[.\[]", name)[0] for name in fields]
    if (not names and not constant) or any(not name or name.isdigit() for name in names):
        raise UserError(f"data.task.template={template!r}: {hint}")
    return names


def fill_template(template: str, row: Row, where: str, constant: bool = False) -> str:
    """Fills the template with the row's columns; a null is an error and never the word None."""
    for name in template_columns(template, constant):
        column_of(row, name, where, "data.task.template")
    try:
        return template.format(**row)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: data.task.template does not fit the row: {error!r}") from error


def checked_prompt(prompt: Any, where: str) -> str | Messages:
    """The prompt, checked to be one that a model can continue: text, or a conversation as from `checked_messages`."""
    if not isinstance(prompt, str):
        return checked_messages(prompt, where)
    if not prompt.strip():
        raise UserError(f"{where}: the prompt is empty")
    return prompt


def checked_messages(prompt: Any, where: str) -> Messages:
    """The conversation, checked to be one that a model can continue, without the nulls that Arrow adds.

    A tool's result may be any data, which the chat template reads or refuses; nulls within it are kept.
    """
    well_formed = isinstance(prompt, list | tuple) and all(isinstance(m, Mapping) and _has_role(m) for m in prompt)
    if not well_formed or not prompt:
        raise UserError(f"{where}: the prompt must be a string or a list of messages with role and content")
    messages: Messages = [_without_added_nulls(message) for message in prompt]
    for number, message in enumerate(messages):
        if message["role"] not in TOOL_ROLES:
            _check_content(message.get("content"), f"{where}, message {number}")
    last = messages[-1]
    if last["role"] == "assistant":
        raise UserError(f"{where}: the last message is the assistant's; end the prompt before it")
    if _is_blank(last.get("content")):
        raise UserError(f"{where}: the prompt is empty")
    return messages


def parts_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message; empty if its content is text, or data that a tool returned."""
    content = message.get("content")
    return [part for part in content if _is_typed(part)] if isinstance(content, list) else []


def is_filled(part: Mapping[str, Any]) -> bool:
    """Whether an image or video part has an image or video of its own."""
    return part.get(part["type"]) is not None


def _without_added_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without null keys: Arrow gives every mapping all keys that occur in its column.

    They are removed at any depth (arguments of tool calls have them too), except within content that is no part: that
    is a tool's data, which an Arrow column cannot hold together with text.
    """
    return {
        name: _content(item) if name == "content" else _without_nulls(item)
        for name, item in message.items()
        if item is not None
    }


def _content(content: Any) -> Any:
    if not isinstance(content, list | tuple):
        return content
    return [_part(_without_nulls(item)) if _is_typed(item) else item for item in content]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """The part with its image or video under the key of its type; transformers' own messages have other keys too."""
    kind = part["type"]
    if kind not in ("image", "video") or kind in part:
        return part
    given = [name for name in ("path", "url", *(["base64"] if kind == "image" else [])) if name in part]
    if len(given) != 1:
        return part
    value = part[given[0]]
    if given == ["base64"]:
        value = f"data:image;base64,{value}"
    return {**{name: item for name, item in part.items() if name != given[0]}, kind: value}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _is_typed(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") is not None


def _has_role(message: Mapping[str, Any]) -> bool:
    role = message.get("role")
    return isinstance(role, str) and bool(role.strip())


def _check_content(content: Any, where: str) -> None:
    """Refuses content that no chat template reads; it may be missing, as in a message with a tool call."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list) or not all(isinstance(part, dict) and _is_part(part) for part in content):
        raise UserError(
            f"{where}: the content must be text, or a list of parts such as {{'type': 'text', 'text': ...}} and "
            "{'type': 'image', 'image': ...}"
        )
    for part in content:
        if part["type"] == "text" and (lost := [name for name in _MEDIA if not is_missing(part.get(name))]):
            raise UserError(
                f"{where}: a part of type text has the key {lost[0]!r}, which would be lost; make it a part of its "
                f"own, {{'type': {lost[0]!r}, {lost[0]!r}: ...}}"
            )


def _is_part(part: dict[str, Any]) -> bool:
    kind = part.get("type")
    if kind == "text":
        return isinstance(part.get("text"), str)
    # For an ``image_url`` a template may write a placeholder, which nothing would fill.
    return kind in ("image", "video") or (isinstance(kind, str) and not re.search("image|video|audio", kind))


def _is_blank(content: Any) -> bool:
    if isinstance(content, list):
        return all(_is_typed(part) and part["type"] == "text" and is_missing(part.get("text")) for part in content)
    return is_missing(content)


def as_mapping(row: Any, where: str) -> Row:
    """The row; refuses what is no mapping."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a row with columns, found {type(row).__name__}")
    return row  # type: ignore[return-value]


def column_of(row: Row, column: str, where: str, key: str) -> Any:
    """The value of a column, which may be blank; ``key`` is the setting that asks for it.

    Raises:
        UserError: it is missing, null or NaN.
    """
    value = row.get(column)
    if is_missing(value) and not isinstance(value, str):
        known = ", ".join(map(str, row))
        raise UserError(f"{where}: column {column!r} {_problem(row, column)} ({key}); the row has {known}")
    return value


def check_columns(row: Row, needed: Needed, where: str) -> None:
    """Refuses a row in which a needed column is missing, null, NaN or blank.

    Raises:
        UserError: names the row, the column and who needs it.
    """
    for column, who in needed.items():
        name = who if isinstance(who, str) else who.get(str(row.get(TASK_COLUMN)))
        if name is not None and is_missing(row.get(column)):
            problem = (
                f"column {column!r} {_problem(row, column)}" if column in row else f"there is no column {column!r}"
            )
            raise UserError(f"{where}: {problem}, which {name} needs; the row has {', '.join(map(str, row))}")


def _problem(row: Row, column: str) -> str:
    value = row.get(column)
    if column not in row:
        return "is missing"
    return "is null" if value is None else "is blank" if isinstance(value, str) else "is NaN"


def extract(pattern: str, text: str, column: str, where: str) -> str:
    """The match of the first group of ``pattern`` in ``text``."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.task.patterns.{column}={pattern!r}: not a regular expression ({error})") from error
    if not compiled.groups:
        raise UserError(f"data.task.patterns.{column}={pattern!r}: put parentheses around the part to keep")
    found = compiled.search(text)
    if found is None or found[1] is None:
        raise UserError(f"{where}: column {column!r} does not match data.task.patterns.{column}={pattern!r}")
    return found[1]
