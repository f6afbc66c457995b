"""What this machine computes with: numbers are compared with those of its like alone."""

from __future__ import annotations

import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Flags of /proc/cpuinfo, the widest first, and the units for products that they stand for."""


def name() -> str:
    """The name of the processor, and whether it has units for bfloat16 matrices."""
    line = next((line for line in _facts().splitlines() if line.startswith("model name")), ":")
    found = line.split(":", 1)[1].strip() or platform.processor() or platform.machine()
    return found + (" with AMX" if units() == "AMX" else "")


def units() -> str:
    """What it multiplies matrices with; the machine type where that is not known."""
    flags = _facts().split()
    return next((units for flag, units in UNITS.items() if flag in flags), platform.machine())


def multiplies_bfloat16() -> bool:
    """Whether it has units for products of bfloat16; without them torch needs a hundred times as long as in float32."""
    return units() in ("AMX", "AVX-512 with bfloat16")


def _facts() -> str:
    try:
        return CPUINFO.read_text()
    except OSError:
        return ""
