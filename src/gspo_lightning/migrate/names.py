"""What the names in a Python text stand for where a call is made. No code is ever executed."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterable
from typing import Any

_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NOT_IN_ORDER = (ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar)


def names_at(tree: ast.Module, call: ast.Call) -> dict[str, Any]:
    """Names that are certainly a literal where ``call`` is made, with their values.

    They are assigned in the statements before it, on the way from the top of the text to it. A name that anything else
    may set, such as a branch, a loop, an argument of the function around the call, or ``+=``, is left out; within a
    function so is a name of the text around it that is set more than once.
    """
    names: dict[str, Any] = {}
    body: list[ast.stmt] = tree.body
    while True:
        for statement in body:
            if call in ast.walk(statement):
                break
            _go_past(statement, names)
        blocks = [block for block in _blocks(statement) if any(call in ast.walk(inner) for inner in block)]
        if not blocks:
            return names
        if isinstance(statement, _FUNCTIONS):
            _forget(names, [node.arg for node in ast.walk(statement.args) if isinstance(node, ast.arg)])
            every = [name for node in ast.walk(tree) for name in _set_by(node)]
            _forget(names, [name for name in names if every.count(name) > 1])
        elif isinstance(statement, _NOT_IN_ORDER):  # what a pass of a loop sets, the next one reads
            _forget(names, [name for node in ast.walk(statement) for name in _set_by(node)])
        else:
            head = [node for node in ast.iter_child_nodes(statement) if not isinstance(node, ast.stmt)]
            _forget(names, [name for part in head for node in ast.walk(part) for name in _set_by(node)])
        body = blocks[0]


def value_of(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of a literal, a name of ``names``, or arithmetic on these.

    Raises:
        ValueError: it is none of them; says why.
    """
    if isinstance(node, ast.Name):
        if node.id not in names:
            raise ValueError(f"{node.id} is not assigned a literal above, or may be changed after that")
        return names[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = value_of(node.left, names), value_of(node.right, names)
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


def _go_past(statement: ast.stmt, names: dict[str, Any]) -> None:
    """Adds what a plain assignment sets to a literal, and removes what the statement sets to anything else."""
    _forget(names, [name for node in ast.walk(statement) for name in _set_by(node)])
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None or len(targets) != 1:
        return
    if isinstance(targets[0], ast.Name):
        try:
            names[targets[0].id] = value_of(statement.value, names)
        except ValueError:  # not a setting: the model, the tokenizer, a config
            return


def _forget(names: dict[str, Any], gone: Iterable[str]) -> None:
    for name in gone:
        names.pop(name, None)


def _set_by(node: ast.AST) -> list[str]:
    """Names that the node itself sets or removes."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return [node.id]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    return []


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """Lists of statements within a statement, such as the branches of an ``if``."""
    holders = [statement, *getattr(statement, "handlers", []), *getattr(statement, "cases", [])]
    fields = (getattr(holder, name, None) for holder in holders for name in ("body", "orelse", "finalbody"))
    return [field for field in fields if isinstance(field, list)]
