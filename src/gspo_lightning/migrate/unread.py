"""What a Python text does with the config that it makes, and that is not read: said, lest it be taken for converted."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from gspo_lightning.migrate.scopes import FUNCTIONS, home_of, scopes_around

_ONLY_LOOK = frozenset({
    "asdict", "debug", "dir", "dumps", "from_pretrained", "get_peft_model", "getattr", "hasattr", "id", "info",
    "init", "isinstance", "len", "log", "pformat", "pprint", "print", "repr", "str", "type", "warning",
})  # fmt: skip
"""Functions that change nothing of a config that they are given."""
_LONGEST = 100


def unread(tree: ast.Module, call: ast.Call) -> dict[int, str]:
    """Line number -> statement after which the config may be another one than ``call`` has made it.

    That is: an attribute ``args`` of something else is set (``trainer.args.beta = 0.1``), an object is given to a
    function other than those that look at it and than classes, is changed by a method or as a dict, or is set under
    another name. What is set under its first name is refused by `parse_config`.
    """
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = _Uses(tree, call, parents)
    return {node.lineno: _short(node) for node in found.changes()}


class _Uses:
    """The places in a text that hold the config of a call."""

    def __init__(self, tree: ast.Module, call: ast.Call, parents: dict[ast.AST, ast.AST]) -> None:
        self.tree, self.call, self.parents = tree, call, parents
        self.names: dict[str, ast.expr] = {ast.unparse(target): call for target in self._targets_of(call)}
        self.first = set(self.names)
        scope = scopes_around(tree, call)[-1]
        if isinstance(scope, FUNCTIONS) and self._is_returned(scope):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == scope.name:
                    self.names |= {ast.unparse(target): node for target in self._targets_of(node)}
        for name in sorted(self._names(), key=lambda name: name.lineno):
            self.names |= {ast.unparse(target): name for target in self._targets_of(name)}

    def changes(self) -> Iterator[ast.stmt]:
        """Statements that change the config, or may."""
        held = [n for n in ast.walk(self.tree) if isinstance(n, ast.Name | ast.Attribute) and self._is_config(n)]
        for node in (self.call, *held):
            above = self.parents[node]
            given_to = self.parents[above] if isinstance(above, ast.keyword) else above
            is_given = isinstance(given_to, ast.Call) and node is not given_to.func and self._may_change(given_to)
            if is_given or (isinstance(above, ast.Attribute) and self._sets(above, ast.unparse(node))):
                yield self._statement(node)

    def _is_config(self, node: ast.Name | ast.Attribute) -> bool:
        if isinstance(node, ast.Attribute) and node.attr == "args" and isinstance(node.ctx, ast.Load):
            return True
        if (maker := self.names.get(ast.unparse(node))) is None or not isinstance(node.ctx, ast.Load):
            return False
        if not isinstance(node, ast.Name):
            return True
        homes = [home_of(node.id, scopes_around(self.tree, place)) for place in (node, maker)]
        scopes = [scopes_around(self.tree, place)[-1] for place in (node, maker)]
        is_before = (node.lineno, node.col_offset) < (maker.end_lineno or 0, maker.end_col_offset or 0)
        return homes[0] is homes[1] and not (scopes[0] is scopes[1] and is_before)

    def _may_change(self, above: ast.Call) -> bool:
        """Whether a function that is given the config may change it; a class, such as a trainer, keeps it."""
        name = ast.unparse(above.func).split(".")[-1]
        shown = self.parents[above]
        if name == "vars" and isinstance(shown, ast.Call) and ast.unparse(shown.func).split(".")[-1] in _ONLY_LOOK:
            return False
        return not (name[:1].isupper() or name in _ONLY_LOOK)

    def _sets(self, above: ast.Attribute, name: str) -> bool:
        """Whether an attribute of the config is set, or a method called that changes it."""
        if not isinstance(above.ctx, ast.Load):
            return name not in self.first
        is_called = isinstance(self.parents[above], ast.Call)
        return above.attr == "__dict__" or (is_called and above.attr.startswith(("set", "update", "__set")))

    def _targets_of(self, value: ast.AST) -> list[ast.expr]:
        above = self.parents[value]
        if isinstance(above, ast.Assign) and above.value is value:
            return [target for target in above.targets if isinstance(target, ast.Name | ast.Attribute)]
        if isinstance(above, ast.AnnAssign | ast.NamedExpr) and above.value is value:
            return [above.target]
        return []

    def _is_returned(self, scope: ast.AST) -> bool:
        returned = [node.value for node in ast.walk(scope) if isinstance(node, ast.Return)]
        return any(value is self.call or (value and ast.unparse(value) in self.first) for value in returned)

    def _names(self) -> list[ast.Name]:
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.Name) and self._is_config(node)]

    def _statement(self, node: ast.AST) -> ast.stmt:
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node


def _short(statement: ast.stmt) -> str:
    text = ast.unparse(statement).splitlines()[0]
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
