"""What claims cost while a reader holds a snapshot open, and who waits behind a flood.

``nox -s pinned`` runs it on a PostgreSQL of its own: tasks pass in batches beneath a
transaction of REPEATABLE READ, and now and then single claims are timed, and the buffers
counted that the whole database touched for them. Then the reader ends, and the table is
vacuumed. At the end one user floods a job, and ten others submit one task each.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import asyncpg
from bench_client import PAYLOAD, ROOM, Connection, User
from bench_host import make_app
from bench_sides import Database, Host, database, running
from zndraw_auth import User as Account
from zndraw_auth.users import get_jwt_strategy

#: what one request takes, of submissions, and of claims and reports
SUBMITTED, CLAIMED = 1000, 32
#: single claims of one measurement, after some whose plans and caches are not yet theirs
CLAIMS, WARM = 100, 10
#: the tasks that wait behind those that are claimed
WAITING = 1000
#: a backend tells its counters at most once in a second
TOLD_SECONDS = 1.5
SMALL_USERS = 10

BUFFERS = "SELECT blks_hit + blks_read FROM pg_stat_database WHERE datname = current_database()"
DEAD = "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'task'"


async def submit(user: User, count: int) -> None:
    for n in range(0, count, SUBMITTED):
        tasks = [{"payload": PAYLOAD}] * min(SUBMITTED, count - n)
        await user.ask("POST", f"/rooms/{ROOM}/batches/{user.job}", {"tasks": tasks})


async def claim(user: User, count: int) -> list[dict[str, Any]]:
    body = {"worker_id": user.worker, "max_tasks": count, "start": True}
    claimed: list[dict[str, Any]] = json.loads(await user.ask("POST", "/tasks/claim", body))[
        "tasks"
    ]
    if claimed:
        ended = [{"id": task["id"], "status": "completed"} for task in claimed]
        await user.ask("PATCH", "/tasks", {"reports": ended})
    return claimed


async def let_pass(user: User, count: int) -> None:
    """Take so many tasks through their lives."""
    await submit(user, count)
    while count > 0:
        count -= len(await claim(user, min(CLAIMED, count)))


async def measure(moment: str, user: User, watcher: Any, passed: int) -> dict[str, Any]:
    """Return what single claims take, and print it."""
    await submit(user, CLAIMS + WARM)
    for _ in range(WARM):
        await user.claim(start=True)
    await asyncio.sleep(TOLD_SECONDS)
    before = await watcher.fetchval(BUFFERS)
    took = []
    for _ in range(CLAIMS):
        begun = time.perf_counter()
        await user.claim(start=True)
        took.append(1000 * (time.perf_counter() - begun))
    await asyncio.sleep(TOLD_SECONDS)
    found = {
        "moment": moment,
        "passed": passed,
        "median_ms": round(statistics.median(took), 2),
        "p99_ms": round(statistics.quantiles(took, n=100)[98], 2),
        "buffers": round((await watcher.fetchval(BUFFERS) - before) / CLAIMS, 1),
        "dead_rows": await watcher.fetchval(DEAD),
    }
    while user.held:
        await user.complete()
    print(json.dumps(found), flush=True)
    return found


async def pinned(user: User, on: Database, url: str, tasks: int, steps: int) -> None:
    """Let tasks pass beneath a reader, and measure claims before, meanwhile and after."""
    reader, watcher = await asyncpg.connect(url), await asyncpg.connect(url)
    await submit(user, WAITING)
    await measure("before", user, watcher, 0)
    snapshot = reader.transaction(isolation="repeatable_read", readonly=True)
    await snapshot.start()
    await reader.fetchval("SELECT count(*) FROM task")
    for n in range(1, steps + 1):
        wal = await on.wal()
        await let_pass(user, tasks // steps)
        wal = await on.wal() - wal
        found = await measure("a reader", user, watcher, n * (tasks // steps))
    print(
        f"WAL bytes a task, in batches: {wal / (tasks // steps):.0f};"
        f" dead rows a task: {found['dead_rows'] / tasks:.1f}"
    )
    await snapshot.rollback()
    await measure("the reader ended", user, watcher, tasks)
    await watcher.execute("VACUUM task", timeout=3600)
    await measure("vacuumed", user, watcher, tasks)
    await reader.close()
    await watcher.close()


async def another(host: Host, url: str) -> User:
    """Return a user who has just registered."""
    connection = await asyncpg.connect(url)
    account = Account(id=uuid4(), email=f"{uuid4()}@example.org", hashed_password="")
    await connection.execute(
        'INSERT INTO "user" (id, email, hashed_password, is_active, is_superuser, is_verified)'
        " VALUES ($1, $2, '', true, false, false)",
        account.id,
        account.email,
    )
    await connection.close()
    app = make_app(host.url, "postgres")
    token = await get_jwt_strategy(app.state.auth_settings).write_token(account)
    return User(await Connection.open(host.port, token), "/v1/joblib")


async def fairness(user: User, host: Host, url: str, flood: int) -> None:
    """Print how many tasks of a flood are claimed before each of ten users has had one."""
    while await claim(user, CLAIMED):
        pass
    await submit(user, flood)
    small = set()
    for _ in range(SMALL_USERS):
        other = await another(host, url)
        await other.submit()
        small.add(other.submitted)
        await other.connection.close()
    before = 0
    while small:
        (task,) = await claim(user, 1)
        before += task["id"] not in small
        small.discard(task["id"])
    print(f"of {flood} tasks of a flood, {before} went before the last of {SMALL_USERS} users'")


async def main(tasks: int, steps: int, flood: int) -> None:
    with database("postgres") as on:
        url = await on.create()
        plain = url.replace("+asyncpg", "")
        async with AsyncExitStack() as stack:
            host = stack.enter_context(running(sys.executable, url, "postgres", "floor"))
            user = User(await Connection.open(host.port, host.token), "/v1/joblib")
            stack.push_async_callback(user.connection.close)
            await user.begin(1)
            await pinned(user, on, plain, tasks, steps)
            await fairness(user, host, plain, flood)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=10_000, help="that pass beneath the reader")
    parser.add_argument("--steps", type=int, default=2, help="after each of which is measured")
    parser.add_argument("--flood", type=int, default=2000, help="tasks of one user")
    options = parser.parse_args()
    asyncio.run(main(options.tasks, options.steps, options.flood))
