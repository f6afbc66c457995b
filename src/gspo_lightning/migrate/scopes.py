"""Which names the parts of a Python text set and use, each in its own scope. No code is ever executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator

EVERY = "*"
"""The name that ``from m import *`` sets."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
EXPRESSIONS = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
"""Expressions with a scope of their own."""
_APART = (*FUNCTIONS, ast.ClassDef, *EXPRESSIONS)
_SHOWN_BY = ("print", "len")


def scopes_around(tree: ast.Module, node: ast.AST) -> list[ast.AST]:
    """The text and the functions and classes around ``node``, the outermost first."""
    kinds = (*FUNCTIONS, ast.ClassDef)
    return [tree, *(outer for outer in ast.walk(tree) if isinstance(outer, kinds) and node in _within(outer))]


def home_of(name: str, scopes: list[ast.AST]) -> ast.AST:
    """The scope whose variable ``name`` is, within the last of ``scopes``."""
    for scope in reversed(scopes[1:]):
        if name in declared(scope, ast.Global):
            return scopes[0]
        readable = scope is scopes[-1] or not isinstance(scope, ast.ClassDef)
        if readable and name in bound_in(scope) and name not in declared(scope, ast.Nonlocal):
            return scope
    return scopes[0]


def elsewhere(tree: ast.Module, call: ast.Call) -> list[tuple[ast.AST, bool]]:
    """Functions and classes that may have run before ``call``, and whether they stand in a function around it.

    They are those of the text and of the functions around the call, without the latter and what is nested deeper.
    """
    scopes = scopes_around(tree, call)
    deferred = any(isinstance(scope, FUNCTIONS) for scope in scopes)
    return [
        (node, scope is not tree)
        for scope in scopes
        for part in _inside(scope)
        for node in _own(part)
        if isinstance(node, (*FUNCTIONS, ast.ClassDef))
        and node not in scopes
        and (deferred or node.lineno < call.lineno)
    ]


def declared(scope: ast.AST, kind: type[ast.Global] | type[ast.Nonlocal]) -> set[str]:
    """Names that a function or class itself declares ``global`` or ``nonlocal``."""
    return {name for part in _inside(scope) for node in _own(part) if isinstance(node, kind) for name in node.names}


def bound_in(scope: ast.AST) -> set[str]:
    """Arguments of a function, class, or comprehension, and what it sets."""
    arguments = getattr(scope, "args", None)
    named = {node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg)} if arguments else set()
    return named.union(*(set_in(part) for part in _inside(scope)))


def set_in(root: ast.AST) -> set[str]:
    """Names that ``root`` sets or removes in the scope that it stands in, ``*`` among them for all."""
    return {name for node in _own(root) for name in _set_by(node)}


def used_in(root: ast.AST, without: ast.AST) -> set[str]:
    """Names whose object ``root`` may change or hand on: it does more than show or compare them.

    What ``without`` does is left out, and what is a variable of a function or comprehension in ``root``.
    """
    names: set[str] = set()
    todo: list[tuple[ast.AST, frozenset[str]]] = [(root, frozenset())]
    while todo:
        node, local = todo.pop()
        if node is without:
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local:
            names.add(node.id)
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and node.target.id not in local:
            names.add(node.target.id)
        if isinstance(node, _APART):
            todo += [(part, local) for part in _outside(node)]
            # What a class sets, its functions do not see, and its body reads the text's until then.
            bound = set() if isinstance(node, ast.ClassDef) else bound_in(node) - declared(node, ast.Global)
            todo += [(part, local | bound) for part in _inside(node)]
        else:
            shown = list(_shown(node))
            todo += [(part, local) for part in ast.iter_child_nodes(node) if part not in shown]
    return names


def _shown(node: ast.AST) -> Iterator[ast.AST]:
    """Names that the node only reads."""
    parts: list[ast.AST] = []
    if isinstance(node, ast.Compare):
        parts = [node.left, *node.comparators]
    elif isinstance(node, ast.FormattedValue):
        parts = [node.value]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _SHOWN_BY:
        parts = list(node.args)
    return (part for part in parts if isinstance(part, ast.Name))


def _own(root: ast.AST) -> Iterator[ast.AST]:
    """``root`` and the nodes in it that run in the scope that it stands in."""
    todo = [root]
    while todo:
        node = todo.pop()
        yield node
        todo += _outside(node) if isinstance(node, _APART) else ast.iter_child_nodes(node)


def _outside(scope: ast.AST) -> list[ast.AST]:
    """Parts of a function, class or comprehension that run in the scope around it."""
    if isinstance(scope, ast.ClassDef):
        return [*scope.decorator_list, *scope.bases, *scope.keywords]
    if isinstance(scope, (*FUNCTIONS, ast.Lambda)):
        defaults = [node for node in (*scope.args.defaults, *scope.args.kw_defaults) if node is not None]
        return [*getattr(scope, "decorator_list", []), *defaults]
    walrus = [node.target for node in ast.walk(scope) if isinstance(node, ast.NamedExpr)]
    return [scope.generators[0].iter, *walrus] if isinstance(scope, EXPRESSIONS[1:]) else []


def _inside(scope: ast.AST) -> list[ast.AST]:
    """Parts of a function, class or comprehension that run in its own scope."""
    if isinstance(scope, EXPRESSIONS[1:]):
        return list(ast.iter_child_nodes(scope))
    body = getattr(scope, "body", [])
    return body if isinstance(body, list) else [body]


def _within(scope: ast.AST) -> Iterator[ast.AST]:
    return (node for part in _inside(scope) for node in ast.walk(part))


def _set_by(node: ast.AST) -> list[str]:
    """Names that the node itself sets or removes."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return [node.id]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
    if isinstance(node, ast.MatchMapping):
        return [node.rest] if node.rest else []
    if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler, ast.MatchAs, ast.MatchStar)):
        return [node.name] if node.name else []
    return []
