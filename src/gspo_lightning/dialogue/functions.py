"""Python functions as tools: found by name, checked, and described by the JSON schemas that chat templates show."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers.utils import get_json_schema

from gspo_lightning.config.targets import look_up
from gspo_lightning.errors import UserError

Tool = Callable[..., Any] | str
"""A function, a class whose public methods are tools, or the dotted name of one of these."""
NOT_TOOLS = ("reset", "reward")
"""Methods of a class of tools that the dialogue calls, and not the model."""
_UNNAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def found(tools: Sequence[Tool], where: str) -> list[Callable[..., Any]]:
    """The functions and classes, dotted names looked up.

    Args:
        tools: at least one.
        where: key of the config, for the message.

    Raises:
        UserError: a config may not name one of them (docs/safety.md), it cannot be imported, or is none of these.
    """
    if not isinstance(tools, list | tuple) or not tools:
        raise UserError(f"{where}={tools!r} must be a list of functions, or of their names such as my_tools.add")
    objects = [look_up(tool, where) if isinstance(tool, str) else tool for tool in tools]
    for tool, thing in zip(tools, objects, strict=True):
        if not inspect.isroutine(thing) and not inspect.isclass(thing):
            name = tool if isinstance(tool, str) else repr(tool)
            raise UserError(f"{where}: {name} is of type {type(thing).__name__}; name a function or a class")
        if inspect.isclass(thing):
            _check_class(thing, where)
    return objects


def by_name(tools: Sequence[Callable[..., Any]]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(Name for the model, function) of each tool; a class, or an object of one, stands for its public methods."""
    for thing in tools:
        if inspect.isroutine(thing):
            yield thing.__name__, thing
            continue
        kind = thing if inspect.isclass(thing) else type(thing)
        names = dict.fromkeys(name for base in kind.__mro__[-2::-1] for name in vars(base))  # those of bases first
        for name in names:
            if not name.startswith("_") and name not in NOT_TOOLS and inspect.isroutine(getattr(kind, name)):
                yield name, getattr(thing, name)


def schemas_of(tools: Sequence[Callable[..., Any]], where: str) -> dict[str, dict[str, Any]]:
    """The JSON schema of each tool, as transformers' ``get_json_schema`` makes it of type hints and docstring, by name.

    Args:
        tools: functions and classes.
        where: key of the config, for the message.

    Raises:
        UserError: a tool has no docstring or type hints, is async, takes what a call by names cannot give, or two have
            one name.
    """
    schemas: dict[str, dict[str, Any]] = {}
    for name, function in by_name(tools):
        if name in schemas:
            raise UserError(f"{where}: two tools are named {name}; rename one")
        refuse_async(name, function, where)
        try:
            schemas[name] = get_json_schema(function)
            unnamed = [p.name for p in inspect.signature(function).parameters.values() if p.kind in _UNNAMED]
        except Exception as error:  # whatever evaluating the hints of the user's own raises
            why = " ".join(map(str, error.args))
            raise UserError(f"{where}: {name} needs type hints and a docstring with Args: ({why})") from error
        if unnamed:
            raise UserError(f"{where}: {name} takes {unnamed[0]} without a name, but models give each argument by name")
    if not schemas:
        raise UserError(f"{where}: there is no public method in {', '.join(thing.__name__ for thing in tools)}")
    return schemas


def template_tools(tools: Any, where: str) -> Any:
    """The ``tools`` of a chat template: JSON schemas in place of functions, classes and names; schemas as they are.

    Raises:
        UserError: as `found` and `schemas_of`.
    """
    if not isinstance(tools, list | tuple) or not tools or all(isinstance(tool, dict) for tool in tools):
        return tools
    ready = [tool for tool in tools if isinstance(tool, dict)]
    others = found([tool for tool in tools if not isinstance(tool, dict)], where)
    return [*ready, *schemas_of(others, where).values()]


def refuse_async(name: str, function: Callable[..., Any], where: str) -> None:
    """Refuses a coroutine function or an async generator.

    Raises:
        UserError: names it.
    """
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"{where}: {name} is async, but nothing awaits it; make it a plain function")


def _check_class(kind: type, where: str) -> None:
    """An object is made for every dialogue, without arguments."""
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {kind.__name__} is made for every dialogue without arguments ({error})") from error
    for name in NOT_TOOLS:
        refuse_async(f"{kind.__name__}.{name}", getattr(kind, name, None), where)  # type: ignore[arg-type]
