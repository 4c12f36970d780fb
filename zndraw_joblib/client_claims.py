"""What a worker claims and reports, and that it lives."""

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from zndraw_joblib.client_answers import Answer, SlowDown, has_waited
from zndraw_joblib.client_registrations import Life, Registrations
from zndraw_joblib.client_tasks import ClaimedTask
from zndraw_joblib.client_transport import CONNECT_SECONDS, SafeLogger, Transport, path, prefer
from zndraw_joblib.exceptions import describe, storable
from zndraw_joblib.lifecycle import TERMINAL, TaskStatus, WorkerState

log = SafeLogger(logging.getLogger(__name__))

# what a host says of a result that it won't keep
REFUSED = frozenset({400, 413, 422})
# a batch that can't be told is told one by one
BATCH_RETRIES = 2
LAST_RETRIES = 3


class TaskOffer(NamedTuple):
    """A claimed task as the host handed it out: no more of it than is needed.

    What else a later host says of a task, a worker need not understand.
    """

    task_id: str
    job_name: str
    room_id: str
    payload: dict[str, Any]
    running: bool
    attempt: int | None
    traceparent: str | None


def read_offers(body: dict[str, Any]) -> list[TaskOffer]:
    """Return the tasks of a claim's answer; raise whatever if it isn't one."""
    found = body.get("tasks") or [body["task"]]
    return [
        TaskOffer(
            str(task["id"]),
            str(task["job_name"]),
            str(task["room_id"]),
            dict(task["payload"]),
            task["status"] == TaskStatus.RUNNING,
            # a host that doesn't count attempts doesn't send them
            None if task.get("attempt") is None else int(task["attempt"]),
            task.get("traceparent"),
        )
        for task in found
        if task
    ]


