"""Races: requests that meet, one of which wins; the same wherever they are run.

`test_races.py` runs them in one process, over SQLite and PostgreSQL, and
`test_replicas.py` on three replicas. A race sets its scene, lets its requests meet in one
order, and looks at their answers and at what was told of them; `run` looks at the rows.
"""

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import anyio
import httpx
import steps
from makers import SessionMaker
from sqlalchemy import and_, event, func, null, or_, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.util import await_only
from steps import Hold, claim, locking, move, offer, read, report, row

from zndraw_joblib.jobs import WANTED
from zndraw_joblib.lifecycle import TERMINAL
from zndraw_joblib.models import Job, Task, Worker, WorkerJobLink, held

HANG = 120
# in which what nothing holds up gets further
PAUSE = 0.05

_seat: ContextVar[int | None] = ContextVar("seat", default=None)


async def meet_before_writes(
    engine: AsyncEngine, hold: Hold, *requests: Callable[[], Awaitable[Any]]
) -> list[Any]:
    """Stop requests before their first write until all are there, and let them write.

    For SQLite. They write in the order given, and each stops once more, as the one
    writer, until the next one has tried.

    Parameters
    ----------
    engine : AsyncEngine
        What they write with.
    hold : Hold
        Ignored: SQLite has no locks on rows. It is there to be called as `steps.meet` is.
    *requests : callable
        Send a request each.
    """
    arrived, wrote, turn, leave = ([anyio.Event() for _ in requests] for _ in range(4))
    answers: dict[int, Any] = {}

    def writing(context: Any) -> int | None:
        write = context.isinsert or context.isupdate or context.isdelete
        return _seat.get() if write else None

    def before(
        connection: Any, cursor: Any, sql: str, names: Any, context: Any, many: bool
    ) -> None:
        at = writing(context)
        if at is not None and not arrived[at].is_set():
            arrived[at].set()
            await_only(turn[at].wait())

    def after(connection: Any, cursor: Any, sql: str, names: Any, context: Any, many: bool) -> None:
        at = writing(context)
        if at is not None and not wrote[at].is_set():
            wrote[at].set()
            await_only(leave[at].wait())

    async def send(at: int, request: Callable[[], Awaitable[Any]]) -> None:
        _seat.set(at)
        answers[at] = await request()

    async def reach(event: anyio.Event, at: int) -> None:
        while not event.is_set() and at not in answers:
            await anyio.sleep(0.001)

    event.listen(engine.sync_engine, "before_cursor_execute", before)
    event.listen(engine.sync_engine, "after_cursor_execute", after)
    try:
        with anyio.fail_after(HANG):
            async with anyio.create_task_group() as group:
                for at, request in enumerate(requests):
                    group.start_soon(send, at, request)
                    await reach(arrived[at], at)
                    assert arrived[at].is_set()
                for at in range(len(requests)):
                    turn[at].set()
                    if at:
                        await anyio.sleep(PAUSE)
                        assert not wrote[at].is_set(), "two wrote at once"
                        leave[at - 1].set()
                    await reach(wrote[at], at)
                leave[-1].set()
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", before)
        event.remove(engine.sync_engine, "after_cursor_execute", after)
    return [answers[at] for at in sorted(answers)]


@dataclass
class Scene:
    """Where a race is run.

    Attributes
    ----------
    ada, elsewhere, bob : AsyncClient
        Two clients of the one to whom the workers belong, and one of who submits; at
        three replicas, if there are three.
    room : str
        Nobody else's.
    meet : coroutine function
        Takes what to hold and the requests; returns their answers in order.
    hears : coroutine function
        Takes a task and its states; fails when others were told, or one twice.
    """

    ada: httpx.AsyncClient
    elsewhere: httpx.AsyncClient
    bob: httpx.AsyncClient
    room: str
    session_maker: SessionMaker
    meet: Callable[..., Awaitable[list[Any]]]
    hears: Callable[..., Awaitable[None]]

    @property
    def job(self) -> str:
        return f"{self.room}:modifiers:Rotate"

    async def offer(self, **policy: Any) -> str:
        return await offer(self.ada, room=self.room, **policy)

    async def task(
        self, worker: str, status: str = "pending", of: httpx.AsyncClient | None = None
    ) -> Any:
        """Submit bob's task, or another's, and bring it to a state."""
        task = await steps.submit(of or self.bob, self.job, self.room)
        return await move(self.ada, worker, task, status)

    async def found(self) -> Any:
        """Return the job as its room sees it, or None."""
        jobs = (await self.ada.get(f"/rooms/{self.room}/jobs")).json()["items"]
        return next((job for job in jobs if job["full_name"] == self.job), None)

    async def job_row(self) -> Hold:
        job = await self.ada.get(f"/rooms/{self.room}/jobs/{self.job}")
        return row(Job, job.json()["id"])


