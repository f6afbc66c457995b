"""A warm process that calls one function and can really be stopped: it is killed, with all its children."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gspo_lightning.errors import UserError

_HERE = "set timeout_s to null to run it in this one"
_SERVE = Path(__file__).parent / "serve.py"


class WorkerError(Exception):
    """The function raised in the worker; the message is its type and text."""


class WorkerTimeoutError(Exception):
    """The function took too long; its process has been killed."""


class Worker:
    """Calls ``function`` in a separate process, started fresh (not forked, which would break torch's threads).

    It starts at the first call, stays warm, and ends with `close`, with this object, or with this process (even if
    killed), whichever comes first. Its start does not count towards a timeout. Where the function's module imports
    torch, ``cuda`` means the GPU that is current where the process is started.

    Args:
        function: importable by name, or an instance of an importable class.

    Raises:
        UserError: the function cannot be sent to another process.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        try:
            pickled = pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UserError(f"it cannot be sent to another process ({error}); define it in a module") from error
        if _names_main(pickled):
            raise UserError("it is defined in the script that was started; move it into a separate module")
        self._ready, self._idle = False, True
        self._is_over = False
        """Whether `kill` ended it: what has not begun in another thread by then must not start it anew."""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._kill: Callable[[], object] = lambda: None

    def __reduce__(self) -> tuple[type[Worker], tuple[Callable[..., Any]]]:
        """Copies have processes of their own: callbacks that average weights copy the whole module."""
        return Worker, (self.function,)

    def start(self) -> None:
        """Starts the process without waiting for it; it ends with the calling thread, which must outlive its use."""
        self._is_over = False
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", str(_SERVE), str(theirs.fileno()), str(os.getpid())]
        with theirs:
            # A new session: Ctrl-C reaches only the trainer, and killing the group reaches the children too.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._connection = Connection(ours.detach())
        self._kill = weakref.finalize(self, _end, self._process, self._connection)
        self._ready = False
        # As it is now: what it says of itself may depend on the GPU that its rank was given since it was made.
        self._connection.send((sys.path, pickle.dumps(self.function), _current_gpu()))

    def __call__(self, *arguments: Any, timeout_s: float | None) -> Any:
        """The result of the function.

        Raises:
            WorkerTimeoutError: after ``timeout_s`` seconds; the process is gone, the next call starts a new one.
            WorkerError: the function raised, or its process died.
            UserError: the function cannot be loaded there, or what it is given or returns cannot be sent.
        """
        try:
            pickled = pickle.dumps(arguments)
        except Exception as error:  # whatever pickling a user's object raises
            raise UserError(f"what it is given cannot be sent to another process ({error}); {_HERE}") from error
        if self._is_over:
            raise WorkerError("its process was ended before it began")
        self.start()
        try:
            if not self._ready:
                self._wait_until_ready()
            assert self._connection is not None
            self._connection.send_bytes(pickled)
            return self._receive(timeout_s)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            assert self._process is not None
            self._end_group()  # it may live on without its end of the connection; one that ends keeps its code
            code = self._process.wait()
            self.close()
            raise WorkerError(f"its process ended with exit code {code}") from error
        except BaseException:
            if not self._idle:
                self.close()
            raise

    def _wait_until_ready(self) -> None:
        try:
            self._receive(None)
        except WorkerError as error:
            raise UserError(f"it cannot be loaded in another process ({error})") from error
        self._ready = True

    def _receive(self, timeout_s: float | None) -> Any:
        assert self._connection is not None
        self._idle = False
        if not self._connection.poll(timeout_s):
            raise WorkerTimeoutError(str(timeout_s))
        pickled = self._connection.recv_bytes()
        self._idle = True
        try:
            ok, answer = pickle.loads(pickled)
        except Exception as error:  # whatever a user's class raised
            raise UserError(
                f"what it returned cannot be read from another process ({type(error).__name__}: {error}); {_HERE}"
            ) from error
        if ok is None:
            raise UserError(f"{answer}; {_HERE}")
        if not ok:
            raise WorkerError(answer)
        return answer

    def kill(self) -> None:
        """Ends the process; a call that waits for it in another thread, or is about to, raises `WorkerError`.

        After that only `start` starts it.
        """
        self._is_over = True
        self._end_group()

    def _end_group(self) -> None:
        process = self._process  # which another thread may set to None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kills the process, if it runs, and its children."""
        self._kill()
        self._process = self._connection = None
        self._idle = True


def _names_main(pickled: bytes) -> bool:
    """Whether what is pickled needs the script that was started: for a function, or what it wraps or belongs to."""
    return b"__main__" in pickled and any(name == "__main__" for _, name, _ in pickletools.genops(pickled))


def _current_gpu() -> int:
    """Number of the GPU of this rank and thread; 0 without one, and where torch is not needed."""
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else 0


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
