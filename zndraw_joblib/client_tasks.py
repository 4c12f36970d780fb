"""Tasks as who runs them and who submits them sees them."""

import json
import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from typing import Any, Generic, TypeVar

from zndraw_joblib import telemetry
from zndraw_joblib.client_answers import Answer, Unreachable, has_waited
from zndraw_joblib.client_transport import CONNECT_SECONDS, Transport, path, prefer
from zndraw_joblib.exceptions import PayloadTooLarge
from zndraw_joblib.extension import Extension, category_of, parameters_of
from zndraw_joblib.lifecycle import TERMINAL, UNPRINTABLE, FullName, check_room
from zndraw_joblib.schemas import MAX_PAGE, TaskQueryResponse, TaskResponse

MAX_MESSAGE = 1000
PROGRESS_SECONDS = 1.0
BAR_WIDTH = 40
# half of what a host takes that is left as it is
BATCH_BYTES = 512 * 1024

E = TypeVar("E", bound=Extension)


class TaskCancelled(Exception):
    """The host wants this task to stop, or has given it to another worker."""


class TaskFailed(Exception):
    """A task that was waited for ended as failed or cancelled.

    Attributes
    ----------
    task : TaskResponse
        The task, ``task.error`` and ``task.errors`` among the rest.
    """

    def __init__(self, task: TaskResponse) -> None:
        super().__init__(f"task {task.id} {task.status.value}: {task.error}")
        self.task = task


class ClaimedTask(Generic[E]):
    """A task that this process is to run.

    Parameters
    ----------
    task_id : str
        Its id.
    job_name : str
        The full name of its job.
    room_id : str
        The room that it was submitted in.
    extension : Extension
        The job with this task's parameters.
    run_kwargs : dict, optional
        What was given at the job's registration.
    attempt : int, optional
        Which attempt this is; None when the host doesn't count them.
    traceparent : str, optional
        The trace that it was submitted in (W3C Trace Context).
    """

    def __init__(
        self,
        task_id: str,
        job_name: str,
        room_id: str,
        extension: E,
        run_kwargs: dict[str, Any] | None = None,
        attempt: int | None = None,
        traceparent: str | None = None,
    ) -> None:
        self.task_id = task_id
        self.job_name = job_name
        self.room_id = room_id
        self.extension = extension
        self.run_kwargs = run_kwargs or {}
        self.attempt = attempt
        self.traceparent = traceparent
        self._cancelled = threading.Event()
        self._ended = False
        self._progress: tuple[float, str | None] | None = None
        self._sent: tuple[float, str | None] | None = None
        self._sent_at = 0.0

    def __repr__(self) -> str:
        return f"ClaimedTask({self.task_id!r}, {self.job_name!r}, {self.room_id!r})"

    @property
    def cancelled(self) -> bool:
        """Whether there is no use in going on: nobody will take the result."""
        return self._cancelled.is_set()

    @property
    def ended(self) -> bool:
        """Whether the host has ended this attempt: there is nothing more to report."""
        return self._ended

    def raise_if_cancelled(self) -> None:
        """Stop here when there is no use in going on.

        Raises
        ------
        TaskCancelled
            When the task was cancelled, timed out or given to another worker.
        """
        if self.cancelled:
            raise TaskCancelled(f"task {self.task_id} is to stop")

    def progress(self, fraction: float, message: str | None = None) -> None:
        """Note how far the task is: the host is told about once a second.

        Parameters
        ----------
        fraction : float
            From 0 to 1.
        message : str, optional
            A line for the people in the room, of at most 1000 characters.
        """
        # nothing else: it is called in tight loops
        self._progress = (float(fraction), message)

    def cancel(self) -> None:
        """Make `cancelled` true; a run that stops for it ends the task as cancelled."""
        self._cancelled.set()

    def end(self) -> None:
        """Make `ended` true, and `cancelled` with it."""
        self._ended = True
        self._cancelled.set()

    def unsent_progress(self) -> dict[str, Any]:
        """Return what a heartbeat is to tell; within the bounds that the host checks.

        One value out of bounds, and the host would refuse the whole heartbeat.
        """
        progress = self._progress
        now = time.monotonic()
        if progress is None or progress == self._sent or now - self._sent_at < PROGRESS_SECONDS:
            return {}
        self._sent, self._sent_at = progress, now
        fraction, message = progress
        fields: dict[str, Any] = {}
        if not math.isnan(fraction):
            fields["progress"] = min(max(fraction, 0.0), 1.0)
        if message is not None:
            fields["message"] = UNPRINTABLE.sub(" ", str(message))[:MAX_MESSAGE]
        return fields


