"""Claims: the oldest first, each task to one worker, and no answer lost."""

from uuid import uuid4

import pytest
from steps import (
    at_once,
    claim,
    offer,
    problem,
    read,
    register,
    report,
    submit,
)

ROTATE, SCALE = "lab:modifiers:Rotate", "lab:modifiers:Scale"


def ids(tasks):
    return [task["id"] for task in tasks]


async def test_who_may_claim(ada, bob, admin):
    worker = await offer(ada)
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
    told = [(e.data["id"], e.data["status"]) for e in events]
    assert len(told) == len(set(told)), "each change is told once"


@pytest.mark.parametrize("most", [0, 33, -1])
async def test_how_many_can_be_asked_for(ada, most):
    worker = await offer(ada)
    task = await submit(ada)
    answer = await ada.post(
        "/tasks/claim", json={"worker_id": worker, "max_tasks": most}
    )
    problem(answer, 422, "invalid-request")
    assert (await read(ada, task))["status"] == "pending"
