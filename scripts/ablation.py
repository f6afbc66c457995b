"""What each saving gives: ours with one of them taken away, in turn with ours as it is. See docs/performance.md.

python scripts/ablation.py [--threads 1] [--rounds 2] [--out benchmarks/ablation.json]
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import processor  # noqa: E402
from benchmarks.arguments import positive, quickstart_model, read_results, results_file  # noqa: E402
from benchmarks.scenarios import SCENARIOS, Scenario  # noqa: E402
from scripts.benchmark import run  # noqa: E402

QUICK, PAPER, SILENT = SCENARIOS["quickstart"], SCENARIOS["paper"], SCENARIOS["half_silent"]
COMMON, BFLOAT16 = "what all prompts begin with is shared", "bfloat16 products"
ROWS: dict[str, tuple[Scenario, Scenario]] = {
    # Saving -> (with it, without it).
    "prefix sharing in the update": (QUICK, replace(QUICK, ablate="prefix sharing in the update")),
    COMMON: (QUICK, replace(QUICK, ablate=COMMON)),
    "no padding in the update": (QUICK, replace(QUICK, ablate="no padding in the update")),
    "ended rows leave the decoder": (QUICK, replace(QUICK, ablate="ended rows leave the decoder")),
    "silent groups are dropped": (SILENT, replace(SILENT, keep_silent=True)),
    "no old pass for the first minibatch": (PAPER, replace(PAPER, ablate="no old pass for the first minibatch")),
    "layers that keep less": (QUICK, replace(QUICK, ablate="layers that keep less")),
    "weights packed once per rollout": (QUICK, replace(QUICK, ablate="weights packed once per rollout")),
    "rows filled up to whole tiles": (QUICK, replace(QUICK, ablate="rows filled up to whole tiles")),
    BFLOAT16: (QUICK, replace(QUICK, precision="fp32")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--out", type=results_file, default=ROOT / "benchmarks" / "ablation.json")
    arguments = parser.parse_args()
    if BFLOAT16 in arguments.rows and not processor.multiplies_bfloat16():
        print(f"left out: {BFLOAT16}: this processor has no units for them; all others run in float32", file=sys.stderr)
        arguments.rows = [name for name in arguments.rows if name != BFLOAT16]
    model = quickstart_model()
    results = earlier(arguments.out, arguments.threads)
    print("| without | rollout, CPU-s | update, CPU-s | peak, GiB | step, times ours |\n|---|---|---|---|---|")
    for name in arguments.rows:
        scenarios = ROWS[name]
        sides: list[list[dict[str, float]]] = [[], []]
        for _ in range(arguments.rounds):
            for side, scenario in zip(sides, scenarios, strict=True):
                here = scenario.on_this_processor()
                side.append(facts(run("ours", sys.executable, here, model, 2, arguments.threads)))
        ours, without = ({key: median(r[key] for r in side) for key in side[0]} for side in sides)
        results[name] = {"ours": ours, "without": without}
        arguments.out.write_text(json.dumps({"threads": arguments.threads, "rows": results}, indent=1) + "\n")
        cells = [f"{ours[k]:.2f} → {without[k]:.2f}" for k in ("rollout_cpu_s", "update_cpu_s", "peak_rss_gb")]
        ratio = (without["rollout_cpu_s"] + without["update_cpu_s"]) / (ours["rollout_cpu_s"] + ours["update_cpu_s"])
        print(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


def earlier(out: Path, threads: int) -> dict[str, dict[str, Any]]:
    """Rows that were measured with as many threads stay until they are run again."""
    found = read_results(out, "threads", "rows")
    return dict(found["rows"]) if found.get("threads") == threads else {}


def facts(result: dict[str, Any]) -> dict[str, float]:
    """Medians over the steps of one run."""
    steps = {key: median(step[key] for step in result["steps"]) for key in ("rollout_cpu_s", "update_cpu_s")}
    return {**steps, "peak_rss_gb": result["peak_rss_gb"]}


if __name__ == "__main__":
    main()
