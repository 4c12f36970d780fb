"""The same with procrastinate: ``bench_queue.py ROLE URL``, on a database of its own.

It is a queue for programs that share a PostgreSQL and trust each other, and so the mark
that a job layer over HTTP can be held against. It does less: no HTTP and no host between
worker and database, no user and no right to anything, no result of a task, and nobody
who waits for one: its submitter counts what has succeeded.
"""

import asyncio
import logging
import sys
import time
from typing import Any

import procrastinate

CONCURRENCY = 32
#: as many as this tree's client submits in one request
BATCH = 1000
LOOK_SECONDS = 0.05
LEFT = """
    SELECT count(*) AS ended FROM procrastinate_jobs
    WHERE id >= %(first)s AND status = 'succeeded'
"""


def make_app(url: str) -> tuple[procrastinate.App, procrastinate.tasks.Task]:
    # a pool as it is by default: with a connection for each hand it was slower
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))

    @app.task(name="relax")
    async def relax(**parameters: Any) -> int:
        return parameters["n"]

    return app, relax


async def prepare(url: str) -> None:
    """Make the tables."""
    app, _ = make_app(url)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        say("ready")


async def work(url: str) -> None:
    app, _ = make_app(url)
    async with app.open_async():
        say("ready")
        await app.run_worker_async(concurrency=CONCURRENCY)


async def submit(url: str) -> None:
    app, relax = make_app(url)
    async with app.open_async():
        say("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            same: dict[str, Any] = {"structure": "Cu", "steps": 100}
            same["scale"] = [1.0, 1.0, 1.5]
            tasks = [same | {"n": n} for n in range(int(line))]
            begun = time.perf_counter()
            ids: list[int] = []
            for first in range(0, len(tasks), BATCH):
                ids += await relax.batch_defer_async(*tasks[first : first + BATCH])
            while await ended(app, min(ids)) < len(ids):
                await asyncio.sleep(LOOK_SECONDS)
            say(time.perf_counter() - begun)


async def ended(app: procrastinate.App, first: int) -> int:
    row = await app.connector.execute_query_one_async(LEFT, first=first)
    return row["ended"]


def say(word: object) -> None:
    print(word, flush=True)


if __name__ == "__main__":
    # it warns of apps that are made in a program's main module
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    roles = {"work": work, "submit": submit, "prepare": prepare}
    asyncio.run(roles[sys.argv[1]](*sys.argv[2:]))