class Report(NamedTuple):
    """What is reported of a task.

    Attributes
    ----------
    task_id : str
        The task.
    status : TaskStatus
        What becomes of it.
    attempt : int or None
        The attempt that it is reported of; None where the host doesn't count them.
    error : str or None
        Why it failed.
    retryable : bool
        Whether another attempt may go better.
    result : JSON
        What it brought.
    """

    task_id: str
    status: TaskStatus
    attempt: int | None = None
    error: str | None = None
    retryable: bool = True
    result: Any = None

    def content(self) -> dict[str, Any]:
        """Return the body of the request; what is not asked for is not said."""
        body: dict[str, Any] = {"status": self.status.value}
        if self.attempt is not None:
            body["attempt"] = self.attempt
        if self.error is not None:
            body["error"] = storable(self.error)
        if not self.retryable:
            body["retryable"] = False
        if self.result is not None:
            body["result"] = self.result
        return body

    def as_failure(self, error: str) -> "Report":
        """Return the report of a failure that no further attempt will mend."""
        return Report(self.task_id, TaskStatus.FAILED, self.attempt, error, retryable=False)

    def is_answered_by(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the task of an answer to this report; raise if it is another one."""
        if str(body["id"]) != self.task_id or not isinstance(body["status"], str):
            raise ValueError("it tells of another task")
        return body


def batches(reports: list[Report], most: int, size: int) -> Iterator[list[Report]]:
    """Yield reports that go into one request each: ``most`` of them, ``size`` bytes."""
    batch: list[Report] = []
    used = 0
    for report in reports:
        more = len(json.dumps(report.content()))
        if batch and (used + more > size or len(batch) == most):
            yield batch
            batch, used = [], 0
        batch.append(report)
        used += more
    if batch:
        yield batch


class HeldTasks:
    """The tasks in this process's hands, by id, for any thread."""

    def __init__(self) -> None:
        self._tasks: dict[str, ClaimedTask[Any]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tasks)

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

    def end(self, task_id: str, attempt: int | None) -> None:
        """Stop a task that the host ended, unless another attempt than this is meant."""
        with self._lock:
            task = self._tasks.get(task_id)
        if task is not None and attempt in (None, task.attempt):
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
    _key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def claim(
        self, limit: int, wait: int, *, start: bool = False, stop: threading.Event | None = None
    ) -> tuple[list[TaskOffer], bool]:
        """Return what was claimed, and whether the host waited for it."""

        def ask(worker_id: UUID) -> Answer:
            body: dict[str, Any] = {"worker_id": str(worker_id)}
            if limit > 1:
                body["max_tasks"] = limit
            if start:
                body["start"] = True
            return self.transport.send(
                "post",
                path("tasks", "claim"),
                read=read_offers,
                json=body,
                # the same one until an answer was read: a claim whose answer got lost
                # is not made a second time but answered a second time
                headers={"Idempotency-Key": self._key, **prefer(wait)},
                timeout=wait + CONNECT_SECONDS,
                stop=stop,
            )

        asked = time.monotonic()
        answer = self.registrations.as_worker(ask)
        self._key = uuid.uuid4().hex
        return answer.value, has_waited(answer, asked)

    def claim_one(self, wait: int) -> tuple[ClaimedTask[Any] | None, bool]:
        """Return a task that can be run, if there is one, and whether the host waited."""
        while True:
            offers, waited = self.claim(1, wait)
            task = self.accept(offers[0]) if offers else None
            if task is not None or not offers:
                return task, waited

    def accept(self, offer: TaskOffer) -> ClaimedTask[Any] | None:
        """Hold a task, or fail it when it is nothing that this worker runs."""
        job = self.registrations.jobs.get(offer.job_name)
        try:
            if job is None:
                raise LookupError
            # as JSON, which it was: to strict fields that is another thing than Python
            extension = job.cls.model_validate_json(json.dumps(offer.payload))
        except BaseException as exc:
            # whatever a validator does, even SystemExit, ends this task alone
            error = describe(exc)
            if job is None:
                error = f"this worker does not serve {offer.job_name}"
            report = Report(offer.task_id, TaskStatus.FAILED, offer.attempt)
            self.tell(report.as_failure(error))
            log.error("task %s can't be run: %s", offer.task_id, error)
            return None
        task = ClaimedTask(
            offer.task_id,
            offer.job_name,
            offer.room_id,
            extension,
            job.run_kwargs,
            attempt=offer.attempt,
            traceparent=offer.traceparent,
        )
        self.held.add(task)
        self.note("claimed", task)
        return task

    def hand_back(self, offer: TaskOffer) -> None:
        """Let another worker have a task that was not begun."""
        if offer.attempt is not None:
            report = Report(offer.task_id, TaskStatus.PENDING, offer.attempt)
            try:
                self._report(report, retries=LAST_RETRIES)
            except Exception as exc:
                log.warning("could not hand back task %s: %s", offer.task_id, exc)

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

    def report(self, task: ClaimedTask[Any], status: TaskStatus, **fields: Any) -> None:
        """Report of a task that the program runs by itself; raise if it is refused."""
        answer = self._report(Report(task.task_id, status, task.attempt, **fields))
        if answer.status in (404, 409):
            task.end()
        if task.ended or (status in TERMINAL and answer.problem is None):
            self.held.discard(task)
        self.transport.value(answer)

    def report_by_id(self, task_id: str, error: str) -> None:
        """Report that a task failed, whatever its attempt; raise if it is refused."""
        report = Report(task_id, TaskStatus.FAILED, error=error)
        self.transport.value(self._report(report))

    def tell(self, report: Report) -> bool:
        """Report, and return whether the host agreed; it is told in any case.

        What the host won't keep is reported as a failure. If nothing gets through, the
        worker gives up: with it, the host ends its tasks.
        """
        try:
            answer = self._report(report)
        except SlowDown:
            return not self.life.hopeless.is_set() and self.tell(report)
        except Exception as exc:
            if not self.life.hopeless.is_set():
                self._give_up(report, exc)
            log.error("task %s: could not report: %s", report.task_id, exc)
            return False
        if answer.problem is None:
            return True
        if report.status is TaskStatus.COMPLETED and answer.status in REFUSED:
            # without another report it would count as running for ever
            self.tell(report.as_failure(f"the host refused the result: {answer.reason}"))
        log.warning("task %s: %s was refused: %s", report.task_id, report.status, answer.reason)
        return False

    def tell_together(self, reports: list[Report]) -> list[Report]:
        """Report in one request; return those that have to be told one by one."""
        body = [{"id": report.task_id, **report.content()} for report in reports]

        def read(answer: dict[str, Any]) -> dict[str, int]:
            found = {str(o["id"]): int(o["status"]) for o in answer["outcomes"]}
            return {report.task_id: found[report.task_id] for report in reports}

        try:
            answer = self.transport.send(
                "patch",
                path("tasks"),
                read=read,
                optional=True,
                json={"reports": body},
                retries=BATCH_RETRIES,
                stop=self.life.hopeless,
            )
        except Exception as exc:
            log.warning("could not report %s tasks together: %s", len(reports), exc)
            return reports
        if answer.problem is not None:
            # one of them may be what the host won't take, if it takes so many at all
            return reports
        # who is refused is told why, and may have something else to report
        return [r for r in reports if answer.value[r.task_id] >= 300]

    def _report(self, report: Report, retries: float | None = None) -> Answer:
        return self.transport.send(
            "patch",
            path("tasks", report.task_id),
            read=report.is_answered_by,
            json=report.content(),
            retries=retries,
            stop=self.life.hopeless,
        )

    def _give_up(self, report: Report, exc: Exception) -> None:
        if report.result is not None:
            # what is in between may let a smaller one through
            error = f"the result could not be reported: {exc}"
            try:
                self._report(report.as_failure(error), retries=LAST_RETRIES)
            except Exception:
                self.life.give_up(exc)
        else:
            self.life.give_up(exc)


@dataclass
class Heartbeat:
    """What tells the host that the worker lives, and how far its tasks are."""

    transport: Transport
    registrations: Registrations
    held: HeldTasks
    draining: bool = False
    host_counts_attempts: bool = True

    def send(self, **options: Any) -> bool:
        """Send a sign of life; return whether the host has lost registrations."""
        offered = self.registrations.counted()
        # hosts that count no attempts have no use for the tasks in a heartbeat
        tasks = [task for task in self.held.all() if task.attempt is not None]
        most = self.transport.limits.max_heartbeat_tasks if len(tasks) > 1 else 1
        for first in range(0, len(tasks) or 1, most):
            some = tasks[first : first + most]
            answer = self._send(some, options)
            # these objects, not what is held under their ids by now
            stop = {*(answer.get("cancelled") or ()), *(answer.get("lost") or ())}
            for task in some:
                if task.task_id in stop:
                    task.end()
        for task in self.held.all():
            if task.ended:
                # there is nothing more to tell or to learn
                self.held.discard(task)
        self.host_counts_attempts = "cancelled" in answer
        self.draining = answer.get("desired_state") == WorkerState.DRAINING
        # only what was offered all the time that the heartbeat was under way
        certain = map(min, offered, self.registrations.counted())
        known = (answer.get("jobs"), answer.get("providers"))
        return any(
            isinstance(told, int) and told < number
            for told, number in zip(known, certain, strict=True)
        )

    def _send(self, tasks: list[ClaimedTask[Any]], options: dict[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if tasks:
            told = [{"id": t.task_id, "attempt": t.attempt, **t.unsent_progress()} for t in tasks]
            content = {"json": {"tasks": told}}

        def ask(worker_id: UUID) -> Answer:
            def read(body: dict[str, Any]) -> dict[str, Any]:
                if UUID(body["id"]) != worker_id:
                    raise ValueError("it tells of another worker")
                return body

            return self.transport.send(
                "patch", path("workers", worker_id), read=read, **content, **options
            )

        answer: dict[str, Any] = self.registrations.as_worker(ask).value
        return answer