class Submissions:
    """Tasks that are submitted and waited for; it needs no worker."""

    def __init__(self, transport: Transport, polling_interval: float) -> None:
        self._transport = transport
        self._polling_interval = polling_interval

    def submit(
        self,
        extensions: Iterable[Extension],
        room: str,
        job_room: str,
        key: str,
        options: dict[str, Any],
    ) -> list[str]:
        """Submit tasks, as many of one job as the host takes in one request."""
        # what is not asked for is not said: an older host does not know the words
        options = {word: value for word, value in options.items() if value}
        bodies = ((_job(e, job_room), _body(e, options)) for e in extensions)
        ids: list[str] = []
        number = 0
        for job, alike in groupby(bodies, key=itemgetter(0)):
            for batch in self._batches(body for _, body in alike):
                ids += self._submit_batch(room, job, batch, f"{key}-{number}")
                number += 1
        return ids

    def submit_one(
        self, extension: Extension, room: str, job_room: str, key: str, options: dict[str, Any]
    ) -> str:
        """Submit a task."""
        options = {word: value for word, value in options.items() if value}
        job = _job(extension, job_room)
        return self._submit(room, job, _body(extension, options), key)

    def _batches(self, bodies: Iterable[bytes]) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        size = 0
        for body in bodies:
            # asked for when there are two
            most = self._transport.limits.max_batch if batch else 1
            if batch and (size + len(body) > BATCH_BYTES or len(batch) == most):
                yield batch
                batch, size = [], 0
            batch.append(body)
            size += len(body)
        yield batch

    def _submit_batch(self, room: str, job: FullName, bodies: list[bytes], key: str) -> list[str]:
        def read(answer: dict[str, Any]) -> list[str]:
            ids = [str(task_id) for task_id in answer["ids"]]
            if len(ids) != len(bodies):
                raise ValueError("it tells of other tasks")
            return ids

        answer = self._transport.send(
            "post",
            path("rooms", check_room(room), "batches", job),
            read=read,
            optional=True,
            content=b'{"tasks":[%s]}' % b",".join(bodies),
            headers=_headers(job, key),
        )
        if answer.no_route:
            return [self._submit(room, job, body, f"{key}-{n}") for n, body in enumerate(bodies)]
        if answer.is_problem(PayloadTooLarge) and len(bodies) > 1:
            # this host takes less at once
            half = len(bodies) // 2
            return [
                *self._submit_batch(room, job, bodies[:half], f"{key}a"),
                *self._submit_batch(room, job, bodies[half:], f"{key}b"),
            ]
        ids: list[str] = self._transport.value(answer)
        return ids

    def _submit(self, room: str, job: FullName, body: bytes, key: str) -> str:
        answer = self._transport.send(
            "post",
            path("rooms", check_room(room), "tasks", job),
            read=lambda answer: str(answer["id"]),
            content=body,
            headers=_headers(job, key),
        )
        return str(self._transport.value(answer))

    def wait_for(self, task_id: str, timeout: float | None) -> TaskResponse:
        """Wait until a task has ended."""
        return self._wait_for(task_id, _deadline(timeout))

    def wait_all(self, ids: list[str], timeout: float | None, progress: bool) -> list[TaskResponse]:
        """Wait until all of these tasks have ended."""
        deadline = _deadline(timeout)
        total = len(set(ids))
        ended: dict[str, TaskResponse] = {}
        for first in range(0, len(ids), MAX_PAGE):
            # duplicates apart, in their order
            left = list(dict.fromkeys(ids[first : first + MAX_PAGE]))
            while left := [task_id for task_id in left if task_id not in ended]:
                ended |= self._ended_of(left, deadline)
                if progress:
                    _show(len(ended), total)
        return [ended[task_id] for task_id in ids]

    def _ended_of(self, ids: list[str], deadline: float) -> dict[str, TaskResponse]:
        """Return those of the tasks that have ended, after a wait for all of them."""
        asked = time.monotonic()
        answer = self._ask(
            "post",
            path("tasks", "query"),
            deadline,
            read=TaskQueryResponse.model_validate,
            optional=True,
            json={"ids": ids},
        )
        if answer.no_route:
            return {ids[0]: self._wait_for(ids[0], deadline)}
        found: TaskQueryResponse = self._transport.value(answer)
        if found.missing:
            raise KeyError(f"there is no task {found.missing[0]}")
        tasks = found.tasks
        ended = {
            # what is too large for one answer to many has to be asked for by itself
            str(task.id): self._wait_for(str(task.id), deadline) if task.abridged else task
            for task in tasks
            if task.status in TERMINAL
        }
        if len(ended) < len(tasks):
            going = next(task for task in tasks if task.status not in TERMINAL)
            self._pause(going, answer, asked, deadline)
        return ended

    def _wait_for(self, task_id: str, deadline: float) -> TaskResponse:
        while True:
            asked = time.monotonic()
            answer = self._ask(
                "get", path("tasks", task_id), deadline, read=TaskResponse.model_validate
            )
            task: TaskResponse = self._transport.value(answer)
            if task.status in TERMINAL:
                return task
            self._pause(task, answer, asked, deadline)

    def _ask(self, method: str, path: str, deadline: float, **content: Any) -> Answer:
        """Ask for what is to be waited for, and let the host wait."""
        left = max(0.0, deadline - time.monotonic())
        wait = int(min(left, self._transport.longest_wait))
        try:
            return self._transport.send(
                method,
                path,
                headers=prefer(wait),
                timeout=wait + CONNECT_SECONDS,
                patience=min(left, self._transport.patience),
                **content,
            )
        except Unreachable as exc:
            if time.monotonic() < deadline:
                raise
            raise TimeoutError(f"no answer to {path}: {exc}") from None

    def _pause(self, task: TaskResponse, answer: Answer, asked: float, deadline: float) -> None:
        """Wait until it is worth to ask again for a task that goes on."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"task {task.id} is still {task.status.value}")
        if not has_waited(answer, asked):
            # less than a second is left, or the host does not wait
            time.sleep(min(left, self._polling_interval))


def _show(ended: int, total: int) -> None:
    bar = "#" * (BAR_WIDTH * ended // total)
    # a service's process may have no stream to draw on
    with suppress(Exception):
        end = "\n" if ended == total else ""
        sys.stderr.write(f"\r[{bar:<{BAR_WIDTH}}] {ended} of {total} tasks{end}")
        sys.stderr.flush()


def _job(extension: Extension, job_room: str) -> FullName:
    return FullName.of(job_room, category_of(extension), type(extension).__name__)


def _body(extension: Extension, options: dict[str, Any]) -> bytes:
    body = {"payload": parameters_of(extension), **options}
    return json.dumps(body, allow_nan=False, ensure_ascii=False).encode()


def _headers(job: FullName, key: str) -> dict[str, str]:
    headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
    if trace := telemetry.carried():
        headers["traceparent"] = trace
    return headers


def _deadline(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout
