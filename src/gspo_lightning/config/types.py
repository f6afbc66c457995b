"""Checks the types in a config: every ``_target_`` node is compared with the signature of what it calls."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, Literal, Union, get_args, get_origin

from hydra.utils import get_object

from gspo_lightning.errors import UserError, reason

_HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}
_OBJECTS = ("gspo_lightning.", "lightning.")
"""Packages of classes that no plain value is an instance of: such an argument needs a section."""


def check_calls(node: Any, key: str = "") -> None:
    """Refuses, in one line that names the key, an unknown setting or a value of the wrong type.

    Args:
        node: a resolved config or a part of it.
        key: path of the node in the config, for the message.
    """
    if isinstance(node, list):
        for number, item in enumerate(node):
            check_calls(item, f"{key}[{number}]")
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        check_calls(value, f"{key}.{name}" if key else str(name))
    if "_target_" in node and not str(node["_target_"]).startswith("hydra.utils."):
        _check_call(node, key)


def _check_call(node: dict[str, Any], key: str) -> None:
    try:
        target = get_object(node["_target_"])
    except (Exception, SystemExit) as error:  # Hydra wraps whatever importing the user's module raised
        cause = error.__cause__ or error
        what = f"it exited with code {cause.code}" if isinstance(cause, SystemExit) else reason(cause)
        raise UserError(f"{key}._target_: cannot import {node['_target_']} ({what})") from error
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return  # a class written in C, such as datetime.timedelta, has no signature
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    settings = {name: value for name, value in node.items() if name not in _HYDRA_KEYS}
    for name in settings:
        if name not in parameters and not open_ended:
            known = ", ".join(sorted(set(parameters) - {"self", "args", "kwargs"}))
            raise UserError(f"{key}.{name}: {node['_target_']} has no such setting; it has {known}")
    check_values(settings, key, hints_of(target))


def check_values(node: dict[str, Any], key: str, hints: dict[str, Any]) -> None:
    """Refuses a value of the wrong type.

    Args:
        node: settings by name.
        key: path of the node in the config, for the message; empty at the root.
        hints: type hints by name; a setting without one may be anything.
    """
    for name, value in node.items():
        hint = hints.get(name)
        if hint is not None and not _fits(value, hint):
            given = f"{key}.{name}".removeprefix(".") + f"={_as_given(value)}"
            expected = _spell(hint)
            if isinstance(value, str) and expected.startswith(_ONE_OF):
                raise UserError(f"{given} is not {expected}")
            infinity = " (YAML's .inf is inf on a command line)" if value in (".inf", "-.inf") else ""
            raise UserError(f"{given} has the wrong type; expected {expected}{infinity}")


def hints_of(target: Any) -> dict[str, Any]:
    """Type hints of a class's constructor or of a function, by argument."""
    source = target.__init__ if inspect.isclass(target) else target
    try:
        return {name: hint for name, hint in typing.get_type_hints(source).items() if name != "return"}
    except (NameError, TypeError):  # names only known to type checkers
        return {}


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, dict) and "_target_" in value:
        return True  # the type of the built object is not known yet
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint is timedelta:
        return isinstance(value, timedelta)
    if hint is type(None):
        return value is None
    if origin in (list, tuple) or hint in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        if origin is list or arguments[1:] == (...,):
            return all(_fits(x, arguments[0]) for x in value)
        return not arguments or len(value) == len(arguments)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if inspect.isclass(hint) and hint.__module__.startswith(_OBJECTS):
        return isinstance(value, dict)
    return hint is Any or value is not None


def _as_given(value: Any) -> str:
    """A value as one writes it in a config, but for strings, whose quotes tell them from numbers."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


_ONE_OF = "one of "
_WORDS = {
    bool: "true or false", float: "a number", int: "a whole number", str: "text", type(None): "null",
    timedelta: "a time",
}  # fmt: skip


def _spell(hint: Any) -> str:
    """A type in words: ``float | None`` is "a number or null"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin in (Union, types.UnionType):
        choices = [choice for part in arguments if get_origin(part) is Literal for choice in get_args(part)]
        parts = [part for part in arguments if get_origin(part) is not Literal]
        words = [_one_of(choices)] if choices else []
        return " or ".join(dict.fromkeys(words + [_spell(part) for part in parts]))
    if origin is Literal:
        return _one_of(arguments)
    if origin is Callable:
        return "a section that builds a function"
    if arguments and (origin in (list, Iterable) or arguments[1:] == (...,)):
        return f"a list of {_spell(arguments[0])}"
    if origin is tuple and arguments:
        return f"a list of {len(arguments)} values"
    if origin is dict:
        return "a section"
    if inspect.isclass(hint):
        return f"a section that builds a {hint.__name__}" if hint.__module__.startswith(_OBJECTS) else hint.__name__
    return str(hint).replace("typing.", "")


def _one_of(choices: Iterable[Any]) -> str:
    return _ONE_OF + ", ".join(dict.fromkeys(map(str, choices)))
