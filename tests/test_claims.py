"""Claims: the oldest first, each task to one worker, and no answer lost."""

import random
from functools import partial
from uuid import UUID, uuid4

import anyio
import pytest
from sqlalchemy import or_, select, update
from steps import (
    at_once,
    claim,
    execute,
    meet,
    offer,
    problem,
    read,
    register,
    report,
    row,
    silence,
    submit,
)

from zndraw_joblib.lifecycle import TaskStatus
from zndraw_joblib.models import TASK, WORKER, Worker, now
from zndraw_joblib.workers import keep_alive

ROTATE, SCALE = "lab:modifiers:Rotate", "lab:modifiers:Scale"


def ids(tasks):
    return [task["id"] for task in tasks]


async def test_who_may_claim(ada, bob, admin):
    worker = await offer(ada)
    await submit(ada)
    # one that has claimed before is no easier to take
    await claim(ada, worker)
    task = await submit(ada)
    for user in (bob, admin):
        answer = await user.post("/tasks/claim", json={"worker_id": worker})
        problem(answer, 403, "forbidden")
    answer = await ada.post("/tasks/claim", json={"worker_id": str(uuid4())})
    problem(answer, 404, "worker-not-found")
    idle = (await ada.post("/workers")).json()["id"]
    empty = await ada.post("/tasks/claim", json={"worker_id": idle})
    assert (empty.status_code, empty.json()) == (200, {"task": None, "tasks": []})
    assert (await read(ada, task))["status"] == "pending"
    assert ids(await claim(ada, worker)) == [task["id"]]


async def test_the_job_whose_first_task_has_waited_longest_comes_first(ada, bob):
    worker, others = await offer(ada), await offer(bob, "Scale")
    await register(ada, "Scale", worker_id=worker)
    await offer(bob, "Unserved")
    await submit(ada, "lab:modifiers:Unserved", priority=1000)
    turns = [ROTATE, SCALE, SCALE, ROTATE, SCALE]
    tasks = [await submit(ada, job) for job in turns]
    urgent = await submit(ada, SCALE, priority=1)
    unhurried = await submit(ada, ROTATE, priority=-1)
    assert ids(await claim(ada, worker)) == [urgent["id"]]
    assert ids(await claim(bob, others)) == [tasks[1]["id"]]
    assert ids(await claim(ada, worker, max_tasks=2)) == ids([tasks[0], tasks[3]])
    rest = await claim(ada, worker, max_tasks=32)
    assert ids(rest) == ids([tasks[2], tasks[4], unhurried])
    assert await claim(ada, worker) == []


async def test_what_comes_back_has_its_place_again(ada):
    worker = await offer(ada)
    first, second = [await submit(ada) for _ in range(2)]
    await claim(ada, worker)
    assert (await report(ada, first, "pending")).json()["queue_position"] == 1
    assert (await read(ada, second))["queue_position"] == 2
    assert ids(await claim(ada, worker, max_tasks=2)) == ids([first, second])


@pytest.mark.parametrize("most", [1, 5])
async def test_no_task_is_claimed_twice_and_none_is_passed_over(ada, most):
    """Eight claims at once, of workers that serve two jobs, over and over."""
    workers = [await offer(ada) for _ in range(8)]
    for worker in workers:
        await register(ada, "Scale", worker_id=worker)
    jobs = [ROTATE, SCALE]
    tasks = [await submit(ada, jobs[n % 2]) for n in range(8 * most + 3)]
    claims = await at_once(*(claim(ada, w, max_tasks=most) for w in workers))
    assert [len(c) for c in claims] == [most] * 8, "enough for everybody"
    claims += [await claim(ada, w, max_tasks=most) for w in workers]
    found = [task for c in claims for task in ids(c)]
    assert len(found) == len(set(found)) == len(tasks)
    for batch in claims:
        for job in jobs:
            of_job = ids(task for task in batch if task["job_name"] == job)
            assert of_job == sorted(of_job, key=ids(tasks).index)


