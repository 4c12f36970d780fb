"""`@internal` tasks: from the outbox to the broker, run once, and never forgotten."""

import asyncio
import logging
import threading
from enum import StrEnum
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import httpx
import internal_jobs
import pytest
from conftest import AUTH_SETTINGS
from sqlalchemy import select, update
from steps import (
    at_once,
    claim,
    execute,
    offer,
    problem,
    read,
    register,
    report,
    silence,
    stored,
    submit,
)
from taskiq import InMemoryBroker

from zndraw_joblib import attempts, register_internal_jobs, register_internal_tasks
from zndraw_joblib.models import Job, Task, now
from zndraw_joblib.registry import ensure_internal_jobs
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.sweeper import cleanup_stuck_internal_tasks, run_sweeper

ECHO = "@internal:modifiers:Echo"


class Kind(StrEnum):
    MODIFIER = "modifiers"


class Echo:
    """A host's own class: nothing of it is known but what is asked of it."""

    category = Kind.MODIFIER

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "object", "properties": {"a": {"type": "integer"}}}


class Plain(Echo):
    category = "analysis"


class Runs:
    """An executor that remembers, and does what it is told to."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.raises: BaseException | None = None
        self.reports: Any = None

    async def __call__(self, extension: Any, payload: Any, room_id: str, task_id: str) -> None:
        self.seen.append((extension, payload, room_id, task_id))
        if self.raises:
            raise self.raises
        if self.reports:
            await self.reports(task_id)


class Broker(InMemoryBroker):
    """Runs a task before it returns, unless it loses the message."""

    def __init__(self) -> None:
        super().__init__(await_inplace=True)
        self.lost: list[Any] = []
        self.loses = False
        self.before: Any = None

    async def kick(self, message: Any) -> None:
        if self.before:
            await self.before()
        if self.loses:
            self.lost.append(message)
        else:
            await super().kick(message)


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
async def broker(app, session_maker, runs) -> Broker:
    broker = Broker()
    await register_internal_jobs(
        app, broker, extensions=[Echo], executor=runs, session_maker=session_maker
    )
    return broker


def told(events):
    return [e.data["status"] for e in events if e.event == "task_status_event"]


async def lines_of(user, task):
    answer = await user.get(f"/tasks/{task['id']}/log")
    assert answer.status_code == 200, answer.text
    return [line["text"] for line in answer.json()["lines"]]


async def overslept(session_maker):
    await execute(
        session_maker, update(Task).where(Task.deadline_at.is_not(None)).values(deadline_at=now(-1))
    )


def completes(admin):
    async def complete(task_id):
        answer = await report(admin, {"id": task_id}, "completed", result="done")
        assert answer.status_code == 200, answer.text

    return complete


async def test_it_is_handed_over_after_the_commit(ada, admin, broker, runs, session_maker, events):
    async def look():
        # its own session: what isn't committed isn't there
        async with session_maker() as session:
            rows = await session.execute(select(Task.status, Task.attempt))
            assert [tuple(row) for row in rows] == [("claimed", 1)]

    broker.before = look
    runs.reports = completes(admin)
    submitted = await ada.post(f"/rooms/lab/tasks/{ECHO}", json={"payload": {"a": 1}})
    assert submitted.status_code == 202
    task = submitted.json()
    assert (task["status"], task["attempt"], task["worker_id"]) == ("claimed", 1, None)
    assert task["queue_position"] is None
    assert runs.seen == [(Echo, {"a": 1}, "lab", task["id"])]
    done = await read(ada, task)
    assert (done["status"], done["result"]) == ("completed", "done")
    assert told(events) == ["claimed", "running", "completed"]
    assert "task_available" not in {e.event for e in events}


class Own(BaseException):
    """Of a library that wants nobody to catch it."""


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        (ValueError("no such atom"), "ValueError: no such atom"),
        (ValueError("a\0b\ud800"), "ValueError: a\ufffdb?"),
        (SystemExit("no such file"), "SystemExit: no such file"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (asyncio.CancelledError(), "CancelledError"),
        (Own("stop"), "Own: stop"),
        (ExceptionGroup("all", [ExceptionGroup("b", [OSError("a leaf")])]), "a leaf"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_executor_that_raises_fails_the_task(ada, broker, runs, events, ends, says):
    """As a worker's task fails, whatever it is that ends it."""
    runs.raises = ends
    task = await submit(ada, ECHO)
    failed = await read(ada, task)
    assert (failed["status"], failed["error_type"]) == ("failed", "user_error")
    assert says in failed["error"]
    assert told(events) == ["claimed", "running", "failed"]
    log = await lines_of(ada, task)
    assert log[0].startswith(("Traceback (most recent call last)", "  + Exception Group"))
    assert any("in __call__" in line for line in log)
    assert type(ends).__name__ in "".join(log)
    # it ended nothing else
    runs.raises = None
    assert (await read(ada, await submit(ada, ECHO)))["status"] == "running"


