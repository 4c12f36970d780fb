"""Spans and metrics of tasks with OpenTelemetry: a recipe to copy.

The package carries the trace of a submission, as ``traceparent``, to whoever runs the
task; spans are made where it runs. Names follow OpenTelemetry's semantic conventions for
messaging (1.28): the job is the destination, the task the message.

In a worker::

    JobManager.connect(url, execute=traced(run), ...)

Around the executor of ``@internal`` jobs, in the host and in TaskIQ's workers::

    register_internal_jobs(..., executor=traced_executor(executor))

In the host, once at startup::

    logging.getLogger("zndraw_joblib.telemetry").addHandler(TaskCounter())
"""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from opentelemetry import metrics, propagate, trace

from zndraw_joblib import ClaimedTask
from zndraw_joblib.registry import internal_name

#: Instruments count under this name, and spans are made under it.
NAME = "zndraw_joblib"


@contextmanager
def process_span(
    job_name: str, task_id: str, attempt: int | None, traceparent: str | None
) -> Iterator[None]:
    """Run a task in a span that goes on with its submission, and measure how long."""
    attributes = {
        "messaging.system": NAME,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": job_name,
    }
    began, error = perf_counter(), {}
    try:
        # what is raised is recorded with the span
        with trace.get_tracer(NAME).start_as_current_span(
            f"process {job_name}",
            context=propagate.extract({"traceparent": traceparent or ""}),
            kind=trace.SpanKind.CONSUMER,
            attributes=attributes
            | {"messaging.message.id": task_id, "zndraw_joblib.task.attempt": attempt or 0},
        ):
            yield
    except BaseException as exc:
        error = {"error.type": type(exc).__qualname__}
        raise
    finally:
        metrics.get_meter(NAME).create_histogram(
            "messaging.process.duration", "s", "How long tasks ran."
        ).record(perf_counter() - began, attributes | error)


def traced(execute: Callable[[ClaimedTask], Any]) -> Callable[[ClaimedTask], Any]:
    """Return a worker's ``execute`` that runs each task in a span."""

    def run(task: ClaimedTask) -> Any:
        about = (task.job_name, task.task_id, task.attempt, task.traceparent)
        with process_span(*about):
            return execute(task)

    return run


def traced_executor(executor: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Return an executor of ``@internal`` jobs that runs each task in a span.

    Parameters
    ----------
    executor : callable
        It has to declare ``attempt`` and ``token``.
    """

    async def run(
        extension: Any,
        payload: dict[str, Any],
        room_id: str,
        task_id: str,
        *,
        attempt: int | None,
        token: str | None,
        traceparent: str | None,
    ) -> None:
        name = str(internal_name(extension))
        with process_span(name, task_id, attempt, traceparent):
            await executor(extension, payload, room_id, task_id, attempt=attempt, token=token)

    return run


class TaskCounter(logging.Handler):
    """Counts what becomes of tasks, from the records that tell of each change.

    Their ``event`` is ``submitted``, ``claimed``, ``started``, ``progressed``,
    ``requeued``, ``completed``, ``failed``, ``lost`` or ``cancelled``.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Count one change."""
        about = {
            "event": getattr(record, "event", None),
            "messaging.destination.name": getattr(record, "job_name", None),
            "error.type": getattr(record, "error_type", None),
        }
        metrics.get_meter(NAME).create_counter(
            "zndraw_joblib.task.changes", "{change}", "Changes of tasks, by what happened."
        ).add(1, {key: value for key, value in about.items() if value is not None})
