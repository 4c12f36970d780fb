"""What goes for good: ended tasks whose time is over, jobs that nobody needs."""

from sqlalchemy import select, update

from zndraw_joblib.lifecycle import TaskStatus
from zndraw_joblib.models import Task, now
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.sweeper import cleanup_idle_jobs, purge_tasks


async def test_only_what_outlived_its_state_goes(admin, session_maker):
    job = {"category": "modifiers", "name": "Rotate"}
    worker = (await admin.put("/rooms/@global/jobs", json=job)).json()["worker_id"]
    ended = {}
    for status in ("completed", "failed", "cancelled", "pending"):
        path = "/rooms/lab/tasks/@global:modifiers:Rotate"
        task = (await admin.post(path, json={})).json()["id"]
        if status in ("completed", "failed"):
            await admin.post("/tasks/claim", json={"worker_id": worker})
            await admin.patch(f"/tasks/{task}", json={"status": "running"})
        if status != "pending":
            answer = await admin.patch(f"/tasks/{task}", json={"status": status})
            assert answer.status_code == 200
        ended[status] = task
    settings = JobLibSettings(task_retention_seconds={"completed": 60, "failed": 600})
    assert await purge_tasks(session_maker, settings) == 0
    async with session_maker() as session:
        await session.execute(
            update(Task).where(Task.status != TaskStatus.PENDING).values(completed_at=now(-120))
        )
        await session.commit()
    assert await purge_tasks(session_maker, settings) == 1
    async with session_maker() as session:
        left = (await session.scalars(select(Task.id))).all()
    assert {str(task) for task in left} == set(ended.values()) - {ended["completed"]}


async def test_a_job_goes_with_its_last_waiting_task(admin, session_maker, tsio, events):
    job = {"category": "modifiers", "name": "Rotate"}
    worker = (await admin.put("/rooms/lab/jobs", json=job)).json()["worker_id"]
    path = "lab:modifiers:Rotate"
    task = (await admin.post(f"/rooms/lab/tasks/{path}", json={})).json()["id"]
    await admin.delete(f"/workers/{worker}")
    assert await cleanup_idle_jobs(session_maker, tsio=tsio) == 0
    assert (await admin.get(f"/rooms/lab/jobs/{path}")).status_code == 200
    await admin.patch(f"/tasks/{task}", json={"status": "cancelled"})
    events.clear()
    assert await cleanup_idle_jobs(session_maker, tsio=tsio) == 1
    assert [sent.event for sent in events] == ["jobs_invalidate"]
    assert (await admin.get(f"/rooms/lab/jobs/{path}")).status_code == 404
    # what became of it stays readable, under the job's name
    assert (await admin.get(f"/tasks/{task}")).json()["job_name"] == path
