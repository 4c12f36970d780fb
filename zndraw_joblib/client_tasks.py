"""The tasks that a worker's process has in its hands."""

import json
import math
import threading
import time
from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import pydantic_core

from zndraw_joblib.exceptions import storable
from zndraw_joblib.extension import Extension
from zndraw_joblib.lifecycle import TaskStatus
from zndraw_joblib.names import UNPRINTABLE
from zndraw_joblib.schemas import TaskResponse

MAX_MESSAGE = 1000
PROGRESS_SECONDS = 1.0

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
        self._progress: tuple[float, str | None] | None = None
        self._told: tuple[float, str | None] | None = None
        self._told_at = 0.0

    def __repr__(self) -> str:
        return f"ClaimedTask({self.task_id!r}, {self.job_name!r}, {self.room_id!r})"

    @property
    def cancelled(self) -> bool:
        """Whether there is no use in going on: nobody will take the result."""
        return self._cancelled.is_set()

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
        """Make `cancelled` true."""
        self._cancelled.set()


class Report(NamedTuple):
    """What is told of a task.

    Attributes
    ----------
    task_id : str
        The task.
    status : TaskStatus
        What becomes of it.
    attempt : int or None
        The attempt that it is told of; None where the host doesn't count them.
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


class HeldTasks:
    """The tasks in this process's hands, by id, for any thread."""

    def __init__(self) -> None:
        self._tasks: dict[str, ClaimedTask[Any]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: ClaimedTask[Any]) -> None:
        """Take a task in hand; an earlier attempt of it is over."""
        with self._lock:
            earlier = self._tasks.get(task.task_id)
            self._tasks[task.task_id] = task
        if earlier is not None:
            earlier.cancel()

    def discard(self, task: ClaimedTask[Any]) -> None:
        """Let go of a task."""
        with self._lock:
            if self._tasks.get(task.task_id) is task:
                del self._tasks[task.task_id]

    def cancel(self, task_id: str, attempt: int | None) -> None:
        """Stop a task, unless another attempt than this one is meant."""
        with self._lock:
            task = self._tasks.get(task_id)
        if task is not None and attempt in (None, task.attempt):
            task.cancel()

    def all(self) -> list[ClaimedTask[Any]]:
        """Return the tasks."""
        with self._lock:
            return list(self._tasks.values())


class Beat:
    """What one heartbeat says of the tasks at hand, and what becomes of its answer."""

    def __init__(self, tasks: Iterable[ClaimedTask[Any]]) -> None:
        # hosts that count no attempts have no use for the tasks in a heartbeat
        self._tasks = [task for task in tasks if task.attempt is not None]
        now = time.monotonic()
        self._progress = {
            task.task_id: task._progress
            for task in self._tasks
            if task._progress != task._told and now - task._told_at >= PROGRESS_SECONDS
        }

    def content(self) -> dict[str, Any]:
        """Return the body of the request, as keyword arguments; at rest there is none."""
        told = [
            {"id": t.task_id, "attempt": t.attempt, **self._in_bounds(t)}
            for t in self._tasks
        ]
        return {"json": {"tasks": told}} if told else {}

    def answered(self, answer: dict[str, Any]) -> None:
        """Stop the tasks that the host wants stopped or gave to others."""
        stop = {*answer.get("cancelled", ()), *answer.get("lost", ())}
        now = time.monotonic()
        # these objects, not what is held under their ids by now
        for task in self._tasks:
            if task.task_id in self._progress:
                task._told, task._told_at = self._progress[task.task_id], now
            if task.task_id in stop:
                task.cancel()

    def _in_bounds(self, task: ClaimedTask[Any]) -> dict[str, Any]:
        # one value out of bounds and the host would refuse the whole heartbeat
        if (progress := self._progress.get(task.task_id)) is None:
            return {}
        fraction, message = progress
        told: dict[str, Any] = {}
        if not math.isnan(fraction):
            told["progress"] = min(max(fraction, 0.0), 1.0)
        if message is not None:
            told["message"] = UNPRINTABLE.sub(" ", str(message))[:MAX_MESSAGE]
        return told


def as_json(result: Any) -> Any:
    """Return a task's result in the types of JSON.

    Raises
    ------
    ValueError
        When it holds something that JSON has no notation for: NaN and Infinity, lone
        surrogates, itself.
    """
    try:
        plain = pydantic_core.to_jsonable_python(result, fallback=_unpack)
        # as it will be sent
        json.dumps(plain, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise ValueError(f"the result can't be kept as JSON: {exc}") from exc
    return plain


def _unpack(value: Any) -> Any:
    # arrays and scalars of NumPy and what is like it
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
