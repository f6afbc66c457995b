"""JSON that every reader takes, of records that may hold anything."""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import Any

# The image itself: base64, possibly with its signs written as %3B and %2C. A completion may begin with "data:" too.
_ADDRESS = re.compile(r"(data:[\w.+/-]{0,80})[^,\s]{0,80}(?:;|%3b)base64(?:,|%2c)", re.IGNORECASE)


def to_json(content: Any, indent: int | None = None) -> str:
    """Strict JSON: non-finite numbers become null, and objects that JSON cannot hold (an image) become their type.

    In a single line, of which a run writes one per completion, long images in base64 (``data:`` addresses) become
    their kind and length; with ``indent`` they stay, for the thumbnails of the report.
    """
    return json.dumps(_plain(content, indent is None), ensure_ascii=False, indent=indent, allow_nan=False)


def _plain(value: Any, short: bool) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item, short) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, short) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return _short_address(value) if short else value
    if value is None or isinstance(value, int):
        return value
    item = None
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or torch, as reward functions log them
        with contextlib.suppress(AttributeError, RuntimeError):  # a tensor without data
            item = value.item()
    return _plain(item, short) if isinstance(item, int | float) else f"<{type(value).__name__}>"


def _short_address(text: str) -> str:
    """``<data:image/png, N characters>`` for a long ``data:`` address; any other text as it is."""
    found = _ADDRESS.match(text) if len(text) > 200 else None
    return text if found is None else f"<{found[1]}, {len(text)} characters>"