async def test_each_attempt_ends_its_log_with_its_traceback(ada, broker, runs):
    # more of them than a heartbeat may bring
    message = list(map(str, range(300)))
    runs.raises = ValueError("\n".join(message))
    task = await submit(ada, ECHO)
    log = await lines_of(ada, task)
    assert log[-300:] == ["ValueError: 0", *message[1:]]
    assert (await ada.post(f"/tasks/{task['id']}/retry")).status_code == 202
    both = await lines_of(ada, task)
    assert both[: len(log)] == log
    assert both[-300:] == log[-300:]
    assert len(both) >= 2 * len(log)


@pytest.mark.parametrize("message", ["\ud800", "\0", "\U0001f9ea" * 100_000])
async def test_whatever_an_executor_raises_fails_the_task_and_is_logged(ada, broker, runs, message):
    runs.raises = ValueError(message)
    task = await submit(ada, ECHO)
    assert (await read(ada, task))["status"] == "failed"
    assert (await lines_of(ada, task))[0].startswith("Traceback (most recent call last)")


async def test_an_executor_that_is_cancelled_fails_the_task(ada, app, session_maker, events):
    """As when the host goes down with a task in its hands."""
    at_work = asyncio.Event()

    async def executor(*args: Any) -> None:
        at_work.set()
        await anyio.sleep(3600)

    broker = InMemoryBroker()
    await register_internal_jobs(app, broker, [Echo], executor, session_maker)
    task = await submit(ada, ECHO)
    with anyio.fail_after(120):
        await at_work.wait()
        (run,) = broker._running_tasks
        run.cancel()
        await asyncio.wait([run])
    assert (await read(ada, task))["status"] == "failed"
    assert told(events) == ["claimed", "running", "failed"]


async def test_what_was_reported_is_not_overwritten(ada, admin, broker, runs, events):
    """An executor that tells of its success, and then raises, has succeeded."""

    async def complete_and_raise(task_id):
        await completes(admin)(task_id)
        raise SystemExit("afterwards")

    runs.reports = complete_and_raise
    task = await submit(ada, ECHO)
    done = await read(ada, task)
    assert (done["status"], done["result"], done["error"]) == ("completed", "done", None)
    assert told(events) == ["claimed", "running", "completed"]


