"""How a worker ends: in order, at once, or because it can't go on."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from zndraw_joblib.client_claims import LAST_RETRIES, HeldTasks
from zndraw_joblib.client_connection import HostApi
from zndraw_joblib.client_hands import Hands, Pulse
from zndraw_joblib.client_readers import Readers
from zndraw_joblib.client_registrations import Life, Registrations
from zndraw_joblib.client_transport import SafeLogger, Transport, path
from zndraw_joblib.lifecycle import WorkerState

log = SafeLogger(logging.getLogger(__name__))

LAST_THREAD_SECONDS = 2.0
LAST_REQUEST_SECONDS = 5.0
AT_ONCE_SECONDS = 1.0


@dataclass
class Ending:
    """The end of a worker, which happens once, whoever begins it.

    Attributes
    ----------
    transport, registrations, pulse, readers, life, held, hands
        The worker's parts.
    grace_seconds : float
        How long running tasks may go on.
    own_api : HostApi or None
        Closed with the worker.
    """

    transport: Transport
    registrations: Registrations
    pulse: Pulse
    readers: Readers
    life: Life
    held: HeldTasks
    grace_seconds: float
    hands: Hands | None = None
    own_api: HostApi | None = None
    _pid: int = field(default_factory=os.getpid)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: threading.Event = field(default_factory=threading.Event)
    _failure: BaseException | None = None
    _signals: int = 0

    def begin(self) -> None:
        """End the worker, and return when all is done."""
        if os.getpid() != self._pid:
            # a fork of this process, made by a task: the worker is not its own to end
            return
        if threading.current_thread() in self._threads():
            # a task or provider wants it: it has to go on before this can be done
            _in_thread(self.begin)
            return
        with self._lock:
            first = not self.life.stopping.is_set()
            self.life.stopping.set()
        if not first:
            self._wait_until_done()
            return
        try:
            self._leave()
        except BaseException:
            self._leave_at_once()
            raise
        finally:
            self._done.set()

    def give_up(self, exc: BaseException) -> None:
        """End the worker, which can't go on."""
        with self._lock:
            if self.life.stopping.is_set():
                return
            self._failure = self._failure or exc
        log.error("giving up: %s", exc)
        _in_thread(self.begin)

    def wait(self) -> None:
        """Return when the worker has ended; raise if it gave up."""
        if threading.current_thread() is threading.main_thread():
            with self._signals_handled():
                self._wait_until_done()
        else:
            self._wait_until_done()
        if self._failure is not None:
            refused = isinstance(self._failure, PermissionError)
            kind = PermissionError if refused else ConnectionError
            raise kind(f"the worker gave up: {self._failure}") from None

    def _leave(self) -> None:
        self.life.wake.set()
        if self.hands is not None and self._failure is None:
            self._finish_tasks(self.hands)
        self.life.hopeless.set()
        self.held.end_all()
        # the lock: a registration under way is to be over
        with self.registrations.lock:
            for part in (self.pulse, self.hands, self.readers):
                if part is not None:
                    part.close()
            retries = 0 if self._failure else LAST_RETRIES
            self.registrations.retire(retries=retries, timeout=LAST_REQUEST_SECONDS)
        deadline = time.monotonic() + LAST_THREAD_SECONDS
        for thread in self._threads():
            thread.join(max(0.0, deadline - time.monotonic()))
        if self.own_api is not None:
            self.registrations.socket.close()
            self.own_api.close()

    def _finish_tasks(self, hands: Hands) -> None:
        """Take no more tasks, and let those at hand end."""
        deadline = time.monotonic() + self.grace_seconds
        try:
            # a claim that waits at the host gets nothing after this
            self.transport.exchange(
                "patch",
                path("workers", self.registrations.worker_id),
                read=dict,
                json={"state": WorkerState.DRAINING.value},
                timeout=LAST_REQUEST_SECONDS,
            )
        except Exception as exc:
            log.warning("could not announce the end: %s", exc)
        if not hands.finish(deadline):
            log.warning("tasks still run after %s s of grace", self.grace_seconds)

    def _leave_at_once(self) -> None:
        self.life.hopeless.set()
        self.held.end_all()
        if (worker_id := self.registrations.worker_id) is not None:
            self.registrations.delete_worker(worker_id, retries=0, timeout=AT_ONCE_SECONDS)
        self._done.set()

    def _threads(self) -> list[threading.Thread]:
        parts = (self.pulse, self.hands, self.readers)
        return [t for part in parts if part is not None for t in part.threads]

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
        if os.getpid() != self._pid:
            # a fork of this process, made by a task, has inherited the handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        # in a thread: the main one may hold the very lock that is needed
        self._signals += 1
        _in_thread(self.begin if self._signals == 1 else self._leave_at_once)


def _in_thread(call: Callable[[], None]) -> None:
    threading.Thread(target=call, name="zndraw-end", daemon=True).start()
