"""`Prefer: wait`: how it is read, what ends a wait, and what a wait holds up."""

import asyncio
import math
import multiprocessing
import os
import time
import warnings

import anyio
import httpx
import pytest
from conftest import PREFIX
from redis.asyncio import Redis
from sqlalchemy import event, update
from steps import JOB, at_once, claim, execute, offer, problem, read, report, submit

from zndraw_joblib import RedisWakeups
from zndraw_joblib.delivery import runtime_of
from zndraw_joblib.dependencies import preferred_wait
from zndraw_joblib.models import Task, TaskStatus, now
from zndraw_joblib.waiting import AT_WORK, Waiters

LONGEST = 60
#: far beyond what is waited for anywhere: whoever relies on looking again hangs
NEVER = 1000.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (["wait=5"], 5),
        (["WAIT=5"], 5),
        (["  wait  =  5  "], 5),
        (['wait="5"'], 5),
        (["wait=0"], 0),
        (["wait=005"], 5),
        (["wait=5; foo=bar"], 5),
        (["wait=5;"], 5),
        (["respond-async, wait=5"], 5),
        (["respond-async", "wait=5"], 5),
        (["respond-async; wait=9, wait=5"], 5),
        (['return="a, wait=9", wait=5'], 5),
        (['return="a \\", wait=9", wait=5'], 5),
        ([",, wait=5,"], 5),
        (["wait=5, wait=7"], 5),
        (["wait=5", "wait=7"], 5),
        (["wait=61"], LONGEST),
        (["wait=" + "9" * 18], LONGEST),
        ([], None),
        ([""], None),
        (["wait"], None),
        (["wait="], None),
        (['wait=""'], None),
        (["wait=soon"], None),
        (["wait=-5"], None),
        (["wait=+5"], None),
        (["wait=5.0"], None),
        (["wait=5s"], None),
        (["wait=5 6"], None),
        (["wait=1e1"], None),
        (["wait=\u0665"], None),
        (["wait=" + "9" * 5000], None),
        (["wait: 5"], None),
        (["await=5"], None),
        (["waiting=5"], None),
        (["x-wait=5"], None),
        (["respond-async; wait=5"], None),
        (['return="wait=5"'], None),
        (['return="a, wait=5"'], None),
        (['return="a, wait=5'], None),
        (['return="', "wait=5"], None),
        (['return="a\\", wait=5"'], None),
    ],
)
def test_prefer(headers, seconds):
    assert preferred_wait(headers, LONGEST) == seconds


