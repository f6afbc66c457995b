"""Throughput on one GPU with random weights of well-known sizes, beside TRL where it is installed.

python scripts/gpu_benchmark.py [--parts table sweeps variants] [--out benchmarks/gpu.json] [--tiny]

Nothing is downloaded. TRL is taken from GSPO_PEERS_VENV (default .venv-peers) or from this environment; without it
ours is measured alone. docs/performance.md has what it printed. ``--tiny`` tries the program out on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.arguments import peers_python, positive, results_file  # noqa: E402
from benchmarks.gpu_models import MODELS  # noqa: E402
from benchmarks.gpu_worker import matmul_rate  # noqa: E402
from benchmarks.scenarios import VISUAL_TOKENS, Scenario, unique_flops  # noqa: E402

WARM_UP_STEPS = 1
TABLE = Scenario("table", prompts=8, generations=8, prompt_tokens=256, completion_tokens=128, precision="bf16")
SWEEP = Scenario("sweep", prompts=8, generations=8, prompt_tokens=256, completion_tokens=256, precision="bf16")
SWEEPS = {
    "generations": (2, 4, 8, 16, 32),
    "prompt_tokens": (64, 256, 1024, 4096, 16384),
    "completion_tokens": (64, 256, 1024, 4096),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "model.attention=flex": {"attention": "flex"},
    "model.attention=sdpa": {"attention": "sdpa"},
    "model.compile=true": {"compile": True},
}

Case = dict[str, Any]

LEFT_OUT = "left out: --seconds were over"


def main() -> None:
    arguments = parse()
    device = "cpu" if arguments.tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device is visible to torch; --tiny tries the program out on a CPU")
    names = ["tiny", "tiny-vl"] if arguments.tiny else [name for name in MODELS if not name.startswith("tiny")]
    facts: dict[str, Any] = {"torch": torch.__version__, "device": "cpu"}
    if device == "cuda":
        facts |= {"device": torch.cuda.get_device_name(), "matmul_tflops": matmul_rate() / 1e12}
        print(f"{facts['device']}, torch {torch.__version__}, bfloat16 products {facts['matmul_tflops']:.0f} TFLOP/s")
    end = time.monotonic() + arguments.seconds
    rate = facts.get("matmul_tflops", float("nan")) * 1e12

    def measure(part: str, side: str, python: str, cases: list[Case]) -> None:
        """Adds the results of a part to the facts."""
        facts[part] = collect(side, python, cases, end, lambda so_far: save({**facts, part: so_far}, arguments.out))
        save(facts, arguments.out)

    table = [case(name, TABLE, device, arguments.steps) for name in names]
    for entry in table:
        if MODELS[entry["model"]].vision is not None:
            text = 128  # a token per character: the question alone is about 100
            entry["scenario"] = replace(TABLE, images=True, prompt_tokens=VISUAL_TOKENS + text).as_dict()
    if "table" in arguments.parts:
        measure("ours", "ours", sys.executable, table)
        if (peer := peer_python()) is not None:
            # One step that counts: each takes as long as ten of ours.
            measure("trl", "trl", peer, [entry | {"steps": WARM_UP_STEPS + 1} for entry in table])
        print(show_table(facts, rate), flush=True)
    if "variants" in arguments.parts:
        cases = [case(names[0], SWEEP, device, 2, random=True, name=n, **options) for n, options in VARIANTS.items()]
        measure("variants", "ours", sys.executable, cases)
        print(show_updates(facts["variants"], rate, lambda c: str(c["name"])), flush=True)
    if "sweeps" in arguments.parts:
        cases = [
            case(names[0], replace(SWEEP, **{key: value}), device, 2, random=True, sweep=key)  # type: ignore[arg-type]
            for key, values in SWEEPS.items()
            for value in (values[:2] if arguments.tiny else values)
        ]
        measure("sweeps", "ours", sys.executable, cases)
        print(show_updates(facts["sweeps"], rate, lambda c: f"{c['sweep']} {c['scenario'][c['sweep']]}"), flush=True)
    results = [result for part in ("ours", "variants", "sweeps") for result in facts.get(part, [])]
    if any(result.get("error", LEFT_OUT) != LEFT_OUT for result in results):
        sys.exit(1)


def save(facts: dict[str, Any], out: Path) -> None:
    """Written whole or not at all, after every case: a run that is killed keeps what it has."""
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    temporary.replace(out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["table", "sweeps", "variants"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--steps", type=positive, default=2, help="of our side of the table that count")
    parser.add_argument("--seconds", type=float, default=threading.TIMEOUT_MAX, help="what does not fit is left out")
    parser.add_argument("--out", type=results_file, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--tiny", action="store_true", help="a random model of no size, on the CPU")
    return parser.parse_args()


def case(model: str, scenario: Scenario, device: str, steps: int, **options: Any) -> Case:
    """One line of work for a worker; ``steps`` of it count."""
    steps += WARM_UP_STEPS
    return {"model": model, "device": device, "steps": steps, "scenario": scenario.as_dict(), **options}


def peer_python() -> str | None:
    """The Python that has TRL; None if none has."""
    if (python := peers_python(ROOT)).exists():
        return str(python)
    if importlib.util.find_spec("trl") is not None:
        return sys.executable
    print("TRL is not installed (bash scripts/setup.sh --peers): measuring ours alone", file=sys.stderr)
    return None


def collect(
    side: str, python: str, cases: list[Case], end: float, keep: Callable[[list[Case]], None] = lambda results: None
) -> list[Case]:
    """Results of a fresh process, case by case; one that failed or was not reached by ``end`` has an ``error``.

    ``keep`` is given the results so far, after each.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [python, "-m", f"benchmarks.gpu_{side}", json.dumps(cases)]
    start, results = time.monotonic(), []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        timer = threading.Timer(max(0.0, min(end - start, threading.TIMEOUT_MAX)), process.kill)
        timer.daemon = True
        timer.start()
        for line in process.stdout:
            if line.startswith('{"case"'):
                result = json.loads(line)
                if "steps" in result:
                    result["steps"] = result["steps"][WARM_UP_STEPS:]
                results.append(result)
                keep(results)
                elapsed = time.monotonic() - start
                print(f"{elapsed:4.0f} s  {side}  {shortly(result)}", file=sys.stderr, flush=True)
        if process.wait() or len(results) < len(cases):
            errors.seek(0)
            print(errors.read()[-2000:], file=sys.stderr)
        timer.cancel()
    why = LEFT_OUT if time.monotonic() >= end else "the process ended before"
    return results + [{"case": case, "error": why} for case in cases[len(results) :]]


