"""The threads of a worker's process, and its end: all of them die with it."""

import inspect
import json
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from zndraw_joblib import provider, telemetry
from zndraw_joblib.client_claims import (
    LAST_RETRIES,
    Claims,
    Heartbeat,
    Report,
    TaskOffer,
    report_of,
)
from zndraw_joblib.client_transport import SlowDown, Transport, Unreachable, path
from zndraw_joblib.client_user import HostApi
from zndraw_joblib.client_worker import Life, Offered, Pool, Registrations
from zndraw_joblib.exceptions import describe
from zndraw_joblib.extension import ClaimedTask, TaskCancelled, as_json
from zndraw_joblib.lifecycle import TaskStatus, WorkerState

# a larger report goes by itself: a host takes 32 of them, and a mebibyte
BATCHED_REPORT_BYTES = 8 * 1024
# how long what is reported together may follow each other
MOMENT_SECONDS = 0.002
# how long a claim may still be answered when the worker leaves; what it brings later
# can't be handed back, and ends with the worker
LAST_CLAIM_SECONDS = 1.0
LAST_THREAD_SECONDS = 2.0
LAST_REQUEST_SECONDS = 5.0
AT_ONCE_SECONDS = 1.0
PROVIDER_THREADS = 4
ANSWER_RETRIES = 3

log = telemetry.SafeLogger(logging.getLogger(__name__))


@dataclass
class Ended:
    """A task that is over, what is reported of it, and whether the host agreed."""

    task_id: str
    report: bytes
    agreed: bool | None = None


@dataclass
class Hands:
    """The claim thread asks for as many tasks as there are free hands; task threads start,
    execute and report them, together if they end at the same moment."""

    claims: Claims
    heartbeat: Heartbeat
    execute: Callable[[ClaimedTask[Any]], Any]
    concurrency: int
    polling_interval: float
    #: tasks that were claimed and whose end was not reported yet
    _busy: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _ended: deque[Ended] = field(default_factory=deque)
    _reporting: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._life = self.claims.life
        self._pool = Pool(self._life, self.concurrency, "task")
        self._claimer = self._life.start("claim", self._claim_all)

    @property
    def _starts(self) -> bool:
        """Whether tasks run from their claim on."""
        # with one hand the worker asks once more before it begins: a cancel may have come
        return self.concurrency > 1

    def finish(self, deadline: float) -> bool:
        """Let tasks at hand end, until `time.monotonic` says so; return whether they did."""
        self._free(0)
        self._claimer.join(max(0.0, min(deadline - time.monotonic(), LAST_CLAIM_SECONDS)))
        with self._changed:
            return self._changed.wait_for(
                lambda: self._busy == 0, max(0.0, deadline - time.monotonic())
            )

    def close(self) -> None:
        """Let the threads end."""
        self._free(0)
        self._pool.close()

    # --- claiming ---

    def _claim_all(self) -> None:
        try:
            while not self._life.stopping.is_set():
                self._claim()
        except BaseException as exc:
            self._life.give_up(exc)

    def _claim(self) -> None:
        free = self._wait_for_free_hands()
        offers: list[TaskOffer] = []
        waited, pause = False, self.polling_interval
        # before what ends the loop is read: who sets that, wakes it afterwards
        self._life.wake.clear()
        stop = self._life.stopping
        if stop.is_set():
            return
        try:
            if not self.heartbeat.draining:
                if free > 1:
                    free = min(free, self.claims.transport.limits().max_claim)
                wait = self.claims.transport.longest_wait
                offers, waited = self.claims.claim(free, wait, start=self._starts, stop=stop)
        except Exception as exc:
            if stop.is_set():
                if isinstance(exc, Unreachable):
                    self._hand_back_unread(free)
                return
            if isinstance(exc, SlowDown):
                pause = max(pause, exc.retry_after)
            elif isinstance(exc, Unreachable | PermissionError):
                raise
            else:
                log.exception("could not claim")
        with self._changed:
            self._busy += len(offers)
        for offer in offers:
            self._pool.submit(partial(self._run, offer))
        if not offers and not waited:
            self._life.wake.wait(pause)

    def _wait_for_free_hands(self) -> int:
        with self._changed:
            self._changed.wait_for(
                lambda: self._busy < self.concurrency or self._life.stopping.is_set()
            )
            return self.concurrency - self._busy

    def _hand_back_unread(self, limit: int) -> None:
        """Hand back what the last claim brought, if its answer got lost."""
        stop = self._life.stopping
        try:
            offers, _ = self.claims.claim(limit, wait=0, start=self._starts, stop=stop)
        except Exception as exc:
            log.debug("the last claim stays without an answer: %s", exc)
            return
        for offer in offers:
            self.claims.hand_back(offer)

    # --- running ---

    def _run(self, offer: TaskOffer) -> None:
        task = report = None
        reported = False
        try:
            if self._life.stopping.is_set():
                self.claims.hand_back(offer)
            elif (task := self.claims.accept(offer)) is not None:
                self.heartbeat.hurry()
                report = self._perform(task, offer.status == TaskStatus.RUNNING)
        except BaseException as exc:
            report = report_of(offer, TaskStatus.FAILED, error=describe(exc))
        try:
            if report is not None:
                reported = self._report_together(report)
                if not reported:
                    self.claims.report(report)
        finally:
            if task is not None:
                self.claims.held.discard(task)
            if not reported:
                self._free(1)

    def _perform(self, task: ClaimedTask[Any], running: bool) -> Report | None:
        """Start a task, execute it, and return what is to be reported of its end."""
        # a claim may have started it
        if not running and not self.claims.report(report_of(task, TaskStatus.RUNNING)):
            self.claims.note("lost", task)
            return None
        self.claims.note("started", task)
        report: Report | None
        try:
            with telemetry.continuing({"traceparent": task.traceparent or ""}):
                result = as_json(self.execute(task))
        except TaskCancelled:
            # the host knows what it has ended; a task that ends itself has to say so
            report = None if task.ended else report_of(task, TaskStatus.CANCELLED)
            self.claims.note("cancelled", task)
        except BaseException as exc:
            # SystemExit and the like end the task, not the thread
            report = report_of(task, TaskStatus.FAILED, error=describe(exc))
            self.claims.note("failed", task)
            log.exception("task %s of %s failed", task.task_id, task.job_name)
        else:
            report = report_of(task, TaskStatus.COMPLETED, result=result)
            self.claims.note("completed", task)
        return report

    # --- reporting ---

    def _report_together(self, report: Report) -> bool:
        """Report with what ends at the same moment; return whether that freed the hand.

        Whoever comes first reports for all, and whoever waits here meanwhile is among
        the next.
        """
        ended = Ended(report["id"], json.dumps(report, ensure_ascii=False).encode())
        if self.concurrency == 1 or len(ended.report) > BATCHED_REPORT_BYTES:
            return False
        self._ended.append(ended)
        with self._reporting:
            while ended.agreed is None:
                self._report_batch()
        return ended.agreed

    def _report_batch(self) -> None:
        most = self.claims.transport.limits().max_reports
        known = 0
        while known < len(self._ended) < min(most, self._busy):
            known = len(self._ended)
            time.sleep(MOMENT_SECONDS)
        batch: dict[str, Ended] = {}
        # two attempts of one task may end here together: each has a report of its own
        while self._ended and len(batch) < most and self._ended[0].task_id not in batch:
            ended = self._ended.popleft()
            batch[ended.task_id] = ended
        agreed = set()
        if len(batch) > 1:
            agreed = self.claims.report_together({i: e.report for i, e in batch.items()})
        for task_id, ended in batch.items():
            ended.agreed = task_id in agreed
        # all at once: so the next claim asks for as many
        self._free(len(agreed))

    def _free(self, number: int) -> None:
        # a hand is free when the host knows
        with self._changed:
            self._busy -= number
            self._changed.notify_all()


