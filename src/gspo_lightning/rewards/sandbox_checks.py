"""Refuses, at the start of a run, a system on which right code would not get the reward that it deserves."""

from __future__ import annotations

import functools
import resource
import shutil
import sys
from typing import Any

from gspo_lightning.errors import UserError
from gspo_lightning.rewards import seccomp
from gspo_lightning.rewards.sandbox import Isolation, Limits, SandboxError, session

_PROBE = """
import os, socket
def probe():
    def can(action):
        try:
            action()
        except OSError:
            return False
        return True
    writes = can(lambda: open("/usr/lib/probe", "w"))
    return [os.path.exists("/etc/passwd"), can(socket.socket), writes, os.getuid() == 0]
"""
_RIGHT = "def probe():\n    return 42\n"


@functools.cache
def require(isolation: Isolation) -> None:
    """Refuses a system that cannot isolate, unless the user chose no isolation.

    Raises:
        UserError: names what is missing. The check runs code in the sandbox that tries to get out; without isolation it
            runs right code, because a process that cannot start would give every completion the reward for failure.
    """
    if isolation == "unsafe":
        _require_an_answer()
        return
    way_out = "or run on a disposable machine with sandbox=unsafe"
    if not sys.platform.startswith("linux") or not seccomp.supported():
        raise UserError(f"the code reward needs Linux on x86_64 or aarch64 to isolate what the model wrote; {way_out}")
    if shutil.which("bwrap") is None:
        raise UserError(f"the code reward needs bubblewrap (apt-get install bubblewrap), {way_out}")
    try:
        seen = _probed(_PROBE, isolation)
    except SandboxError as error:
        raise UserError(f"bubblewrap cannot isolate here (are user namespaces off?): {error}; {way_out}") from error
    if seen != [False] * 4:
        raise UserError(f"bubblewrap does not isolate here (files, network, writing, root: {seen}); {way_out}")


def check_limits(limits: Limits) -> None:
    """Refuses limits above the hard ones of this process, which a sandbox inherits and cannot raise.

    Right code that stays within the settings would get the reward of failure.

    Raises:
        UserError: names the setting and the limit of the system.
    """
    mib = 2**20
    for name, kind, unit, flag in (
        ("memory_mb", resource.RLIMIT_AS, mib, "v"),
        ("disk_mb", resource.RLIMIT_FSIZE, mib, "f"),
        ("cpu_s", resource.RLIMIT_CPU, 1, "t"),
    ):
        asked, hard = getattr(limits, name), resource.getrlimit(kind)[1]
        if (name, sys.platform) != ("memory_mb", "darwin") and hard != resource.RLIM_INFINITY and hard < asked * unit:
            raise UserError(
                f"limits.{name}={asked} is more than the {hard / unit:.4g} that this system allows (`ulimit -H{flag}`)"
                "; lower it, or raise the system's limit"
            )


def _probed(code: str, isolation: Isolation) -> Any:
    with session(code, "functions", Limits(), isolation) as process:
        process.receive(), process.receive()
        return process.call("probe")


def _require_an_answer() -> None:
    try:
        found = _probed(_RIGHT, "unsafe")
    except (SandboxError, OSError) as error:
        found = error
    if found != 42:
        raise UserError(
            f"the code reward with sandbox=unsafe cannot run correct code here ({found}); see what `ulimit -Ha` and "
            f"`{sys.executable} -I -S -c pass` say"
        )
