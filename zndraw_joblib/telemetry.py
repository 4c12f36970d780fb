"""What goes on, told to logging, and to OpenTelemetry where the process uses it.

Nothing of OpenTelemetry is imported here before the host or the worker has: without it
a trace context is handed on from the submission to the worker, and that is all. Names
follow OpenTelemetry's semantic conventions for messaging (1.28): the job is the
destination, the task the message.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from time import perf_counter
from typing import Any

from zndraw_joblib.lifecycle import ErrorType, TaskStatus

log = logging.getLogger(__name__)

SYSTEM = "zndraw_joblib"
#: W3C Trace Context, version 00.
TRACEPARENT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_incoming: ContextVar[str | None] = ContextVar("traceparent", default=None)


@cache
def _import_api() -> Any:
    try:
        for name in ("trace", "metrics", "propagate"):
            import_module(f"opentelemetry.{name}")
    except ImportError:
        return None
    return sys.modules["opentelemetry"]


def _configured(provider: Any) -> bool:
    # what the API itself stands in with does nothing, and that takes time: a host that
    # only has the API, through FastAPI for example, pays nothing for it
    kind = type(provider)
    deferred = kind.__name__.lstrip("_") in (
        "ProxyTracerProvider",
        "ProxyMeterProvider",
    )
    return not (deferred and kind.__module__.startswith("opentelemetry."))


def _tracing() -> Any:
    # whoever wants to be told has loaded it; to look costs nothing
    api = _import_api() if sys.modules.get("opentelemetry") else None
    return api if api and _configured(api.trace.get_tracer_provider()) else None


def _metering() -> "_Instruments | None":
    api = _import_api() if sys.modules.get("opentelemetry") else None
    provider = api and api.metrics.get_meter_provider()
    return _instruments(provider) if api and _configured(provider) else None


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
    """Return the trace context that came with a request or a broker's message."""
    return _incoming.get()


def _context(api: Any, given: str | None) -> Any:
    return api.propagate.extract({"traceparent": given}) if given else None


def _attributes(
    operation: str, kind: str, job_name: str, **more: Any
) -> dict[str, Any]:
    told = {
        "messaging.system": SYSTEM,
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
        "messaging.destination.name": job_name,
    }
    return told | {key: value for key, value in more.items() if value is not None}


def submitting(job_name: str, task_id: Any = None) -> str | None:
    """Return the trace context that a task is to carry, as ``traceparent``.

    Where OpenTelemetry is used it is that of a new producer span, which goes on with
    the current span, or else with the request's header.
    """
    given = _incoming.get()
    if (api := _tracing()) is None:
        return given
    current = api.trace.get_current_span().get_span_context().is_valid
    span = api.trace.get_tracer(SYSTEM).start_span(
        f"submit {job_name}",
        context=None if current else _context(api, given),
        kind=api.trace.SpanKind.PRODUCER,
        attributes=_attributes("submit", "send", job_name)
        | ({} if task_id is None else {"messaging.message.id": str(task_id)}),
    )
    with api.trace.use_span(span, end_on_exit=True):
        carried: dict[str, str] = {}
        api.propagate.inject(carried)
    return carried.get("traceparent") or given


@contextmanager
def processing(
    job_name: str, task_id: Any, attempt: int | None, traceparent: str | None
) -> Iterator[None]:
    """Run a task within its trace; what is raised is recorded with the span."""
    api, instruments = _tracing(), _metering()
    began, error_type = perf_counter(), None
    attributes = _attributes("process", "process", job_name)
    told: dict[str, Any] = {"messaging.message.id": str(task_id)}
    if attempt is not None:
        told["zndraw_joblib.task.attempt"] = attempt
    try:
        with (
            api.trace.get_tracer(SYSTEM).start_as_current_span(
                f"process {job_name}",
                context=_context(api, traceparent),
                kind=api.trace.SpanKind.CONSUMER,
                attributes=attributes | told,
            )
            if api
            else nullcontext()
        ):
            yield
    except BaseException as exc:
        error_type = type(exc).__qualname__
        raise
    finally:
        if instruments:
            more = {"error.type": error_type} if error_type else {}
            instruments.duration.record(perf_counter() - began, attributes | more)


class _Instruments:
    def __init__(self, provider: Any) -> None:
        meter = provider.get_meter(SYSTEM)
        self.sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Tasks that were submitted."
        )
        self.consumed = meter.create_counter(
            "messaging.client.consumed.messages",
            "{message}",
            "Tasks that were claimed.",
        )
        self.ended = meter.create_counter(
            "zndraw_joblib.tasks.ended", "{task}", "Tasks that ended, by how."
        )
        self.duration = meter.create_histogram(
            "messaging.process.duration", "s", "How long tasks ran."
        )


@cache
def _instruments(provider: Any) -> _Instruments:
    return _Instruments(provider)


def happening(task: Any) -> str:
    """Return what became of a task, in a word, from how it stands after a change."""
    if task.status is TaskStatus.PENDING:
        return "requeued" if task.attempt else "submitted"
    if task.status is TaskStatus.FAILED and task.error_type == ErrorType.WORKER_LOST:
        return "lost"
    going_on = task.status in (TaskStatus.CLAIMED, TaskStatus.RUNNING)
    # a claim forgets both
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
    if log.isEnabledFor(level):
        told = {
            "event": event,
            "task_id": str(task.id),
            "job_name": task.job_name,
            "room_id": task.room_id,
            "worker_id": None if task.worker_id is None else str(task.worker_id),
            "attempt": task.attempt,
            "status": task.status.value,
            "error_type": task.error_type and str(task.error_type),
        }
        log.log(level, "task %s of %s %s", task.id, task.job_name, event, extra=told)
    if instruments := _metering():
        _count(instruments, event, task)


def _count(instruments: _Instruments, event: str, task: Any) -> None:
    job = task.job_name
    if event == "submitted":
        instruments.sent.add(1, _attributes("submit", "send", job))
    # a claim may start its tasks
    elif event == "claimed" or (
        event == "started" and task.started_at == task.claimed_at
    ):
        instruments.consumed.add(1, _attributes("claim", "receive", job))
    elif event not in ("requeued", "progressed", "started"):
        failed = {"error.type": str(task.error_type)} if task.error_type else {}
        ended = {"zndraw_joblib.task.status": task.status.value}
        named = {"messaging.destination.name": job}
        instruments.ended.add(1, named | ended | failed)
