"""Calls of environments: one after another in the caller's thread, or several at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


class Threads:
    """Runs calls of users' code, which may wait for other programs.

    Args:
        count: most calls at a time. One runs at once, in the caller's thread. More run in threads that live as long as
            this object: the processes that they start end with them.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="environment") if count > 1 else None

    def __reduce__(self) -> tuple[type[Threads], tuple[int]]:
        """Copies have threads of their own: callbacks that average weights copy the whole module."""
        return Threads, (self._count,)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The result of the call, or the exception that it raised; with one thread it is there when this returns."""
        if self._pool is not None:
            return self._pool.submit(_on_this_gpu(call))
        future: Future[T] = Future()
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001  (kept for whoever asks for the result; Ctrl-C is not)
            future.set_exception(error)
        return future

    def all(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all calls, in their order; if some raise, the exception of the first of them.

        Calls that have not begun by then are not made.
        """
        if self._pool is None:
            return [call() for call in calls]
        futures = [self.submit(call) for call in calls]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def _on_this_gpu(call: Callable[[], T]) -> Callable[[], T]:
    """The call on the caller's current GPU; a thread of its own has the first one, on any rank."""
    if not torch.cuda.is_initialized():
        return call
    device = torch.cuda.current_device()

    def there() -> T:
        torch.cuda.set_device(device)
        return call()

    return there
