"""Facts about the machine of a run, which make its speed comparable."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from gspo_lightning.program.threads import sysctl


def machine_facts() -> dict[str, Any]:
    """``cpu``, ``cpu_count`` (of this process), ``memory_gb``, ``gpu``, ``os``, ``python`` and ``torch``.

    ``memory_gb`` (GiB) is None if the system does not report it, ``gpu`` is None without a GPU.
    """
    return {
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


_CPU_INFO = Path("/proc/cpuinfo")


def _cpu_name() -> str:
    if sys.platform == "darwin" and (brand := sysctl("machdep.cpu.brand_string")):
        return brand
    facts: dict[str, str] = {}
    if _CPU_INFO.exists():
        for line in re.findall(r"^([^:\n]+?)\s*:[ \t]*(.+)$", _CPU_INFO.read_text(encoding="utf-8"), re.MULTILINE):
            facts.setdefault(*line)
    if "model name" in facts:
        return facts["model name"].strip()
    if "CPU implementer" in facts:  # ARM has numbers for vendors and for their cores
        return f"{platform.machine()} implementer {facts['CPU implementer']} part {facts.get('CPU part', 'unknown')}"
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
