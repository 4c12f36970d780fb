"""The end of a worker."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from zndraw_joblib.client_claims import LAST_RETRIES, Claims
from zndraw_joblib.client_hands import Hands, Readers
from zndraw_joblib.client_heartbeat import Heartbeat
from zndraw_joblib.client_transport import path
from zndraw_joblib.client_worker import Life
from zndraw_joblib.extension import ClaimedTask
from zndraw_joblib.lifecycle import WorkerState
from zndraw_joblib.telemetry import SafeLogger

LAST_THREAD_SECONDS = 2.0
LAST_REQUEST_SECONDS = 5.0
# in which tasks that have to stop may do so, and child processes are ended
LAST_TASK_SECONDS = 4.0
AT_ONCE_SECONDS = 1.0

log = SafeLogger(logging.getLogger(__name__))


@dataclass
class Shutdown:
    """The end of a worker, which happens once, whoever begins it.

    Running tasks may go on for ``grace_seconds``.
    """

    claims: Claims
    heartbeat: Heartbeat
    readers: Readers
    grace_seconds: float
    hands: Hands | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: threading.Event = field(default_factory=threading.Event)
    _failure: BaseException | None = None
    #: whether tasks were left that had not ended
    _left: bool = False
    _signals: int = 0

    def begin(self) -> None:
        """End the worker, and return when all is done."""
        life = self.claims.life
        if life.is_forked:
            # the worker is not this process's own to end
            return
        if threading.current_thread() in life.threads:
            # a task or provider wants it: it has to go on before this can be done
            _in_thread(self.begin)
            return
        with self._lock:
            first = not life.stopping.is_set()
            life.stopping.set()
        if not first:
            self._wait_until_done()
            return
        try:
            self._leave(life)
        except BaseException:
            self._leave_at_once()
            raise
        finally:
            self._done.set()

    def give_up(self, exc: BaseException) -> None:
        """End the worker, which can't go on."""
        with self._lock:
            if self.claims.life.stopping.is_set():
                return
            self._failure = self._failure or exc
        log.error("giving up: %s", exc)
        _in_thread(self.begin)

    def leave(self, why: str) -> None:
        """End the worker, which has stayed as long as it was to."""
        log.warning("leaving: %s", why)
        self.grace_seconds = 0.0
        _in_thread(self.begin)

    def wait(self) -> bool:
        """Return when the worker has ended, whether its tasks had; raise if it gave up."""
        in_main = threading.current_thread() is threading.main_thread()
        with self._signals_handled() if in_main else nullcontext():
            self._wait_until_done()
        if self._failure is not None:
            kinds = (PermissionError, RuntimeError)
            kind = next((k for k in kinds if isinstance(self._failure, k)), ConnectionError)
            raise kind(f"the worker gave up: {self._failure}") from None
        return not self._left

    def _leave(self, life: Life) -> None:
        life.wake.set()
        if self.hands is not None and self._failure is None:
            self._finish_tasks(self.hands)
        life.aborting.set()
        self.claims.held.end_all()
        registrations = self.claims.registrations
        # the lock: a registration under way is to be over
        with registrations.lock:
            for part in (self.heartbeat, self.hands, self.readers):
                if part is not None:
                    part.close()
            retries = 0 if self._failure else LAST_RETRIES
            registrations.retire(retries=retries, timeout=LAST_REQUEST_SECONDS)
        deadline = time.monotonic() + LAST_THREAD_SECONDS
        for thread in life.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        registrations.socket.close()

    def _finish_tasks(self, hands: Hands) -> None:
        """Take no more tasks, and let those at hand end."""
        deadline = time.monotonic() + self.grace_seconds
        try:
            # a claim that waits at the host gets nothing after this
            self.claims.transport.exchange(
                "patch",
                path("workers", self.claims.registrations.worker_id),
                read=dict,
                json={"state": WorkerState.DRAINING.value},
                timeout=LAST_REQUEST_SECONDS,
            )
        except Exception as exc:
            log.warning("could not announce the end: %s", exc)
        if not hands.finish(deadline):
            self._left = True
            log.warning("tasks still run after %s s of grace", self.grace_seconds)
            tasks = self._interruptible()
            self.claims.held.end_all()
            hands.executor.close()
            hands.finish(time.monotonic() + LAST_TASK_SECONDS)
            for task in tasks:
                self.heartbeat.send_rest(task, saved=True, retries=LAST_RETRIES)
            self.claims.interrupt(tasks, timeout=LAST_REQUEST_SECONDS)

    def _interruptible(self) -> list[ClaimedTask[Any]]:
        # a host that counts no attempts knows of no interruptions either
        held = self.claims.held.all()
        return [task for task in held if not task.ended and task.attempt is not None]

    def _leave_at_once(self) -> None:
        self._left = True
        self.claims.interrupt(self._interruptible(), retries=0, timeout=AT_ONCE_SECONDS)
        self.claims.life.aborting.set()
        self.claims.held.end_all()
        self.claims.registrations.delete_worker(retries=0, timeout=AT_ONCE_SECONDS)
        self._done.set()

    def _wait_until_done(self) -> None:
        # in turns: on Windows Ctrl-C does not interrupt a wait
        while not self._done.wait(1.0):
            pass

    @contextmanager
    def _signals_handled(self) -> Iterator[None]:
        earlier = {
            signum: signal.signal(signum, self._on_signal)
            for signum in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for signum, handler in earlier.items():
                signal.signal(signum, handler or signal.SIG_DFL)

    def _on_signal(self, signum: int, frame: object) -> None:
        if self.claims.life.is_forked:
            # a fork of this process, made by a task, has inherited the handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        # in a thread: the main one may hold the very lock that is needed
        self._signals += 1
        again = "Ctrl-C again" if signum == signal.SIGINT else "a second signal"
        first = partial(self._begin_to_finish, again)
        _in_thread(first if self._signals == 1 else self._leave_at_once)

    def _begin_to_finish(self, again: str) -> None:
        if self.hands is not None and (busy := self.hands.busy):
            tasks, them = ("task", "it") if busy == 1 else ("tasks", "them")
            log.warning("finishing %s %s, %s to stop %s now", busy, tasks, again, them)
        self.begin()


def _in_thread(call: Callable[[], None]) -> None:
    threading.Thread(target=call, name="zndraw-end", daemon=True).start()
