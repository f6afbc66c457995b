"""The other side of `worker.Worker`: a process that calls one function again and again until it is told to end.

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
from multiprocessing.connection import Connection

PR_SET_PDEATHSIG = 1
HAS_PRCTL = sys.platform.startswith("linux")
LOOK_S = 1.0
"""Seconds between two looks for the parent where there is no prctl."""


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """Linux sends this process a signal when its parent dies, however that happens.

    Elsewhere it only looks whether the parent is there now. Called between fork and exec (`sweep_job.run_apart`) it
    can do no more: no thread lives on through an exec, so there a job outlives a sweep that is killed.
    """
    if HAS_PRCTL:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(0)


def watch(parent: int) -> None:
    """Kills this process when its parent is another one: the first has died, and the system's has taken its place."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGKILL)


def main(fd: int, parent: int) -> None:
    """Receives the search path and the function, then one message of arguments per call."""
    die_with(parent)
    if not HAS_PRCTL:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
    connection = Connection(fd)
    sys.path[:], pickled = connection.recv()
    # What the function prints is nobody's protocol: the connection has a descriptor of its own.
    try:
        function = pickle.loads(pickled)
        connection.send((True, None))
    except BaseException as error:  # noqa: BLE001  (whatever importing the user's module raised is told)
        connection.send((False, f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
            pickle.dumps(answer)
        except BaseException as error:  # noqa: BLE001  (SystemExit of the function must not look like a crash)
            traceback.print_exc()
            answer = (False, f"{type(error).__name__}: {error}")
        connection.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