async def test_a_lost_answer_loses_no_task(ada, events):
    worker, other = await offer(ada), await offer(ada)
    tasks = [await submit(ada) for _ in range(5)]
    events.clear()

    async def ask(worker, key):
        answer = await ada.post(
            "/tasks/claim",
            json={"worker_id": worker, "max_tasks": 2},
            headers={"Idempotency-Key": key},
        )
        return ids(answer.json()["tasks"])

    first = await ask(worker, "k")
    assert first == ids(tasks[:2])
    assert await at_once(*(ask(worker, "k") for _ in range(4))) == [first] * 4
    await report(ada, tasks[0], "running")
    assert await ask(worker, "k") == first
    assert await ask(other, "k") == ids(tasks[2:4]), "a key is one worker's"
    assert await ask(worker, "l") == ids(tasks[4:])
    assert await ask(worker, "k") == first, "though the queue is empty"
    await report(ada, tasks[0], "completed")
    assert await ask(worker, "k") == first[1:], "what has ended is not handed out"
    told = [(e.data["id"], e.data["status"]) for e in events]
    assert len(told) == len(set(told)), "each change is told once"


@pytest.mark.parametrize("most", [0, 33, -1])
async def test_how_many_can_be_asked_for(ada, most):
    worker = await offer(ada)
    task = await submit(ada)
    answer = await ada.post("/tasks/claim", json={"worker_id": worker, "max_tasks": most})
    problem(answer, 422, "invalid-request")
    assert (await read(ada, task))["status"] == "pending"


# --- the order, on the real statements ---

JOBS = (ROTATE, SCALE, "lab:modifiers:Flip")
STEPS = ("submit", "submit", "delayed", "claim", "claim", "back", "end", "again")


async def in_turn(session_maker, jobs, most):
    """Return what a claim of ``most`` tasks has to bring, from the rows alone."""
    async with session_maker() as session:
        found = await session.execute(
            select(TASK).where(
                TASK.c.status == TaskStatus.PENDING,
                TASK.c.job_name.in_(jobs),
                or_(TASK.c.available_at.is_(None), TASK.c.available_at <= now()),
            )
        )
    everybody = found.all()

    def place(row):
        alike = [r for r in everybody if (r.job_name, r.priority) == (row.job_name, row.priority)]
        queued = [r.queue_order for r in alike if r.available_at is None]
        if row.available_at is None:
            return row.queue_order, row.id
        # beside the first of the queue, or all at the clock where it is empty
        beside = min(queued) if queued else max(r.queue_order for r in alike)
        return max(row.queue_order, beside), row.id

    rows = sorted(everybody, key=place)
    queues = [[row for row in rows if row.job_name == job] for job in jobs]

    def turn(queue):
        head = queue[0]
        return -head.priority, head.available_at or head.queued_at

    waiting = [row for queue in sorted(filter(None, queues), key=turn) for row in queue]
    return [str(row.id) for row in waiting[:most]]


@pytest.mark.parametrize("seed", range(3))
async def test_each_claim_brings_whose_turn_it_is(ada, bob, session_maker, seed):
    """Whatever was submitted, claimed, handed back, tried again, and under which key."""
    draw = random.Random(seed)
    every, some = await offer(ada), await offer(bob, "Scale")
    for user, name, worker in (
        (ada, "Scale", every), (ada, "Flip", every), (bob, "Flip", some),
    ):  # fmt: skip
        await register(user, name, worker_id=worker)
    workers = {every: (ada, JOBS), some: (bob, JOBS[1:])}
    held, ended, keys = [], [], 0
    for _ in range(60):
        match draw.choice(STEPS):
            case "submit":
                priority = draw.choice([-1, 0, 0, 0, 2])
                submitter = draw.choice([ada, bob])
                await submit(submitter, draw.choice(JOBS), priority=priority)
            case "delayed":
                await submit(ada, draw.choice(JOBS), delay_seconds=0.001)
                await anyio.sleep(0.005)
            case "claim":
                worker = draw.choice([every, some])
                user, jobs = workers[worker]
                wanted = draw.choice([jobs, jobs, jobs[1:]])
                most = draw.choice([1, 1, 1, 3, 32])
                body = {"worker_id": worker, "max_tasks": most, "jobs": wanted}
                if wanted is jobs:
                    del body["jobs"]
                keys += 1
                key = {"Idempotency-Key": f"{keys}"} if draw.random() < 0.3 else {}
                right = await in_turn(session_maker, wanted, most)
                answer = await user.post("/tasks/claim", json=body, headers=key)
                claimed = answer.json()["tasks"]
                assert ids(claimed) == right
                if key:
                    answer = await user.post("/tasks/claim", json=body, headers=key)
                    # of a claim that brought nothing there is nothing to repeat
                    assert ids(answer.json()["tasks"]) == right
                held += [(user, task) for task in claimed]
            case "back" if held:
                user, task = held.pop(draw.randrange(len(held)))
                assert (await report(user, task, "pending")).status_code == 200
            case "end" if held:
                user, task = held.pop(draw.randrange(len(held)))
                assert (await report(user, task, "failed")).status_code == 200
                ended.append(task)
            case "again" if ended:
                task = ended.pop(draw.randrange(len(ended)))
                submitter = ada if task["created_by_id"] == str(ada.id) else bob
                again = await submitter.post(f"/tasks/{task['id']}/retry")
                assert again.status_code == 202


