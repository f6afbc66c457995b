"""The configuration of a run as a tree on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from gspo_lightning.config.targets import LOOKUPS
from gspo_lightning.screen import visible


def config_tree(plain: Mapping[str, Any]) -> Tree:
    """A resolved config as a tree: groups as branches, their settings on one line, nested objects as branches too."""
    tree = Tree("[bold]Configuration[/bold]")
    leaves = {key: value for key, value in plain.items() if not _is_branch(value)}
    _add_leaves(tree, leaves)
    for key, value in plain.items():
        if _is_branch(value):
            _add_branch(tree, str(key), value)
    return tree


def looked_up(node: Any) -> str | None:
    """The path of the object that a lookup node names; None for any other node."""
    is_lookup = isinstance(node, Mapping) and str(node.get("_target_")) in LOOKUPS and "path" in node
    return str(node["path"]) if is_lookup else None


def _add_branch(tree: Tree, key: str, node: Mapping[str, Any]) -> None:
    path = looked_up(node)
    label = str(node.get("_target_", "")).rsplit(".", 1)[-1] if path is None else path
    branch = tree.add(f"[bold]{_plain(key)}[/bold]" + (f" [cyan]{_plain(label)}[/cyan]" if label else ""))
    if path is not None:
        return
    _add_leaves(branch, {name: value for name, value in node.items() if not _is_branch(value)})
    for name, value in node.items():
        if _is_branch(value):
            _add_branch(branch, str(name), value)


def _add_leaves(tree: Tree, leaves: Mapping[str, Any]) -> None:
    words = [f"{_plain(key)}=[green]{_plain(value)}[/green]" for key, value in leaves.items() if key[0] != "_"]
    if words:
        tree.add("  ".join(words))


def _plain(value: Any) -> str:
    """The value as text without markup of the tree or control sequences of the terminal."""
    return escape(visible(str(value)))


def _is_branch(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)
