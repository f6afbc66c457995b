"""What the two workers share: the scenario, the clock, and the line of JSON at the end."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.scenarios import Scenario


class Clock:
    """Wall and CPU seconds by phase, one dict per step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        wait_for_device()
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            wait_for_device()
            self.now[f"{phase}_wall_s"] = self.now.get(f"{phase}_wall_s", 0.0) + time.perf_counter() - wall
            self.now[f"{phase}_cpu_s"] = self.now.get(f"{phase}_cpu_s", 0.0) + time.process_time() - cpu

    def end_step(self, **facts: float) -> None:
        """Closes the step."""
        self.steps.append({**self.now, **facts})
        self.now = {}


def wait_for_device() -> None:
    """Until a GPU has done what it was told: its work is asynchronous."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def job() -> tuple[Scenario, str, int]:
    """Scenario, model folder and number of steps, from the command line."""
    arguments = json.loads(sys.argv[1])
    return Scenario(**arguments["scenario"]), arguments["model"], arguments["steps"]


def report(clock: Clock, **facts: Any) -> None:
    """Prints the result as the last line of standard output."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("\n" + json.dumps({"steps": clock.steps, "peak_rss_gb": peak, **facts}), flush=True)