@dataclass
class Readers:
    """Threads that read from providers for who asks over Socket.IO."""

    transport: Transport
    registrations: Registrations
    life: Life
    _pool: Pool | None = None

    def start(self) -> None:
        """Begin, if they have not begun."""
        if self._pool is None:
            self._pool = Pool(self.life, PROVIDER_THREADS, "provider")

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None:
            self._pool.close()

    def request(self, data: dict[str, Any]) -> None:
        """Have a request answered, if it is for a provider of this worker."""
        offered = self.registrations.providers.get(data["provider_name"])
        if offered is not None and self._pool is not None:
            self._pool.submit(partial(self._read, offered, data))

    def _read(self, offered: Offered, data: dict[str, Any]) -> None:
        """Read from a provider for somebody, and send what was read, or why not."""
        if self.registrations.providers.get(str(offered.name)) is not offered:
            return
        content = provider.answer(offered.cls, offered.given, data["params"])
        if refused := self._send(offered, data["request_id"], content):
            content = provider.failure(f"the host refused the result: {refused}")
            self._send(offered, data["request_id"], content)

    def _send(self, offered: Offered, digest: str, content: provider.Content) -> str:
        """Answer a reader; return why the host doesn't want the answer, if it doesn't."""
        body, headers = content
        # a registration that is under way tells the id
        with self.registrations.lock:
            provider_id = offered.id
        if provider_id is None:
            return ""
        try:
            answer = self.transport.send(
                "post",
                path("providers", provider_id, "results"),
                content=body,
                headers={"X-Request-Hash": digest, **headers},
                retries=ANSWER_RETRIES,
                stop=self.life.stopping,
            )
        except (Unreachable, PermissionError) as exc:
            # the reader runs into a time-out
            log.warning("could not answer a reader of %s: %s", offered.name, exc)
            return ""
        return answer.reason if answer.problem else ""


@dataclass
class Shutdown:
    """The end of a worker, which happens once, whoever begins it.

    Running tasks may go on for ``grace_seconds``; ``own_api`` is closed with the worker.
    """

    claims: Claims
    heartbeat: Heartbeat
    readers: Readers
    grace_seconds: float
    hands: Hands | None = None
    own_api: HostApi | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: threading.Event = field(default_factory=threading.Event)
    _failure: BaseException | None = None
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

    def wait(self) -> None:
        """Return when the worker has ended; raise if it gave up."""
        in_main = threading.current_thread() is threading.main_thread()
        with self._signals_handled() if in_main else nullcontext():
            self._wait_until_done()
        if self._failure is not None:
            refused = isinstance(self._failure, PermissionError)
            kind = PermissionError if refused else ConnectionError
            raise kind(f"the worker gave up: {self._failure}") from None

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
        if self.own_api is not None:
            registrations.socket.close()
            self.own_api.close()

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
            log.warning("tasks still run after %s s of grace", self.grace_seconds)

    def _leave_at_once(self) -> None:
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
        _in_thread(self.begin if self._signals == 1 else self._leave_at_once)


def _in_thread(call: Callable[[], None]) -> None:
    threading.Thread(target=call, name="zndraw-end", daemon=True).start()


def run_extension(task: ClaimedTask[Any]) -> Any:
    """Run a task's extension, given ``task`` if it asks for it by this name."""
    run = task.extension.run
    asked = {"task": task} if "task" in inspect.signature(run).parameters else {}
    return run(None, **asked, **task.run_kwargs)
