"""A long run of the micro model, watched from outside: memory, open files, threads and speed must stay flat.

    bash scripts/soak.sh [ROLLOUTS, default 2000]

Samples /proc of the training process, and compares the second quarter of the run with the last one. Exit code 1 where
memory has grown by 1 % or more, where there are more files or threads, or where a rollout takes 10 % longer.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST = 200


@dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    rollouts: int
    rss_mb: float
    files: int
    threads: int


def sample(pid: int, metrics: Path) -> Sample | None:
    """The process now; None once it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(os.listdir(f"/proc/{pid}/fd"))
        rss_mb = int(status["VmRSS"].split()[0]) / 1024
    except (OSError, KeyError):
        return None
    rollouts = max(0, metrics.read_text().count("\n") - 1) if metrics.exists() else 0
    return Sample(rollouts, rss_mb, files, int(status["Threads"]))


def watch(folder: Path, rollouts: int) -> list[Sample]:
    """Runs the training and returns the samples, two a second."""
    command = [
        sys.executable, str(ROOT / "train.py"), "experiment=micro", f"max_rollouts={rollouts}",
        f"hydra.run.dir={folder}", "print_config=false", "callbacks.progress.every_n_rollouts=200",
        # So slow that there is always something to learn: a model that knows it all skips its updates.
        "checkpoint.every_n_rollouts=50", "optimizer.lr=1e-7",
    ]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    samples = []
    while process.poll() is None:
        if (now := sample(process.pid, folder / "metrics.csv")) is not None:
            samples.append(now)
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"the run failed with exit code {process.returncode}")
    return samples


def quarters(values: list[Any]) -> tuple[list[Any], list[Any]]:
    """The second and the last quarter."""
    size = len(values)
    return values[size // 4 : size // 2], values[3 * size // 4 :]


def verdict(samples: list[Sample], step_s: list[float]) -> list[tuple[str, float, float, bool]]:
    """(what, second quarter, last quarter, whether it is flat)."""
    during = [s for s in samples if 0 < s.rollouts < len(step_s)]
    before, after = quarters(during)
    rows = []
    for name, least in (("rss_mb", 1.01), ("files", 1.0), ("threads", 1.0)):
        old, new = (statistics.median(getattr(s, name) for s in part) for part in (before, after))
        rows.append((name, old, new, new < old * least if least > 1 else new <= old))
    old, new = (statistics.median(part) for part in quarters(step_s))
    rows.append(("step_s", old, new, new < 1.1 * old))
    return rows


def enough(text: str) -> int:
    """A number of rollouts, for argparse; with fewer the quarters would hold next to no samples."""
    if not text.isdecimal() or int(text) < LEAST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rollouts of at least {LEAST}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="soak.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rollouts", nargs="?", type=enough, default=2000, metavar="ROLLOUTS")
    rollouts = parser.parse_args().rollouts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        samples = watch(folder, rollouts)
        with (folder / "metrics.csv").open(newline="") as file:
            step_s = [float(row["time/step_s"]) for row in csv.DictReader(file) if row["time/step_s"]]
    rows = verdict(samples, step_s)
    for what, before, after, flat in rows:
        print(f"{what:8} second quarter {before:9.4g}   last quarter {after:9.4g}   {'flat' if flat else 'GROWS'}")
    sys.exit(0 if all(flat for *_, flat in rows) else 1)


if __name__ == "__main__":
    main()
