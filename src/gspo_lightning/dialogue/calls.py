"""From a turn of the policy to the calls of tools in it, and from a call to its name and checked arguments.

`forms` says which functions belong to which form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from gspo_lightning.rewards.functions import spoken

Schemas = dict[str, dict[str, Any]]
"""The JSON schema of each tool by its name, as ``get_json_schema`` makes it."""
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_WORDS = {"True": True, "False": False, "None": None}
"""Python's words for JSON's, which templates of untyped forms write."""
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


def json_calls(text: str) -> list[str]:
    """The JSON text of each call of a turn of Hermes, Qwen2.5, Qwen3 or Llama 3; none: the turn is an answer.

    ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, once or several times, the last perhaps unclosed, or a
    turn that is nothing but ``{"name": ..., "parameters": {...}}``. Takes linear time, as all functions here do.

    Args:
        text: the turn; what is thought in it is no call.
    """
    tagged = tagged_calls(text)
    if tagged:
        return tagged
    bare = spoken(text).strip()
    is_call = bare.startswith("{") and '"name"' in bare and ('"parameters"' in bare or '"arguments"' in bare)
    return [bare] if is_call else []


def tagged_calls(text: str) -> list[str]:
    """What stands in each ``<tool_call>...</tool_call>`` of a turn, the last perhaps unclosed."""
    return [part.partition(_CLOSE)[0] for part in spoken(text).split(_OPEN)[1:]]


def xml_calls(text: str) -> list[str]:
    """What stands in each ``<function=...</function>`` of a turn (Qwen3-Coder, Seed-OSS), the last perhaps unclosed."""
    return [part.partition("</function>")[0] for part in spoken(text).split("<function=")[1:]]


def mistral_calls(text: str) -> list[str]:
    """What follows each ``[TOOL_CALLS]`` of a turn of Mistral, the items of a JSON list one by one.

    Older models write ``[TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}]``, newer ones
    ``[TOOL_CALLS]name[ARGS]{...}`` or ``[TOOL_CALLS]name[CALL_ID]id[ARGS]{...}``.
    """
    calls = []
    for part in spoken(text).split("[TOOL_CALLS]")[1:]:
        try:
            items = _parsed(part)
        except CallError:
            items = None
        whole = isinstance(items, list) and items
        calls += [json.dumps(item, ensure_ascii=False) for item in items] if whole else [part]
    return calls


def read_json(call: str, schemas: Schemas) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a call, which may be called ``arguments`` or ``parameters``, or be missing.

    Args:
        call: one of `json_calls`.
        schemas: not needed: the JSON has types.

    Raises:
        CallError: it is no JSON of that form.
    """
    parsed = _parsed(call)
    if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str):
        raise CallError('a call must be {"name": ..., "arguments": {...}}')
    return parsed["name"], _mapping(parsed["name"], parsed.get("arguments", parsed.get("parameters", {})))


def read_mistral(call: str, schemas: Schemas) -> tuple[str, dict[str, Any]]:
    """As `read_json`, for one of `mistral_calls`."""
    head, is_new, arguments = call.partition("[ARGS]")
    if not is_new:
        return read_json(call, schemas)
    name = head.partition("[CALL_ID]")[0].strip()
    return name, _mapping(name, _parsed(arguments))


def mistral_id(call: str) -> str | None:
    """The id that the model gave to one of `mistral_calls`: nine letters and digits; None without such an id."""
    given: Any = call.partition("[ARGS]")[0].partition("[CALL_ID]")[2].strip()
    if not given:
        try:
            given = _parsed(call).get("id")
        except (CallError, AttributeError):
            return None
    return given if isinstance(given, str) and len(given) == 9 and given.isascii() and given.isalnum() else None


def read_xml(call: str, schemas: Schemas) -> tuple[str, dict[str, Any]]:
    """Name and arguments of ``name>`` and any number of ``<parameter=name>value</parameter>``, one of `xml_calls`.

    One line break at each end of a value is none of its own.

    Args:
        call: the call.
        schemas: say which values are text and which are JSON.

    Raises:
        CallError: it is not of that form.
    """
    name, closed, rest = call.partition(">")
    if not closed or not name.strip():
        raise CallError("a call must be <function=name><parameter=name>value</parameter></function>")
    texts = {}
    for part in _parts(rest, "<parameter=", "</parameter>", f"a parameter of {name.strip()}"):
        key, closed, value = part.partition(">")
        if not closed:
            raise CallError(f"a parameter of {name.strip()} must be <parameter=name>value</parameter>")
        texts[key.strip()] = value.removeprefix("\n").removesuffix("\n")
    return name.strip(), _typed(texts, name.strip(), schemas)


def read_glm(call: str, schemas: Schemas) -> tuple[str, dict[str, Any]]:
    """Name and arguments of ``name`` and pairs of ``<arg_key>...</arg_key>`` and ``<arg_value>...</arg_value>``.

    Args:
        call: one of `tagged_calls`, written by GLM-4.5 or a later one.
        schemas: say which values are text and which are JSON.

    Raises:
        CallError: it is not of that form.
    """
    name, opened, rest = call.partition("<arg_key>")
    if not name.strip():
        raise CallError("a call must be name<arg_key>...</arg_key><arg_value>...</arg_value>")
    texts = {}
    for pair in _parts(opened + rest, "<arg_key>", "</arg_value>", f"an argument of {name.strip()}"):
        key, closed, value = pair.partition("</arg_key>")
        before, opened, value = value.partition("<arg_value>")
        if not closed or not opened or before.strip():
            raise CallError(f"an argument of {name.strip()} must be <arg_key>...</arg_key><arg_value>...</arg_value>")
        texts[key.strip()] = value
    return name.strip(), _typed(texts, name.strip(), schemas)


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
    return "type" not in schema or any(kind not in _TYPES or _TYPES[kind](value) for kind in _kinds(schema))


def _kinds(schema: dict[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else kinds


def _spell(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return f"the choices {json.dumps(schema['enum'], ensure_ascii=False)}"
    return f"type {' or '.join(kind for part in schema.get('anyOf', [schema]) for kind in _kinds(part))}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CallError(f"the call is not valid JSON ({error})") from error


def _mapping(name: str, arguments: Any) -> dict[str, Any]:
    if not isinstance(arguments, dict):
        raise CallError(f"the arguments of {name} must be a JSON object")
    return arguments


def _parts(text: str, begin: str, end: str, what: str) -> Iterator[str]:
    """What stands between each ``begin`` and the next ``end``; between these pairs there may be nothing."""
    *pieces, rest = text.split(end)
    for piece in pieces:
        before, begun, part = piece.partition(begin)
        if before.strip() or not begun:
            raise CallError(f"{what} must be {begin}...{end}")
        yield part
    if rest.strip():
        raise CallError(f"{what} must be {begin}...{end}")


def _typed(texts: dict[str, str], name: str, schemas: Schemas) -> dict[str, Any]:
    """The arguments of a call of tool ``name``, which its form gives as text, as the tool's schema wants them."""
    known = schemas[name]["function"]["parameters"]["properties"] if name in schemas else {}
    return {key: _value(text, known.get(key, {})) for key, text in texts.items()}


def _value(text: str, schema: dict[str, Any]) -> Any:
    """Text where the schema allows text, else JSON; what is no JSON stays text, which then has the wrong type."""
    if schema.get("nullable") and text in ("null", "None"):
        return None
    if _fits(text, {key: value for key, value in schema.items() if key != "enum"}):
        return text
    if text in _WORDS:
        return _WORDS[text]
    try:
        return _parsed(text)
    except CallError:
        return text


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")
