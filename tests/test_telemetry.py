"""What the log tells, and how a trace goes with a task: the recipe of docs/tracing.py."""

import asyncio
import logging
import subprocess
import sys
import threading
import time
from typing import Any, ClassVar

import httpx
import pytest
from conftest import PASSWORD, User
from makers import SessionMaker
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import update
from steps import JOB, claim, execute, offer, read, report, silence, submit
from taskiq import InMemoryBroker
from tracing import TaskCounter, traced, traced_executor

from zndraw_joblib import (
    Category,
    Extension,
    JobManager,
    register_internal_jobs,
    register_internal_tasks,
    telemetry,
)
from zndraw_joblib.models import Task, now
from zndraw_joblib.sweeper import cleanup_stale_workers, cleanup_stuck_internal_tasks

pytestmark = pytest.mark.makers("plain")

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # the API lets a process set it once
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> InMemoryMetricReader:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics._internal, "_METER_PROVIDER", provider)
    return reader


def finished(
    spans: InMemorySpanExporter, name: str, within: ReadableSpan | None = None
) -> list[ReadableSpan]:
    """Return the spans of a name, those of one trace alone, as they began."""
    found = [
        span
        for span in spans.get_finished_spans()
        if span.name == name
        and (within is None or span.context.trace_id == within.context.trace_id)
    ]
    return sorted(found, key=lambda span: span.start_time)


def ancestors(spans: InMemorySpanExporter, span: ReadableSpan) -> list[int]:
    """Return the ids of the spans that a span stands in."""
    above = {s.context.span_id: s.parent for s in spans.get_finished_spans()}
    line, at = [], span.parent
    while at is not None:
        line.append(at.span_id)
        at = above.get(at.span_id)
    return line


async def test_each_change_is_one_structured_line(
    ada: User, bob: User, session_maker: SessionMaker, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "zndraw_joblib")
    worker = await offer(ada, max_attempts=2)
    task = await submit(bob)
    await claim(ada, worker)
    await report(ada, task, "running")
    beat = {"tasks": [{"id": task["id"], "attempt": 1, "progress": 0.5}]}
    assert (await ada.patch(f"/workers/{worker}", json=beat)).status_code == 200
    await silence(session_maker, worker)
    assert await cleanup_stale_workers(session_maker) == 1
    other = await offer(ada)
    await claim(ada, other)
    await silence(session_maker, other)
    assert await cleanup_stale_workers(session_maker) == 1

    told = [r.__dict__ for r in caplog.records if hasattr(r, "event")]
    of_task = [
        (r["event"], r["worker_id"], r["attempt"], r["error_type"])
        for r in told
        if r.get("task_id") == task["id"]
    ]
    assert of_task == [
        ("submitted", None, 0, None),
        ("claimed", worker, 1, None),
        ("started", worker, 1, None),
        ("requeued", None, 1, "worker_lost"),
        ("claimed", other, 2, "worker_lost"),
        ("lost", other, 2, "worker_lost"),
    ]
    gone = [r["worker_id"] for r in told if r["event"] == "gone"]
    assert gone == [worker, other]
    assert {(r["job_name"], r["room_id"]) for r in told if "task_id" in r} == {(JOB, "lab")}


class Outcome(Extension):
    category: ClassVar[Category] = Category.MODIFIER
    good: bool | None = True

    def run(self, vis: Any, **kwargs: Any) -> None:
        if not self.good:
            raise RuntimeError("as asked")


