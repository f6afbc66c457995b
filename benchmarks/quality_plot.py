"""What `scripts/quality_per_time.py` measured, in words and as a picture."""

from __future__ import annotations

from typing import Any


def summary(curves: dict[str, Any]) -> str:
    return ""


def plot(curves: dict[str, Any]) -> str:
    return ""