class Gates:
    """An executor whose runs go on one by one, and each as it is told to."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, int, asyncio.Future[Any]]] = []

    async def __call__(
        self, extension: Any, payload: Any, room: str, task_id: str, *, attempt: int
    ) -> None:
        end = asyncio.get_running_loop().create_future()
        self.runs.append((task_id, attempt, end))
        await end

    async def reach(self, count: int) -> None:
        with anyio.fail_after(120):
            while len(self.runs) < count:
                await anyio.sleep(0.01)


@pytest.mark.parametrize("state", ["claimed", "running", "completed"])
@pytest.mark.parametrize("how", ["it raises", "it reports", "its sending fails"])
async def test_a_late_end_of_an_attempt_is_not_of_the_next_one(
    ada, admin, app, session_maker, how, state
):
    gates, late = Gates(), {"Idempotency-Key": "of the first"}
    broker = Broker()
    broker.await_inplace = False
    await register_internal_jobs(app, broker, [Echo], gates, session_maker)
    task = await submit(ada, ECHO)
    url = f"/tasks/{task['id']}"
    await gates.reach(1)
    (first_run,) = broker._running_tasks
    started = await admin.patch(url, json={"status": "running"}, headers=late)
    assert started.status_code == 200
    assert (await report(ada, task, "cancelled")).status_code == 200
    broker.loses = state == "claimed"
    assert (await ada.post(f"{url}/retry")).status_code == 202
    if state != "claimed":
        await gates.reach(2)
        key = {"Idempotency-Key": "of the second"}
        body = {"status": "running", "attempt": 2}
        assert (await admin.patch(url, json=body, headers=key)).status_code == 200
    if state == "completed":
        body = {"status": "completed", "result": "right"}
        assert (await admin.patch(url, json=body, headers=key)).status_code == 200
    before = await read(ada, task)
    assert (before["status"], before["attempt"]) == (state, 2)
    assert [attempt for _, attempt, _ in gates.runs] == [1, 2][: len(gates.runs)]

    if how == "it raises":
        gates.runs[0][2].set_exception(RuntimeError("late"))
        await asyncio.wait([first_run])
    elif how == "its sending fails":
        async with session_maker() as session:
            settings, sent = app.state.joblib_settings, [(UUID(task["id"]), 1)]
            lost = await attempts.fail_undispatched(session, sent, "late", settings)
            assert lost == []
            await session.commit()
    else:
        for status in ("running", "completed", "failed", "pending"):
            for fence, headers in (({"attempt": 1}, {}), ({}, late)):
                if (status, fence, state) == ("running", {}, "claimed"):
                    continue  # a delivery of this attempt would say the same
                body = {"status": status, **fence}
                answer = await admin.patch(url, json=body, headers=headers)
                problem(answer, 409, "lease-lost")
    assert await read(ada, task) == before
    for *_, end in gates.runs:
        end.done() or end.set_result(None)
    with anyio.fail_after(120):
        await broker.wait_all()


@pytest.mark.parametrize("started", ["by the host", "by the executor"])
@pytest.mark.parametrize("key", [True, False], ids=["keyed", "without keys"])
async def test_of_two_consumers_one_starts(ada, admin, app, broker, runs, started, key):
    """The host's process and TaskIQ's, and executors of 0.1.7, which show no key."""
    if started == "by the executor":
        broker.loses = True
    task = await submit(ada, ECHO)
    url = f"/tasks/{task['id']}"
    for status in ("running", "completed"):
        body = {"status": status, "result": "x" if status == "completed" else None}
        keys = [{"Idempotency-Key": k} for k in "ab"] if key else [{}, {}]
        first, second = [await admin.patch(url, json=body, headers=headers) for headers in keys]
        assert first.status_code == 200, first.text
        if key or status == "running":
            problem(second, 409, "lease-lost")
        if key:
            # an answer that got lost is asked for again
            again = await admin.patch(url, json=body, headers=keys[0])
            assert (again.status_code, again.json()) == (200, first.json())
    assert (await read(ada, task))["result"] == "x"


async def test_messages_do_not_multiply_behind_a_slow_consumer(ada, app, session_maker):
    """Their number grows with the logarithm of an attempt's age."""
    settings, queue = JobLibSettings(internal_redispatch_seconds=60), []

    class Slow:
        down = False

        def __contains__(self, name):
            return True

        async def send(self, name, **message):
            if self.down:
                raise ConnectionError("the broker restarts")
            queue.append(message["task_id"])

    app.state.internal_registry = broker = Slow()
    await ensure_internal_jobs([Echo], session_maker)
    ids = [(await submit(ada, ECHO))["id"] for _ in range(5)]

    async def sweep(age=None):
        await overslept(session_maker)
        if age is not None:
            then = update(Task).values(claimed_at=now(-age))
            await execute(session_maker, then)
        await cleanup_stuck_internal_tasks(session_maker, settings, None, broker)
        return len(queue)

    # what can't be sent again may still be queued: it is neither failed nor counted
    broker.down = True
    assert await sweep() == 5
    states = {(await read(ada, {"id": id_}))["status"] for id_ in ids}
    assert states == {"claimed"}
    broker.down = False
    assert [await sweep() for _ in range(4)] == [10] * 4
    ages = (100, 130, 200, 250, 400, 500, 900, 1000)
    counts = [10, 15, 15, 20, 20, 25, 25, 30]
    assert [await sweep(age) for age in ages] == counts