async def test_a_trace_goes_from_the_submission_through_the_run(
    server: str, ada: User, spans: InMemorySpanExporter, measured: InMemoryMetricReader
):
    """And into what the run itself submits."""
    inner, managers, counter = [], [], TaskCounter()

    def execute(task: Any) -> Any:
        inner.append(trace.get_current_span().get_span_context())
        if task.extension.good is None:
            return managers[0].submit(Outcome(), "lab", job_room="lab")
        return task.extension.run(None)

    def work() -> tuple[str, str, str]:
        login = {"user": ada.email, "password": PASSWORD}
        with JobManager.connect(server, **login, execute=traced(execute)) as manager:
            managers.append(manager)
            manager.register(Outcome, room="lab")
            with trace.get_tracer("a notebook").start_as_current_span("a cell"):
                many = [Outcome(good=None), Outcome(good=False)]
                good, bad = manager.submit_many(many, "lab", job_room="lab")
            within = manager.wait_all([good, bad], timeout=120)[0].result
            manager.wait_all([within], timeout=120)
            return good, bad, within

    changes = logging.getLogger("zndraw_joblib.telemetry")
    changes.addHandler(counter)
    changes.setLevel(logging.INFO)
    try:
        good, bad, within = await asyncio.to_thread(work)
    finally:
        changes.removeHandler(counter)
        changes.setLevel(logging.NOTSET)

    name = "process lab:modifiers:Outcome"
    runs = {s.attributes["messaging.message.id"]: s for s in finished(spans, name)}
    (cell,) = finished(spans, "a cell")
    assert set(runs) == {good, bad, within}
    assert {run.context.trace_id for run in runs.values()} == {cell.context.trace_id}
    assert {run.kind for run in runs.values()} == {trace.SpanKind.CONSUMER}
    assert sorted(s.context.span_id for s in runs.values()) == sorted(
        context.span_id for context in inner
    )
    for task_id in (good, bad):
        assert cell.context.span_id in ancestors(spans, runs[task_id])
    assert runs[good].context.span_id in ancestors(spans, runs[within])
    failed = runs[bad]
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert [e.attributes["exception.message"] for e in failed.events] == ["as asked"]
    assert failed.attributes["zndraw_joblib.task.attempt"] == 1

    points = {
        metric.name: list(metric.data.data_points)
        for resource in measured.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    counted = {
        (p.attributes["event"], p.attributes.get("error.type")): p.value
        for p in points["zndraw_joblib.task.changes"]
    }
    assert counted.pop(("started", None)) == 3
    counted.pop(("claimed", None), None)
    assert counted == {
        ("submitted", None): 3, ("completed", None): 2, ("failed", "user_error"): 1,
    }  # fmt: skip
    lasted = points["messaging.process.duration"]
    assert {p.attributes.get("error.type"): p.count for p in lasted} == {
        None: 2, "RuntimeError": 1,
    }  # fmt: skip


class Echo:
    category = "modifiers"

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "object"}


class Noted(InMemoryBroker):
    """Runs a task before it returns, and keeps what was sent."""

    def __init__(self) -> None:
        super().__init__(await_inplace=True)
        self.sent: list[Any] = []

    async def kick(self, message: Any) -> None:
        self.sent.append(self.formatter.loads(message.message))
        await super().kick(message)


@pytest.mark.parametrize("where", ["in the host", "in TaskIQ's worker"])
@pytest.mark.parametrize("path", ["tasks", "batches"])
async def test_internal_tasks_go_on_with_the_trace(
    app: Any,
    ada: User,
    session_maker: SessionMaker,
    spans: InMemorySpanExporter,
    where: str,
    path: str,
):
    inner = []

    @traced_executor
    async def executor(*args: Any, attempt: int, token: str | None) -> None:
        inner.append(trace.get_current_span().get_span_context().span_id)
        raise RuntimeError("as asked")

    broker = Noted()
    await register_internal_jobs(app, broker, [Echo], executor, session_maker)
    if where != "in the host":
        # it has neither app nor database
        app.state.internal_registry = register_internal_tasks(broker, [Echo], executor)
    job, count = "@internal:modifiers:Echo", 2 if path == "batches" else 1
    body = {"tasks": [{}] * count} if path == "batches" else {}
    answer = await ada.post(
        f"/rooms/lab/{path}/{job}", json=body, headers={"traceparent": TRACEPARENT}
    )
    assert answer.status_code == 202, answer.text
    runs = finished(spans, f"process {job}")
    assert [f"{run.context.trace_id:032x}" for run in runs] == [TRACE] * count
    assert [run.context.span_id for run in runs] == inner
    assert [run.attributes["zndraw_joblib.task.attempt"] for run in runs] == [1] * count
    assert {run.kind for run in runs} == {trace.SpanKind.CONSUMER}
    assert {run.status.status_code for run in runs} == {trace.StatusCode.ERROR}
    # hosts' own tasks take exactly these arguments
    assert [set(m.kwargs) for m in broker.sent] == [{"task_id", "room_id", "payload"}] * count


@pytest.mark.parametrize(("header", "label"), [(TRACEPARENT, TRACEPARENT), (None, None)])
async def test_a_broker_is_told_of_a_trace_without_opentelemetry(
    app: Any,
    ada: User,
    session_maker: SessionMaker,
    monkeypatch: pytest.MonkeyPatch,
    header: str | None,
    label: str | None,
):
    monkeypatch.delitem(sys.modules, "opentelemetry.propagate")
    carried = []

    async def executor(*args: Any) -> None:
        carried.append(telemetry.carried())

    broker = Noted()
    await register_internal_jobs(app, broker, [Echo], executor, session_maker)
    app.state.internal_registry = register_internal_tasks(broker, [Echo], executor)
    headers = {} if header is None else {"traceparent": header}
    url = "/rooms/lab/tasks/@internal:modifiers:Echo"
    task = (await ada.post(url, json={}, headers=headers)).json()
    # and when it is sent again
    late = update(Task).values(deadline_at=now(-1))
    await execute(session_maker, late)
    registry = app.state.internal_registry
    await cleanup_stuck_internal_tasks(session_maker, registry=registry)
    assert [m.kwargs["task_id"] for m in broker.sent] == [task["id"]] * 2
    assert [m.labels.get("traceparent") for m in broker.sent] == [label] * 2
    assert carried == [label] * 2


