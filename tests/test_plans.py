"""What statements read does not grow with what waits or is done.

On PostgreSQL the rows are counted that were read, while each step is repeated until the
generic plans are in use, and with statistics from before the queue was filled, which is
how a queue lives. On SQLite, whose plans know no statistics, the plans are read.
"""

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from conftest import User
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from steps import claim, report

from zndraw_joblib.sweeper import (
    cleanup_idle_jobs,
    cleanup_overdue_attempts,
    cleanup_stale_workers,
    cleanup_stuck_internal_tasks,
)

JOBS = 50
#: so many tasks are finished, as many wait, half of them for one job
TASKS = 20_000
#: what one step may read of them
MOST = 6_000
#: PostgreSQL turns to a generic plan after five executions
REPEATS = 8
ROOM = "/rooms/room1"
J0 = "@global:modifiers:J0"

Steps = dict[str, Callable[[int], Awaitable[Any]]]

FILL = """
INSERT INTO task (id, job_id, job_name, room_id, payload, status, priority, queue_order,
    attempt, failed_attempts, max_attempts, batch_index, dispatches, revision, interruptions,
    payload_checked, created_at, queued_at, completed_at, available_at)
SELECT {id}, job.id, '@global:modifiers:' || name, 'room' || (n % 7), '{{}}', '{status}', 0, n,
    0, 0, 1, 0, 1, 1, 0, true, {moment}, {moment}, {completed}, {available}
FROM {numbers} JOIN job ON job.name = 'J' || (n % {jobs})
"""
SQL = {
    "postgres": {
        "id": "gen_random_uuid()",
        "moment": "now() - make_interval(secs => 900000 - n)",
        "later": "now() + make_interval(secs => 900000 + n)",
        "numbers": "generate_series({first}, {last}) AS numbers(n)",
    },
    "plain": {
        "id": "lower(hex(randomblob(16)))",
        "moment": "strftime('%Y-%m-%d %H:%M:%f000', 'now', (n - 900000) || ' seconds')",
        "later": "strftime('%Y-%m-%d %H:%M:%f000', 'now', (n + 900000) || ' seconds')",
        "numbers": "(WITH RECURSIVE numbers(n) AS (SELECT {first} UNION ALL "
        "SELECT n + 1 FROM numbers WHERE n < {last}) SELECT n FROM numbers)",
    },
}


def filling(maker: str, first: int, count: int, jobs: int, status: str) -> str:
    sql = SQL[maker]
    numbers = sql["numbers"].format(first=first, last=first + count - 1)
    done, delayed = status == "COMPLETED", status == "DELAYED"
    return FILL.format(
        id=sql["id"],
        numbers=numbers,
        jobs=jobs,
        moment=sql["moment"],
        status="PENDING" if delayed else status,
        completed=sql["moment"] if done else "NULL",
        available=sql["later"] if delayed else "NULL",
    )


