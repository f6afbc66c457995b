"""Scripts that start in a fraction of the time: as forks of a process that has imported what they import.

Of the seven seconds of `python train.py experiment=micro max_rollouts=1` five are imports. A fork runs the script as a
process of its own would: as ``__main__``, with its arguments, folder, streams, signals, exit handlers and exit status.

A script whose environment has something else in it that imports read is a process of its own; and so is every script
with ``GSPO_TEST_FORK=0``, and where there is no ``os.pidfd_open``, which is Linux's.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import itertools
import json
import multiprocessing.process
import os
import select
import socket
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


_AT_FIRST = dict(os.environ)
_TURNS = itertools.count()
READ_BY_IMPORTS = (
    "ACCELERATE", "ATEN", "BNB", "CUDA", "DNNL", "GOMP", "GSPO_ALLOWED", "HF", "HOME", "KMP", "LANG", "LC_", "LD_", "MALLOC",
    "MKL", "NCCL", "OMP", "ONEDNN", "OPENBLAS", "PYTHON", "TEMP", "TMP", "TOKENIZERS", "TORCH", "TRANSFORMERS", "XDG",
)  # fmt: skip
"""What the names of such variables begin with."""
SET_BY_IMPORTS = ("TORCHINDUCTOR_CACHE_DIR",)


def can_fork(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a script with this environment may be a fork."""
    if not hasattr(os, "pidfd_open") or environment.get("GSPO_TEST_FORK") == "0":
        return False
    changed = {name for name, _ in environment.items() ^ _AT_FIRST.items() if name not in SET_BY_IMPORTS}
    return not any(name.startswith(READ_BY_IMPORTS) for name in changed)


class Script:
    """A script in a fork. Its methods are those of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        cwd: str | Path,
        stdout: int,
        stderr: int,
        env: Mapping[str, str] = os.environ,
    ) -> None:
        """Starts it; ``stdout`` and ``stderr`` are file descriptors."""
        self.returncode: int | None = None
        self._answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            request = json.dumps([[*map(str, arguments)], str(cwd), dict(env)]).encode()
            socket.send_fds(_server(next(_TURNS) % 2), [request], [stdout, stderr, theirs.fileno()])
        self.pid = int(self._answers.recv(100))

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self.returncode = int(self._answers.recv(100))
            except TimeoutError:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0) from None
            self._answers.close()
        return self.returncode


def start_script(
    arguments: Sequence[str | Path],
    cwd: str | Path,
    stdout: int,
    stderr: int,
    env: Mapping[str, str] = os.environ,
) -> Script | subprocess.Popen[bytes]:
    """A script with its arguments, in a fork if it may be one, else in a process of its own."""
    if can_fork(env):
        return Script(arguments, cwd, stdout, stderr, env)
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


@functools.cache
def _server(number: int) -> socket.socket:
    """The socket of one of two servers. They take turns: each has an order of sets of its own, as processes have.

    A server ends when the socket is closed, as by the end of this process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        environment = {name: value for name, value in _AT_FIRST.items() if name != "PYTHONHASHSEED"}
        subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
    return ours


def _import_all() -> None:
    """What runs of the micro model import."""
    gc.disable()
    import hydra.core.plugins  # noqa: F401
    import peft  # noqa: F401 - as a run with an adapter does
    import transformers.models.llama.modeling_llama  # noqa: F401

    import gspo_lightning.cli  # noqa: F401

    gc.enable()
    gc.freeze()


def _serve(control: socket.socket) -> tuple[list[str], str, dict[str, str]]:
    """Forks until the other end of ``control`` is closed, then exits. Returns in each fork, with what was asked."""
    running: dict[int, tuple[int, socket.socket]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in running:
                poll.unregister(ready)
                os.close(ready)
                pid, answers = running.pop(ready)
                _answer(answers, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                answers.close()
                continue
            request, files, _, _ = socket.recv_fds(control, 1 << 20, 3)
            if not request:
                sys.exit()
            answers = socket.socket(fileno=files.pop())
            if not (pid := os.fork()):
                for number, file in enumerate(files, start=1):
                    os.dup2(file, number)
                for file in (*files, *running):
                    os.close(file)
                for opened in (control, answers, *(other for _, other in running.values())):
                    opened.close()
                return tuple(json.loads(request))
            for file in files:
                os.close(file)
            _answer(answers, pid)
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, answers
            poll.register(pidfd, select.POLLIN)


def _answer(answers: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the test may have ended without waiting
        answers.send(str(number).encode())


def _become(arguments: list[str], cwd: str, environment: dict[str, str]) -> None:
    """Runs the script as the interpreter would have run it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.process.ORIGINAL_DIR = cwd
    # Imports have drawn seeds, which would be the same in all forks. (Python draws its own anew.)
    torch, numpy = sys.modules["torch"], sys.modules["numpy"]
    torch.seed()
    numpy.random.seed()
    for number, name in ((1, "stdout"), (2, "stderr")):  # made for other files: only some can seek, as pipes cannot
        old, file = getattr(sys, name), io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        stream = io.TextIOWrapper(file, old.encoding, old.errors, line_buffering=name == "stderr")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = arguments[0]
    main.__dict__["__builtins__"] = __builtins__
    exec(compile(Path(arguments[0]).read_bytes(), arguments[0], "exec"), main.__dict__)


if __name__ == "__main__":
    _import_all()
    with socket.socket(fileno=int(sys.argv[1])) as _control:
        _asked = _serve(_control)
    _become(*_asked)
