"""Seconds by phase and memory of the process. None of it is reproducible, as the names ``time/`` and ``perf/`` show."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch


class Stopwatch:
    """Adds up wall seconds per phase since the last reset; a phase ends when the GPU has finished its work."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything; the step starts now."""
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        """By phase."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            if torch.cuda.is_initialized():  # only then anything was computed there
                torch.cuda.synchronize()
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self, now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
        """``time/<phase>_s``, ``time/step_s`` and tokens per second of rollout and update.

        Args:
            now: counters ``count/rollout_tokens`` and ``count/train_tokens`` after this rollout.
            before: the same after the previous rollout; empty for the first.
        """
        times = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        times["time/step_s"] = time.perf_counter() - self._start
        rates = {}
        # The time of a rollout generated ahead is that of its generation, not that of waiting for it.
        spent = {
            "rollout": self.seconds.get("rollout_ahead", self.seconds.get("rollout", 0.0)),
            "train": self.seconds.get("update", 0.0),
        }
        for name, seconds in spent.items():
            tokens = now[f"count/{name}_tokens"] - before.get(f"count/{name}_tokens", 0.0)
            rates[f"perf/{name}_tokens_per_s"] = tokens / max(seconds, 1e-9)
        return {**times, **rates}


def peak_rss_gb() -> float:
    """Peak resident memory of this process in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def rss_gb() -> float:
    """Current resident memory of this process in GiB; the peak if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return peak_rss_gb()
    return pages * resource.getpagesize() / 2**30