@pytest.fixture
async def workers(app, admin: User, engine: AsyncEngine, maker: str) -> list[str]:
    """A worker of all jobs, and one of the first."""
    app.state.joblib_settings.queue_position_max = 100
    made = [(await admin.post("/workers")).json()["id"] for _ in range(2)]
    for n in range(JOBS):
        body = {"category": "modifiers", "name": f"J{n}", "worker_id": made[0]}
        answer = await admin.put("/rooms/@global/jobs", json=body)
        assert answer.status_code == 201
    body = {"category": "modifiers", "name": "J0", "worker_id": made[1]}
    assert (await admin.put("/rooms/@global/jobs", json=body)).status_code == 200
    async with engine.begin() as connection:
        run = connection.exec_driver_sql
        if maker == "postgres":
            await run("ALTER TABLE task SET (autovacuum_enabled = off)")
        await run(filling(maker, 0, TASKS, JOBS, "COMPLETED"))
        await run("ANALYZE")
        await run(filling(maker, TASKS, TASKS // 2, JOBS, "PENDING"))
        await run(filling(maker, 2 * TASKS, TASKS // 2, 1, "PENDING"))
        await run(filling(maker, 3 * TASKS, TASKS // 4, JOBS, "DELAYED"))
    return made


async def steps_of(admin: User, workers: list[str], session_maker: Any) -> Steps:
    every, one = workers
    held = await claim(admin, every, max_tasks=2 * REPEATS)
    submitted = await admin.post(f"{ROOM}/tasks/{J0}", json={})
    task = submitted.json()["id"]

    async def next_page(url: str) -> str:
        answer = await admin.get(url)
        return f"http://host{answer.links['next']['url']}"

    pages = {
        "tasks": await next_page(f"{ROOM}/tasks"),
        "waiting tasks": await next_page(f"{ROOM}/tasks?status=pending"),
        "tasks of a job": await next_page(f"{ROOM}/jobs/{J0}/tasks"),
    }
    leaving = [(await admin.post("/workers")).json()["id"] for _ in range(REPEATS)]
    for worker in leaving:
        body = {"category": "modifiers", "name": f"L{worker}", "worker_id": worker}
        await admin.put("/rooms/@global/jobs", json=body)

    def claim_by(worker: str, **fields: Any) -> Any:
        body = {"worker_id": worker, **fields}
        return lambda n: admin.post("/tasks/claim", json=body)

    def report_that(status: str, tasks: list[Any]) -> Any:
        return lambda n: report(admin, tasks[n], status, attempt=1)

    def sweep(one_pass: Any) -> Any:
        return lambda n: one_pass(session_maker)

    keyed = {"Idempotency-Key": "k"}
    # none of them may move these tasks, which are used up below
    ends = [["completed", "claimed"] * REPEATS] * REPEATS
    beat = {"tasks": [{"id": t["id"], "attempt": 1, "progress": 0.5} for t in held]}
    return {
        "claim of 50 jobs": claim_by(every),
        "claim of 1 job": claim_by(one),
        "claim of 32 tasks": claim_by(every, max_tasks=32),
        "claim with a key": lambda n: admin.post(
            "/tasks/claim", json={"worker_id": every}, headers={"Idempotency-Key": f"{n}"}
        ),
        "submit": lambda n: admin.post(f"{ROOM}/tasks/{J0}", json={}),
        "submission of a batch": lambda n: admin.post(
            f"{ROOM}/batches/{J0}", json={"tasks": [{}] * 100}
        ),
        "claim that starts": claim_by(every, max_tasks=4, start=True),
        "batch of reports": lambda n: admin.patch(
            "/tasks",
            json={
                "reports": [
                    {"id": t["id"], "status": status}
                    for t, status in zip(held, ends[n], strict=True)
                ]
            },
        ),
        "status of many": lambda n: admin.post(
            "/tasks/query", json={"ids": [t["id"] for t in held]}
        ),
        "submit with a key": lambda n: admin.post(f"{ROOM}/tasks/{J0}", json={}, headers=keyed),
        "status": lambda n: admin.get(f"/tasks/{task}"),
        "heartbeat": lambda n: admin.patch(f"/workers/{every}", json=beat),
        "start": report_that("running", held),
        "complete": report_that("completed", held),
        "fail": report_that("failed", held[REPEATS:]),
        "retry": lambda n: admin.post(f"/tasks/{held[n]['id']}/retry"),
        "cancel": lambda n: report(admin, held[n], "cancelled"),
        **{f"page of {k}": partial(lambda u, n: admin.get(u), u) for k, u in pages.items()},
        "bulk of a room": lambda n: admin.post(
            f"{ROOM}/tasks/bulk", json={"action": "cancel", "status": "pending", "dry_run": True}
        ),
        "bulk of a job": lambda n: admin.post(
            f"{ROOM}/tasks/bulk", json={"action": "delete", "job": J0, "dry_run": True}
        ),
        "job": lambda n: admin.get(f"{ROOM}/jobs/{J0}"),
        "jobs": lambda n: admin.get(f"{ROOM}/jobs"),
        "stats": lambda n: admin.get(f"{ROOM}/stats?limit=10"),
        "sweep of workers": sweep(cleanup_stale_workers),
        "sweep of attempts": sweep(cleanup_overdue_attempts),
        "sweep of internal tasks": sweep(cleanup_stuck_internal_tasks),
        "sweep of jobs": sweep(cleanup_idle_jobs),
        "worker goes": lambda n: admin.delete(f"/workers/{leaving[n]}"),
    }


async def take(step: Callable[[int], Awaitable[Any]], times: int) -> None:
    for n in range(times):
        answer = await step(n)
        assert getattr(answer, "status_code", 200) < 300, answer.text


@pytest.mark.makers("postgres")
async def test_what_is_read_does_not_grow_on_postgresql(admin, engine, workers, session_maker):
    async def rows_read() -> int:
        async with engine.connect() as connection:
            run = connection.exec_driver_sql
            await run("SELECT pg_stat_force_next_flush()")
            await connection.commit()
            await run("SELECT pg_stat_clear_snapshot()")
            found = await run(
                "SELECT (SELECT seq_tup_read FROM pg_stat_user_tables"
                " WHERE relname = 'task') + (SELECT sum(idx_tup_read)"
                " FROM pg_stat_user_indexes WHERE relname = 'task')"
            )
            return int(found.scalar_one())

    too_many = {}
    for statistics in ("of the empty queue", "of today"):
        for name, step in (await steps_of(admin, workers, session_maker)).items():
            before = await rows_read()
            await take(step, REPEATS)
            each = (await rows_read() - before) / REPEATS
            if each > MOST:
                too_many[name, statistics] = each
        async with engine.begin() as connection:
            await connection.exec_driver_sql("ANALYZE")
    assert not too_many


def reads_all(step: str) -> bool:
    # what is held, and nothing else, is in that index
    return bool(re.match(r"SCAN task(?! USING INDEX ix_task_held$)", step))


@pytest.mark.makers("plain")
async def test_no_plan_reads_all_tasks_on_sqlite(admin, engine, workers, session_maker):
    seen: dict[str, list[tuple[str, Any]]] = {}
    now_in = ""

    def note(connection, cursor, statement, parameters, context, executemany):
        one = parameters[0] if executemany else parameters
        seen.setdefault(now_in, []).append((statement, one))

    steps = await steps_of(admin, workers, session_maker)
    event.listen(engine.sync_engine, "before_cursor_execute", note)
    for name, step in steps.items():
        now_in = name
        await take(step, 1)
    event.remove(engine.sync_engine, "before_cursor_execute", note)
    bad = []
    async with engine.connect() as connection:
        for name, statements in seen.items():
            for statement, parameters in statements:
                if not re.search(r"\btask\b", statement):
                    continue
                found = await connection.exec_driver_sql(
                    f"EXPLAIN QUERY PLAN {statement}", parameters
                )
                plan = [row.detail for row in found]
                if "MATERIALIZE edges" in plan:
                    # what follows is done with the rows of one page
                    plan = plan[: plan.index("MATERIALIZE edges")]
                # a claim merges the heads of queues, which are short, what is reported
                # or lost is locked by id, what goes on is grouped, a batch numbered: few tasks are
                # named by a request, held, or ended just now; a bulk merges what it read of
                # each state
                few = bool(re.search("batch|claim|report|fail|heartbeat|worker|stats|bulk", name))
                sorts = not few and any("TEMP B-TREE" in p for p in plan)
                if sorts or any(map(reads_all, plan)):
                    bad.append("\n".join([f"{name}: {statement[:200]}", *plan]))
    assert seen.keys() == steps.keys()
    assert not bad, "\n\n".join(bad)