@pytest.mark.parametrize("where", ["in the host", "in TaskIQ's worker"])
async def test_an_executor_is_given_what_it_declares(ada, app, session_maker, caplog, where):
    caplog.set_level(logging.DEBUG, "zndraw_joblib")
    given = []

    async def full(cls, payload, room_id, task_id, *, traceparent, token, attempt):
        given.append((payload, room_id, task_id, attempt, token, traceparent))
        raise ValueError(f"illegal header {token!r}")

    async def mint(task):
        # a row of nobody's session, after the commit
        assert (await read(ada, {"id": task.id}))["status"] == "claimed"
        return f"s3cret-{task.id}-{task.created_by_id}"

    broker = Broker()
    await register_internal_jobs(app, broker, [Echo], full, session_maker, mint)
    if where != "in the host":
        registry = register_internal_tasks(broker, [Echo], full, mint)
        app.state.internal_registry = registry
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    url, headers = f"/rooms/lab/tasks/{ECHO}", {"traceparent": trace}
    task = (await ada.post(url, json={"payload": {"a": 1}}, headers=headers)).json()
    token = f"s3cret-{task['id']}-{task['created_by_id']}"
    assert given == [({"a": 1}, "lab", task["id"], 1, token, trace)]
    assert "s3cret" not in str(await read(ada, task))
    said = "\n".join(await lines_of(ada, task))
    assert "s3cret" not in said
    # only the host's process has a database
    assert ("illegal header '[token]'" in said) == (where == "in the host")
    # TaskIQ tells itself what the executor raised
    ours = [r for r in caplog.records if r.name.startswith("zndraw_joblib")]
    assert ours
    assert "s3cret" not in "".join(map(logging.Formatter().format, ours))


async def test_a_token_that_cannot_be_minted_is_a_message_that_is_not_sent(
    ada, app, session_maker, runs
):
    async def mint(task):
        raise RuntimeError("no key")

    broker = Broker()
    await register_internal_jobs(
        app, broker, [Echo], runs, session_maker=session_maker, mint_token=mint
    )
    failed = await read(ada, await submit(ada, ECHO))
    assert (failed["status"], failed["error_type"]) == ("failed", "dispatch")
    assert runs.seen == []


async def test_a_message_that_arrived_is_not_undone_by_its_sender(
    ada, admin, broker, runs, session_maker, app
):
    """The broker took it, and then the connection broke."""

    class Breaks(Broker):
        async def kick(self, message):
            await super().kick(message)
            raise ConnectionError("reset by peer")

    await register_internal_jobs(
        app, Breaks(), extensions=[Echo], executor=runs, session_maker=session_maker
    )
    task = await submit(ada, ECHO)
    assert (await read(ada, task))["status"] == "running"
    assert (await report(admin, task, "completed")).status_code == 200


async def test_what_a_worker_claims_goes_to_no_broker(ada, admin, broker, runs):
    """It may serve what the server runs too."""
    schema = Echo.model_json_schema()
    worker = await offer(admin, "Echo", "@internal", schema=schema, max_attempts=2)
    runs.raises = ValueError("once")
    task = await submit(ada, ECHO)
    broker.loses = True
    (claimed,) = await claim(admin, worker)
    assert (claimed["id"], claimed["attempt"], broker.lost) == (task["id"], 2, [])


