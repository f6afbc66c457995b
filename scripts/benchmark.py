"""Ours against TRL on the same work, in turn, in fresh processes. See docs/performance.md.

bash scripts/setup.sh --peers
python scripts/benchmark.py --check
python scripts/benchmark.py [--quick] [--scenarios NAME ...] [--rounds N] [--steps N] [--out benchmarks/results.json]
python scripts/benchmark.py rollout [--dtype bfloat16] [--engines transformers vllm vllm_server]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import guard, processor, vlm  # noqa: E402
from benchmarks.arguments import peers_python, positive, quickstart_model, read_results, results_file  # noqa: E402
from benchmarks.environment import environment  # noqa: E402
from benchmarks.results_plot import plot  # noqa: E402
from benchmarks.scenarios import GUARD, SCENARIOS, Scenario, guard_here, quick_here, unique_flops  # noqa: E402

WARM_UP_STEPS = 2
"""Not counted on either side: the first step touches every page of memory, the second those of the optimizer."""

Result = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["rollout"]:
        from benchmarks import rollout

        del sys.argv[1]
        rollout.main()
        return
    arguments = parse()
    peers = peers_python(ROOT)
    sides = {"ours": sys.executable}
    if peers.exists():
        sides["trl"] = str(peers)
    else:
        print("TRL is not installed (bash scripts/setup.sh --peers): measuring ours alone", file=sys.stderr)
    model = quickstart_model()
    if arguments.check or arguments.write_baseline:
        sys.exit(run_guard(model, arguments))
    results = earlier(arguments.out, arguments.threads)
    quick = [quick_here()] if arguments.quick else []
    for scenario in quick or [SCENARIOS[name].on_this_processor() for name in arguments.scenarios]:
        rates = [matmul_rate(scenario.precision, arguments.threads)]
        rounds: dict[str, list[Result]] = {side: [] for side in sides}
        for _ in range(arguments.rounds):
            for side, python in sides.items():
                path = vlm.folder(model) if scenario.images else model
                rounds[side].append(run(side, python, scenario, path, arguments.steps, arguments.threads))
            rates.append(matmul_rate(scenario.precision, arguments.threads))
        results[scenario.name] = summarise(scenario, rounds, statistics.median(rates))
        print(show(scenario, results[scenario.name]), flush=True)
        facts = {"machine": processor.name(), "threads": arguments.threads, "scenarios": results}
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
        plotted = plot(results, processor.name(), arguments.threads)
        arguments.out.with_suffix(".svg").write_text(plotted)


def earlier(out: Path, threads: int) -> dict[str, Result]:
    """Scenarios that were measured on such a machine before and stay in the file until they are measured again."""
    if not (facts := read_results(out, "machine", "threads", "scenarios")):
        return {}
    same = facts["machine"] == processor.name() and facts["threads"] == threads
    return dict(facts["scenarios"]) if same else {}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="quickstart (half in float32), one round of two steps")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--rounds", type=positive, default=2, help="times each side runs, in turn")
    parser.add_argument("--steps", type=positive, default=2, help="training steps per run that count")
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=results_file, default=ROOT / "benchmarks" / "results.json")
    parser.add_argument("--check", action="store_true", help="compare with benchmarks/baseline.json, without TRL")
    parser.add_argument("--write-baseline", action="store_true", help="write that file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 2
    return arguments


def run_guard(model: str, arguments: argparse.Namespace) -> int:
    """The exit code of ``--check`` and ``--write-baseline``."""

    scenario = guard_here()
    steps = 2 if scenario == GUARD else 1

    def measure(side: str) -> Result:
        return run(side, sys.executable, scenario, model, steps, threads=1)

    if arguments.write_baseline:
        guard.write_baseline(measure, processor.units())
        return 0
    return 0 if guard.check(measure, processor.units()) else 1


def run(side: str, python: str, scenario: Scenario, model: str, steps: int, threads: int) -> Result:
    """One fresh process; the result is its last line of output."""
    task = json.dumps({"scenario": scenario.as_dict(), "model": model, "steps": WARM_UP_STEPS + steps})
    done = subprocess.run(
        [python, "-m", f"benchmarks.worker_{side}", task],
        cwd=ROOT,
        env=environment(threads),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{side} failed on {scenario.name}:\n{done.stderr[-3000:]}")
    result: Result = json.loads(done.stdout.strip().splitlines()[-1])
    result["steps"] = result["steps"][WARM_UP_STEPS:]
    return result


def matmul_rate(precision: str, threads: int) -> float:
    """Operations per second of a square product as ours computes it, in a fresh process with the same threads."""
    code = (
        "import torch,time,sys\n"
        "from gspo_lightning.packing.products import onednn_float32\n"
        "ours=onednn_float32(torch.device('cpu')); ours.__enter__()\n"  # unnamed, it would be left at once
        f"torch.set_num_threads({threads})\n"
        f"a=torch.randn(1536,1536).to(torch.{'bfloat16' if precision == 'bf16' else 'float32'}); b=a.clone()\n"
        "[a@b for _ in range(5)]\n"
        "best=0\n"
        "for _ in range(5):\n"
        "  t=time.perf_counter(); [a@b for _ in range(10)]; best=max(best,10*2*1536**3/(time.perf_counter()-t))\n"
        "print(best)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def summarise(scenario: Scenario, rounds: dict[str, list[Result]], rate: float) -> Result:
    """Medians per side, ratios round by round, and the distance to the limit."""
    summary: Result = {"matmul_gflops": rate / 1e9, "sides": {}}
    for side, results in rounds.items():
        steps = [step for result in results for step in result["steps"]]
        medians = {key: statistics.median(step[key] for step in steps) for key in steps[0]}
        medians["step_wall_s"] = statistics.median(s["rollout_wall_s"] + s["update_wall_s"] for s in steps)
        medians["step_cpu_s"] = statistics.median(s["rollout_cpu_s"] + s["update_cpu_s"] for s in steps)
        medians["peak_rss_gb"] = statistics.median(result["peak_rss_gb"] for result in results)
        summary["sides"][side] = medians
    ours = rounds["ours"][0]
    tokens = int(summary["sides"]["ours"]["completion_tokens"])
    flops = unique_flops(scenario, ours, tokens)
    for phase, count in flops.items():
        for medians in summary["sides"].values():
            medians[f"{phase}_efficiency"] = count / rate / medians[f"{phase}_wall_s"]
    if "trl" in rounds:
        summary["ratios"] = ratios(rounds)
    return summary


def ratios(rounds: dict[str, list[Result]]) -> Result:
    """TRL / ours by round, as (smallest, median, largest)."""

    def total(result: Result, phases: tuple[str, ...], kind: str) -> float:
        return statistics.median(sum(step[f"{phase}_{kind}"] for phase in phases) for step in result["steps"])

    def spread(values: list[float]) -> list[float]:
        return [min(values), statistics.median(values), max(values)]

    pairs = list(zip(rounds["trl"], rounds["ours"], strict=True))
    both = ("rollout", "update")
    out = {"memory": spread([t["peak_rss_gb"] / o["peak_rss_gb"] for t, o in pairs])}
    for name, phases in (("step", both), ("rollout", ("rollout",)), ("update", ("update",))):
        for kind in ("wall_s", "cpu_s"):
            out[f"{name}_{kind[:-2]}"] = spread([total(t, phases, kind) / total(o, phases, kind) for t, o in pairs])
    return out


def show(scenario: Scenario, result: Result) -> str:
    """The scenario's block of text."""
    lines = [
        f"== {scenario.name}: {scenario.prompts} x {scenario.generations}, prompt {scenario.prompt_tokens}, completion "
        f"{scenario.completion_tokens}{' at most' if scenario.natural_stops else ''}, {scenario.precision}, "
        f"{result['matmul_gflops']:.0f} GFLOP/s in matrix products"
    ]
    for side, m in result["sides"].items():
        lines.append(
            f"   {side:5} step {m['step_wall_s']:6.2f} s ({m['step_cpu_s']:6.2f} CPU-s) "
            f"= rollout {m['rollout_wall_s']:5.2f} + update {m['update_wall_s']:6.2f}; "
            f"peak {m['peak_rss_gb']:5.2f} GiB; "
            f"efficiency rollout {m['rollout_efficiency']:.0%}, update {m['update_efficiency']:.0%}; "
            f"{m['completion_tokens']:.0f} completion tokens"
        )
    if "ratios" in result:
        text = ", ".join(f"{k} {v[1]:.2f} ({v[0]:.2f}-{v[2]:.2f})" for k, v in result["ratios"].items())
        lines.append(f"   TRL / ours: {text}")
        if scenario.bars:
            lines.append(f"   bars: time {scenario.bars[0]:g}, memory {scenario.bars[1]:g}")
    return "\n".join(lines)


if __name__ == "__main__":
    start = time.monotonic()
    main()
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
