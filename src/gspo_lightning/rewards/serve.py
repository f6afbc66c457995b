"""The other side of `worker.Worker`: a process that calls one function repeatedly until it is told to end.

It is started by path, not as a module of the package, so that it imports nothing that the function does not need.
"""

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1
HAS_PRCTL = sys.platform.startswith("linux")
LOOK_S = 1.0
"""Seconds between two checks for the parent on systems without prctl."""


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Makes Linux send this process a signal when its parent dies, however that happens.

    On other systems it only checks that the parent exists now. Called between fork and exec (`sweep_job.run_apart`) it
    can do no more: no thread survives an exec, so there a job outlives a killed sweep.
    """
    if HAS_PRCTL:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(0)


def watch(parent: int) -> None:
    """Kills this process when its parent changes: the parent has died, and a system process has taken its place."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGKILL)


def make_current(gpu: int, visible: str | None) -> None:
    """Makes a GPU the current one, which in a new process is the first, if the function's module imports torch.

    torch does so when the GPU is first used: memory of a GPU is not for functions that use none. A module that chose
    its GPUs itself, by another ``CUDA_VISIBLE_DEVICES`` than the trainer's ``visible``, keeps to the first of them:
    there the number means another GPU, or none.
    """
    torch = sys.modules.get("torch")
    if gpu and torch is not None and os.environ.get("CUDA_VISIBLE_DEVICES") == visible:
        torch.cuda._lazy_call(lambda: torch.cuda.set_device(gpu))


def main(fd: int, parent: int) -> None:
    """Receives the search path, the function and the number of a GPU, then one message of arguments per call."""
    die_with(parent)
    if not HAS_PRCTL:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
    connection = Connection(fd)
    sys.path[:], pickled, gpu = connection.recv()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # The function may print: the connection has its own descriptor.
    try:
        function = pickle.loads(pickled)
        make_current(gpu, visible)
        connection.send((True, None))
    except BaseException as error:  # noqa: BLE001  (whatever importing the user's module raised is told)
        connection.send((False, f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            pickled = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(answer(function, pickled))


def answer(function: Callable[..., Any], pickled: bytes) -> bytes:
    """Pickled: True and what the function returned, False and its error, or None and what could not be sent.

    Neither this nor the trainer uses ``Connection.send``: there torch's pickling of tensors, whose memory the other
    process would ask for with a key that it lacks, takes the place of the ordinary one.
    """
    try:
        arguments = pickle.loads(pickled)
    except BaseException as error:  # noqa: BLE001  (whatever a user's class raised is told)
        return pickle.dumps((None, f"what it is given cannot be read in another process ({_named(error)})"))
    try:
        result = function(*arguments)
    except BaseException as error:  # noqa: BLE001  (SystemExit of the function must not look like a crash)
        traceback.print_exc()
        return pickle.dumps((False, _named(error)))
    try:
        return pickle.dumps((True, result))
    except BaseException as error:  # noqa: BLE001  (as above)
        return pickle.dumps((None, f"what it returned cannot be sent from another process ({_named(error)})"))


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
