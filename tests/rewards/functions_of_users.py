"""Reward functions as users write them, in a module of their own, so that a worker process can import them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time


def pid(completions, **_):
    return [float(os.getpid())] * len(completions)


def has_torch(completions, **_):
    return [float("torch" in sys.modules)] * len(completions)


async def asynchronous(completions, log_metric=None, log_extra=None, trainer_state=None):
    log_metric("mean_length", 2.0)
    log_extra("text", list(completions))
    return [float(trainer_state.global_step)] * len(completions)


def hangs(completions, **_):
    time.sleep(1000)


def hangs_with_a_child(completions, file, **_):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(file[0], "w") as out:
        out.write(f"{os.getpid()} {child.pid}")
    while True:
        pass


def raises_on_y(completions, answer, **_):
    return [1.0 if a != "y" else 1 / 0 for a in answer]


def raises_late(completions, **_):
    time.sleep(1.2)
    raise RuntimeError("the judge is down")


def dies(completions, **_):
    os._exit(7)


def closes_what_it_inherited(completions, **_):
    """As a program that makes itself a daemon does."""
    os.closerange(3, 256)
    time.sleep(20)


def not_sent_back(completions, **_):
    return lambda: None


def tensor(completions, given, **_):
    return given[0] + 1


class Unreadable:
    """Can be pickled, but not unpickled."""

    def __reduce__(self):
        return int, ("x",)


def unreadable(completions, **_):
    return Unreadable()


class SlowToSend:
    """Takes a second to be pickled, like the columns of a large rollout."""

    def __reduce__(self):
        time.sleep(1)
        return int, ("1",)


def notes_its_call(completions, file, slow, **_):
    open(file[0], "w").close()
    return [1.0] * len(completions)


class Placed:
    """Says to another process where it is at the moment."""

    place = "where it was made"

    def __getstate__(self):
        return {"place": Placed.place}

    def __call__(self):
        return self.place


class Judge:
    """Keeps a connection from call to call, as clients of a judge's server do; a connection belongs to an event loop."""

    def __init__(self):
        self.connection = None

    async def __call__(self, completions, **_):
        if self.connection is None:
            self.server = await asyncio.start_server(echo, "127.0.0.1", 0)
            self.connection = await asyncio.open_connection(*self.server.sockets[0].getsockname())
        reader, writer = self.connection
        rewards = []
        for completion in completions:
            writer.write(f"{len(completion)}\n".encode())
            rewards.append(float(await asyncio.wait_for(reader.readline(), 10)))
        return rewards


async def echo(reader, writer):
    while line := await reader.readline():
        writer.write(line)
