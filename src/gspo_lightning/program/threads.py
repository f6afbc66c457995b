"""Thread settings that must be in the environment before torch is imported.

OpenMP's default is to spin while it waits. With any other load on the machine the spinning threads
fight for the cores that the working ones need: a rollout of 13 s was measured at 180 s. A short spin
(``GOMP_SPINCOUNT``) stays fast under other load. It has a price: sleeping threads must be woken, and an
otherwise idle machine is faster with a long spin (docs/performance.md). On macOS torch brings
LLVM's OpenMP, which spins by time (``KMP_BLOCKTIME``, 200 ms unless set): there it does not spin at all.
"""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

SPIN_COUNT = 1000
_CPU_FOLDER = Path("/sys/devices/system/cpu")
_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")
# Whether the count in the environment is this module's and not the user's.
_is_ours = False


def configure_threads() -> int:
    """Set ``OMP_NUM_THREADS`` and ``GOMP_SPINCOUNT`` (macOS: ``KMP_BLOCKTIME``) where the user has not.

    Call it before the first import of torch; later it cannot act, and a ``RuntimeWarning`` says so.
    The default count is :func:`available_cores`, divided by the number of ranks on this machine if ``torchrun``
    started them (``LOCAL_WORLD_SIZE``); :func:`share_threads` divides for others. Values that the user set are
    never changed.

    Returns:
        the thread count.

    Raises:
        SystemExit: after one line that says why: on native Windows, which is not supported, or if ``OMP_NUM_THREADS``
            or ``LOCAL_WORLD_SIZE`` is set to something that is not a count.
    """
    global _is_ours
    if sys.platform == "win32":
        raise _refusal("native Windows is not supported; use WSL2")
    if "torch" in sys.modules and "OMP_NUM_THREADS" not in os.environ:
        warnings.warn(
            "configure_threads() was called after torch was imported; set OMP_NUM_THREADS in the shell",
            RuntimeWarning,
            stacklevel=2,
        )
    ranks = _positive("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ:
        _is_ours = True
        os.environ["OMP_NUM_THREADS"] = str(_share(ranks))
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if sys.platform == "darwin":
        os.environ.setdefault("KMP_BLOCKTIME", "0")
    # OpenMP allows one count per nesting level, as in "4,2"; the outermost is ours.
    return _positive("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"].split(",")[0])


def share_threads(ranks: int) -> None:
    """Divide the cores among ``ranks`` processes that train together on this machine, unless the user set a count.

    Call it before Lightning starts the others: they inherit ``OMP_NUM_THREADS``, and with that set Lightning does not
    divide. It does nothing unless :func:`configure_threads` was called.
    """
    count = str(_share(ranks))
    if not _is_ours or os.environ["OMP_NUM_THREADS"] == count:
        return
    import torch

    os.environ["OMP_NUM_THREADS"] = count
    torch.set_num_threads(int(count))


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step instead of returning it to the system.

    A training step frees and allocates gigabytes of activations; without this every step pays again for the page
    faults (a third of the system time of the quickstart). Returns whether the C library accepted the settings; False
    if it lacks the call, which is glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 64 << 20))
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)


def available_cores() -> int:
    """Number of physical cores this process may use, within its CPU affinity and its cgroup quota.

    Hyper-threads of one core count once, because matrix products gain nothing from the second. On macOS only the
    performance cores count, as in torch: threads get equal shares, and one on an efficiency core delays the others.
    """
    if sys.platform == "darwin":
        counts = map(sysctl, ("hw.perflevel0.physicalcpu", "hw.physicalcpu"))
        return next((int(count) for count in counts if count.isdigit() and int(count) > 0), os.cpu_count() or 1)
    cpus = _affinity()
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota()))


def sysctl(name: str) -> str:
    """A value of macOS's kernel, such as ``hw.physicalcpu``; empty if it is not known."""
    try:
        result = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _share(ranks: int) -> int:
    return max(1, available_cores() // (1 if _is_bound() else ranks))


def _is_bound() -> bool:
    """Whether ``srun`` has bound this rank to a part of the job's CPUs on this machine."""
    of_the_job = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return of_the_job.isdigit() and len(_affinity()) < int(of_the_job)


def _affinity() -> set[int]:
    # Not every platform knows CPU affinity (macOS, Windows).
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """The name of the physical core that ``cpu`` belongs to; its own number if that is not known."""
    try:
        return (_CPU_FOLDER / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text(encoding="utf-8").strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """Number of cores under the cgroup's CPU quota, rounded up; very large without a quota."""
    try:
        limit, period = _QUOTA_FILE.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else math.ceil(int(limit) / int(period))


def _positive(name: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise _refusal(f"{name}={text!r} is not a positive whole number; unset it or give a count")
    return int(text)


def _refusal(line: str) -> SystemExit:
    """Prints the line; nothing is imported yet that could print it for a `UserError`."""
    print(f"error: {line}", file=sys.stderr)
    return SystemExit(2)


if __name__ == "__main__":
    print(configure_threads())