Race = Callable[[Scene, int], Awaitable[None]]


def links(worker: str) -> Hold:
    """Hold what goes after its worker is locked."""
    return locking(select(WorkerJobLink.job_id).where(WorkerJobLink.worker_id == UUID(worker)))


async def all_links(session: AsyncSession) -> None:
    """Hold up whoever has made a job and is about to serve it."""
    table = WorkerJobLink.__tablename__
    await session.execute(text(f"LOCK TABLE {table} IN SHARE MODE"))


def codes(answers: list[Any]) -> list[int]:
    return [answer.status_code for answer in answers]


def turned(things: list[Any], first: int) -> list[Any]:
    return things[first:] + things[:first]


# --- reports ---


async def three_ends(scene: Scene, first: int) -> None:
    task = await scene.task(await scene.offer(), "running")
    ends = [
        ("completed", partial(report, scene.ada, task, "completed", attempt=1)),
        ("failed", partial(report, scene.elsewhere, task, "failed")),
        ("cancelled", partial(report, scene.bob, task, "cancelled")),
    ]
    ends = turned(ends, first)
    answers = await scene.meet(row(Task, task["id"]), *(end for _, end in ends))
    assert codes(answers) == [200, 409, 409]
    assert (await read(scene.ada, task))["status"] == ends[0][0]
    await scene.hears(task, "pending", "claimed", "running", ends[0][0])


async def complete_and_cancel(scene: Scene, first: int) -> None:
    task = await scene.task(await scene.offer(), "running")
    ends = [
        partial(report, scene.ada, task, "completed", result={"n": 1}),
        partial(report, scene.bob, task, "cancelled"),
    ]
    answers = await scene.meet(row(Task, task["id"]), *turned(ends, first))
    assert codes(answers) == [200, 409]
    stored = await read(scene.ada, task)
    # never the state of one and the result of the other
    assert (stored["status"], stored["result"]) == (("completed", {"n": 1}), ("cancelled", None))[
        first
    ]
    await scene.hears(task, "pending", "claimed", "running", stored["status"])


async def two_starts(scene: Scene, first: int) -> None:
    task = await scene.task(await scene.offer(), "claimed")
    starts = [
        partial(report, user, task, "running", attempt=1) for user in (scene.ada, scene.elsewhere)
    ]
    answers = await scene.meet(row(Task, task["id"]), *turned(starts, first))
    assert codes(answers) == [200, 200]
    assert answers[0].json() == answers[1].json()
    await scene.hears(task, "pending", "claimed", "running")


async def three_retries(scene: Scene, first: int) -> None:
    # it is the submitter who may
    task = await scene.task(await scene.offer(), "failed", of=scene.ada)
    retries = [
        partial(user.post, f"/tasks/{task['id']}/retry")
        for user in (scene.ada, scene.elsewhere, scene.ada)
    ]
    answers = await scene.meet(row(Task, task["id"]), *turned(retries, first))
    assert codes(answers) == [202, 409, 409]
    await scene.hears(task, "pending", "claimed", "running", "failed", "pending")


# --- workers that go ---


async def claim_and_delete(scene: Scene, first: int) -> None:
    await scene.offer()  # keeps the job
    await delete_at_the_claim_of(scene, await scene.offer(), first)


async def next_claim_and_delete(scene: Scene, first: int) -> None:
    """Of a worker that claimed before."""
    await scene.offer()  # keeps the job
    worker = await scene.offer()
    await steps.submit(scene.bob, scene.job, scene.room)
    await claim(scene.elsewhere, worker)
    await delete_at_the_claim_of(scene, worker, first)


async def delete_at_the_claim_of(scene: Scene, worker: str, first: int) -> None:
    task = await scene.task(worker)
    requests = [
        partial(scene.elsewhere.post, "/tasks/claim", json={"worker_id": worker}),
        partial(scene.ada.delete, f"/workers/{worker}"),
    ]
    answers = await scene.meet(row(Worker, worker), *turned(requests, first))
    assert codes(answers) == ([200, 204], [204, 404])[first]
    states = (["pending", "claimed", "failed"], ["pending"])[first]
    await scene.hears(task, *states)
    assert (await read(scene.ada, task))["status"] == states[-1]


