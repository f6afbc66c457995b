"""Calls of environments: one after another in the caller's thread, or several at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_Calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class Threads:
    """Runs calls of users' code, which may wait for other programs.

    Args:
        count: most calls at a time. One runs at once, in the caller's thread. More run in threads that live as long as
            this object: the processes that they start end with them. A program that ends does not wait for them, unlike
            for those of `concurrent.futures.ThreadPoolExecutor`: a call may hang.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._calls: _Calls | None = None

    def __reduce__(self) -> tuple[type[Threads], tuple[int]]:
        """Copies have threads of their own: callbacks that average weights copy the whole module."""
        return Threads, (self._count,)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The result of the call, or the exception that it raised; with one thread it is there when this returns."""
        future: Future[T] = Future()
        if self._count > 1:
            self._queue().put((future, as_here(call)))
            return future
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001  (kept for whoever asks for the result; Ctrl-C is not)
            future.set_exception(error)
        return future

    def all(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all calls, in their order, or the first exception.

        It waits for no call after an exception, and calls that have not begun by then are not made.
        """
        if self._count == 1:
            return [call() for call in calls]
        futures = [self.submit(call) for call in calls]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future.done() and future.exception()]
            return [future.result() for future in failed or futures]
        finally:
            for future in futures:
                future.cancel()

    def _queue(self) -> _Calls:
        """The calls that the threads take; the first use starts them."""
        if self._calls is None:
            self._calls = SimpleQueue()
            for number in range(self._count):
                threading.Thread(target=_serve, args=(self._calls,), name=f"environment-{number}", daemon=True).start()
            weakref.finalize(self, _end, self._calls, self._count)
        return self._calls


def _serve(calls: _Calls) -> None:
    while (one := calls.get()) is not None:
        future, call = one
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  (whoever asks for the result gets it)
                future.set_exception(error)
        del one, future, call  # else they would live until the next call


def _end(calls: _Calls, count: int) -> None:
    for _ in range(count):
        calls.put(None)


def as_here(call: Callable[[], T]) -> Callable[[], T]:
    """The call with the GPU, the gradient mode and the autocast of this thread, which a new one has not.

    Not with the dtype of new tensors, which bf16-true and 64-true set for all threads: one that leaves their context
    after another has left it would put its own dtype back for good.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    dtypes = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    caches = torch.is_autocast_cache_enabled()

    def there() -> T:
        if device is not None:
            torch.cuda.set_device(device)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in dtypes.items():
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=caches))
            return call()

    return there