@pytest.mark.parametrize("how", ["submit", "retry", "delay"])
async def test_a_queue_that_never_empties_starves_no_other(ada, session_maker, how):
    worker = await offer(ada)
    await register(ada, "Scale", worker_id=worker)

    async def more(ended=None):
        if how == "retry" and ended is not None:
            await ada.post(f"/tasks/{ended['id']}/retry")
        else:
            delay = 0.001 if how == "delay" else 0
            await submit(ada, ROTATE, delay_seconds=delay)
            await anyio.sleep(delay * 5)
        # of a queue that is never empty the places fall behind the clock
        behind = TASK.c.queue_order - TASK.c.priority - 10**12
        busy = TASK.c.job_name == ROTATE, TASK.c.queue_order > 10**15
        await execute(session_maker, update(TASK).where(*busy).values(queue_order=behind))

    for _ in range(3):
        await more()
    patient = await submit(ada, SCALE)
    for _ in range(3):
        (task,) = await claim(ada, worker, start=True)
        assert task["job_name"] == ROTATE
        await report(ada, task, "completed")
        await more(task)
    assert ids(await claim(ada, worker)) == [patient["id"]]


async def test_a_due_task_takes_its_place_though_others_wait(ada, session_maker):
    worker = await offer(ada)
    late = await submit(ada, priority=1, delay_seconds=3600)
    tasks = [await submit(ada) for _ in range(3)]
    assert ids(await claim(ada, worker)) == ids(tasks[:1])
    due = update(TASK).where(TASK.c.id == UUID(late["id"])).values(available_at=now(-1))
    await execute(session_maker, due)
    assert ids(await claim(ada, worker)) == [late["id"]]
    assert ids(await claim(ada, worker)) == ids(tasks[1:2])


async def test_a_waiting_claim_is_woken_for_the_jobs_that_it_names(app, ada):
    app.state.joblib_settings.recheck_seconds = 600
    worker = await offer(ada)
    await register(ada, "Scale", worker_id=worker)

    async def wait_for(job):
        answer = await ada.post(
            "/tasks/claim", json={"worker_id": worker, "jobs": [job]}, headers={"Prefer": "wait=60"}
        )
        return ids(answer.json()["tasks"])

    async def submit_both():
        await anyio.sleep(0.5)
        return ids([await submit(ada, job) for job in (ROTATE, SCALE)])

    # before they would look once more by themselves
    with anyio.fail_after(30):
        scale, rotate, tasks = await at_once(wait_for(SCALE), wait_for(ROTATE), submit_both())
    assert [*rotate, *scale] == tasks
    body = {"worker_id": worker, "jobs": []}
    problem(await ada.post("/tasks/claim", json=body), 422, "invalid-request")


# --- heartbeats ---


async def heard(session_maker, worker):
    async with session_maker() as session:
        last = select(WORKER.c.last_heartbeat).where(WORKER.c.id == UUID(worker))
        return await session.scalar(last)


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
async def test_a_claim_is_a_heartbeat_where_one_is_due(app, ada, session_maker, waiting, keyed):
    # one is due after a sixtieth of it
    app.state.joblib_settings.worker_timeout_seconds = 6000
    worker = await offer(ada)
    for seconds, due in ((90, False), (110, True)):
        ago = update(WORKER).values(last_heartbeat=now(-seconds))
        await execute(session_maker, ago)
        before = await heard(session_maker, worker)
        if waiting:
            await submit(ada)
        key = {"Idempotency-Key": f"{seconds}"} if keyed else {}
        body = {"worker_id": worker}
        answer = await ada.post("/tasks/claim", json=body, headers=key)
        assert bool(answer.json()["tasks"]) is waiting
        # a claim with a key locks its worker anyhow
        assert (await heard(session_maker, worker) > before) is (due or keyed)


