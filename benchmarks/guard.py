"""Has this change made training slower or larger? Ratios to a plain loop in the same run, against a file of ratios.

python scripts/benchmark.py --check             # exit code 1 where something is worse
python scripts/benchmark.py --write-baseline    # after a change that is meant to be

The file has a baseline for each kind of processor: one with matrix units gains less by computing less.
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

ROUNDS, MOST_ROUNDS = 2, 5
"""Times both sides run, and where something looks worse."""
SIDES = ("ours", "plain")

Result = dict[str, Any]


def add_round(run: Callable[[str], Result], results: dict[str, list[Result]]) -> None:
    """Runs both sides once, in turn.

    Args:
        run: side (``ours``, ``plain``) -> result of a fresh process.
        results: by side; added to.
    """
    for side in SIDES:
        results.setdefault(side, []).append(run(side))


def summary(results: dict[str, list[Result]]) -> dict[str, float]:
    """Ratios of the two sides, each at its best round; memory and tokens of ours."""

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


def check(run: Callable[[str], Result], units: str) -> bool:
    """Measures and prints the table; whether everything is good enough.

    A disturbed round makes a side look slow, never fast: what looks worse is measured again, up to `MOST_ROUNDS`.

    Args:
        run: as for `add_round`.
        units: of this processor; what a ratio is depends on them.
    """
    before = json.loads(BASELINE.read_text()).get(units)
    if before is None:
        print(f"no baseline for a processor with {units}: nothing to compare with (--write-baseline writes one)")
        return True
    results: dict[str, list[Result]] = {}
    rows: list[tuple[str, float, float, bool]] = []
    for number in range(1, MOST_ROUNDS + 1):
        add_round(run, results)
        rows = verdict(summary(results), before)
        if number >= ROUNDS and all(good for *_, good in rows):
            break
    for name, old, new, good in rows:
        print(f"{name:17} baseline {old:8.3f}   now {new:8.3f}   {'ok' if good else 'WORSE'}")
    return all(good for *_, good in rows)


def write_baseline(run: Callable[[str], Result], units: str) -> None:
    """Measures and writes what `check` compares with on processors of this kind."""
    results: dict[str, list[Result]] = {}
    for _ in range(MOST_ROUNDS):
        add_round(run, results)
    baselines = {**json.loads(BASELINE.read_text()), units: summary(results)}
    BASELINE.write_text(json.dumps(baselines, indent=1) + "\n")
