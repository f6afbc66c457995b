"""How the cost of a training step grows with group size, prompt, completion and batch. See docs/performance.md.

python scripts/growth.py [--threads 1] [--out benchmarks/growth.json]

Each point is a fresh process: two steps of warm-up, two that count, forced lengths, bfloat16 where the processor
multiplies it. A token is unique if it has to be computed at all: each prompt once, each completion token once.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import positive, quickstart_model, results_file  # noqa: E402
from benchmarks.scenarios import Scenario  # noqa: E402
from scripts.benchmark import run  # noqa: E402

BASE = Scenario("growth", prompts=2, generations=8, prompt_tokens=128, completion_tokens=32, precision="bf16")
SWEEPS = {
    "generations": (2, 4, 8, 16, 32),
    "prompt_tokens": (32, 128, 512, 2048),
    "completion_tokens": (16, 32, 128, 512),
    "prompts": (1, 2, 4, 8, 16),
}

Point = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), metavar="NAME")
    parser.add_argument("--out", type=results_file, default=ROOT / "benchmarks" / "growth.json")
    arguments = parser.parse_args()
    model = quickstart_model()
    results: dict[str, list[Point]] = {}
    for name in arguments.sweeps:
        results[name] = []
        for value in SWEEPS[name]:
            results[name].append(point(name, value, model, arguments.threads))
            arguments.out.write_text(json.dumps({"threads": arguments.threads, "sweeps": results}, indent=1) + "\n")
        print(table(name, results[name]), flush=True)


def point(name: str, value: int, model: str, threads: int) -> Point:
    """Medians of one setting, in CPU seconds and GiB."""
    scenario = replace(BASE, **{name: value}).on_this_processor()  # type: ignore[arg-type]
    result = run("ours", sys.executable, scenario, model, 2, threads)
    prompt = scenario.prompts * scenario.prompt_tokens
    sampled = scenario.prompts * scenario.generations * scenario.completion_tokens
    return {
        "value": value,
        "unique_tokens": prompt + sampled,
        "sampled_tokens": sampled,
        "rollout_cpu_s": median(step["rollout_cpu_s"] for step in result["steps"]),
        "update_cpu_s": median(step["update_cpu_s"] for step in result["steps"]),
        "peak_rss_gb": result["peak_rss_gb"],
    }


def table(name: str, points: list[Point]) -> str:
    """One Markdown table, with the exponents fitted over it."""
    lines = [
        f"| {name} | unique tokens | update, CPU-s | per 1000 unique tokens | rollout, CPU-s | peak, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        per = 1000 * p["update_cpu_s"] / p["unique_tokens"]
        lines.append(
            f"| {p['value']:.0f} | {p['unique_tokens']:.0f} | {p['update_cpu_s']:.2f} | {per:.2f} "
            f"| {p['rollout_cpu_s']:.2f} | {p['peak_rss_gb']:.2f} |"
        )
    by_value = [f"{phase} {exponent(points, 'value', f'{phase}_cpu_s'):.2f}" for phase in ("update", "rollout")]
    by_tokens = exponent(points, "unique_tokens", "update_cpu_s")
    lines.append(f"\nExponents over {name}: {', '.join(by_value)}; of the update over unique tokens: {by_tokens:.2f}\n")
    return "\n".join(lines)


def exponent(points: list[Point], across: str, of: str) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = ([math.log(p[key]) for p in points] for key in (across, of))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


if __name__ == "__main__":
    main()
