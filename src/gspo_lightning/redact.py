"""Secrets stay out of what a run writes and shows: ``config.yaml``, the report, the screen."""

from __future__ import annotations

import os
import re
from typing import Any

MASK = "***"
_NAME = re.compile(r"(?i)(^|[_.-])(token|secret|password|passwd|api_?key|access_?key|private_?key|credentials?)$")
_SHORT = 6
"""A value of fewer characters is looked for under its own key alone: it may be a word that stands anywhere."""


def redacted(plain: Any) -> Any:
    """A copy with ``***`` for the values of keys that name a secret, and for values of such environment variables."""
    known = [value for name, value in os.environ.items() if _NAME.search(name) and len(value) >= _SHORT]
    return _redacted(plain, known)


def _redacted(node: Any, known: list[str]) -> Any:
    if isinstance(node, dict):
        return {k: MASK if _is_secret(k, v) else _redacted(v, known) for k, v in node.items()}
    if isinstance(node, list):
        return [_redacted(item, known) for item in node]
    if isinstance(node, str):
        for value in known:
            node = node.replace(value, MASK)
    return node


def _is_secret(key: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and _NAME.search(str(key)) is not None
