"""The threads of a worker's process; all of them die with it."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from zndraw_joblib import telemetry
from zndraw_joblib.client_answers import SlowDown, Unreachable
from zndraw_joblib.client_claims import Claims, Heartbeat, Report, TaskOffer, batches
from zndraw_joblib.client_readers import Pool
from zndraw_joblib.client_registrations import Life
from zndraw_joblib.client_tasks import ClaimedTask, TaskCancelled
from zndraw_joblib.client_transport import SafeLogger
from zndraw_joblib.exceptions import describe
from zndraw_joblib.extension import as_json
from zndraw_joblib.lifecycle import TaskStatus

log = SafeLogger(logging.getLogger(__name__))

PAUSE_AFTER_ERROR_SECONDS = 5.0
# with tasks at hand: how long a cancel takes to arrive where no websocket brings it
BUSY_BEAT_SECONDS = 0.5
# how long what is reported together may follow each other
MOMENT_SECONDS = 0.005
# how long a claim may still be answered when the worker leaves; what it brings later
# can't be handed back, and ends with the worker
LAST_CLAIM_SECONDS = 1.0
# beyond this, results go by themselves: a host takes a mebibyte, if it is left as it is
BATCH_BYTES = 256 * 1024


class End(NamedTuple):
    """A task that is over, and what is to be reported of it, if anything."""

    task_id: str
    task: ClaimedTask[Any] | None = None
    report: Report | None = None


class Hands:
    """The claim thread asks for as many tasks as there are free hands; task threads
    start, execute and report them, together if they end at the same moment."""

    def __init__(
        self,
        claims: Claims,
        pulse: "Pulse",
        execute: Callable[[ClaimedTask[Any]], Any],
        concurrency: int,
        polling_interval: float,
    ) -> None:
        self._claims = claims
        self._pulse = pulse
        self._life = claims.life
        self._execute = execute
        self._concurrency = concurrency
        self._polling_interval = polling_interval
        self._slots = threading.Semaphore(concurrency)
        #: claimed tasks whose end was not told yet, begun or not
        self._in_hand: set[str] = set()
        self._ends: queue.SimpleQueue[End | None] = queue.SimpleQueue()
        self._pool = Pool(concurrency, "zndraw-task")
        self._reporter = threading.Thread(target=self._report, name="zndraw-report", daemon=True)
        self._claimer = threading.Thread(target=self._claim, name="zndraw-claim", daemon=True)
        self._reporter.start()
        self._claimer.start()

    @property
    def threads(self) -> list[threading.Thread]:
        """All of them."""
        return [self._claimer, self._reporter, *self._pool.threads]

    def finish(self, deadline: float) -> bool:
        """Take no more tasks, and let those at hand end; tell whether they did.

        Parameters
        ----------
        deadline : float
            In the seconds of `time.monotonic`.
        """
        self._slots.release()
        left = deadline - time.monotonic()
        self._claimer.join(max(0.0, min(left, LAST_CLAIM_SECONDS)))
        while self._in_hand and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._in_hand

    def close(self) -> None:
        """Let the threads end."""
        self._slots.release()
        self._pool.close()
        self._ends.put(None)

    # --- claiming ---

    def _claim(self) -> None:
        try:
            while not self._life.stopping.is_set():
                self._claim_once()
        except BaseException as exc:
            self._life.give_up(exc)

    def _claim_once(self) -> None:
        free = self._wait_for_slots()
        offers: list[TaskOffer] = []
        waited = False
        # before the look at what ends the loop: who sets that, wakes it afterwards
        self._life.wake.clear()
        if self._life.stopping.is_set():
            return
        try:
            if not self._pulse.heartbeat.draining:
                offers, waited = self._claims.claim(
                    free,
                    self._claims.transport.longest_wait,
                    start=self._starts,
                    stop=self._life.stopping,
                )
        except Exception as exc:
            if self._life.stopping.is_set():
                if isinstance(exc, Unreachable):
                    self._hand_back_unread(free)
                return
            if not isinstance(exc, SlowDown):
                if isinstance(exc, Unreachable | PermissionError):
                    raise
                log.exception("could not claim")
        # before one of them ends, which may be at once: it is told with the others
        self._in_hand.update(offer.task_id for offer in offers)
        for offer in offers:
            self._pool.submit(partial(self._run, offer))
        for _ in range(free - len(offers)):
            self._slots.release()
        if not offers and not waited:
            self._life.wake.wait(self._polling_interval)

    @property
    def _starts(self) -> bool:
        """Whether tasks run from their claim on.

        A worker of one hand asks once more before it begins: a cancel may have come.
        """
        return self._concurrency > 1

    def _wait_for_slots(self) -> int:
        most = self._claims.transport.limits.max_claim if self._starts else 1
        self._slots.acquire()
        free = 1
        while free < most and self._slots.acquire(blocking=False):
            free += 1
        return free

    def _hand_back_unread(self, limit: int) -> None:
        """Hand back what the last claim brought, if its answer got lost."""
        try:
            offers, _ = self._claims.claim(
                limit, wait=0, start=self._starts, stop=self._life.stopping
            )
        except Exception as exc:
            log.debug("the last claim stays without an answer: %s", exc)
            return
        for offer in offers:
            self._claims.hand_back(offer)

    # --- running ---

    def _run(self, offer: TaskOffer) -> None:
        task = report = None
        try:
            if self._life.stopping.is_set():
                self._claims.hand_back(offer)
            elif (task := self._claims.accept(offer)) is not None:
                self._pulse.hurry()
                report = self._perform(task, offer.running)
        except BaseException as exc:
            report = Report(offer.task_id, TaskStatus.FAILED, offer.attempt, error=describe(exc))
        end = End(offer.task_id, task, report)
        if report is None:
            self._free([end])
        elif self._starts:
            self._ends.put(end)
        else:
            self._tell(end)

    def _perform(self, task: ClaimedTask[Any], running: bool) -> Report | None:
        """Start a task, execute it, and return what is to be reported of its end."""
        # a claim may have started it
        if not running:
            start = Report(task.task_id, TaskStatus.RUNNING, task.attempt)
            if not self._claims.tell(start):
                self._claims.note("lost", task)
                return None
        self._claims.note("started", task)
        ends: list[Report | None] = []
        try:
            with telemetry.continuing({"traceparent": task.traceparent or ""}):
                self._execute_into(ends, task)
        except BaseException as exc:
            if not ends:
                raise
            # with its traceback; SystemExit and the like end the task, not the thread
            if not isinstance(exc, TaskCancelled):
                log.exception("task %s of %s failed", task.task_id, task.job_name)
        return ends[0]

    def _execute_into(self, ends: list[Report | None], task: ClaimedTask[Any]) -> None:
        """Execute a task, and append what is to be reported before anything is raised."""
        report = partial(Report, task.task_id, attempt=task.attempt)
        try:
            result = as_json(self._execute(task))
        except TaskCancelled:
            # the host knows what it has ended; a task that ends itself has to say so
            ends.append(None if task.ended else report(status=TaskStatus.CANCELLED))
            self._claims.note("cancelled", task)
            raise
        except BaseException as exc:
            ends.append(report(status=TaskStatus.FAILED, error=describe(exc)))
            self._claims.note("failed", task)
            raise
        ends.append(report(status=TaskStatus.COMPLETED, result=result))
        self._claims.note("completed", task)

    # --- reporting ---

    def _report(self) -> None:
        most = self._claims.transport.limits.max_reports if self._starts else 1
        over = False
        while not over and (end := self._ends.get()) is not None:
            ends = [end]
            while len(ends) < min(most, len(self._in_hand)):
                try:
                    more = self._ends.get(timeout=MOMENT_SECONDS)
                except queue.Empty:
                    break
                if more is None:
                    over = True
                    break
                ends.append(more)
            self._tell_all(ends, most)

    def _tell_all(self, ends: list[End], most: int) -> None:
        alone = {end.task_id for end in ends}
        try:
            reports = [end.report for end in ends if end.report is not None]
            for batch in batches(reports, most, BATCH_BYTES):
                if len(batch) > 1:
                    left = self._claims.tell_together(batch)
                    alone -= {r.task_id for r in batch} - {r.task_id for r in left}
        except BaseException:
            log.exception("unexpected")
        # all at once: so the next claim asks for as many
        self._free([end for end in ends if end.task_id not in alone])
        for end in ends:
            if end.task_id in alone:
                # its hand is still taken, so that there is a thread
                self._pool.submit(partial(self._tell, end))

    def _tell(self, end: End) -> None:
        try:
            if end.report is not None:
                self._claims.tell(end.report)
        finally:
            self._free([end])

    def _free(self, ends: list[End]) -> None:
        for end in ends:
            if end.task is not None:
                self._claims.held.discard(end.task)
            self._in_hand.discard(end.task_id)
        if ends:
            # the hand is free when the host knows
            self._slots.release(len(ends))


@dataclass
class Pulse:
    """The heartbeat thread: tells that the worker lives, and what to stop."""

    heartbeat: Heartbeat
    life: Life
    interval: float
    threads: list[threading.Thread] = field(default_factory=list)
    _due: threading.Event = field(default_factory=threading.Event)
    _over: bool = False
    _checked: float = 0.0

    def start(self) -> None:
        """Begin, if it has not begun."""
        if not self.threads:
            self.threads.append(
                threading.Thread(target=self._run, name="zndraw-heartbeat", daemon=True)
            )
            self.threads[0].start()

    def hurry(self) -> None:
        """Have the next heartbeat soon: there is a task to ask about."""
        if self.heartbeat.host_counts_attempts:
            self._due.set()

    def close(self) -> None:
        """Send no more of them."""
        self._over = True
        self._due.set()

    def _run(self) -> None:
        pause = self.interval
        while not self._over:
            if self._due.wait(pause) and not self._over:
                self._due.clear()
                self.life.stopping.wait(min(BUSY_BEAT_SECONDS, self.interval))
            if self._over:
                return
            try:
                pause = self._beat()
            except BaseException:
                log.exception("no heartbeat")
                pause = min(PAUSE_AFTER_ERROR_SECONDS, self.interval)

    def _beat(self) -> float:
        try:
            lost = self.heartbeat.send(stop=self.life.hopeless)
            now = time.monotonic()
            if lost and now - self._checked > self.interval / 2:
                # not more often: the host may have reasons of its own
                self._checked = now
                self.heartbeat.registrations.put_again()
        except SlowDown:
            return self.interval
        except (Unreachable, PermissionError) as exc:
            if not self.life.hopeless.is_set():
                # the worker may have been deleted under this heartbeat
                self.life.give_up(exc)
            return self.interval
        # of a host that doesn't count attempts a heartbeat learns nothing of tasks
        busy = len(self.heartbeat.held) > 0 and self.heartbeat.host_counts_attempts
        return min(BUSY_BEAT_SECONDS, self.interval) if busy else self.interval