async def test_a_lost_message_is_sent_again_once(
    ada, admin, app, broker, runs, session_maker, events
):
    """As when the process died between the commit and the broker."""
    broker.loses = True
    task = await submit(ada, ECHO)
    broker.loses = False
    runs.reports = completes(admin)
    registry = app.state.internal_registry

    async def sweep():
        return await cleanup_stuck_internal_tasks(session_maker, registry=registry)

    await sweep()
    assert runs.seen == [], "it may still be on its way"
    await overslept(session_maker)
    await cleanup_stuck_internal_tasks(session_maker)
    assert runs.seen == [], "no registry, nothing to send it with"
    assert await at_once(sweep(), sweep(), sweep()) == [0, 0, 0]
    assert [run[3] for run in runs.seen] == [task["id"]]
    assert (await read(ada, task))["status"] == "completed"
    assert told(events) == ["claimed", "running", "completed"]
    # the first message turns up after all
    await InMemoryBroker.kick(broker, broker.lost[0])
    assert len(runs.seen) == 1


async def test_of_two_deliveries_to_the_executor_of_the_example_one_runs(ada, admin, app, broker):
    """In processes that start nothing by themselves: its key is what tells them apart."""
    broker.loses = True
    task = await submit(ada, ECHO)
    runs, begun, go_on = [], threading.Event(), threading.Event()

    class Slow:
        def run(self, vis: Any) -> str:
            runs.append(self)
            begun.set()
            go_on.wait(20)
            return "done"

    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as http:
        execute = internal_jobs.make_executor(http)
        deliver = partial(execute, Slow, {}, "lab", task["id"], attempt=1, token=admin.token)
        async with anyio.create_task_group() as group:
            group.start_soon(deliver)
            await anyio.to_thread.run_sync(begun.wait, 20)
            with anyio.move_on_after(2):
                await deliver()
            go_on.set()
    assert len(runs) == 1
    done = await read(ada, task)
    assert (done["status"], done["result"]) == ("completed", "done")


@pytest.mark.parametrize("in_host", [True, False])
async def test_the_executor_of_the_example_leaves_failures_to_the_host(
    ada, admin, app, broker, in_host
):
    broker.loses = True
    task = await submit(ada, ECHO)

    class Stops:
        def run(self, vis: Any) -> None:
            raise StopIteration("at the end")

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://host"
    ) as http:
        execute = internal_jobs.make_executor(http, AUTH_SETTINGS if in_host else None)
        with pytest.raises(RuntimeError, match="StopIteration"):
            await execute(Stops, {}, "lab", task["id"], attempt=1, token=admin.token)
    found = await read(ada, task)
    assert found["status"] == ("running" if in_host else "failed")
    assert ("at the end" in str(found["error"])) == (not in_host)


async def test_the_sweeper_uses_all_that_it_is_given(
    ada, admin, app, broker, runs, session_maker, tsio, events
):
    provider = {"category": "files", "name": "data", "schema": {}}
    answer = await ada.put("/rooms/lab/providers", json=provider)
    await silence(session_maker, answer.json()["worker_id"])
    broker.loses = True
    task = await submit(ada, ECHO)
    broker.loses = False
    runs.reports = completes(admin)
    await overslept(session_maker)
    gone = []

    async def removed(names):
        gone.extend(map(str, names))

    async def sweep(seconds, until):
        settings = JobLibSettings(sweeper_interval_seconds=seconds)
        async with anyio.create_task_group() as group:
            args = session_maker, settings, tsio, app.state.internal_registry, removed
            group.start_soon(run_sweeper, *args)
            await until()
            group.cancel_scope.cancel()

    async def a_moment():
        await anyio.sleep(0.3)

    async def all_is_swept():
        with anyio.fail_after(120):
            while not gone or (await read(ada, task))["status"] != "completed":
                await anyio.sleep(0.01)

    events.clear()
    await sweep(1000, a_moment)
    assert (gone, runs.seen, events) == ([], [], [])
    await sweep(0.05, all_is_swept)
    assert gone == ["lab:files:data"]
    assert ("providers_invalidate", {}, "room:lab") in events
    assert (await read(ada, task))["status"] == "completed"


