"""How long heartbeats take while the sweeper ends what thousands of workers held.

``nox -s sweep`` runs it under the lock-wrapped maker, where everybody waits for everybody.
``SILENT_WORKERS`` is how many there are; each runs ten tasks.
"""

import gc
import os
import statistics
import sys
import time
from uuid import UUID, uuid4

import anyio
import pytest
from conftest import User
from makers import SessionMaker
from sqlalchemy import func, insert, select
from steps import JOB, offer

from zndraw_joblib.lifecycle import TaskStatus
from zndraw_joblib.models import Task, Worker, WorkerJobLink, held, now
from zndraw_joblib.sweeper import cleanup_stale_workers

WORKERS = int(os.environ.get("SILENT_WORKERS", "10000"))
TASKS_EACH = 10
AT_ONCE = 500
BETWEEN_SECONDS = 0.05


async def fall_silent(user: User, session_maker: SessionMaker) -> None:
    """Add workers that run tasks and have not been heard for an hour."""
    worker = await offer(user)
    job = UUID((await user.get(f"/rooms/lab/jobs/{JOB}")).json()["id"])
    task = {
        "job_id": job,
        "job_name": JOB,
        "room_id": "lab",
        "payload": {},
        "status": TaskStatus.RUNNING,
        "holder_id": user.id,
        "attempt": 1,
    }
    for first in range(0, WORKERS, AT_ONCE):
        ids = [uuid4() for _ in range(min(AT_ONCE, WORKERS - first))]
        tasks = [
            {**task, "id": uuid4(), "worker_id": worker, "queue_order": first * TASKS_EACH + n}
            for n, worker in enumerate(ids * TASKS_EACH)
        ]
        async with session_maker() as session:
            silent = insert(Worker).values(last_heartbeat=now(-3600))
            await session.execute(silent, [{"id": w, "user_id": user.id} for w in ids])
            await session.execute(
                insert(WorkerJobLink), [{"worker_id": w, "job_id": job} for w in ids]
            )
            started = insert(Task).values(started_at=now(-3600), claimed_at=now(-3600))
            await session.execute(started, tasks)
            await session.commit()
    await user.delete(f"/workers/{worker}")


@pytest.mark.timeout(1200)
async def test_heartbeats_while_the_lost_are_swept(
    ada: User, bob: User, session_maker: SessionMaker, tsio
):
    alive = await offer(bob, "Alive")
    await fall_silent(ada, session_maker)
    took: list[float] = []
    # a host does not collect what pytest and its plugins hold
    gc.collect()
    gc.freeze()

    async def beat() -> None:
        while True:
            began = time.perf_counter()
            answer = await bob.patch(f"/workers/{alive}")
            took.append((time.perf_counter() - began) * 1000)
            assert answer.status_code == 200, answer.text
            await anyio.sleep(BETWEEN_SECONDS)

    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        began = time.perf_counter()
        assert await cleanup_stale_workers(session_maker, tsio=tsio) == WORKERS
        seconds = time.perf_counter() - began
        group.cancel_scope.cancel()
    async with session_maker() as session:
        assert not await session.scalar(select(func.count()).where(held()))
    took.sort()
    sys.stdout.write(
        f"\n{WORKERS} workers with {WORKERS * TASKS_EACH} tasks swept in {seconds:.1f} s;"
        f" {len(took)} heartbeats: median {statistics.median(took):.0f} ms, 99 % within"
        f" {took[len(took) * 99 // 100]:.0f} ms, longest {took[-1]:.0f} ms\n"
    )
