"""Runs the quickstart for several seeds, one process each, and prints the table of docs/quickstart.md.

python scripts/quickstart_seeds.py [--seeds 0 1 2 3 4] [--out outputs/seeds] [overrides ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "seeds")
    arguments, overrides = parser.parse_known_args()
    for seed in arguments.seeds:
        folder = arguments.out.resolve() / str(seed)
        command = [sys.executable, "train.py", f"seed={seed}", f"hydra.run.dir={folder}", *overrides]
        if code := subprocess.run(command, cwd=ROOT).returncode:
            sys.exit(code)  # it has said why
    print(table([arguments.out / str(seed) for seed in arguments.seeds]))


def table(folders: list[Path]) -> str:
    """A Markdown table of the runs' summaries."""
    lines = [
        "| seed | sampled accuracy | greedy accuracy | gain (sampled) | training time | tokens/s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for folder in folders:
        s = json.loads((folder / "summary.json").read_text())
        lines.append(
            f"| {s['seed']} | {s['val_sampled_before']:.3f} → {s['val_sampled_after']:.3f} "
            f"| {s['val_accuracy_before']:.3f} → {s['val_accuracy_after']:.3f} "
            f"| +{s['val_sampled_after'] - s['val_sampled_before']:.3f} | {s['wall_s']:.0f} s "
            f"| {s['tokens_per_s']:.0f} | {s['peak_rss_gb']:.2f} GiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
