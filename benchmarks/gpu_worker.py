"""What the two sides of `scripts/gpu_benchmark.py` share: a process that answers each case with a line of JSON.

And what both are compared with.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Case = dict[str, Any]


def answer(run: Callable[[Case], Case]) -> None:
    """Runs the cases of the command line; one that fails says so and does not take the others with it."""
    for case in json.loads(sys.argv[1]):
        on_gpu = case["device"] == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            result = run(case)
            result["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
        except Exception as error:  # noqa: BLE001 - it is printed, as the row of the table
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        print("\n" + json.dumps({"case": case, **result}), flush=True)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()


def matmul_rate() -> float:
    """Operations per second of a large bfloat16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)