async def test_a_run_that_outlives_its_time_is_ended(
    ada, admin, broker, runs, session_maker, tsio, events
):
    task = await submit(ada, ECHO)
    assert (await read(ada, task))["status"] == "running"
    settings = JobLibSettings(internal_task_timeout_seconds=60)
    sweep = cleanup_stuck_internal_tasks
    assert await sweep(session_maker, settings, tsio) == 0
    await execute(session_maker, update(Task).values(started_at=now(-61), claimed_at=now(-62)))
    events.clear()
    assert await sweep(session_maker, settings, tsio) == 1
    stuck = await read(ada, task)
    assert (stuck["status"], stuck["error"]) == ("failed", "Internal task timed out")
    assert stuck["error_type"] == "timeout"
    assert told(events) == ["failed"]
    late = await report(admin, task, "completed")
    assert problem(late, 409, "invalid-task-transition")["task_status"] == "failed"


async def test_what_is_cancelled_on_its_way_is_not_run(ada, app, broker, runs, session_maker):
    broker.loses = True
    task = await submit(ada, ECHO)
    assert (await report(ada, task, "cancelled")).status_code == 200
    await InMemoryBroker.kick(broker, broker.lost[0])
    assert runs.seen == []
    await overslept(session_maker)
    registry = app.state.internal_registry
    await cleanup_stuck_internal_tasks(session_maker, registry=registry)
    assert runs.seen == []
    assert (await read(ada, task))["status"] == "cancelled"


async def test_many_are_sent_again_some_at_a_time(ada, app, broker, runs, session_maker):
    """Each may have a payload of a MiB, and is in memory until the broker has it."""
    broker.loses = True
    count = attempts.MESSAGES_A_BATCH + 4
    batch = {"tasks": [{}] * count}
    assert (await ada.post(f"/rooms/lab/batches/{ECHO}", json=batch)).status_code == 202
    await overslept(session_maker)
    settings = JobLibSettings()
    async with session_maker() as session:
        overdue = attempts.undelivered(settings)
        some = await attempts.dispatch_again(session, overdue, settings)
    assert len(some) == attempts.MESSAGES_A_BATCH
    registry = app.state.internal_registry
    await cleanup_stuck_internal_tasks(session_maker, registry=registry)
    assert len(broker.lost) == 2 * count


async def test_a_retry_is_handed_over_as_well(ada, admin, app, broker, runs, events):
    runs.raises = ValueError("once")
    task = await submit(ada, ECHO, payload={"a": 1})
    runs.raises, runs.reports = None, completes(admin)
    registry, app.state.internal_registry = app.state.internal_registry, None
    refused = await ada.post(f"/tasks/{task['id']}/retry")
    problem(refused, 503, "internal-job-not-configured")
    assert (await read(ada, task))["status"] == "failed"
    app.state.internal_registry = registry
    events.clear()
    again = await ada.post(f"/tasks/{task['id']}/retry")
    assert (again.status_code, again.json()["status"]) == (202, "claimed")
    assert runs.seen[1] == (Echo, {"a": 1}, "lab", task["id"])
    assert (await read(ada, task))["status"] == "completed"
    assert told(events) == ["claimed", "running", "completed"]


async def test_a_failed_attempt_is_handed_over_again(
    ada, admin, app, broker, runs, session_maker, events
):
    """No task of the server's own waits for a worker that will never come."""
    answer = await register(
        admin, "Echo", "@internal", schema=Echo.model_json_schema(), max_attempts=2
    )
    assert answer.status_code == 200
    worker = answer.json()["worker_id"]
    runs.raises = ValueError("each time")
    task = await submit(ada, ECHO)
    registry = app.state.internal_registry
    for _ in range(3):
        await overslept(session_maker)
        await cleanup_stuck_internal_tasks(session_maker, registry=registry)
    failed = await read(ada, task)
    assert (failed["status"], failed["attempt"]) == ("failed", 2)
    assert len(runs.seen) == 2
    assert "task_available" not in {e.event for e in events}
    assert await claim(admin, worker) == []