async def test_any_number_of_workers_is_kept_alive(ada, session_maker):
    worker = await offer(ada)
    await silence(session_maker, worker)
    before = await heard(session_maker, worker)
    async with session_maker() as session:
        others = [uuid4() for _ in range(33_000)]
        await keep_alive(session, [*others, UUID(worker)])
        await session.commit()
    assert await heard(session_maker, worker) > before


async def test_a_heartbeat_tells_what_the_host_knows_of_the_worker(ada):
    worker = await offer(ada)

    async def told(**fields):
        answer = (await ada.patch(f"/workers/{worker}", json=fields)).json()
        return answer["jobs"], answer["providers"], answer["lost"]

    assert await told() == (1, 0, [])
    await register(ada, "Scale", worker_id=worker)
    provider = {"category": "frames", "name": "f", "worker_id": worker, "schema": {}}
    assert (await ada.put("/rooms/lab/providers", json=provider)).status_code == 201
    nobody = str(uuid4())
    assert await told(tasks=[{"id": nobody, "attempt": 1}]) == (2, 1, [nobody])
    assert await told(state="draining") == (2, 1, [])


# --- races that only a database with row locks has ---


@pytest.mark.makers("postgres")
async def test_what_changes_while_a_claim_waits_is_seen(ada, session_maker):
    """The claim's snapshot is older than the change: each row is looked at again."""
    worker = await offer(ada)
    first, second = [await submit(ada) for _ in range(2)]
    cancel, take = partial(report, ada, first, "cancelled"), partial(claim, ada, worker)
    claimed, cancelled = await meet(session_maker, row(Worker, worker), take, cancel)
    assert cancelled.status_code == 200
    assert ids(claimed) == [second["id"]]
    assert (await read(ada, first))["status"] == "cancelled"


@pytest.mark.makers("postgres")
async def test_a_claim_passes_over_what_others_hold(ada, session_maker):
    """Of every job, and none of them waits for the other."""
    worker = await offer(ada)
    await register(ada, "Scale", worker_id=worker)
    tasks = [await submit(ada, job) for job in (ROTATE, ROTATE, SCALE)]
    for held, left in ((1, 1), (2, 2)):
        async with session_maker() as session:
            some = select(TASK.c.id).where(
                TASK.c.id.in_([UUID(task["id"]) for task in tasks[:held]])
            )
            await session.execute(some.with_for_update())
            (claimed,) = await claim(ada, worker)
            assert claimed["id"] == tasks[left]["id"]
        await report(ada, claimed, "pending")


# --- limits ---


async def test_the_limits_that_are_told_are_those_that_hold(app, ada):
    app.state.joblib_settings.max_payload_bytes = 100_000
    worker = await offer(ada)
    limits = (await ada.get("/limits")).json()
    task = {"id": str(uuid4()), "attempt": 1}
    done = [{"id": str(uuid4()), "status": "completed"} for _ in range(100)]
    claims, url = {"worker_id": worker}, f"/rooms/lab/batches/{ROTATE}"

    async def claims_of(**body):
        return await ada.post("/tasks/claim", json=claims | body)

    asked = {
        "max_claim": lambda n: claims_of(max_tasks=n),
        "max_claim_jobs": lambda n: claims_of(jobs=["lab:a:b"] * n),
        "max_heartbeat_tasks": lambda n: ada.patch(
            f"/workers/{worker}", json={"tasks": [task] * n}
        ),
        "max_reports": lambda n: ada.patch("/tasks", json={"reports": done[:n]}),
        "max_batch": lambda n: ada.post(url, json={"tasks": [{}] * n}),
        "max_page": lambda n: ada.get(f"/rooms/lab/tasks?limit={n}"),
    }
    for name, ask in asked.items():
        assert (await ask(limits[name])).status_code < 300, name
        problem(await ask(limits[name] + 1), 422, "invalid-request")
    assert limits["max_payload_bytes"] == 100_000
