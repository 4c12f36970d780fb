"""How one task is executed, in a thread or in a child process, and what is reported of it.

A child process loads this, what it stands on, and what its tasks need.
"""

import inspect
import json
import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from socket import gethostname
from tempfile import gettempdir
from typing import Any, Protocol, TypedDict

from zndraw_joblib.encoding import as_json
from zndraw_joblib.exceptions import describe, storable, traceback_of
from zndraw_joblib.extension import ClaimedTask, TaskCancelled
from zndraw_joblib.lifecycle import ErrorType, TaskStatus
from zndraw_joblib.telemetry import SafeLogger, continuing

log = SafeLogger(logging.getLogger(__name__))


Report = dict[str, Any]
Execute = Callable[[ClaimedTask[Any]], Any]


class Options(TypedDict, total=False):
    """How a `JobManager` works; what it means is told there."""

    execute: Execute | None
    heartbeat_interval: float
    polling_interval: float
    max_unreachable_seconds: float
    max_startup_retries: int
    concurrency: int
    grace_seconds: float
    isolate: bool
    setup: Callable[[], Any] | None
    kill_after: float
    until: datetime | float | None
    idle_seconds: float | None


class _Attempt(Protocol):
    """A task as it was handed out, or as it is run."""

    task_id: str
    attempt: int | None


def run_extension(task: ClaimedTask[Any]) -> Any:
    """Run a task's extension, given ``task`` if it asks for it by this name."""
    run = task.extension.run
    asked = {"task": task} if "task" in inspect.signature(run).parameters else {}
    return run(None, **asked, **task.run_kwargs)


_running: ContextVar[ClaimedTask[Any] | None] = ContextVar("task", default=None)


class TaskLogHandler(logging.Handler):
    """Sends what is logged while a task is executed to the task's log.

    Of other threads that a task starts, only what carries its context variables over, as
    `asyncio.to_thread` does.

    Examples
    --------
    >>> logging.getLogger().addHandler(TaskLogHandler(logging.INFO))
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Add a record to the log of the task that logged it, if it was one."""
        task = _running.get()
        if task is not None:
            try:
                task.log(self.format(record))
            except Exception:
                self.handleError(record)


def perform(execute: Execute, task: ClaimedTask[Any]) -> Report | None:
    """Execute a task, and return what is to be reported of its end."""
    try:
        with continuing({"traceparent": task.traceparent or ""}):
            token = _running.set(task)
            try:
                value = execute(task)
            finally:
                _running.reset(token)
        result = _as_result(task, value)
    except TaskCancelled:
        # the host knows what it has ended; a task that ends itself has to say so
        return None if task.ended else report_of(task, TaskStatus.CANCELLED)
    except BaseException as exc:
        # SystemExit and the like end the task, not the thread
        log.exception("task %s of %s failed", task.task_id, task.job_name)
        with suppress(Exception):
            task.log(traceback_of(exc))
        return report_of(task, TaskStatus.FAILED, error=describe(exc))
    return report_of(task, TaskStatus.COMPLETED, result=result)


def _as_result(task: ClaimedTask[Any], value: Any) -> Any:
    try:
        return as_json(value, nan_as_null=getattr(task.extension, "nan_as_null", False))
    except ValueError as exc:
        try:
            kept = _keep(task.task_id, task.attempt, "pickle", pickle.dumps(value))
        except Exception:
            # there is no form at all in which it could be kept
            raise exc from None
        raise ValueError(f"{exc}{kept}") from None


def keep_result(report: Report) -> str:
    """Keep the result that can't be reported in a file; return the end of a sentence."""
    if report.get("result") is None:
        return ""
    content = json.dumps(report["result"], ensure_ascii=False).encode()
    return _keep(report["id"], report.get("attempt"), "json", content)


def _keep(task_id: str, attempt: int | None, kind: str, content: bytes) -> str:
    for directory in (Path.cwd(), Path(gettempdir())):
        path = directory / f"zndraw-joblib-{task_id}-{attempt or 0}.{kind}"
        try:
            path.write_bytes(content)
        except OSError as exc:
            log.warning("task %s: no result in %s: %s", task_id, path, exc)
            continue
        log.error("task %s: its result is kept in %s", task_id, path)
        return f"; the result is kept in {path} on {gethostname()}"
    return "; there was no room for the result in a file either"


def report_of(
    task: _Attempt,
    status: TaskStatus,
    *,
    error: str | None = None,
    retryable: bool = True,
    error_type: ErrorType | None = None,
    result: Any = None,
) -> Report:
    """Return what is to be reported of a task."""
    report = {
        "id": task.task_id,
        "attempt": task.attempt,
        "status": status.value,
        "error": None if error is None else storable(error),
        "error_type": error_type,
        "retryable": None if retryable else False,
        "result": result,
    }
    # what is not asked for is left out: an older host does not know it
    return {word: value for word, value in report.items() if value is not None}


class Hands(Protocol):
    """What takes tasks to have them executed, ``concurrency`` of them side by side."""

    concurrency: int

    def open(self, number: int) -> None:
        """Let so many hands more, or less, take tasks."""

    def submit(self, call: Callable[[], None]) -> None:
        """Have one of the threads make a call."""


class Executor(Protocol):
    """Where tasks are executed."""

    #: whether parameters are read before, in a thread of the worker
    reads_parameters: bool

    def check(self, offered: Any) -> None:
        """Raise ValueError when a job's tasks can't be executed."""

    def start(self, hands: "Hands") -> None:
        """Open hands as soon as tasks can be executed."""

    def perform(self, task: ClaimedTask[Any]) -> Report | None:
        """Execute a task, and return what is to be reported of its end; never raise."""

    def close(self) -> None:
        """Let what was started end."""


@dataclass
class Threads:
    """Executes tasks in the threads of the hands."""

    execute: Execute
    reads_parameters: bool = True

    def check(self, offered: Any) -> None:
        """Take any job."""

    def start(self, hands: "Hands") -> None:
        """Open all hands."""
        hands.open(hands.concurrency)

    def perform(self, task: ClaimedTask[Any]) -> Report | None:
        """Execute a task."""
        return perform(self.execute, task)

    def close(self) -> None:
        """Do nothing: threads end with the process."""