async def complete_and_delete(scene: Scene, first: int) -> None:
    worker = await scene.offer()
    task = await scene.task(worker, "running")
    requests = [
        partial(report, scene.elsewhere, task, "completed", attempt=1),
        partial(scene.ada.delete, f"/workers/{worker}"),
    ]
    answers = await scene.meet(row(Task, task["id"]), *turned(requests, first))
    assert codes(answers) == ([200, 204], [204, 409])[first]
    last = ("completed", "failed")[first]
    await scene.hears(task, "pending", "claimed", "running", last)


async def reports_and_heartbeat(scene: Scene, first: int) -> None:
    """Of the same tasks, which lie in the table in another order than their ids'."""
    worker, tasks = await two_running(scene)
    progress = [{"id": t["id"], "attempt": 1, "progress": 0.5} for t in tasks]
    reports = [{"id": t["id"], "status": "completed"} for t in tasks]
    requests = [
        partial(scene.elsewhere.patch, "/tasks", json={"reports": reports}),
        partial(scene.ada.patch, f"/workers/{worker}", json={"tasks": progress}),
    ]
    answers = await scene.meet(row(Task, tasks[0]["id"]), *turned(requests, first))
    assert codes(answers) == [200, 200]
    for task in tasks:
        assert (await read(scene.ada, task))["status"] == "completed"


async def reports_and_delete(scene: Scene, first: int) -> None:
    worker, tasks = await two_running(scene)
    reports = [{"id": t["id"], "status": "completed"} for t in tasks]
    requests = [
        partial(scene.elsewhere.patch, "/tasks", json={"reports": reports}),
        partial(scene.ada.delete, f"/workers/{worker}"),
    ]
    answers = await scene.meet(row(Task, tasks[0]["id"]), *turned(requests, first))
    assert codes(answers) == ([200, 204], [204, 200])[first]
    for task in tasks:
        last = ("completed", "failed")[first]
        assert (await read(scene.ada, task))["status"] == last


async def two_running(scene: Scene) -> tuple[str, list[Any]]:
    worker = await scene.offer()
    tasks = [await scene.task(worker, "running") for _ in range(2)]
    # the first one's row is now behind the other's
    beat = {"tasks": [{"id": tasks[0]["id"], "attempt": 1, "progress": 0.1}]}
    await scene.ada.patch(f"/workers/{worker}", json=beat)
    return worker, tasks


async def heartbeat_and_delete(scene: Scene, first: int) -> None:
    worker = await scene.offer()
    requests = [
        partial(scene.elsewhere.patch, f"/workers/{worker}"),
        partial(scene.ada.delete, f"/workers/{worker}"),
    ]
    answers = await scene.meet(row(Worker, worker), *turned(requests, first))
    assert codes(answers) == ([200, 204], [204, 404])[first]
    assert await scene.found() is None


async def two_deletions(scene: Scene, first: int) -> None:
    worker = await scene.offer()
    task = await scene.task(worker, "running")
    deletions = [
        partial(user.delete, f"/workers/{worker}") for user in (scene.ada, scene.elsewhere)
    ]
    answers = await scene.meet(row(Worker, worker), *turned(deletions, first))
    assert codes(answers) == [204, 404]
    await scene.hears(task, "pending", "claimed", "running", "failed")


# --- what is there once ---


async def two_registrations(scene: Scene, first: int) -> None:
    offers = [partial(steps.register, user, room=scene.room) for user in (scene.ada, scene.bob)]
    answers = await scene.meet(all_links, *turned(offers, first))
    assert codes(answers) == [201, 200]
    assert len({answer.json()["id"] for answer in answers}) == 1
    both = sorted(answer.json()["worker_id"] for answer in answers)
    assert (await scene.found())["workers"] == both


async def two_schemas(scene: Scene, first: int) -> None:
    count = (await scene.ada.get("/workers")).json()["total"]
    schemas = turned([{"title": "ada's"}, {"title": "bob's"}], first)
    offers = [
        partial(steps.register, user, room=scene.room, schema=schema)
        for user, schema in zip((scene.ada, scene.bob), schemas, strict=True)
    ]
    answers = await scene.meet(all_links, *offers)
    assert codes(answers) == [201, 409]
    # who lost left no worker behind
    assert (await scene.ada.get("/workers")).json()["total"] == count + 1
    shown = await scene.ada.get(f"/rooms/{scene.room}/jobs/{scene.job}")
    job = shown.json()
    assert job["schema"] == schemas[0]
    assert job["workers"] == [answers[0].json()["worker_id"]]


