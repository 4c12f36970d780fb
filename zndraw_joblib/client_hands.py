"""The threads that execute a worker's tasks, and those that read from its providers."""

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from zndraw_joblib import provider, telemetry
from zndraw_joblib.client_api import SlowDown, Unreachable
from zndraw_joblib.client_claims import TaskOffer
from zndraw_joblib.client_heartbeat import Heartbeat
from zndraw_joblib.client_transport import Transport, path
from zndraw_joblib.client_worker import Life, Offered, Pool, Registrations
from zndraw_joblib.exceptions import describe
from zndraw_joblib.execution import Execute, Executor, Report, Threads, report_of, run_extension
from zndraw_joblib.extension import ClaimedTask
from zndraw_joblib.lifecycle import TaskStatus

# a larger report goes by itself: a host takes 32 of them, and a mebibyte
BATCHED_REPORT_BYTES = 8 * 1024
# how long what ends together may follow each other, and how many may follow
MOMENT_SECONDS, MOMENTS = 0.002, 10
# how long a claim may still be answered when the worker leaves; what it brings later
# can't be handed back, and ends with the worker
LAST_CLAIM_SECONDS = 1.0
# how long code may go on after its attempt has ended, until the log says so
STUCK_SECONDS = 10.0
# what is left of an allocation when its tasks are interrupted: to end them, and to say so
RESERVED_SECONDS = 8.0
# how long a worker whose jobs don't fit any more waits for others to be registered
SETTLED_SECONDS = 5.0
PROVIDER_THREADS = 4
ANSWER_RETRIES = 3

log = telemetry.SafeLogger(logging.getLogger(__name__))


def executor_of(
    life: Life,
    execute: Execute | None,
    isolate: bool,
    setup: Callable[[], Any] | None,
    kill_after: float,
) -> Executor | None:
    """Return what executes tasks, if the program doesn't do that by itself."""
    if isolate:
        # no other worker loads multiprocessing
        from zndraw_joblib.client_isolation import Processes

        return Processes(life, execute or run_extension, setup, kill_after)
    if setup is not None:
        raise ValueError("setup is called in child processes: it needs isolate=True")
    return None if execute is None else Threads(execute)


class Allocation:
    """How long a worker may stay: until a moment, and without a task for so long.

    Parameters
    ----------
    until : datetime or float, optional
        The moment, or the seconds from now. Running tasks are interrupted shortly before.
    idle_seconds : float, optional
        After so long without a task the worker leaves.
    executor : Executor, optional
        Without one the program claims by itself, and no worker leaves by itself.

    Raises
    ------
    ValueError
        When the moment has passed, or there is no executor.
    """

    def __init__(
        self, until: datetime | float | None, idle_seconds: float | None, executor: Executor | None
    ) -> None:
        if executor is None and (until, idle_seconds) != (None, None):
            raise ValueError("until and idle_seconds are for workers that execute: give execute")
        if isinstance(until, datetime):
            # without a zone it is local time
            until = until.timestamp() - time.time()
        seconds = math.inf if until is None else until
        if seconds <= 0:
            raise ValueError("until is over: the worker could not begin")
        # a quarter of a very short one: there is to be time for tasks
        self._leave_at = time.monotonic() + seconds - min(RESERVED_SECONDS, seconds / 4)
        self._idle_seconds = math.inf if idle_seconds is None else idle_seconds
        self._idle_since = time.monotonic()

    def work(self) -> None:
        """Note that the worker is not idle."""
        self._idle_since = time.monotonic()

    @property
    def left(self) -> float:
        """Return for how many seconds tasks may still run."""
        return self._leave_at - time.monotonic()

    @property
    def idle(self) -> float:
        """Return for how many seconds there has been no task."""
        return time.monotonic() - self._idle_since

    @property
    def patience(self) -> float:
        """Return how many seconds the worker stays if no task comes."""
        return min(self.left, self._idle_seconds - self.idle)

    def next_claim(self, jobs: Mapping[str, Offered]) -> tuple[list[str] | None, float]:
        """Return for which jobs a claim may be, None for all, and for how many seconds."""
        left = self.left
        expected = {name: job.options.get("expected_seconds") or 0 for name, job in jobs.items()}
        fits = [name for name, seconds in expected.items() if seconds <= left]
        # what fits by now, is to fit when the claim is answered
        longest = min((left - expected[name] for name in fits), default=0)
        return None if len(fits) == len(jobs) else fits, min(self.patience, longest)


