"""From a turn of the policy to the calls of tools in it, and from a call to its name and checked arguments."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TYPES: dict[str, Callable[[Any], bool]] = {
    "integer": lambda x: isinstance(x, int) and not isinstance(x, bool),
    "number": lambda x: isinstance(x, int | float) and not isinstance(x, bool),
    "string": lambda x: isinstance(x, str),
    "boolean": lambda x: isinstance(x, bool),
    "array": lambda x: isinstance(x, list),
    "object": lambda x: isinstance(x, dict),
    "null": lambda x: x is None,
}


class CallError(Exception):
    """What is wrong with a call, in words for the model."""


def calls_of(text: str) -> list[str]:
    """The JSON text of each call of a turn, decoded without special tokens; none: the turn is an answer.

    Two forms are read: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` of Hermes and Qwen, once or several
    times, the last perhaps unclosed; and a turn that is nothing but ``{"name": ..., "parameters": {...}}``, of Llama 3.
    What is thought (up to ``</think>``) is no call. Takes linear time.
    """
    spoken = text.rpartition("</think>")[2].partition("<think>")[0]
    tagged = spoken.split(_OPEN)[1:]
    if tagged:
        return [part.partition(_CLOSE)[0] for part in tagged]
    bare = spoken.strip()
    is_call = bare.startswith("{") and '"name"' in bare and ('"parameters"' in bare or '"arguments"' in bare)
    return [bare] if is_call else []


def read_call(call: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call, which may be called ``arguments`` or ``parameters``, or be missing.

    Raises:
        CallError: it is no JSON of that form.
    """
    try:
        parsed = json.loads(call, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CallError(f"the call is not valid JSON ({error})") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str):
        raise CallError('a call must be {"name": ..., "arguments": {...}}')
    arguments = parsed.get("arguments", parsed.get("parameters", {}))
    if not isinstance(arguments, dict):
        raise CallError(f"the arguments of {parsed['name']} must be a JSON object")
    return parsed["name"], arguments


def check_arguments(arguments: dict[str, Any], schema: dict[str, Any]) -> None:
    """Compares names, and types as far as the schema of a parameter itself says them (not those within lists).

    Args:
        arguments: as the model gave them.
        schema: of the tool, as ``get_json_schema`` makes it.

    Raises:
        CallError: an argument is missing, unknown or of another type.
    """
    parameters = schema["function"]["parameters"]
    known = parameters["properties"]
    for name in arguments:
        if name not in known:
            raise CallError(f"there is no argument {name}; the arguments are {', '.join(known) or 'none'}")
    for name in parameters.get("required", []):
        if name not in arguments:
            raise CallError(f"the argument {name} is missing")
    for name, value in arguments.items():
        if not _fits(value, known[name]):
            raise CallError(f"the argument {name} must be of {_spell(known[name])}")


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    if value is None and schema.get("nullable"):
        return True
    if "anyOf" in schema:
        return any(_fits(value, choice) for choice in schema["anyOf"])
    if "enum" in schema and not any(value == choice and type(value) is type(choice) for choice in schema["enum"]):
        return False
    return "type" not in schema or any(_TYPES.get(kind, _anything)(value) for kind in _kinds(schema))


def _anything(value: Any) -> bool:
    return True


def _kinds(schema: dict[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else kinds


def _spell(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return f"the choices {json.dumps(schema['enum'], ensure_ascii=False)}"
    return f"type {' or '.join(kind for part in schema.get('anyOf', [schema]) for kind in _kinds(part))}"


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")