async def two_returns(scene: Scene, first: int) -> None:
    """Of a job that had gone."""
    worker = await scene.offer()
    hold = await scene.job_row()
    await scene.ada.delete(f"/workers/{worker}")
    schema = {"title": "new"}
    offers = [
        partial(steps.register, user, room=scene.room, schema=schema)
        for user in (scene.ada, scene.bob)
    ]
    answers = await scene.meet(hold, *turned(offers, first))
    assert codes(answers) == [201, 200]
    both = sorted(answer.json()["worker_id"] for answer in answers)
    assert (await scene.found())["workers"] == both


async def two_registrations_of_a_worker(scene: Scene, first: int) -> None:
    worker = (await scene.ada.post("/workers")).json()["id"]
    offers = [
        partial(steps.register, user, room=scene.room, worker_id=worker)
        for user in (scene.ada, scene.elsewhere)
    ]
    answers = await scene.meet(row(Worker, worker), *turned(offers, first))
    assert codes(answers) == [201, 200]
    assert (await scene.found())["workers"] == [worker]


async def two_submissions_under_a_key(scene: Scene, first: int) -> None:
    await scene.offer()
    url, key = f"/rooms/{scene.room}/tasks/{scene.job}", {"Idempotency-Key": "k"}
    # keys are a user's own
    submissions = [
        partial(user.post, url, json={}, headers=key) for user in (scene.ada, scene.elsewhere)
    ]
    answers = await scene.meet(await scene.job_row(), *turned(submissions, first))
    assert codes(answers) == [202, 202]
    (task,) = {answer.json()["id"] for answer in answers}
    await scene.hears({"id": task}, "pending")


async def submission_and_replacement(scene: Scene, first: int) -> None:
    """What was checked against a schema enters no queue after it was replaced."""
    await scene.offer()
    new = {"schema": {"title": "new"}, "replace": True}
    requests = [
        partial(scene.bob.post, f"/rooms/{scene.room}/tasks/{scene.job}", json={}),
        partial(steps.register, scene.ada, room=scene.room, **new),
    ]
    answers = await scene.meet(await scene.job_row(), *turned(requests, first))
    # where rows are locked, the submission may come before the other's commit
    assert codes(answers) in ([[202, 200]], [[200, 404], [200, 202]])[first]


async def two_claims(scene: Scene, first: int) -> None:
    """Of one worker, and there is one task."""
    worker = await scene.offer()
    task = await scene.task(worker)
    requests = [partial(claim, user, worker) for user in (scene.ada, scene.elsewhere)]
    answers = await scene.meet(row(Worker, worker), *turned(requests, first))
    claimed = [[task["id"] for task in claimed] for claimed in answers]
    assert sorted(claimed) == [[], [task["id"]]]
    await scene.hears(task, "pending", "claimed")


async def two_claims_under_a_key(scene: Scene, first: int) -> None:
    worker = await scene.offer()
    await scene.task(worker, "claimed")
    tasks = [await scene.task(worker) for _ in range(2)]
    body, key = {"worker_id": worker}, {"Idempotency-Key": "k"}
    requests = [
        partial(user.post, "/tasks/claim", json=body, headers=key)
        for user in (scene.ada, scene.elsewhere)
    ]
    answers = await scene.meet(row(Worker, worker), *turned(requests, first))
    assert codes(answers) == [200, 200]
    assert answers[0].json() == answers[1].json()
    await scene.hears(tasks[0], "pending", "claimed")
    await scene.hears(tasks[1], "pending")


async def two_claims_of_a_due_task_under_a_key(scene: Scene, first: int) -> None:
    worker = await scene.offer()
    task = await steps.submit(scene.ada, scene.job, scene.room, delay_seconds=0.1)
    await anyio.sleep(0.2)
    body, key = {"worker_id": worker}, {"Idempotency-Key": "k"}
    requests = [
        partial(user.post, "/tasks/claim", json=body, headers=key)
        for user in (scene.ada, scene.elsewhere)
    ]
    # when the second one begins to wait, nothing is in the queue
    answers = await scene.meet(row(Worker, worker), *turned(requests, first))
    claimed = [[one["id"] for one in answer.json()["tasks"]] for answer in answers]
    assert claimed == [[task["id"]]] * 2
    await scene.hears(task, "pending", "claimed")


# --- jobs that nobody serves ---


async def register_and_delete_the_last(scene: Scene, first: int) -> None:
    worker = await scene.offer()
    requests = [
        partial(offer, scene.bob, room=scene.room),
        partial(scene.ada.delete, f"/workers/{worker}"),
    ]
    answers = await scene.meet(await scene.job_row(), *turned(requests, first))
    assert (await scene.found())["workers"] == [answers[first]]


