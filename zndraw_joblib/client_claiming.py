"""Claiming tasks and reporting what becomes of them."""

import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from zndraw_joblib.client_registering import Registrant
from zndraw_joblib.client_submitting import UNKNOWN, has_waited, prefer
from zndraw_joblib.client_tasks import (
    Beat,
    ClaimedTask,
    HeldTasks,
    Report,
    as_json,
)
from zndraw_joblib.client_transport import CONNECT_SECONDS, Api, path
from zndraw_joblib.exceptions import describe
from zndraw_joblib.lifecycle import TERMINAL, TaskStatus, WorkerState
from zndraw_joblib.schemas import MAX_REPORTS, TaskResponse

log = logging.getLogger(__name__)

# what a host says of a result that it won't keep
REFUSED = frozenset({400, 413, 422})
# beyond this, results go by themselves: a host takes a mebibyte, if it is left as it is
BATCH_BYTES = 256 * 1024


class Claimant(Registrant):
    """A worker that takes tasks one by one, as its program asks for them.

    Parameters
    ----------
    api : Api
        The host, and who asks.
    **options
        As for `Registrant`.
    """

    def __init__(self, api: Api, **options: Any) -> None:
        super().__init__(api, **options)
        self._held = HeldTasks()
        self._claim_key = uuid.uuid4().hex
        #: set: there may be work
        self._wake = threading.Event()
        #: set: no report is repeated any more
        self._hopeless = threading.Event()
        self._draining = False
        self._host_counts_attempts = True

    def claim(self) -> ClaimedTask[Any] | None:
        """Return a task to run, or None when there is none.

        One that doesn't fit its job, or whose job is not registered here, is failed.

        Raises
        ------
        KeyError, PermissionError
            When the worker is not the user's.
        ConnectionError
            When the host can't be reached.
        """
        return self._claim_one(wait=0)[0]

    def listen(
        self, polling_interval: float = 2.0, stop_event: threading.Event | None = None
    ) -> Iterator[ClaimedTask[Any]]:
        """Yield tasks to run, as they come, until `disconnect`.

        Parameters
        ----------
        polling_interval : float
            Seconds after which ``stop_event`` is looked at.
        stop_event : threading.Event, optional
            Set: there are no further tasks.

        Raises
        ------
        KeyError, PermissionError
            When the worker is not the user's.
        ConnectionError
            When the host can't be reached.
        """
        stop = stop_event or threading.Event()
        wait = min(int(polling_interval), self._transport.longest_wait)
        while not stop.is_set() and not self._stopping.is_set():
            self._wake.clear()
            task, waited = self._claim_one(wait)
            if task is not None:
                yield task
            elif not waited:
                self._wake.wait(polling_interval)

    def start(self, task: ClaimedTask[Any]) -> None:
        """Report that a task runs.

        Raises
        ------
        ValueError
            When it is not this worker's any more.
        ConnectionError
            When the host can't be reached.
        """
        self._report_own(task, TaskStatus.RUNNING)

    def complete(self, task: ClaimedTask[Any], result: Any = None) -> None:
        """Report that a task succeeded.

        Parameters
        ----------
        task : ClaimedTask
            The task.
        result : JSON, optional
            Kept with the task; Pydantic models and NumPy's arrays become JSON.

        Raises
        ------
        ValueError
            When the task is not this worker's any more, or the result can't be kept.
        ConnectionError
            When the host can't be reached.
        """
        self._report_own(task, TaskStatus.COMPLETED, result=as_json(result))

    def fail(
        self, task: ClaimedTask[Any], error: str, *, retryable: bool = True
    ) -> None:
        """Report that a task failed.

        Parameters
        ----------
        task : ClaimedTask
            The task.
        error : str
            Why.
        retryable : bool
            Whether another attempt may go better.

        Raises
        ------
        ValueError
            When it is not this worker's any more.
        ConnectionError
            When the host can't be reached.
        """
        self._report_own(task, TaskStatus.FAILED, error=error, retryable=retryable)

    def fail_by_id(self, task_id: str, error: str) -> None:
        """Report that a task failed, whatever its attempt.

        Raises
        ------
        KeyError
            When there is no such task.
        ValueError
            When it has ended.
        ConnectionError
            When the host can't be reached.
        """
        response = self._report(Report(task_id, TaskStatus.FAILED, error=error))
        self.api.raise_for_status(response)

    def cancel(self, task: ClaimedTask[Any]) -> None:
        """Report that a task is not to be run by anybody.

        Raises
        ------
        ValueError
            When it has ended.
        ConnectionError
            When the host can't be reached.
        """
        self._report_own(task, TaskStatus.CANCELLED)

    def heartbeat(self) -> None:
        """Tell the host that the worker lives, and how far its tasks are.

        Tasks that the host wants stopped are `ClaimedTask.cancelled` afterwards.

        Raises
        ------
        KeyError, PermissionError
            When the worker is not the user's.
        ConnectionError
            When the host can't be reached.
        """
        self._send_beat(retries=0)

    def _lose_tasks(self) -> None:
        for task in self._held.all():
            task.cancel()

    def _claim(
        self,
        limit: int,
        wait: int,
        *,
        start: bool = False,
        stop: threading.Event | None = None,
    ) -> tuple[list[TaskResponse], bool]:
        """Return what was claimed, and whether the host waited for it."""

        def ask(worker_id: UUID) -> Any:
            body: dict[str, Any] = {"worker_id": str(worker_id)}
            if limit > 1:
                body["max_tasks"] = limit
            if start:
                body["start"] = True
            return self._transport.send(
                "post",
                path("tasks", "claim"),
                json=body,
                # the same one until there is an answer: a claim whose answer got lost
                # is not made a second time but answered a second time
                headers={"Idempotency-Key": self._claim_key, **prefer(wait)},
                timeout=wait + CONNECT_SECONDS,
                stop=stop,
            )

        asked = time.monotonic()
        response = self._as_worker(ask)
        self._claim_key = uuid.uuid4().hex
        answer = response.json()
        found = answer.get("tasks") or [answer["task"]]
        tasks = [TaskResponse.model_validate(task) for task in found if task]
        return tasks, has_waited(response, asked)

    def _claim_one(self, wait: int) -> tuple[ClaimedTask[Any] | None, bool]:
        while True:
            tasks, waited = self._claim(1, wait)
            if not tasks:
                return None, waited
            task = self._accept(tasks[0])
            if task is not None:
                return task, waited

    def _accept(self, claimed: TaskResponse) -> ClaimedTask[Any] | None:
        """Take a task in hand, or fail it when it is nothing that this worker runs."""
        # a host that doesn't count attempts doesn't send them
        attempt = claimed.attempt if "attempt" in claimed.model_fields_set else None
        task_id = str(claimed.id)
        try:
            job = self._jobs[claimed.job_name]
            # as JSON, which it was: to strict fields that is another thing than Python
            extension = job.cls.model_validate_json(json.dumps(claimed.payload))
        except BaseException as exc:
            # whatever a validator does, even SystemExit, ends this task alone
            error = describe(exc)
            if claimed.job_name not in self._jobs:
                error = f"this worker does not serve {claimed.job_name}"
            log.error("task %s can't be run: %s", task_id, error)
            self._tell(
                Report(
                    task_id, TaskStatus.FAILED, attempt, error=error, retryable=False
                )
            )
            return None
        task = ClaimedTask(
            task_id,
            claimed.job_name,
            claimed.room_id,
            extension,
            job.run_kwargs,
            attempt=attempt,
            traceparent=claimed.traceparent,
        )
        self._held.add(task)
        self._note("claimed", task)
        return task

    def _note(self, event: str, task: ClaimedTask[Any]) -> None:
        told = {
            "event": event,
            "task_id": task.task_id,
            "job_name": task.job_name,
            "room_id": task.room_id,
            "worker_id": self._worker_id and str(self._worker_id),
            "attempt": task.attempt,
        }
        log.info("task %s of %s %s", task.task_id, task.job_name, event, extra=told)

    def _report(self, report: Report, retries: float = math.inf) -> Any:
        return self._transport.send(
            "patch",
            path("tasks", report.task_id),
            json=report.content(),
            retries=retries,
            stop=self._hopeless,
        )

    def _report_own(
        self, task: ClaimedTask[Any], status: TaskStatus, **fields: Any
    ) -> None:
        response = self._report(Report(task.task_id, status, task.attempt, **fields))
        if response.status_code in (404, 409):
            task.cancel()
        if task.cancelled or (status in TERMINAL and response.status_code < 300):
            self._held.discard(task)
        self.api.raise_for_status(response)

    def _tell(self, report: Report, retries: float = math.inf) -> bool:
        """Report, and return whether the host agreed; the worker goes on in any case."""
        task_id, status = report.task_id, report.status
        try:
            response = self._report(report, retries)
        except Exception as exc:
            log.error("task %s: could not report %s: %s", task_id, status, exc)
            return False
        if response.status_code < 300:
            return True
        log.warning(
            "task %s: %s was refused: %s", task_id, status, response.text[:1000]
        )
        if status is TaskStatus.COMPLETED and response.status_code in REFUSED:
            # without another report it would count as running for ever
            error = f"the host refused the result: {response.text[:1000]}"
            self._tell(
                Report(
                    task_id,
                    TaskStatus.FAILED,
                    report.attempt,
                    error=error,
                    retryable=False,
                )
            )
        return False

    def _tell_all(self, reports: list[Report]) -> None:
        """Report several tasks, in as few requests as the host takes."""
        for batch in _in_batches(reports):
            if not self._tell_together(batch):
                for report in batch:
                    self._tell(report)

    def _tell_together(self, batch: list[Report]) -> bool:
        """Report in one request; return whether the host takes it so."""
        if len(batch) == 1 or not self._host_takes_batches:
            return False
        body = [{"id": report.task_id, **report.content()} for report in batch]
        try:
            response = self._transport.send(
                "patch", path("tasks"), json={"reports": body}, stop=self._hopeless
            )
        except Exception as exc:
            log.error("could not report %s tasks: %s", len(batch), exc)
            return True
        if response.status_code in UNKNOWN:
            self._host_takes_batches = False
        if response.status_code >= 300:
            # one of them may be what the host won't take
            return False
        for outcome in response.json()["outcomes"]:
            if outcome["status"] >= 300:
                log.warning("task %s: refused: %s", outcome["id"], outcome["problem"])
        return True

    def _send_beat(self, **options: Any) -> None:
        beat = Beat(self._held.all())

        def ask(worker_id: UUID) -> Any:
            return self._transport.send(
                "patch", path("workers", worker_id), **beat.content(), **options
            )

        answer = self._as_worker(ask).json()
        beat.answered(answer)
        for task in self._held.all():
            if task.cancelled:
                # there is nothing more to tell or to learn
                self._held.discard(task)
        self._host_counts_attempts = "cancelled" in answer
        self._draining = answer.get("desired_state") == WorkerState.DRAINING


def _in_batches(reports: list[Report]) -> Iterator[list[Report]]:
    batch: list[Report] = []
    size = 0
    for report in reports:
        more = len(json.dumps(report.content()))
        if batch and (size + more > BATCH_BYTES or len(batch) == MAX_REPORTS):
            yield batch
            batch, size = [], 0
        batch.append(report)
        size += more
    if batch:
        yield batch
