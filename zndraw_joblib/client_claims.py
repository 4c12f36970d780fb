"""What a worker claims, holds and reports of tasks."""

import json
import logging
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import BaseModel, Field

from zndraw_joblib.client_api import Answer, SlowDown
from zndraw_joblib.client_transport import FIRST_DELAY_SECONDS, Transport, path
from zndraw_joblib.client_worker import Life, Registrations
from zndraw_joblib.encoding import as_json
from zndraw_joblib.exceptions import describe, storable
from zndraw_joblib.execution import Report, keep_result, report_of
from zndraw_joblib.extension import ClaimedTask
from zndraw_joblib.lifecycle import TERMINAL, TaskStatus
from zndraw_joblib.telemetry import SafeLogger

# what a host says of a result that it won't keep
REFUSED = frozenset({400, 413, 422})
BATCH_RETRIES = 2
LAST_RETRIES = 3

log = SafeLogger(logging.getLogger(__name__))


class TaskOffer(BaseModel):
    """A claimed task as the host handed it out: no more of it than is needed.

    What else a later host says of a task, a worker need not understand.
    """

    task_id: str = Field(alias="id")
    job_name: str
    room_id: str
    payload: dict[str, Any]
    status: str
    # a host that doesn't count attempts doesn't send them
    attempt: int | None = None
    traceparent: str | None = None
    checkpoint: Any = None


class Unread(NamedTuple):
    """A job's class, and a task's parameters in JSON, which are read in another process."""

    cls: type[BaseModel]
    payload: str


def read_offers(body: dict[str, Any]) -> list[TaskOffer]:
    """Return the tasks of a claim's answer; raise whatever if it isn't one."""
    tasks = body.get("tasks") or [body["task"]]
    return [TaskOffer.model_validate(task) for task in tasks if task]


def failure_of(report: Report, error: str) -> Report:
    """Return the report of a failure that no further attempt will mend, instead of another."""
    failure = {"status": TaskStatus.FAILED.value, "error": storable(error), "retryable": False}
    return {word: report[word] for word in ("id", "attempt") if word in report} | failure


class HeldTasks:
    """The tasks that this process runs, by id, for any thread."""

    def __init__(self) -> None:
        #: those whose code runs, held or not
        self.running: set[ClaimedTask[Any]] = set()
        self._tasks: dict[str, ClaimedTask[Any]] = {}
        self._lock = threading.Lock()

    def stuck(self) -> list[ClaimedTask[Any]]:
        """Return the tasks that are over, and whose code still runs."""
        return [task for task in self.running.copy() if task.ended]

    def add(self, task: ClaimedTask[Any]) -> None:
        """Hold a task; an earlier attempt of it is over."""
        with self._lock:
            earlier = self._tasks.get(task.task_id)
            self._tasks[task.task_id] = task
        if earlier is not None:
            earlier.end()

    def discard(self, task: ClaimedTask[Any]) -> None:
        """Let go of a task."""
        with self._lock:
            if self._tasks.get(task.task_id) is task:
                del self._tasks[task.task_id]

    def on_status(self, data: dict[str, Any]) -> None:
        """Stop a task that was cancelled, unless another attempt than this was."""
        if data.get("status") == TaskStatus.CANCELLED:
            for task in self.all():
                if task.task_id == data["id"] and data.get("attempt") in (None, task.attempt):
                    task.end()

    def end_all(self) -> None:
        """Stop all tasks: the host has ended them with their worker."""
        for task in self.all():
            task.end()

    def all(self) -> list[ClaimedTask[Any]]:
        """Return the tasks."""
        with self._lock:
            return list(self._tasks.values())


