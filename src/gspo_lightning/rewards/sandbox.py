"""Runs code that a model wrote, in a process that can neither harm nor fool the trainer.

Isolation is that of bubblewrap (https://github.com/containers/bubblewrap): separate namespaces for processes,
network, IPC and mounts, an empty file system with the standard library read-only and one small folder in memory, a
seccomp filter (`seccomp.py`), resource limits, and a wall clock. Killing it kills all its children, and
it dies with the trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gspo_lightning.errors import UserError
from gspo_lightning.rewards import bubblewrap, seccomp

Isolation = Literal["bubblewrap", "unsafe"]

_RUNNER = (Path(__file__).parent / "sandbox_runner.py").read_text(encoding="utf-8")


class SandboxError(Exception):
    """The code in the sandbox failed, broke a limit, or ended before it answered. Never an error of the trainer."""


@dataclass(frozen=True)
class Limits:
    """Limits of one run. All its processes together can take at most max_processes x memory_mb + disk_mb of memory."""

    wall_s: float = 10.0
    """Wall-clock seconds from start to end."""
    cpu_s: int = 5
    """CPU seconds of one process."""
    memory_mb: int = 512
    """Address space of one process."""
    disk_mb: int = 16
    """Size of its folder, which is in memory, and of one file."""
    max_processes: int = 4
    """Number of processes and threads together."""
    output_mb: int = 4
    """Size of what it may print or answer; more ends it."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise UserError(f"limits.{name}={value} must be above 0")
        if self.memory_mb < 64:
            raise UserError(f"limits.memory_mb={self.memory_mb} is less than Python needs to start; give at least 64")


class Session:
    """One process in the sandbox. Every exchange with it is limited by the rest of its wall-clock time."""

    def __init__(self, process: subprocess.Popen[bytes], limits: Limits) -> None:
        self.process = process
        self.deadline = time.monotonic() + limits.wall_s
        self.room = limits.output_mb << 20
        assert process.stdin and process.stdout
        self.stdin, self.stdout = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        self.buffer = b""

    def call(self, function: str, *arguments: Any) -> Any:
        """The value that a function of the candidate returns for JSON arguments.

        Raises:
            SandboxError: it raised, its answer is not JSON or too long, or it did not answer in time.
        """
        self.pump(frame({"call": function, "args": arguments}), want=0)
        reply = self.receive()
        if "value" not in reply:
            raise SandboxError(str(reply.get("error", "no answer"))[:100])
        return reply["value"]

    def receive(self) -> dict[str, Any]:
        """The next message of the process."""
        self.pump(b"", want=4)
        (length,) = struct.unpack(">I", self.buffer[:4])
        if length > self.room:
            raise SandboxError("output limit")
        self.pump(b"", want=4 + length)
        body, self.buffer = self.buffer[4 : 4 + length], self.buffer[4 + length :]
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise SandboxError("its answer is not JSON") from error
        if not isinstance(message, dict):
            raise SandboxError("its answer is not a message")
        return message

    def run(self, text: str) -> str:
        """Everything that the program prints, given ``text`` as its input.

        Raises:
            SandboxError: its exit status is not 0 (an exception, a signal, a limit), it printed too much, or it did not
                end in time.
        """
        self.pump(text.encode(errors="replace"), want=None)
        try:
            status = self.process.wait(max(0.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise SandboxError("wall clock") from error
        if status != 0:
            raise SandboxError(f"exit status {status}")
        return self.buffer.decode(errors="replace")

    def pump(self, data: bytes, want: int | None) -> None:
        """Writes ``data`` and reads until the buffer holds ``want`` bytes; None: closes the input, reads to the end."""
        view = memoryview(data)
        while view or want is None or len(self.buffer) < want:
            if not view and want is None:
                self._close_input()
            if (left := self.deadline - time.monotonic()) <= 0:
                raise SandboxError("wall clock")
            poller = select.poll()  # select.select accepts no descriptor above 1023
            poller.register(self.stdout, select.POLLIN)
            if view:
                poller.register(self.stdin, select.POLLOUT)
            ready = dict(poller.poll(left * 1000))
            if self.stdin in ready:
                try:
                    view = view[os.write(self.stdin, view[:65536]) :]
                except BrokenPipeError:
                    view = memoryview(b"")
            if self.stdout in ready:
                part = os.read(self.stdout, 65536)
                self.buffer += part
                self.room -= len(part)
                if self.room < 0:
                    raise SandboxError("output limit")
                if not part and want is None:
                    return
                if not part:
                    raise SandboxError("it ended before it answered")

    def _close_input(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()


def frame(message: Any) -> bytes:
    """A message of the runner's protocol."""
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


@contextlib.contextmanager
def session(
    code: str, mode: Literal["functions", "program"], limits: Limits, isolation: Isolation
) -> Iterator[Session]:
    """Context of a process for ``code``; at the end it and all its children are killed.

    ``functions``: the code is executed as a module, then `Session.call` calls its functions. ``program``: it runs as
    ``__main__`` with standard input and output.
    """
    as_root = isolation == "bubblewrap" and os.geteuid() == 0
    allowed = {
        "cpu_s": limits.cpu_s,
        "memory_mb": limits.memory_mb,
        "disk_mb": limits.disk_mb,
        # Without namespaces the kernel would count every process of the user.
        "max_processes": None if isolation == "unsafe" else limits.max_processes,
    }
    # A separate user id: the kernel counts processes by user, and it can kill no other process.
    uid = random.SystemRandom().randrange(1 << 30, (1 << 31) - 2) if as_root else None
    parent = os.getpid() if isolation == "unsafe" else None
    order = {"code": code, "mode": mode, "limits": allowed, "uid": uid, "parent": parent}
    with tempfile.TemporaryDirectory(prefix="gspo-code-", ignore_cleanup_errors=True) as folder:
        process = _start(isolation, limits, folder, as_root)
        try:
            opened = Session(process, limits)
            opened.pump(frame(order), want=0)
            yield opened
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    assert pipe is not None
                    pipe.close()


def _start(isolation: Isolation, limits: Limits, folder: str, as_root: bool) -> subprocess.Popen[bytes]:
    python = ["-I", "-S", "-B", "-X", "utf8", "-c", _RUNNER]
    if isolation == "unsafe":
        return _popen([sys.executable, *python], folder)
    read_end, write_end = os.pipe()
    try:
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(seccomp.program())
        isolated = [*bubblewrap.command(limits.disk_mb, as_root), "--seccomp", str(read_end), "--", bubblewrap.PYTHON]
        return _popen([*isolated, *python], folder, read_end)
    finally:
        os.close(read_end)


def _popen(command: list[str], folder: str, *fds: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        pass_fds=fds,
        start_new_session=True,
        bufsize=0,
    )