@pytest.mark.timeout(10)
@pytest.mark.parametrize("piece", ['"', '\\"', '"\\', ",", "a ", "=", ";", '=";', " "])
def test_no_header_holds_up_the_host(piece):
    """Each of these is as long as the largest header that a server lets through."""
    for start in ("", "wait", "wait=", 'a="', "wait= "):
        preferred_wait([start + piece * (65536 // len(piece))], LONGEST)


@pytest.fixture(autouse=True)
def waiters(request):
    """Let the helpers below see who waits in the app under test."""
    if "app" in request.fixturenames:
        app = request.getfixturevalue("app")
        until_waited_for.waiters = runtime_of(app).waiters


@pytest.fixture
def patient(app):
    """Nobody looks again by itself: who is not woken waits in vain."""
    app.state.joblib_settings.recheck_seconds = NEVER


def wait_for(seconds):
    return {"Prefer": f"wait={seconds}"}


async def until_waited_for(count: int = 1, pause: float = 0.1):
    """Return when so many requests of this app wait."""
    with anyio.fail_after(20):
        while len(until_waited_for.waiters) < count:
            await anyio.sleep(0.01)
        # it listens first and looks then
        await anyio.sleep(pause)


async def after_it_waits(act, count: int = 1):
    await until_waited_for(count)
    return await act


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_a_report_wakes_who_waits_for_the_task(ada, end):
    worker = await offer(ada)
    task = await submit(ada)
    await claim(ada, worker)
    await report(ada, task, "running")
    url = f"/tasks/{task['id']}"
    with anyio.fail_after(30):
        *waited, _ = await at_once(
            ada.get(url, headers=wait_for(60)),
            ada.get(url, headers=wait_for(600)),
            after_it_waits(report(ada, task, end), 2),
        )
    for answer, applied in zip(waited, ("wait=60", "wait=60"), strict=True):
        assert answer.status_code == 200
        assert answer.json()["status"] == end
        assert answer.headers["preference-applied"] == applied
        assert "prefer" in answer.headers["vary"].lower()
    assert not len(until_waited_for.waiters)


@pytest.mark.usefixtures("patient")
async def test_a_worker_that_goes_wakes_who_waits_for_its_task(ada):
    worker = await offer(ada)
    task = await submit(ada)
    await claim(ada, worker)
    with anyio.fail_after(30):
        answer, _ = await at_once(
            ada.get(f"/tasks/{task['id']}", headers=wait_for(60)),
            after_it_waits(ada.delete(f"/workers/{worker}")),
        )
    assert answer.json()["error_type"] == "worker_lost"


async def test_what_another_process_did_is_seen(app, ada, session_maker):
    app.state.joblib_settings.recheck_seconds = 0.05
    await offer(ada)
    task = await submit(ada)
    elsewhere = execute(
        session_maker, update(Task).values(status=TaskStatus.CANCELLED, completed_at=now())
    )
    with anyio.fail_after(30):
        answer, _ = await at_once(
            ada.get(f"/tasks/{task['id']}", headers=wait_for(60)), after_it_waits(elsewhere)
        )
    assert answer.json()["status"] == "cancelled"


@pytest.mark.usefixtures("patient")
async def test_the_last_sleep_is_cut_to_what_remains(ada):
    worker = await offer(ada)
    task = await submit(ada)
    idle = (await ada.post("/workers")).json()["id"]
    began = time.monotonic()
    with anyio.fail_after(30):
        read, empty = await at_once(
            ada.get(f"/tasks/{task['id']}", headers=wait_for(1)),
            ada.post("/tasks/claim", json={"worker_id": idle}, headers=wait_for(1)),
        )
    assert time.monotonic() - began >= 1
    assert (read.status_code, read.json()["status"]) == (200, "pending")
    assert (empty.status_code, empty.json()["task"]) == (200, None)
    for answer in (read, empty):
        assert answer.headers["preference-applied"] == "wait=1"
    assert worker


@pytest.mark.usefixtures("patient")
async def test_what_is_there_is_not_waited_for(ada):
    worker = await offer(ada)
    tasks = [await submit(ada) for _ in range(2)]
    await report(ada, tasks[0], "cancelled")
    with anyio.fail_after(30):
        ended = await ada.get(f"/tasks/{tasks[0]['id']}", headers=wait_for(60))
        claimed = await ada.post("/tasks/claim", json={"worker_id": worker}, headers=wait_for(60))
        answers = [
            await ada.get(f"/tasks/{tasks[1]['id']}", headers=headers)
            for headers in ({}, wait_for("soon"), wait_for(0), {"Prefer": "x"})
        ]
        await ada.patch(f"/workers/{worker}", json={"state": "draining"})
        drained = await ada.post("/tasks/claim", json={"worker_id": worker}, headers=wait_for(60))
    assert ended.json()["status"] == "cancelled"
    assert claimed.json()["task"]["id"] == tasks[1]["id"]
    assert drained.json()["task"] is None
    applied = [answer.headers.get("preference-applied") for answer in answers]
    assert applied == [None, None, "wait=0", None]
    for user_error in (
        await ada.get("/tasks/01900000-0000-7000-8000-000000000000", headers=wait_for(9)),
        await ada.post(
            "/tasks/claim",
            json={"worker_id": "01900000-0000-7000-8000-000000000000"},
            headers=wait_for(9),
        ),
    ):
        assert user_error.status_code == 404


@pytest.mark.usefixtures("patient")
async def test_work_of_any_kind_wakes_a_claim(ada):
    worker = await offer(ada, max_attempts=2)

    async def woken_by(act):
        with anyio.fail_after(30):
            answer, _ = await at_once(
                ada.post("/tasks/claim", json={"worker_id": worker}, headers=wait_for(60)),
                after_it_waits(act),
            )
        return answer.json()["task"]

    task = await woken_by(submit(ada))
    assert await woken_by(report(ada, task, "pending")) == {**(await read(ada, task)), "attempt": 2}
    assert (await woken_by(report(ada, task, "failed")))["attempt"] == 3
    await report(ada, task, "cancelled")
    assert (await woken_by(ada.post(f"/tasks/{task['id']}/retry")))["attempt"] == 4
    # what another worker of the job held, goes
    await report(ada, task, "pending")
    other = await offer(ada)
    await claim(ada, other)
    assert (await woken_by(ada.delete(f"/workers/{other}")))["attempt"] == 6


@pytest.mark.usefixtures("patient")
async def test_what_becomes_of_its_worker_ends_a_wait(ada, bob):
    await offer(bob, "Scale")
    waiting = await submit(ada, "lab:modifiers:Scale")
    worker = await offer(ada)
    body, url = {"worker_id": worker}, f"/workers/{worker}"

    async def woken_by(act):
        with anyio.fail_after(30):
            answer, done = await at_once(
                ada.post("/tasks/claim", json=body, headers=wait_for(60)), after_it_waits(act)
            )
        assert not isinstance(done, httpx.Response) or done.is_success
        return answer

    hired = await woken_by(offer(ada, "Scale", worker_id=worker))
    assert hired.json()["task"]["id"] == waiting["id"]
    drained = await woken_by(ada.patch(url, json={"state": "draining"}))
    assert (drained.status_code, drained.json()["tasks"]) == (200, [])
    await ada.patch(url, json={"state": "active"})
    problem(await woken_by(ada.delete(url)), 404, "worker-not-found")


@pytest.mark.usefixtures("patient")
async def test_a_batch_wakes_as_many_claims_as_it_has_tasks(ada):
    workers = [await offer(ada) for _ in range(3)]
    batch = f"/rooms/lab/batches/{JOB}"
    with anyio.fail_after(30):
        *waited, answer = await at_once(
            *(
                ada.post("/tasks/claim", json={"worker_id": w}, headers=wait_for(60))
                for w in workers
            ),
            after_it_waits(ada.post(batch, json={"tasks": [{}] * 3}), 3),
        )
    claimed = [answer.json()["task"]["id"] for answer in waited]
    assert sorted(claimed) == sorted(answer.json()["ids"])


@pytest.mark.usefixtures("patient")
async def test_each_of_two_tasks_wakes_one_of_two_claims(ada):
    workers = [await offer(ada) for _ in range(2)]
    first_come = []

    async def wait_with(worker):
        answer = await ada.post("/tasks/claim", json={"worker_id": worker}, headers=wait_for(60))
        first_come.append(answer.json()["task"]["id"])

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for n, worker in enumerate(workers, start=1):
                group.start_soon(wait_with, worker)
                await until_waited_for(n)
            submitted = []
            for _ in workers:
                submitted.append((await submit(ada))["id"])
                while len(first_come) < len(submitted):
                    await anyio.sleep(0.01)
    assert first_come == submitted


@pytest.mark.usefixtures("patient")
async def test_a_wait_holds_up_nobody(ada, bob):
    """Under a lock-wrapped maker a session held over it would stop the whole host."""
    worker, others = await offer(ada), await offer(bob, "Scale")
    task = await submit(ada, "lab:modifiers:Scale")

    async def meanwhile():
        await until_waited_for(2)
        (claimed,) = await claim(bob, others)
        for status in ("running", "completed"):
            assert (await report(bob, claimed, status)).status_code == 200
        await submit(bob)

    with anyio.fail_after(30):
        claimed, ended, _ = await at_once(
            ada.post("/tasks/claim", json={"worker_id": worker}, headers=wait_for(60)),
            ada.get(f"/tasks/{task['id']}", headers=wait_for(60)),
            meanwhile(),
        )
    assert claimed.json()["task"]["status"] == "claimed"
    assert ended.json()["status"] == "completed"


@pytest.mark.usefixtures("patient")
async def test_who_hung_up_claims_nothing(ada, server):
    """A task that went into the void would be lost until its worker is missed."""
    worker = await offer(ada)
    async with httpx.AsyncClient(base_url=f"{server}{PREFIX}", headers=ada.headers) as hasty:
        with pytest.raises(httpx.ReadTimeout):
            await hasty.post(
                "/tasks/claim", json={"worker_id": worker}, headers=wait_for(60), timeout=1
            )
    other = await offer(ada)
    with anyio.fail_after(30):
        answer, task = await at_once(
            ada.post("/tasks/claim", json={"worker_id": other}, headers=wait_for(60)),
            after_it_waits(submit(ada)),
        )
    assert answer.json()["task"]["id"] == task["id"]
    assert answer.json()["task"]["worker_id"] == other


async def test_who_may_not_claim_does_not_wait_either(ada, bob):
    worker = await offer(ada)
    with anyio.fail_after(30):
        answer = await bob.post("/tasks/claim", json={"worker_id": worker}, headers=wait_for(60))
    problem(answer, 403, "forbidden")


REQUEST, GONE = {"type": "http.request"}, {"type": "http.disconnect"}
MORE = {**REQUEST, "more_body": True}


@pytest.mark.parametrize(
    ("messages", "stays", "asked"),
    [
        ([REQUEST, GONE], False, 2),
        ([MORE, MORE, REQUEST, GONE], False, 4),
        # what a middleware plays back never ends
        ([REQUEST] * 9, True, 2),
        ([MORE, *[REQUEST] * 9], True, 3),
        # it can't be asked
        ([], True, 1),
    ],
)
async def test_who_hung_up_is_told_from_a_body_that_never_ends(messages, stays, asked):
    count, left = 0, iter(messages)

    async def receive():
        nonlocal count
        count += 1
        return next(left)

    with Waiters().waiting_for([]) as waiter:
        assert await waiter.wait(0.05, receive) is stays
    assert count == asked


# --- between processes ---


async def tell(wakeups, key):
    wakeups.publish([key], [])
    assert wakeups._sender._task is not None
    await wakeups._sender._task


def tell_from_a_fork(wakeups, listened):
    listened.wait(30)
    asyncio.run(tell(wakeups, "theirs"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
async def test_processes_that_are_forked_from_one_app_wake_each_other(redis_url):
    """And no process itself: it would wake another one for what one took already."""
    async with Redis.from_url(redis_url) as redis:
        wakeups, waiters = RedisWakeups(redis), Waiters()
        fork = multiprocessing.get_context("fork")
        listened, listens = fork.Event(), anyio.Event()
        other = fork.Process(target=tell_from_a_fork, args=(wakeups, listened))
        # it forks in the middle of things
        wakeups.publish(["before"], [])
        with warnings.catch_warnings(action="ignore"):
            # of threads, which the other process has no use for
            other.start()
        try:
            with anyio.fail_after(30):
                async with anyio.create_task_group() as group:
                    group.start_soon(wakeups.listen, waiters, listens.set)
                    await listens.wait()
                    with waiters.waiting_for(["own"]) as own:
                        with waiters.waiting_for(["theirs"]) as theirs:
                            await tell(wakeups, "own")
                            listened.set()
                            await theirs.wait(math.inf)
                        assert own.wake(), "it slept until now"
                    group.cancel_scope.cancel()
        finally:
            listened.set()
            await anyio.to_thread.run_sync(other.join, 30)
        assert other.exitcode == 0


@pytest.mark.makers("plain", "postgres")
async def test_of_a_crowd_few_are_at_work(ada, engine):
    worker = await offer(ada)
    at_work, most = 0, 0

    def begin(*_: object) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)

    def end(*_: object) -> None:
        nonlocal at_work
        at_work -= 1

    async def wait() -> None:
        claimed = await ada.post(
            "/tasks/claim", json={"worker_id": worker}, headers={"Prefer": "wait=60"}
        )
        given.append(claimed.json()["task"]["id"])

    given: list[str] = []
    event.listen(engine.sync_engine, "checkout", begin)
    event.listen(engine.sync_engine, "checkin", end)
    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(wait)
        await anyio.sleep(0.5)
        # and all of them are woken at once
        tasks = {"tasks": [{}] * 50}
        made = await ada.post(f"/rooms/lab/batches/{JOB}", json=tasks)
    event.remove(engine.sync_engine, "checkout", begin)
    event.remove(engine.sync_engine, "checkin", end)
    assert sorted(given) == sorted(made.json()["ids"])
    # beside them the submission, and who polls for all of them
    assert most <= AT_WORK + 2


async def test_wake_ups_in_one_moment_wake_as_many():
    waiters = Waiters()
    with waiters.waiting_for(["k"]) as first, waiters.waiting_for(["k"]) as second:
        waiters.wake_some("k")
        waiters.wake_some("k")
        with anyio.fail_after(LONGEST):
            assert await first.wait(NEVER)
            assert await second.wait(NEVER)
