"""Jobs over several servers that may fail at any moment: each job ends exactly once, or the run stops in bounded time.

One thread decides (the caller's), others only wait for answers. A server takes jobs once it has been prepared: found
alive, on the right model, with the right weights. After any failure its jobs return to the queue and the server pauses;
after that pause, which doubles from failure to failure, it is prepared again as if it were new.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gspo_lightning.errors import UserError, check_time_limit
from gspo_lightning.rollout.engine import EngineUnavailableError
from gspo_lightning.rollout.http_client import Server, ServerError
from gspo_lightning.screen import visible

Job = TypeVar("Job")
Result = TypeVar("Result")

Following = Future[Callable[[], Job | None]]
"""Once it has ended, its result is called in the thread of `ServerPool.run`, and makes the next job or None."""

_MAX_PAUSE_S = 30.0
_SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class Patience:
    """How long to wait for what. Each bound is for a single wait; a run that ends never waits twice for the same."""

    ready_timeout_s: float = 600.0
    """Longest wait for the first server at the start of a run."""
    request_timeout_s: float = 600.0
    """Longest wait for one answer: the completions of a prompt, of which a server has ``max_in_flight`` at a time."""
    give_up_after_s: float = 120.0
    """Longest later wait without a usable server; a first attempt to load weights may take ``request_timeout_s``."""
    pause_s: float = 0.5
    """Pause before a failed server is tried again; doubles up to 30 s."""
    max_attempts: int = 8
    """Most failed answers to the same prompt, over all servers."""
    max_in_flight: int = 64
    """Most prompts that a server is sent at a time; time in its own queue would count against the timeout."""

    def __post_init__(self) -> None:
        check_time_limit("rollout.engine.request_timeout_s", self.request_timeout_s)
        for name, least in (("ready_timeout_s", 0), ("give_up_after_s", 0), ("pause_s", 0), ("max_attempts", 1)):
            if not getattr(self, name) >= least:
                raise UserError(f"rollout.engine.{name}={getattr(self, name)} must be at least {least}")


class Member:
    """One server of the pool and what is known about it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.ready = self.preparing = False
        self.told = False  # whether a line has said that others do its work
        self.in_flight = self.failures = 0
        self.retry_at = 0.0
        self.trouble = f"{server.url} has not answered yet"

    def rest(self, error: Exception, pause_s: float) -> None:
        """Takes the server out of use after a failure; jobs in flight that fail together count as one."""
        if self.ready or self.preparing:
            doubled = pause_s * 2 ** min(self.failures, 64)  # no float holds 2**1024
            self.retry_at = time.monotonic() + min(doubled, _MAX_PAUSE_S)
            self.failures += 1
        self.ready, self.trouble = False, str(error)