async def test_a_worker_tells_the_same_lines(
    server: str, ada: User, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO, "zndraw_joblib")
    at_work = threading.Event()

    def run(task: Any) -> None:
        if task.extension.good is None:
            at_work.set()
            for _ in range(1000):
                task.raise_if_cancelled()
                time.sleep(0.02)
        task.extension.run(None)

    def work() -> tuple[str, list[str]]:
        login = {"user": ada.email, "password": PASSWORD}
        with JobManager.connect(server, **login, execute=run, heartbeat_interval=0.2) as manager:
            manager.register(Outcome, room="lab")
            ids = [
                manager.submit(Outcome(good=good), "lab", job_room="lab")
                for good in (True, False, None)
            ]
            assert at_work.wait(30)
            url = f"{server}/v1/joblib/tasks/{ids[-1]}"
            httpx.patch(url, json={"status": "cancelled"}, headers=ada.headers)
            manager.wait_all(ids, timeout=120)
            return str(manager.worker_id), ids

    worker, ids = await asyncio.to_thread(work)
    of_worker = [
        r
        for r in caplog.records
        if r.name.startswith(("zndraw_joblib.client", "zndraw_joblib.execution"))
    ]
    told = [r for r in of_worker if hasattr(r, "event")]
    by_task = {id: [r.event for r in told if r.task_id == id] for id in ids}
    assert list(by_task.values()) == [
        ["claimed", "started", "completed"],
        ["claimed", "started", "failed"],
        ["claimed", "started", "cancelled"],
    ]
    assert {(r.job_name, r.room_id, r.worker_id, r.attempt) for r in told} == {
        ("lab:modifiers:Outcome", "lab", worker, 1)
    }
    assert {r.levelname for r in told} == {"INFO"}
    # the traceback goes with the failure
    (why,) = [r for r in of_worker if r.exc_info and ids[1] in r.getMessage()]
    assert "as asked" in str(why.exc_info[1])


@pytest.mark.parametrize(
    ("header", "kept"), [(TRACEPARENT, TRACE), ("00-nonsense", None), (None, None)]
)
async def test_a_request_may_bring_its_trace(
    ada: User, monkeypatch: pytest.MonkeyPatch, header: str | None, kept: str | None
):
    # as where it is not installed: the context is handed on all the same
    monkeypatch.delitem(sys.modules, "opentelemetry.propagate")
    worker = await offer(ada)
    headers = {} if header is None else {"traceparent": header}
    answer = await ada.post(f"/rooms/lab/tasks/{JOB}", json={}, headers=headers)
    (task,) = await claim(ada, worker)
    assert (task["traceparent"] or "").split("-")[1:2] == ([kept] if kept else [])
    assert (await read(ada, answer.json()))["traceparent"] == task["traceparent"]


async def test_a_handler_that_raises_decides_nothing(ada: User, events: list[Any]):
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("the disk is full")

    broken, changes = Broken(), logging.getLogger("zndraw_joblib.telemetry")
    changes.addHandler(broken)
    changes.setLevel(logging.DEBUG)
    try:
        worker = await offer(ada)
        task = await submit(ada)
        assert [t["id"] for t in await claim(ada, worker)] == [task["id"]]
    finally:
        changes.removeHandler(broken)
        changes.setLevel(logging.NOTSET)
    told = [e.data["status"] for e in events if e.event == "task_status_event"]
    assert told == ["pending", "claimed"]


def test_nothing_of_opentelemetry_is_imported():
    probe = """
import sys
sys.modules["opentelemetry"] = None
import zndraw_joblib.client, zndraw_joblib.provider
from zndraw_joblib import telemetry

with telemetry.continuing({"traceparent": "%s"}):
    print(telemetry.carried())
"""
    ran = subprocess.run(
        [sys.executable, "-c", probe % TRACEPARENT], capture_output=True, text=True, timeout=300
    )
    assert (ran.returncode, ran.stdout) == (0, f"{TRACEPARENT}\n"), ran.stderr