@dataclass
class Claims:
    """Tasks that a worker takes from the host, and what it reports of them."""

    transport: Transport
    registrations: Registrations
    life: Life
    held: HeldTasks
    # of claims whose answers were not read; several threads may claim
    _unanswered: deque[str] = field(default_factory=deque)

    def claim(
        self,
        limit: int,
        wait: int,
        *,
        start: bool = False,
        stop: threading.Event | None = None,
        jobs: Sequence[str] | None = None,
    ) -> tuple[list[TaskOffer], bool]:
        """Return what was claimed, of some of the jobs or all, and whether the host waited."""
        try:
            # the same one until an answer was read: a claim whose answer got lost
            # is not made a second time but answered a second time
            key = self._unanswered.pop()
        except IndexError:
            key = uuid.uuid4().hex

        def ask(worker_id: UUID) -> Answer:
            body: dict[str, Any] = {"worker_id": str(worker_id)}
            if limit > 1:
                body["max_tasks"] = limit
            if start:
                body["start"] = True
            if jobs is not None:
                body["jobs"] = jobs
            return self.transport.send(
                "post",
                path("tasks", "claim"),
                read=read_offers,
                json=body,
                headers={"Idempotency-Key": key},
                wait=wait,
                stop=stop,
            )

        try:
            answer = self.registrations.as_worker(ask)
        except BaseException:
            self._unanswered.append(key)
            raise
        return answer.value, answer.waited

    def claim_one(self, wait: int) -> tuple[ClaimedTask[Any] | None, bool]:
        """Return a task that can be run, if there is one, and whether the host waited."""
        while True:
            offers, waited = self.claim(1, wait)
            task = self.accept(offers[0]) if offers else None
            if task is not None or not offers:
                return task, waited

    def listen(self, polling_interval: float, stop: threading.Event) -> Iterator[ClaimedTask[Any]]:
        """Yield tasks to run, until the worker ends or ``stop`` is set."""
        wait = min(int(polling_interval), self.transport.longest_wait)
        while not stop.is_set() and not self.life.stopping.is_set():
            self.life.wake.clear()
            task, waited = self.claim_one(wait)
            if task is not None:
                yield task
            elif not waited:
                self.life.wake.wait(polling_interval)

    def accept(self, offer: TaskOffer, *, read: bool = True) -> ClaimedTask[Any] | None:
        """Hold a task, or fail it when it is nothing that this worker runs.

        Unless ``read``, its extension is `Unread`.
        """
        job = self.registrations.jobs.get(offer.job_name)
        if job is None:
            self._refuse(offer, f"this worker does not serve {offer.job_name}")
            return None
        try:
            # as JSON, which it was: to strict fields that is another thing than Python
            payload = json.dumps(offer.payload)
            extension: Any = Unread(job.cls, payload)
            if read:
                extension = job.cls.model_validate_json(payload)
        except BaseException as exc:
            # whatever a validator does, even SystemExit, ends this task alone
            self._refuse(offer, describe(exc))
            return None
        task = ClaimedTask(
            offer.task_id,
            offer.job_name,
            offer.room_id,
            extension,
            job.given,
            attempt=offer.attempt,
            traceparent=offer.traceparent,
            saved=offer.checkpoint,
        )
        self.held.add(task)
        self.note("claimed", task)
        return task

    def _refuse(self, offer: TaskOffer, error: str) -> None:
        self.report(report_of(offer, TaskStatus.FAILED, error=error, retryable=False))
        log.error("task %s can't be run: %s", offer.task_id, error)

    def hand_back(self, offer: TaskOffer) -> None:
        """Let another worker have a task that was not begun."""
        if offer.attempt is not None:
            try:
                self._send(report_of(offer, TaskStatus.PENDING), retries=LAST_RETRIES)
            except Exception as exc:
                log.warning("could not hand back task %s: %s", offer.task_id, exc)

    def interrupt(self, tasks: Sequence[ClaimedTask[Any]], **options: Any) -> None:
        """Let other workers have tasks that are at work here, and can't go on."""
        most = self.transport.limits().max_reports if len(tasks) > 1 else 1
        for first in range(0, len(tasks), most):
            some = tasks[first : first + most]
            reports = [report_of(t, TaskStatus.PENDING) | {"interrupted": True} for t in some]
            agreed = self.report_together(reports, **options)
            for task in some:
                if task.task_id in agreed:
                    self.note("interrupted", task)
                else:
                    log.warning("task %s could not be given back", task.task_id)

    def note(self, event: str, task: ClaimedTask[Any]) -> None:
        """Log what becomes of a task."""
        fields = {
            "event": event,
            "task_id": task.task_id,
            "job_name": task.job_name,
            "room_id": task.room_id,
            "worker_id": str(self.registrations.worker_id),
            "attempt": task.attempt,
        }
        log.info("task %s of %s %s", task.task_id, task.job_name, event, extra=fields)

    def report_or_raise(
        self, task: ClaimedTask[Any], status: TaskStatus, *, result: Any = None, **fields: Any
    ) -> None:
        """Report of a task that the program runs by itself; raise if it is refused."""
        answer = self._send(report_of(task, status, result=as_json(result), **fields))
        if answer.status in (404, 409):
            task.end()
        if task.ended or (status in TERMINAL and answer.problem is None):
            self.held.discard(task)
        self.transport.value(answer)

    def fail_by_id(self, task_id: str, error: str) -> None:
        """Report that a task failed, whatever its attempt; raise if it is refused."""
        report = {"id": task_id, "status": TaskStatus.FAILED.value, "error": storable(error)}
        self.transport.value(self._send(report))

    def report(self, report: Report) -> bool:
        """Report as long as there is hope, and return whether the host agreed.

        What the host won't keep is reported as a failure. If nothing gets through, the
        worker gives up: with it, the host ends its tasks.
        """
        answer: Answer | None = None
        while answer is None:
            try:
                answer = self._send(report)
            except SlowDown as exc:
                # the host is there, and will take it
                if self.life.aborting.wait(max(exc.retry_after, FIRST_DELAY_SECONDS)):
                    return False
            except BaseException as exc:
                kept = keep_result(report)
                if not self.life.aborting.is_set():
                    self._give_up(report, exc, kept)
                log.error("task %s: could not report: %s", report["id"], exc)
                return False
        if answer.problem is None:
            return True
        if report["status"] == TaskStatus.COMPLETED and answer.status in REFUSED:
            # without another report it would count as running for ever
            error = f"the host refused the result: {answer.reason}{keep_result(report)}"
            self.report(failure_of(report, error))
        elif (answer.problem or {}).get("task_status") == TaskStatus.FAILED:
            # given up for lost, as while the host was away: nobody does it again
            keep_result(report)
        log.warning("task %s: %s was refused: %s", report["id"], report["status"], answer.reason)
        return False

    def report_together(self, reports: Sequence[Report], **options: Any) -> set[str]:
        """Report of different tasks in one request; return the ids of those that were agreed."""

        def read(answer: dict[str, Any]) -> set[str]:
            outcomes = {str(o["id"]): int(o["status"]) for o in answer["outcomes"]}
            return {report["id"] for report in reports if outcomes[report["id"]] < 300}

        try:
            answer = self.transport.send(
                "patch",
                path("tasks"),
                read=read,
                json={"reports": reports},
                stop=self.life.aborting,
                **{"retries": BATCH_RETRIES, **options},
            )
        except BaseException as exc:
            log.warning("could not report %s tasks together: %s", len(reports), exc)
            return set()
        # of a problem any of them may be the cause; alone, that one is refused
        return answer.value or set()

    def _send(self, report: Report, **options: Any) -> Answer:
        def read(body: dict[str, Any]) -> None:
            if str(body["id"]) != report["id"] or not isinstance(body["status"], str):
                raise ValueError("it is about another task")

        return self.transport.send(
            "patch",
            path("tasks", report["id"]),
            read=read,
            json={word: value for word, value in report.items() if word != "id"},
            stop=self.life.aborting,
            **options,
        )

    def _give_up(self, report: Report, exc: BaseException, kept: str) -> None:
        try:
            if "result" not in report:
                raise exc
            # what is in between may let a smaller one through
            error = f"the result could not be reported: {exc}{kept}"
            self._send(failure_of(report, error), retries=LAST_RETRIES)
        except BaseException:
            self.life.give_up(exc)
