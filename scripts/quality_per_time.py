"""Reward against wall-clock time: the quickstart, ours and TRL, seed by seed (docs/performance.md).

bash scripts/setup.sh --peers
python scripts/quality_per_time.py [--seeds 0 1 2] [--rollouts 20] [--threads N] [--out benchmarks/quality.json]

Task, prompts and their order, reward, model, precision, objective, minibatches and optimizer are the same on both
sides. Time is that of training: no start-up, no measuring on held-out prompts.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.arguments import peers_python, positive, quickstart_model, read_results, results_file  # noqa: E402
from benchmarks.environment import environment  # noqa: E402
from benchmarks.quality_plot import plot, summary  # noqa: E402

Curve = dict[str, list[float]]
"""``reward`` of each rollout and the ``seconds`` of training before it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rollouts", type=positive, default=20)
    parser.add_argument("--threads", type=positive, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=results_file, default=ROOT / "benchmarks" / "quality.json")
    parser.add_argument("--plot-only", action="store_true", help="draw what --out holds")
    arguments = parser.parse_args()
    if not arguments.plot_only:
        if not peers_python(ROOT).exists():
            sys.exit("error: TRL is not installed; run bash scripts/setup.sh --peers")
        measure(arguments.seeds, arguments.rollouts, arguments.threads, arguments.out)
    if not (results := read_results(arguments.out, "curves")):
        sys.exit(f"error: {arguments.out} is not there; --plot-only draws what an earlier measurement wrote")
    print(summary(results["curves"]))
    arguments.out.with_suffix(".svg").write_text(plot(results["curves"]))


def measure(seeds: list[int], rollouts: int, threads: int, out: Path) -> None:
    """Runs both sides for each seed; what is done is on disk after each of them."""
    results: dict[str, Any] = {"threads": threads, "rollouts": rollouts, "curves": {"ours": {}, "trl": {}}}
    for seed in seeds:
        for side, run in (("ours", run_ours), ("trl", run_trl)):
            results["curves"][side][str(seed)] = curve = run(seed, rollouts, environment(threads))
            out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{side} seed {seed}: {curve['seconds'][-1]:.0f} s", flush=True)


def run_ours(seed: int, rollouts: int, environment: dict[str, str]) -> Curve:
    """`train.py` as it is, without the validations that the quickstart begins and ends with."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "train.py", f"seed={seed}", f"max_rollouts={rollouts}", "data.task.num_validation=8",
            "export.enabled=false", f"hydra.run.dir={folder}",
        ]  # fmt: skip
        if code := subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode:
            sys.exit(code)  # it has said why
        with (Path(folder) / "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["reward/mean"]]
    ends = list(accumulate(float(row["time/step_s"]) for row in rows))
    return {"reward": [float(row["reward/mean"]) for row in rows], "seconds": [0.0, *ends[:-1]]}


def run_trl(seed: int, rollouts: int, environment: dict[str, str]) -> Curve:
    """TRL's GRPOTrainer with the same settings, in its own environment."""
    command = [str(peers_python(ROOT)), "-m", "benchmarks.quality_trl", quickstart_model(), str(seed), str(rollouts)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    curve: Curve = json.loads(done.stdout.strip().splitlines()[-1])
    return curve


if __name__ == "__main__":
    main()
