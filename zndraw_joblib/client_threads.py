"""The threads of a worker's process; all of them die with it."""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

PAUSE_AFTER_ERROR_SECONDS = 5.0
# how long what goes together may follow each other
MOMENT_SECONDS = 0.005


class DaemonPool:
    """Threads that take calls from one queue.

    Those of `concurrent.futures` would keep the process alive until the last call
    returns, and a call may hang.

    Parameters
    ----------
    size : int
        How many calls run side by side.
    name : str
        What the threads are called.
    """

    def __init__(self, size: int, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(size)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """Have a thread make the call as soon as one is free."""
        self._calls.put(call)

    def close(self) -> None:
        """Let the threads end once they have made the calls submitted so far."""
        for _ in self.threads:
            self._calls.put(None)

    def join(self, deadline: float) -> bool:
        """Wait for the threads to end, until ``deadline``; tell whether they did.

        Parameters
        ----------
        deadline : float
            In the seconds of `time.monotonic`.
        """
        return _join(self.threads, deadline)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException:
                # even SystemExit: it would end this thread and nothing else
                log.exception("unexpected")


class Gatherer(Generic[T]):
    """A thread that makes one call with all that was put since its last one.

    Parameters
    ----------
    call : callable
        Given what was put, in its order.
    expected : callable
        Returns how much there could be for one call: more is waited for, a moment.
    name : str
        What the thread is called.
    """

    def __init__(
        self, call: Callable[[list[T]], None], expected: Callable[[], int], name: str
    ) -> None:
        self._call = call
        self._expected = expected
        self._put: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self.threads = [threading.Thread(target=self._work, name=name, daemon=True)]
        for thread in self.threads:
            thread.start()

    def put(self, item: T) -> None:
        """Have the next call take this too."""
        self._put.put(item)

    def close(self) -> None:
        """Let the thread end once it has made its calls with what was put so far."""
        self._put.put(None)

    def join(self, deadline: float) -> bool:
        """Wait for the thread to end, as `DaemonPool.join`."""
        return _join(self.threads, deadline)

    def _work(self) -> None:
        item = self._put.get()
        while item is not None:
            items = []
            while item is not None:
                items.append(item)
                try:
                    more = len(items) < self._expected()
                    item = self._put.get(timeout=MOMENT_SECONDS if more else 0)
                except queue.Empty:
                    break
            try:
                self._call(items)
            except BaseException:
                log.exception("unexpected")
            if item is not None:
                item = self._put.get()


def _join(threads: list[threading.Thread], deadline: float) -> bool:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


class Ticker:
    """A thread that makes one call again and again.

    Parameters
    ----------
    call : callable
        Returns the seconds until it is to be made again.
    name : str
        What the thread is called.
    """

    def __init__(self, call: Callable[[], float], name: str) -> None:
        self._call = call
        self._due = math.inf
        self._over = False
        self._changed = threading.Condition()
        self.threads = [threading.Thread(target=self._tick, name=name, daemon=True)]

    def start(self, seconds: float) -> None:
        """Make the first call in ``seconds``."""
        self.hasten(seconds)
        for thread in self.threads:
            thread.start()

    def hasten(self, seconds: float) -> None:
        """Make the next call in ``seconds`` at the latest."""
        due = time.monotonic() + seconds
        with self._changed:
            if due < self._due:
                self._due = due
                self._changed.notify()

    def close(self) -> None:
        """Make no further call."""
        with self._changed:
            self._over = True
            self._changed.notify()

    def _tick(self) -> None:
        while True:
            with self._changed:
                while not self._over and (left := self._due - time.monotonic()) > 0:
                    self._changed.wait(left)
                if self._over:
                    return
                self._due = math.inf
            try:
                pause = self._call()
            except Exception:
                log.exception("unexpected")
                pause = PAUSE_AFTER_ERROR_SECONDS
            self.hasten(pause)
