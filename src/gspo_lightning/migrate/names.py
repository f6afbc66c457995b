"""What the names in a Python text stand for where a call is made. No code is ever executed."""

from __future__ import annotations

import ast
import operator
from typing import Any

from gspo_lightning.migrate.scopes import EVERY, EXPRESSIONS, FUNCTIONS, bound_in, declared, elsewhere, set_in, used_in

_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
}  # fmt: skip
_NOT_IN_ORDER = (ast.For, ast.AsyncFor, ast.While, ast.Try, ast.TryStar)


def names_at(tree: ast.Module, call: ast.Call) -> dict[str, Any]:
    """Names that are certainly a literal where ``call`` is made, with their values.

    They are assigned in the statements before it, on the way from the top of the text to it. A name that anything else
    may set, such as a branch, a loop, an argument of the function around the call, or ``+=``, is left out, and so is a
    list or dict that anything else may change; within a function also what the text around it sets or changes later.
    """
    names = _Names(tree, call)
    body, later = tree.body, list[ast.stmt]()
    while True:
        for statement in body:
            if call in ast.walk(statement):
                break
            names.go_past(statement)
        blocks = _blocks(statement)
        inner = [block for block in blocks if any(call in ast.walk(part) for part in block)]
        later += body[body.index(statement) + 1 :]
        if not inner:
            names.enter_expressions(statement, later)
            return names.values
        if isinstance(statement, FUNCTIONS):
            names.forget(bound_in(statement) - declared(statement, ast.Global))
            names.forget_what(*later)
            later = []
        elif isinstance(statement, _NOT_IN_ORDER):  # what a pass of a loop sets, the next one reads
            names.forget_what(statement)
            later += [part for block in blocks if block is not inner[0] for part in block]
        else:
            names.forget_what(*(node for node in ast.iter_child_nodes(statement) if not isinstance(node, ast.stmt)))
            if isinstance(statement, ast.ClassDef):  # whose names its functions do not see
                later += [part for part in statement.body if call not in ast.walk(part)]
        body = inner[0]


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


class _Names:
    """Names with their values on the way to ``call``."""

    def __init__(self, tree: ast.Module, call: ast.Call) -> None:
        self.values: dict[str, Any] = {}
        self._call = call
        self._set_elsewhere: set[str] = set()
        self._changed_elsewhere: set[str] = set()
        for node, nested in elsewhere(tree, call):
            kinds = (ast.Global, ast.Nonlocal) if nested else (ast.Global,)
            self._set_elsewhere.update(*(inner.names for inner in ast.walk(node) if isinstance(inner, kinds)))
            self._changed_elsewhere |= used_in(node, call)

    def go_past(self, statement: ast.stmt) -> None:
        """Adds what a plain assignment sets to a literal, and removes what the statement may set or change."""
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        target, value = targets[0], getattr(statement, "value", None)
        plain = isinstance(statement, ast.Assign | ast.AnnAssign) and len(targets) == 1 and isinstance(target, ast.Name)
        if not plain or not isinstance(target, ast.Name) or value is None:
            self.forget_what(statement)
            return
        self.forget(set_in(statement))
        if not isinstance(value, ast.Name):  # else both names are of one object
            self._forget_objects(used_in(statement, self._call))
        try:
            read = value_of(value, self.values)
        except ValueError:  # not a setting: the model, the tokenizer, a config
            return
        if target.id not in self._set_elsewhere and not (target.id in self._changed_elsewhere and _changeable(read)):
            self.values[target.id] = read

    def enter_expressions(self, statement: ast.stmt, later: list[ast.stmt]) -> None:
        """Removes what comprehensions and lambdas around the call set, and for the latter what is set later."""
        for node in ast.walk(statement):
            if isinstance(node, EXPRESSIONS) and self._call in ast.walk(node):
                self.forget(bound_in(node))
                self.forget_what(*(later if isinstance(node, ast.Lambda) else ()))

    def forget_what(self, *parts: ast.AST) -> None:
        """Removes the names that ``parts`` may set, and those of objects that they may change."""
        for part in parts:
            self._forget_objects(used_in(part, self._call))
            self.forget(set_in(part))

    def forget(self, gone: set[str]) -> None:
        """Removes names."""
        for name in list(self.values) if EVERY in gone else gone:
            self.values.pop(name, None)

    def _forget_objects(self, used: set[str]) -> None:
        """Removes the lists and dicts among the names, under every name that they have."""
        changed = [self.values[name] for name in used & self.values.keys() if _changeable(self.values[name])]
        self.forget({name for name, value in self.values.items() if any(value is other for other in changed)})


def _changeable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return True
    return False


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """Lists of statements within a statement, such as the branches of an ``if``."""
    holders = [statement, *getattr(statement, "handlers", []), *getattr(statement, "cases", [])]
    fields = (getattr(holder, name, None) for holder in holders for name in ("body", "orelse", "finalbody"))
    return [field for field in fields if isinstance(field, list)]
