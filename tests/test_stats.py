"""What goes on in each job, as monitoring and the people in a room see it."""

from uuid import UUID

import httpx
import pytest
from conftest import User
from makers import SessionMaker
from sqlalchemy import update
from steps import JOB, claim, execute, offer, report, silence, submit

from zndraw_joblib import queue_stats
from zndraw_joblib.models import Task, now
from zndraw_joblib.settings import JobLibSettings

pytestmark = pytest.mark.makers("plain", "strict", "postgres")

NOTHING = {
    "pending": 0, "delayed": 0, "claimed": 0, "running": 0, "workers_alive": 0,
    "oldest_pending_seconds": None, "completed_last_minute": 0, "failed_last_minute": 0,
}  # fmt: skip


async def test_each_task_is_counted_where_it_is(
    ada: User, bob: User, admin: User, session_maker: SessionMaker
):
    worker = await offer(ada)
    gone = await offer(ada)
    await silence(session_maker, gone)
    await offer(admin, "Shared", room="@global")
    await offer(ada, "Private", room="elsewhere")
    ended, long_ago, failed, running, _ = [await submit(bob) for _ in range(5)]
    assert len(await claim(ada, worker, max_tasks=8)) == 5
    for task in (ended, long_ago, failed, running):
        await report(ada, task, "running")
    for task, status in ((ended, "completed"), (long_ago, "completed"), (failed, "failed")):
        await report(ada, task, status)
    oldest, *_ = [await submit(bob) for _ in range(3)]
    await submit(bob, delay_seconds=3600)
    await submit(bob, "@global:modifiers:Shared", room="elsewhere")
    tasks = update(Task)
    await execute(
        session_maker,
        tasks.where(Task.id == UUID(long_ago["id"])).values(completed_at=now(-61)),
        tasks.where(Task.id == UUID(oldest["id"])).values(created_at=now(-100)),
    )

    page = (await bob.get("/rooms/lab/stats")).json()
    by_name = {item.pop("job_name"): item for item in page["items"]}
    assert by_name.keys() == {JOB, "@global:modifiers:Shared"}
    age = by_name[JOB].pop("oldest_pending_seconds")
    assert 100 <= age < 160
    assert by_name[JOB] == {
        "pending": 3, "delayed": 1, "claimed": 1, "running": 1,
        "completed_last_minute": 1, "failed_last_minute": 1, "workers_alive": 1,
    }  # fmt: skip
    # what is shared is counted over all rooms, as queue positions are
    shared = by_name["@global:modifiers:Shared"]
    assert 0 <= shared.pop("oldest_pending_seconds") < 60
    expected = NOTHING | {"pending": 1, "workers_alive": 1}
    del expected["oldest_pending_seconds"]
    assert shared == expected

    async with session_maker() as session:
        every = await queue_stats(session)
        capped = await queue_stats(session, JobLibSettings(queue_position_max=2))
    private = "elsewhere:modifiers:Private"
    assert {s.job_name for s in every} == {*by_name, private}
    (idle,) = (s for s in every if s.job_name == private)
    assert idle.model_dump(exclude={"job_name"}) == NOTHING | {"workers_alive": 1}
    assert {s.job_name: s.pending for s in capped}[JOB] == 2


@pytest.mark.makers("plain")
async def test_prometheus_reads_the_example_host(
    client: httpx.AsyncClient, ada: User, monkeypatch: pytest.MonkeyPatch
):
    await offer(ada)
    await submit(ada)
    url, token = "http://host/metrics", {"Authorization": "Bearer secret"}
    assert (await client.get(url, headers=token)).status_code == 401
    monkeypatch.setenv("METRICS_TOKEN", "secret")
    assert (await client.get(url)).status_code == 401
    answer = await client.get(url, headers=token)
    assert answer.status_code == 200
    assert f'zndraw_joblib_pending{{job="{JOB}"}} 1.0' in answer.text.splitlines()
