"""Has this change made training slower or larger? Ratios to a plain loop in the same run, against a file of ratios.

python scripts/benchmark.py --check             # exit code 1 where something is worse
python scripts/benchmark.py --write-baseline    # after a change that is meant to be
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

BASELINE = Path(__file__).parent / "baseline.json"
SLOWER, LARGER = 0.85, 1.05
"""Allowed: 15 % less of the speed, which is noisy, and 5 % more of the memory, which is not."""

Result = dict[str, Any]


def measure(run: Callable[[str], Result], rounds: int = 2) -> dict[str, float]:
    """Ratios of the two sides, in turn, each the better of ``rounds``; memory and tokens of ours.

    Args:
        run: side (``ours``, ``plain``) -> result of a fresh process.
        rounds: times each side runs.
    """
    results: dict[str, list[Result]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        for side, found in results.items():
            found.append(run(side))

    def best(side: str, phase: str) -> float:
        return min(statistics.median(step[f"{phase}_cpu_s"] for step in result["steps"]) for result in results[side])

    ours = results["ours"][0]
    return {
        "rollout_speed": best("plain", "rollout") / best("ours", "rollout"),
        "update_speed": best("plain", "update") / best("ours", "update"),
        "memory": min(r["peak_rss_gb"] for r in results["ours"]) / min(r["peak_rss_gb"] for r in results["plain"]),
        "processed_tokens": float(ours["steps"][-1]["processed_tokens"]),
    }


def verdict(now: dict[str, float], before: dict[str, float]) -> list[tuple[str, float, float, bool]]:
    """(what, baseline, now, whether it is good enough)."""
    rows = []
    for name, old in before.items():
        new = now[name]
        limit = SLOWER * old if name.endswith("_speed") else old * (LARGER if name == "memory" else 1.0)
        good = new >= limit if name.endswith("_speed") else new <= limit
        rows.append((name, old, new, good))
    return rows


def check(now: dict[str, float]) -> bool:
    """Prints the table; whether everything is good enough."""
    rows = verdict(now, json.loads(BASELINE.read_text()))
    for name, old, new, good in rows:
        print(f"{name:17} baseline {old:8.3f}   now {new:8.3f}   {'ok' if good else 'WORSE'}")
    return all(good for *_, good in rows)
