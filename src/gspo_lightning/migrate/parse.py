"""Reads a GRPOConfig from JSON, YAML, or Python keyword arguments. No code is ever executed."""

from __future__ import annotations

import ast
import operator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gspo_lightning.errors import UserError

_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def parse_config(text: str) -> dict[str, Any]:
    """The keys and values of a config.

    A Python snippet may hold imports and assignments of literals around the call of ``GRPOConfig``, or be the keyword
    arguments alone. Values are literals, names assigned before, and arithmetic on these.

    Raises:
        UserError: the text has none of the three forms, or a value is not a literal; names the line or the key.
    """
    try:
        return _parsed(text)
    except RecursionError as error:
        raise UserError("the config is nested too deeply, or contains itself") from error


def _parsed(text: str) -> dict[str, Any]:
    tree = _python(text)
    if tree is not None and (call := _call(tree)) is not None:
        return _keywords(tree, call)
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, OmegaConfBaseException, ValueError, AssertionError) as error:  # the last for a number alone
        why = " ".join(str(error).split()) or "it is a value without a key"
        raise UserError(f"the config is neither JSON, YAML nor Python: {why}") from error
    if not isinstance(content, dict) or not content or all(value is None for value in content.values()):
        raise UserError("the config has no keys: give `key: value` lines, or the keyword arguments of a GRPOConfig")
    return {str(key): value for key, value in content.items()}


def parse_lora(text: str) -> dict[str, Any] | None:
    """The keys and values of the ``LoraConfig`` of a Python snippet; None if there is none.

    Raises:
        UserError: a value is not a literal; names the key.
    """
    tree = _python(text)
    calls = [] if tree is None else [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = [call for call in calls if ast.unparse(call.func).split(".")[-1] == "LoraConfig"]
    return _keywords(tree, named[0]) if tree is not None and named else None


def _python(text: str) -> ast.Module | None:
    """The syntax tree if the text calls a ``...Config`` or is a list of keyword arguments."""
    body = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("!", "%")))
    for candidate in (body, f"GRPOConfig(\n{body}\n)"):
        try:
            tree = ast.parse(candidate)
        except SyntaxError:
            continue
        if _call(tree) is not None:
            return tree
    return None


def _call(tree: ast.Module) -> ast.Call | None:
    """The call of ``GRPOConfig``; if there is none, that of another config, such as a subclass."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for ending in ("GRPOConfig", "Config"):
        named = [call for call in calls if ast.unparse(call.func).split(".")[-1].endswith(ending)]
        if named:
            return next((call for call in named if call.keywords), None)
    return None


def _keywords(tree: ast.Module, call: ast.Call) -> dict[str, Any]:
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise UserError(f"line {call.lineno}: write every setting as a keyword argument, without * and **")
    names: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                names[node.targets[0].id] = _value(node.value, names)
            except ValueError:  # not a setting: the model, the tokenizer, the call itself
                continue
    values = {}
    for keyword in call.keywords:
        try:
            values[str(keyword.arg)] = _value(keyword.value, names)
        except ValueError as error:
            raise UserError(f"{keyword.arg}={ast.unparse(keyword.value)}: {error}; write its value") from error
    return values


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise ValueError(f"{node.id} is not assigned a literal above")
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, names), _value(node.right, names)
        if not all(isinstance(side, int | float) for side in (left, right)):
            raise ValueError("is arithmetic on what is not a number")
        try:
            return _OPERATORS[type(node.op)](left, right)
        except (ZeroDivisionError, OverflowError) as error:
            raise ValueError(str(error)) from error
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("is not a literal") from None
