"""What logs, traces and metrics tell, and that without OpenTelemetry nothing is asked."""

import asyncio
import logging
import subprocess
import sys
from typing import Any, ClassVar

import pytest
from conftest import PASSWORD, User
from makers import SessionMaker
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from steps import JOB, claim, offer, read, report, silence, submit

from zndraw_joblib import Category, Extension, JobManager
from zndraw_joblib.sweeper import cleanup_stale_workers

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
    assert {(r["job_name"], r["room_id"]) for r in told if "task_id" in r} == {
        (JOB, "lab")
    }


class Outcome(Extension):
    category: ClassVar[Category] = Category.MODIFIER
    good: bool = True

    def run(self, vis: Any, **kwargs: Any) -> None:
        if not self.good:
            raise RuntimeError("as asked")


async def test_a_trace_goes_from_the_submission_through_the_run(
    server: str, ada: User, spans: InMemorySpanExporter, measured: InMemoryMetricReader
):
    inner = []

    def execute(task: Any) -> None:
        inner.append(trace.get_current_span().get_span_context())
        task.extension.run(None)

    def work() -> tuple[str, str]:
        login = {"user": ada.email, "password": PASSWORD}
        with JobManager.connect(server, **login, execute=execute) as manager:
            manager.register(Outcome, room="lab")
            with trace.get_tracer("a notebook").start_as_current_span("a cell"):
                good = manager.submit(Outcome(), "lab", job_room="lab")
            bad = manager.submit(Outcome(good=False), "lab", job_room="lab")
            manager.wait_all([good, bad], timeout=30)
            return good, bad

    good, bad = await asyncio.to_thread(work)
    by_task: dict[Any, list[ReadableSpan]] = {}
    for span in spans.get_finished_spans():
        by_task.setdefault(
            (span.attributes or {}).get("messaging.message.id"), []
        ).append(span)
    (cell,) = (s for s in by_task[None] if s.name == "a cell")
    sent = [s for s in by_task[None] if s.kind is trace.SpanKind.PRODUCER]
    taken, run = by_task[good]
    assert [s.name for s in (taken, run)] == [
        "submit lab:modifiers:Outcome", "process lab:modifiers:Outcome",
    ]  # fmt: skip
    assert {s.context.trace_id for s in (cell, sent[0], taken, run)} == {
        cell.context.trace_id
    }
    # FastAPI has spans of its own in between
    above = {s.context.span_id: s.parent for s in spans.get_finished_spans()}
    line, at = [], run.context
    while at is not None:
        line.append(at.span_id)
        at = above[at.span_id]
    ours = {s.context.span_id for s in (cell, sent[0], taken, run)}
    assert [i for i in line if i in ours] == [
        s.context.span_id for s in (run, taken, sent[0], cell)
    ]
    assert run.kind is trace.SpanKind.CONSUMER
    assert run.context in inner
    failed = by_task[bad][1]
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert [e.attributes["exception.message"] for e in failed.events] == ["as asked"]
    assert failed.attributes["zndraw_joblib.task.attempt"] == 1

    points = {
        metric.name: list(metric.data.data_points)
        for resource in measured.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    count = {
        name: sum(getattr(p, "value", 0) for p in ps) for name, ps in points.items()
    }
    assert count["messaging.client.sent.messages"] == 2
    assert count["messaging.client.consumed.messages"] == 2
    assert {
        p.attributes["zndraw_joblib.task.status"]: p.value
        for p in points["zndraw_joblib.tasks.ended"]
    } == {"completed": 1, "failed": 1}
    runs = points["messaging.process.duration"]
    assert {p.attributes.get("error.type"): p.count for p in runs} == {
        None: 1, "RuntimeError": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("header", "kept"), [(TRACEPARENT, TRACE), ("00-nonsense", None), (None, None)]
)
async def test_a_request_may_bring_its_trace(
    ada: User, monkeypatch: pytest.MonkeyPatch, header: str | None, kept: str | None
):
    # as where it is not installed: the context is handed on all the same
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    worker = await offer(ada)
    headers = {} if header is None else {"traceparent": header}
    answer = await ada.post(f"/rooms/lab/tasks/{JOB}", json={}, headers=headers)
    (task,) = await claim(ada, worker)
    assert (task["traceparent"] or "").split("-")[1:2] == ([kept] if kept else [])
    assert (await read(ada, answer.json()))["traceparent"] == task["traceparent"]


def test_without_opentelemetry_nothing_is_imported():
    probe = """
import sys
from importlib.abc import MetaPathFinder

asked = []

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            asked.append(name)
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import zndraw_joblib.client, zndraw_joblib.provider
from zndraw_joblib import telemetry

with telemetry.continuing({"traceparent": "%s"}):
    carried = telemetry.submitting("a:b:c", "id")
with telemetry.processing("a:b:c", "id", 1, carried):
    pass
print(asked, carried)
"""
    ran = subprocess.run(
        [sys.executable, "-c", probe % TRACEPARENT],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout) == (0, f"[] {TRACEPARENT}\n"), ran.stderr
