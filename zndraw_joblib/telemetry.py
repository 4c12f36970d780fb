"""What goes on, told to logging, and the trace that goes with a task.

The log records are the hook for whoever counts or forwards what happens. Spans and
metrics are the process's own: ``docs/tracing.py`` is a recipe for OpenTelemetry, of which
nothing is imported here.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from zndraw_joblib.lifecycle import ErrorType, TaskStatus

log = logging.getLogger(__name__)

#: W3C Trace Context, version 00.
TRACEPARENT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_incoming: ContextVar[str | None] = ContextVar("traceparent", default=None)


class SafeLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that never raises: what is only logged decides nothing."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave message and arguments as they are."""
        return msg, kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log, and swallow what a handler or a closed stream raises."""
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        with suppress(Exception, SystemExit):
            super().log(level, msg, *args, **kwargs)


@contextmanager
def continuing(headers: Mapping[str, str]) -> Iterator[None]:
    """Go on with the trace that ``traceparent`` tells of, a header or a label."""
    given = headers.get("traceparent")
    if given is None or not TRACEPARENT.fullmatch(given):
        yield
        return
    token = _incoming.set(given)
    try:
        yield
    finally:
        _incoming.reset(token)


def carried() -> str | None:
    """Return the trace that what is sent from here goes on with, as ``traceparent``.

    It is that of the current span where the process uses OpenTelemetry, or else what came
    with the request, the message or the task.
    """
    span: dict[str, str] = {}
    if propagate := sys.modules.get("opentelemetry.propagate"):
        propagate.inject(span)
    return span.get("traceparent") or _incoming.get()


def happening(task: Any) -> str:
    """Return what became of a task, in a word, from how it stands after a change."""
    if task.status is TaskStatus.PENDING:
        return "requeued" if task.attempt else "submitted"
    if task.status is TaskStatus.FAILED and task.error_type == ErrorType.WORKER_LOST:
        return "lost"
    going_on = task.status in (TaskStatus.CLAIMED, TaskStatus.RUNNING)
    # what waits for a claim has neither
    if going_on and (task.progress, task.progress_message) != (None, None):
        return "progressed"
    return "started" if task.status is TaskStatus.RUNNING else str(task.status.value)


def task_changed(task: Any) -> None:
    """Tell of a committed change to a task.

    The log record carries ``event``, ``task_id``, ``job_name``, ``room_id``,
    ``worker_id``, ``attempt``, ``status`` and ``error_type``.
    """
    event = happening(task)
    level = logging.DEBUG if event == "progressed" else logging.INFO
    if not log.isEnabledFor(level):
        return
    fields = {
        "event": event,
        "task_id": str(task.id),
        "job_name": task.job_name,
        "room_id": task.room_id,
        "worker_id": None if task.worker_id is None else str(task.worker_id),
        "attempt": task.attempt,
        "status": task.status.value,
        "error_type": task.error_type and str(task.error_type),
    }
    # a handler of the host's that raises decides nothing
    with suppress(Exception):
        log.log(level, "task %s of %s %s", task.id, task.job_name, event, extra=fields)