def shortly(result: Case) -> str:
    """One line while it runs."""
    if "error" in result:
        return f"{result['case']['model']}: {result['error']}"
    phases = ", ".join(f"{phase} {seconds(result, phase):.2f} s" for phase in ("rollout", "update"))
    return f"{result['case']['model']}: {phases}, peak {result['peak_gb']:.1f} GiB"


def seconds(result: Case, phase: str) -> float:
    """Median over the steps that count."""
    return median(step[f"{phase}_wall_s"] for step in result["steps"])


def unique_tokens(scenario: Scenario) -> int:
    """Every prompt once, every completion token once."""
    return scenario.prompts * (scenario.prompt_tokens + scenario.generations * scenario.completion_tokens)


def update_flops(ours: Case) -> float:
    """Operations that the update of our side's case cannot do without; frozen weights need no gradient of their own."""
    scenario = Scenario(**ours["case"]["scenario"])
    tokens = scenario.prompts * scenario.generations * scenario.completion_tokens
    flops = unique_flops(scenario, ours, tokens)["update"]
    return flops * (2 / 3 if MODELS[ours["case"]["model"]].lora else 1)


def show_table(facts: dict[str, Any], rate: float) -> str:
    """Both sides of every model."""
    lines = [
        "| model | side | rollout, s | update, s | unique tokens/s in the update | MFU | peak, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    others = facts.get("trl", [])
    for number, ours in enumerate(facts["ours"]):
        name, scenario = ours["case"]["model"], Scenario(**ours["case"]["scenario"])
        pair = [("ours", ours), *([("TRL", others[number])] if number < len(others) else [])]
        for side, result in pair:
            if "error" in result or "error" in ours:
                lines.append(f"| {name} | {side} | {result.get('error', '')[:120]} | | | | |")
                continue
            update = seconds(result, "update")
            lines.append(
                f"| {name} | {side} | {seconds(result, 'rollout'):.2f} | {update:.2f} | "
                f"{unique_tokens(scenario) / update:.0f} | {update_flops(ours) / update / rate:.0%} | "
                f"{result['peak_gb']:.1f} |"
            )
        if len(pair) == 2 and not any("error" in result for _, result in pair):
            trl = pair[1][1]
            both = [seconds(r, "rollout") + seconds(r, "update") for r in (trl, ours)]
            lines.append(
                f"| | TRL / ours | {seconds(trl, 'rollout') / seconds(ours, 'rollout'):.1f} | "
                f"{seconds(trl, 'update') / seconds(ours, 'update'):.1f} | step {both[0] / both[1]:.1f} | | "
                f"{trl['peak_gb'] / max(ours['peak_gb'], 1e-9):.1f} |"
            )
    return "\n".join(lines)


def show_updates(results: list[Case], rate: float, label: Any) -> str:
    """The update alone, on random completions."""
    lines = ["| case | unique tokens | update, s | unique tokens/s | MFU | peak, GiB |", "|---|---|---|---|---|---|"]
    for result in results:
        entry, scenario = result["case"], Scenario(**result["case"]["scenario"])
        if "error" in result:
            lines.append(f"| {label(entry)} | {result['error'][:120]} | | | | |")
            continue
        update, tokens = seconds(result, "update"), unique_tokens(scenario)
        lines.append(
            f"| {label(entry)} | {tokens} | {update:.3f} | {tokens / update:.0f} | "
            f"{update_flops(result) / update / rate:.0%} | {result['peak_gb']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    start = time.monotonic()
    main()
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