async def test_one_key_hands_it_over_once(ada, broker, runs):
    key = {"Idempotency-Key": "k"}
    answers = await at_once(
        *(ada.post(f"/rooms/lab/tasks/{ECHO}", json={}, headers=key) for _ in range(4))
    )
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(runs.seen) == 1


async def test_a_job_that_only_its_row_knows_is_not_configured(ada, admin, broker, session_maker):
    await register(admin, "Other", "@internal")
    other = "@internal:modifiers:Other"
    answer = await ada.post(f"/rooms/lab/tasks/{other}", json={})
    problem(answer, 503, "internal-job-not-configured")
    assert (await stored(session_maker))["task"] == 0
    missing = await ada.post("/rooms/lab/tasks/@internal:modifiers:No", json={})
    problem(missing, 404, "job-not-found")
    wrong = await ada.post(f"/rooms/lab/tasks/{ECHO}", json={"payload": {"a": "b"}})
    problem(wrong, 422, "payload-mismatch")


async def test_replicas_write_the_rows_together(app, ada, session_maker):
    class Changed(Echo):
        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return {"type": "object", "title": "changed"}

    Changed.__name__ = "Echo"
    for extensions in ([Echo, Plain], [Plain, Changed]):
        await at_once(*(ensure_internal_jobs(extensions, session_maker) for _ in range(4)))
    async with session_maker() as session:
        rows = await session.execute(select(Job.category, Job.name, Job.schema_))
    assert sorted((row.category, row.name) for row in rows.all()) == [
        ("analysis", "Plain"),
        ("modifiers", "Echo"),
    ]
    job = (await ada.get(f"/rooms/lab/jobs/{ECHO}")).json()
    assert job["schema"]["title"] == "changed"
    assert (job["workers"], job["worker_id"]) == ([], None)
    await execute(session_maker, update(Job).values(deleted=True))
    await ensure_internal_jobs([Echo], session_maker)
    assert (await ada.get(f"/rooms/lab/jobs/{ECHO}")).status_code == 200


async def test_a_process_without_app_and_database_takes_the_tasks(runs):
    broker = Broker()
    registry = register_internal_tasks(broker, [Echo, Plain], runs)
    names = [ECHO, "@internal:analysis:Plain"]
    assert sorted(registry.tasks) == sorted(names)
    assert all(name in registry for name in names)
    assert "@internal:modifiers:Plain" not in registry
    for name in names:
        sent = broker.find_task(name)
        assert sent is not None
        await sent.kiq(task_id="t", room_id="lab", payload={"a": 1})
    assert runs.seen == [(Echo, {"a": 1}, "lab", "t"), (Plain, {"a": 1}, "lab", "t")]


async def test_the_broker_is_given_a_while_and_no_more(ada, bob, app, broker, session_maker):
    """The room hears of it, the answer stands, and nobody else waits for it."""

    async def hang():
        await anyio.sleep(3600)

    app.state.joblib_settings.dispatch_timeout_seconds = 0.5
    broker.before = hang
    worker = (await bob.post("/workers")).json()["id"]
    with anyio.fail_after(120):
        task, *beats = await at_once(
            submit(ada, ECHO), *(bob.patch(f"/workers/{worker}") for _ in range(3))
        )
    assert {beat.status_code for beat in beats} == {200}
    failed = await read(ada, task)
    assert (failed["status"], failed["error_type"]) == ("failed", "dispatch")


async def test_how_many_tasks_of_a_user_may_be_under_way(ada, bob, app, broker):
    app.state.joblib_settings.max_internal_tasks_per_user = 2
    for _ in range(2):
        task = await submit(ada, ECHO)
    for refused in (
        await ada.post(f"/rooms/lab/tasks/{ECHO}", json={}),
        await ada.post(f"/rooms/lab/batches/{ECHO}", json={"tasks": [{}]}),
    ):
        problem(refused, 429, "quota-exceeded")
    await submit(bob, ECHO)
    await report(ada, task, "cancelled")
    await submit(ada, ECHO)
    problem(await ada.post(f"/tasks/{task['id']}/retry"), 429, "quota-exceeded")
