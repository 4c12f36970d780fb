"""What goes on, told to logging; the trace that goes with a task, and what it says itself.

The log records are the hook for whoever counts or forwards what happens. Spans and
metrics are the process's own: ``docs/tracing.py`` is a recipe for OpenTelemetry, of which
nothing is imported here.
"""

import logging
import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from zndraw_joblib.lifecycle import MAX_LOG_LINES, ErrorType, TaskStatus, as_line

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


# --- what a task says while it runs, until heartbeats have taken it to the host ---

# what may wait for heartbeats; beyond, the oldest lines are left out
MAX_UNSENT_LINES = 2000
MAX_UNSENT_CHARACTERS = 256 * 1024
# half of what a host takes of a task at once
BYTES_A_BEAT = 32 * 1024
MAX_TRACEBACK = 16 * 1024

#: What sets colours, and moves the cursor.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class TaskLog:
    """The lines of a task's attempt that the host does not have yet; for any thread."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._characters = 0
        self._omitted = 0
        self._first = 1
        #: what is under way, as long as the host has not answered
        self._sent: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def add(self, text: str) -> None:
        """Add one line, or several."""
        lines = [as_line(_as_on_a_terminal(line)) for line in text.split("\n")]
        with self._lock:
            self._lines += lines
            self._characters += sum(map(len, lines))
            while len(self._lines) > MAX_UNSENT_LINES or self._characters > MAX_UNSENT_CHARACTERS:
                self._take()
                self._omitted += 1

    def unsent(self) -> dict[str, Any] | None:
        """Return what a heartbeat is to carry, the same until it is kept."""
        with self._lock:
            if self._sent is None and self._lines:
                lines = []
                if self._omitted:
                    lines.append(f"... {self._omitted} lines left out ...")
                    self._omitted = 0
                size = 0
                while self._lines and len(lines) < MAX_LOG_LINES:
                    size += len(self._lines[0].encode()) + 1
                    if size > BYTES_A_BEAT:
                        break
                    lines.append(self._take())
                self._sent = {"first": self._first, "lines": lines}
                self._first += len(lines)
            return self._sent

    def keep(self, sent: dict[str, Any]) -> None:
        """Note what the host has, or won't have."""
        with self._lock:
            if self._sent is sent:
                self._sent = None

    def _take(self) -> str:
        line = self._lines.popleft()
        self._characters -= len(line)
        return line


def _as_on_a_terminal(line: str) -> str:
    """Return what of a line a terminal would show in the end, without colours."""
    return _ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2])


def traceback_of(exc: BaseException) -> str:
    """Return the traceback of an exception, of a long one the first part and the last."""
    text = "".join(traceback.format_exception(exc))
    if (beyond := len(text) - MAX_TRACEBACK) > 0:
        half = MAX_TRACEBACK // 2
        text = f"{text[:half]}\n... {beyond} characters left out ...\n{text[-half:]}"
    return text
