"""What each argument of a config node does, as something that can be looked at: an observer per ``_target_``.

`test_every_key.py` builds a node twice, as its file has it and with one value changed, and demands that the two
observations differ. An observation is what the object does (rewards, prompts, logged lines, weights), or, where this
machine cannot do it, what arrives at the library's boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gspo_lightning.config.build import build
from gspo_lightning.errors import UserError

ORACLE = Path(__file__).parents[1] / "letters.jsonl"


@dataclass(frozen=True)
class Probe:
    """One node of one file, its observer, and a changed value for each argument."""

    overrides: list[str]
    """Choose the file."""
    path: str
    """Of the node in the composed config."""
    observe: Callable[[dict[str, Any], Path], Any]
    """From the resolved node and an empty folder to what is compared."""
    changes: dict[str, Any]
    common: dict[str, Any] = field(default_factory=dict)
    """Set in both."""


def built(node: dict[str, Any]) -> Any:
    return build(node)


def or_error(action: Callable[[], Any], *others: type[Exception]) -> Any:
    """What the action gives, or the one line that refuses it."""
    try:
        return action()
    except (UserError, *others) as error:
        return str(error)