async def _delete_the_last(scene: Scene, first: int, worker: str, url: str, content: Any) -> None:
    requests = [
        partial(scene.bob.post, url, json=content),
        partial(scene.ada.delete, f"/workers/{worker}"),
    ]
    answers = await scene.meet(await scene.job_row(), *turned(requests, first))
    assert codes(answers) == ([202, 204], [204, 404])[first]
    pending = f"/rooms/{scene.room}/tasks?status=pending&limit=0"
    waiting = (await scene.ada.get(pending)).json()["total"]
    assert (await scene.found() is not None, waiting) == ((True, 1), (False, 0))[first]


async def submit_and_delete_the_last(scene: Scene, first: int) -> None:
    worker, url = await scene.offer(), f"/rooms/{scene.room}/tasks/{scene.job}"
    await _delete_the_last(scene, first, worker, url, {})


async def batch_and_delete_the_last(scene: Scene, first: int) -> None:
    worker, url = await scene.offer(), f"/rooms/{scene.room}/batches/{scene.job}"
    await _delete_the_last(scene, first, worker, url, {"tasks": [{}]})


async def retry_and_delete_the_last(scene: Scene, first: int) -> None:
    worker = await scene.offer()
    done = await scene.task(worker, "completed")
    await _delete_the_last(scene, first, worker, f"/tasks/{done['id']}/retry", {})


async def delete_the_last_two(scene: Scene, first: int) -> None:
    workers = [await scene.offer(), await scene.offer()]
    deletions = [
        partial(user.delete, f"/workers/{worker}")
        for user, worker in zip((scene.ada, scene.elsewhere), workers, strict=True)
    ]
    answers = await scene.meet(await scene.job_row(), *turned(deletions, first))
    assert codes(answers) == [204, 204]
    assert await scene.found() is None


#: Each race, and how many of its requests may be the first.
RACES: dict[Race, int] = {
    three_ends: 3,
    complete_and_cancel: 2,
    two_starts: 1,
    three_retries: 1,
    claim_and_delete: 2,
    next_claim_and_delete: 2,
    complete_and_delete: 2,
    reports_and_heartbeat: 2,
    reports_and_delete: 2,
    heartbeat_and_delete: 2,
    two_deletions: 1,
    two_registrations: 2,
    two_schemas: 2,
    two_returns: 1,
    two_registrations_of_a_worker: 1,
    two_submissions_under_a_key: 1,
    submission_and_replacement: 2,
    two_claims: 1,
    two_claims_under_a_key: 1,
    two_claims_of_a_due_task_under_a_key: 1,
    register_and_delete_the_last: 2,
    submit_and_delete_the_last: 2,
    batch_and_delete_the_last: 2,
    retry_and_delete_the_last: 2,
    delete_the_last_two: 1,
}
ORDERS = [(race, first) for race, firsts in RACES.items() for first in range(firsts)]
NAMES = [f"{race.__name__}-{first}" for race, first in ORDERS]


async def run(race: Race, first: int, scene: Scene) -> None:
    """Run a race, and look for what is half stored."""
    await race(scene, first)
    await intact(scene)


async def intact(scene: Scene) -> None:
    """Fail when rows contradict each other."""
    ours = select(Job.id).where(Job.room_id == scene.room)
    there = select(Worker.id)
    ended = Task.status.in_(TERMINAL)
    broken = {
        "links without their worker": select(WorkerJobLink.job_id).where(
            WorkerJobLink.job_id.in_(ours), WorkerJobLink.worker_id.not_in(there)
        ),
        "jobs that nobody needs, or gone though somebody does": select(Job.id).where(
            Job.room_id == scene.room, or_(and_(Job.deleted, WANTED), and_(~Job.deleted, ~WANTED))
        ),
        "tasks held by nobody": select(Task.id).where(
            Task.room_id == scene.room,
            held(),
            or_(Task.worker_id == null(), Task.worker_id.not_in(there)),
        ),
        "waiting tasks in somebody's hands": select(Task.id).where(
            Task.room_id == scene.room,
            Task.status == "pending",
            or_(Task.worker_id != null(), Task.started_at != null()),
        ),
        "ended tasks without an end, or the reverse": select(Task.id).where(
            Task.room_id == scene.room,
            or_(
                and_(ended, Task.completed_at == null()), and_(~ended, Task.completed_at != null())
            ),
        ),
    }
    async with scene.session_maker() as session:
        for what, rows in broken.items():
            found = select(func.count()).select_from(rows.subquery())
            assert await session.scalar(found) == 0, what