class ServerPool:
    """The servers of a whole run.

    Args:
        servers: at least one.
        prepare: called in another thread before a server is used: makes it ready or raises `ServerError`.
        accept: called in the caller's thread with what ``prepare`` returned; raises `ServerError` for a server that
            must not be used, any other exception to end the run.
        patience: the bounds.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        prepare: Callable[[Server], Any],
        accept: Callable[[Server, Any], None],
        patience: Patience,
    ) -> None:
        self.members = [Member(server) for server in servers]
        self.prepare, self.accept, self.patience = prepare, accept, patience
        self.ever_ready = False

    def run(
        self,
        jobs: Sequence[Job],
        work: Callable[[Server, Job], Result],
        next_of: Callable[[int, Result], Following[Job] | None] | None = None,
    ) -> list[Result]:
        """Results of ``work(server, job)``, in the order of the jobs; if it raises `ServerError`, another is tried.

        Args:
            jobs: what to do.
            work: called in other threads.
            next_of: called in this thread with a job's number and result; the job that follows, if one does, takes the
                number of the one before, and its result replaces that.

        Raises:
            EngineUnavailableError: no server was usable for as long as `Patience` allows.
        """
        for member in self.members:
            # The weights may have changed since; a run that ended during a preparation has not reset that flag, and one
            # whose end was interrupted (a second Ctrl-C) has left the servers aborted.
            member.ready = member.preparing = False
            member.in_flight = 0
            member.server.revive()
        return _Run(self, jobs, work, next_of).results()


class _Run(Generic[Job, Result]):
    """One call of `ServerPool.run`."""

    def __init__(
        self,
        pool: ServerPool,
        jobs: Sequence[Job],
        work: Callable[[Server, Job], Result],
        next_of: Callable[[int, Result], Following[Job] | None] | None,
    ) -> None:
        self.pool, self.jobs, self.work, self.next_of = pool, list(jobs), work, next_of
        self.done: dict[int, Result] = {}
        self.served_by: dict[int, Member] = {}
        """Job number -> the server of the job before it, which may have kept what the next one begins with."""
        self.queue = deque(range(len(jobs)))
        self.attempts = [0] * len(jobs)
        self.futures: dict[Future[Any], tuple[Member, int | None]] = {}
        self.following: dict[Following[Job], tuple[Member, int, Result]] = {}
        """What follows a job: the server that did it, its number and its result."""
        self.start = self.last_ready = self.last_said = time.monotonic()

    def results(self) -> list[Result]:
        servers = len(self.pool.members)
        jobs = min(len(self.jobs), servers * self.pool.patience.max_in_flight)
        threads = ThreadPoolExecutor(max_workers=jobs + servers)
        try:
            while len(self.done) < len(self.jobs):
                self._prepare(threads)
                self._hand_out(threads)
                self._check_patience()
                for future in self._finished():
                    (self._settle if future in self.futures else self._follow)(future)
        finally:
            for following in self.following:
                following.cancel()
            # What is still in progress belongs to servers that are not needed (any more).
            for member, _ in self.futures.values():
                member.server.abort()
                member.preparing = False
            threads.shutdown(wait=True, cancel_futures=True)
            for member in self.pool.members:
                member.in_flight = 0
                member.server.revive()
        return [self.done[number] for number in range(len(self.jobs))]

    def _finished(self) -> Set[Future[Any]]:
        """The futures that have ended, once one has or it is time to look again."""
        futures: dict[Future[Any], Any] = self.futures | self.following
        if not futures:  # all servers rest; waiting for nothing would return at once
            time.sleep(self._next_look())
        return wait(futures, timeout=self._next_look(), return_when=FIRST_COMPLETED).done

    def _prepare(self, threads: ThreadPoolExecutor) -> None:
        for member in self.pool.members:
            if not member.ready and not member.preparing and time.monotonic() >= member.retry_at:
                member.preparing = True
                self.futures[threads.submit(self.pool.prepare, member.server)] = (member, None)

    def _hand_out(self, threads: ThreadPoolExecutor) -> None:
        """Gives each job to the server of the job before it, or else to the ready one with the fewest in flight."""
        ready = [member for member in self.pool.members if member.ready]
        # Not all go to the first server that is up: those still being prepared get their share.
        hopeful = sum(member.preparing and member.failures == 0 for member in self.pool.members)
        share = -(-len(self.jobs) // (len(ready) + hopeful)) if hopeful else len(self.jobs)
        most = min(share, self.pool.patience.max_in_flight)
        while self.queue and (free := [member for member in ready if member.in_flight < most]):
            job = self.queue.popleft()
            member = min(free, key=lambda m: (m is not self.served_by.get(job), m.in_flight))
            member.in_flight += 1
            self.futures[threads.submit(self.work, member.server, self.jobs[job])] = (member, job)

    def _settle(self, future: Future[Any]) -> None:
        member, job = self.futures.pop(future)
        try:
            value = future.result()
            if job is None:
                self.pool.accept(member.server, value)
        except ServerError as error:
            self._failed(member, job, error)
            return
        if job is None:
            member.preparing, member.ready, member.told = False, True, False
            self.pool.ever_ready = True
        else:
            member.in_flight -= 1
            member.failures = 0
            self._take(member, job, value)

    def _take(self, member: Member, job: int, value: Result) -> None:
        with self._no_wait():
            following = None if self.next_of is None else self.next_of(job, value)
        if following is None:
            self.done[job] = value
            return
        self.following[following] = (member, job, value)
        if following.done():  # before the server's place is given to another job
            self._follow(following)

    def _follow(self, future: Following[Job]) -> None:
        member, job, value = self.following.pop(future)
        with self._no_wait():
            following = future.result()()
        if following is None:
            self.done[job] = value
            return
        self.jobs[job], self.attempts[job], self.served_by[job] = following, 0, member
        self.queue.appendleft(job)  # before jobs that no server has begun

    @contextmanager
    def _no_wait(self) -> Iterator[None]:
        """Leaves the time inside out of the wait for a server: none could be tried meanwhile."""
        before = time.monotonic()
        yield
        self.last_ready += time.monotonic() - before

    def _failed(self, member: Member, job: int | None, error: ServerError) -> None:
        was_ready = member.ready
        member.rest(error, self.pool.patience.pause_s)
        if job is None:
            member.preparing = False
            if not member.told and any(other.ready for other in self.pool.members):
                member.told = True
                _say(f"rollout server cannot be used, its prompts go to others: {error}")
            return
        member.in_flight -= 1
        self.queue.appendleft(job)
        self.attempts[job] += 1
        if was_ready:
            member.told = True
            _say(f"rollout server failed, its prompts go to others: {error}")
        if self.attempts[job] >= self.pool.patience.max_attempts:
            raise EngineUnavailableError(f"one prompt failed {self.attempts[job]} times, the last error: {error}")

    def _check_patience(self) -> None:
        now, patience = time.monotonic(), self.pool.patience
        if any(member.ready for member in self.pool.members):
            self.last_ready = now
            return
        bound = patience.give_up_after_s if self.pool.ever_ready else patience.ready_timeout_s
        key = "give_up_after_s" if self.pool.ever_ready else "ready_timeout_s"
        trouble = "; ".join(member.trouble for member in self.pool.members)
        # A first attempt may take longer: loading large weights does.
        loading = any(member.preparing and not member.failures for member in self.pool.members)
        if now - self.last_ready >= bound and not loading:
            raise EngineUnavailableError(f"no rollout server was usable for {bound:g} s ({key}): {trouble}")
        if now - self.last_said >= _SAY_EVERY_S:
            self.last_said = now
            count = len(self.pool.members)
            _say(f"waiting for rollout servers: 0 of {count} ready after {now - self.start:.0f} s ({trouble})")

    def _next_look(self) -> float:
        now = time.monotonic()
        resting = [m.retry_at - now for m in self.pool.members if not m.ready and not m.preparing]
        patience = self.pool.patience
        bound = patience.give_up_after_s if self.pool.ever_ready else patience.ready_timeout_s
        return max(0.02, min([*resting, self.last_ready + bound - now, 1.0]))


def _say(line: str) -> None:
    print(visible(" ".join(line.split())), file=sys.stderr, flush=True)