#: A task that is over, if it could be accepted, and what is reported of its end.
End = tuple[ClaimedTask[Any] | None, Report]


@dataclass
class Hands:
    """The claim thread asks for as many tasks as there are free hands; task threads start
    and execute them; the report thread reports their ends, together if they end at the same
    moment, while the hands take the next ones."""

    heartbeat: Heartbeat
    executor: Executor
    concurrency: int
    polling_interval: float
    allocation: Allocation
    #: hands that can take tasks, and those that have one
    _open: int = 0
    _busy: int = 0
    #: tasks that are over, and whose end the host doesn't know yet; those to be told next
    _unreported: int = 0
    _ended: deque[End] = field(default_factory=deque)
    #: tasks that are over, and whose code still runs: when that was noticed
    _over: dict[ClaimedTask[Any], float] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closed: bool = False

    def __post_init__(self) -> None:
        self.claims = self.heartbeat.claims
        self._life = self.claims.life
        self._pool = Pool(self._life, self.concurrency, "task")
        self.executor.start(self)
        self._life.closing.append(self._close)
        self._claimer = self._life.start("claim", self._claim_all)
        self._life.start("report", self._report_all)

    @property
    def _starts(self) -> bool:
        """Whether tasks run from their claim on."""
        # with one hand the worker asks once more before it begins: a cancel may have come
        return self.concurrency > 1

    @property
    def busy(self) -> int:
        """How many tasks are at hand."""
        return self._busy + self._unreported

    def submit(self, call: Callable[[], None]) -> None:
        """Have one of the threads make a call."""
        self._pool.submit(call)

    def open(self, number: int) -> None:
        """Let so many hands more, or less, take tasks."""
        with self._changed:
            self._open += number
            self._changed.notify_all()

    def finish(self, deadline: float) -> bool:
        """Let tasks at hand end, until `time.monotonic` says so; return whether they did."""
        self.open(0)
        self._claimer.join(max(0.0, min(deadline - time.monotonic(), LAST_CLAIM_SECONDS)))
        with self._changed:
            return self._changed.wait_for(
                lambda: self.busy == 0, max(0.0, deadline - time.monotonic())
            )

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.executor.close()

    # --- claiming ---

    def _claim_all(self) -> None:
        try:
            while not self._life.stopping.is_set():
                self._warn_of_stuck()
                if why := self._why_to_leave():
                    self._life.leave(why)
                    return
                self._claim()
        except BaseException as exc:
            self._life.give_up(exc)

    def _why_to_leave(self) -> str:
        if self.busy or not self._open:
            self.allocation.work()
        if self.allocation.left <= 0:
            return "the time until it was to leave is over"
        if self.busy or not self._open:
            return ""
        if self.allocation.patience <= 0:
            return "no task came for idle_seconds"
        jobs, _ = self.allocation.next_claim(self.claims.registrations.jobs.copy())
        # there may be others in a moment
        if jobs == [] and self.allocation.idle >= SETTLED_SECONDS:
            return "no job fits in the time that is left"
        return ""

    def _claim(self) -> None:
        free = self._wait_for_free_hands()
        offers: list[TaskOffer] = []
        waited, pause = False, self.polling_interval
        # before what ends the loop is read: who sets that, wakes it afterwards
        self._life.wake.clear()
        stop = self._life.stopping
        if stop.is_set() or not free:
            return
        try:
            if not self.heartbeat.draining:
                if free > 1:
                    free = min(free, self.claims.transport.limits().max_claim)
                known = self.claims.registrations.jobs.copy()
                jobs, longest = self.allocation.next_claim(known)
                if jobs != []:
                    wait = math.ceil(min(self.claims.transport.longest_wait, longest))
                    offers, waited = self.claims.claim(
                        free, wait, start=self._starts, stop=stop, jobs=jobs
                    )
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
            self._life.wake.wait(max(0.0, min(self.allocation.left, pause)))

    @property
    def _free(self) -> int:
        # while the host is away, what it has not been told of does not grow
        return max(0, min(self._open - self._busy, 2 * self.concurrency - self._unreported))

    def _wait_for_free_hands(self) -> int:
        with self._changed:
            self._changed.wait_for(
                lambda: self._free or self._life.stopping.is_set(),
                max(0.0, min(self.allocation.left, STUCK_SECONDS)),
            )
        self._settle()
        return self._free

    def _warn_of_stuck(self) -> None:
        now = time.monotonic()
        over = self.claims.held.stuck()
        self._over = {task: self._over.get(task, now) for task in over}
        for task in over:
            if now - self._over[task] >= STUCK_SECONDS:
                self._over[task] = math.inf
                log.warning(
                    "task %s of %s is over, and its code still runs: until it returns, its"
                    " hand takes no other (isolate=True would end it)",
                    task.task_id,
                    task.job_name,
                )

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
        try:
            if self._life.stopping.is_set():
                self.claims.hand_back(offer)
            elif (
                task := self.claims.accept(offer, read=self.executor.reads_parameters)
            ) is not None:
                self.heartbeat.hurry()
                report = self._perform(task, offer.status == TaskStatus.RUNNING)
        except BaseException as exc:
            report = report_of(offer, TaskStatus.FAILED, error=describe(exc))
        ends: list[End] = [] if report is None else [(task, report)]
        if report is not None and self._goes_alone(report):
            self._report(ends)
            ends = []
        elif report is None and task is not None:
            self.claims.held.discard(task)
        with self._changed:
            self._busy -= 1
            self._unreported += len(ends)
            self._ended += ends
            self._changed.notify_all()

    def _perform(self, task: ClaimedTask[Any], running: bool) -> Report | None:
        """Start a task, execute it, and return what is to be reported of its end."""
        # a claim may have started it
        if not running and not self.claims.report(report_of(task, TaskStatus.RUNNING)):
            self.claims.note("lost", task)
            return None
        self.claims.note("started", task)
        self.claims.held.running.add(task)
        try:
            report = self.executor.perform(task)
        finally:
            self.claims.held.running.discard(task)
        self.claims.note(report["status"] if report else TaskStatus.CANCELLED.value, task)
        return report

    # --- reporting ---

    def _goes_alone(self, report: Report) -> bool:
        return self._max_reports == 1 or len(json.dumps(report)) > BATCHED_REPORT_BYTES

    @property
    def _max_reports(self) -> int:
        return 1 if self.concurrency == 1 else self.claims.transport.limits().max_reports

    def _settle(self) -> None:
        """Wait a moment for tasks that end together."""
        for _ in range(MOMENTS):
            busy = self._busy
            if busy:
                time.sleep(MOMENT_SECONDS)
            if self._busy == busy:
                return

    def _report_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or (self._closed and not self._busy))
            if not self._ended:
                return
            self._settle()
            batch: dict[str, End] = {}
            # two attempts of one task may end here together: each has a report of its own
            while self._ended and self._ended[0][1]["id"] not in batch:
                if len(batch) == self._max_reports:
                    break
                end = self._ended.popleft()
                batch[end[1]["id"]] = end
            self._report([*batch.values()])
            with self._changed:
                self._unreported -= len(batch)
                self._changed.notify_all()

    def _report(self, ends: list[End]) -> None:
        """Report the ends of different tasks, as long as there is hope."""
        reports = [report for _, report in ends]
        try:
            self.heartbeat.send_rest(ends)
            agreed = self.claims.report_together(reports) if len(ends) > 1 else set()
            for report in reports:
                if report["id"] not in agreed:
                    self.claims.report(report)
        except BaseException as exc:
            self._life.give_up(exc)
        for task, _ in ends:
            if task is not None:
                self.claims.held.discard(task)


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
