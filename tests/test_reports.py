"""Reports: which state may follow which, at whose word, and what an attempt is."""

import json
from datetime import datetime
from itertools import pairwise

import pytest
from sqlalchemy import select, update
from steps import JOB, at_once, claim, execute, move, offer, problem, read, report, statuses, submit

from zndraw_joblib.lifecycle import TaskStatus
from zndraw_joblib.models import Task, now
from zndraw_joblib.settings import JobLibSettings

MAY_FOLLOW = {
    "pending": {"cancelled"},
    "claimed": {"pending", "running", "failed", "cancelled"},
    "running": {"completed", "failed", "cancelled"},
    "completed": set(),
    "failed": set(),
    "cancelled": set(),
}


@pytest.mark.parametrize("state", MAY_FOLLOW)
async def test_each_report_in_each_state(ada, admin, events, state):
    worker = await offer(ada)
    for status in map(str, TaskStatus):
        task = await move(ada, worker, await submit(ada), state)
        events.clear()
        repeated = status == state and status != "claimed"
        said = {} if repeated else {"error": "why"}
        answer = await report(admin, task, status, **said)
        if status in MAY_FOLLOW[state]:
            assert (answer.status_code, answer.json()["status"]) == (200, status)
            assert events[0].data["status"] == status
        elif repeated:
            # the report that won, repeated; none leads to "claimed"
            assert (answer.status_code, answer.json()) == (200, task)
            assert events == []
        else:
            body = problem(answer, 409, "invalid-task-transition")
            assert body["task_status"] == state
            assert (await read(ada, task)) == task
            assert events == []
        await report(ada, task, "cancelled")


#: No two of them are the same to whoever reads them.
RESULTS = (None, 2.0, 2, True, "2", [2], {"n": 2.5, "m": 0.1 + 0.2}, 5e-324, 2**63 - 1,
           -0.0, 1e22, 1.7976931348623157e308, "", [], {}, "旋\ud83d\ude00".encode(
           "utf-16", "surrogatepass").decode("utf-16"))  # fmt: skip


# a session holds what a database gives it
@pytest.mark.makers("plain", "postgres")
async def test_what_is_kept_is_what_was_said_and_anything_else_no_repetition(ada):
    worker = await offer(ada)
    exactly = [json.dumps(result) for result in RESULTS]
    batch = {"tasks": [{"payload": {"of": result}} for result in RESULTS]}
    await ada.post(f"/rooms/lab/batches/{JOB}", json=batch)
    for n, task in enumerate(await claim(ada, worker, max_tasks=len(RESULTS))):
        assert json.dumps(task["payload"]["of"]) == exactly[n]
        await report(ada, task, "running")
        said = {"result": RESULTS[n], "error": "kept"}
        ended = (await report(ada, task, "completed", **said)).json()
        assert json.dumps(ended["result"]) == exactly[n]
        assert (await report(ada, task, "completed", **said)).json() == ended
        others = [{"result": result} for result in RESULTS if result is not RESULTS[n]]
        for other in [*others[n % 3 :: 3], {"error": None}, {"error": "other"}]:
            answer = await report(ada, task, "completed", **(said | other))
            problem(answer, 409, "invalid-task-transition")
        assert await read(ada, task) == ended


async def test_a_report_fills_in_what_it_means(ada):
    worker = await offer(ada)
    for status, fields in (
        ("completed", {"result": {"energy": -1.5}}),
        ("failed", {"error": "line 1\nline 2 \x1b[31m旋"}),
        ("cancelled", {"error": "no use"}),
    ):
        task = await move(ada, worker, await submit(ada), "running")
        ended = (await report(ada, task, status, **fields)).json()
        assert fields.items() <= ended.items()
        assert ended["started_at"] == task["started_at"]
        began, over = (datetime.fromisoformat(ended[f"{at}_at"]) for at in ("started", "completed"))
        assert over >= began
        assert ended["error_type"] == ("user_error" if status == "failed" else None)
        assert await read(ada, task) == ended


async def test_who_may_report(ada, bob, admin, register):
    eve = await register("eve")
    worker = await offer(ada)

    async def claimed():
        task = await submit(bob)
        await claim(ada, worker)
        return task

    for status in ("pending", "running", "failed", "cancelled"):
        task = await claimed()
        problem(await report(eve, task, status), 403, "forbidden")
        if status != "cancelled":
            problem(await report(bob, task, status), 403, "forbidden")
        for user in (ada, admin, *([bob] if status == "cancelled" else [])):
            assert (await report(user, task, status)).status_code == 200
            await report(admin, task, "cancelled")
            task = await claimed()
        await report(admin, task, "cancelled")
    # nobody holds it: its submitter may stop it, a worker's owner may not
    task = await submit(bob)
    problem(await report(ada, task, "cancelled"), 403, "forbidden")
    assert (await report(bob, task, "cancelled")).status_code == 200


async def test_of_conflicting_reports_one_wins(ada, bob, events):
    """The submitter cancels while the worker completes or fails, side by side."""
    worker = await offer(ada)
    for _ in range(5):
        task = await move(ada, worker, await submit(ada), "running")
        events.clear()
        wishes = ["completed", "cancelled", "failed", "cancelled"]
        answers = await at_once(*(report(ada, task, wish) for wish in wishes))
        final = await read(ada, task)
        for wish, answer in zip(wishes, answers, strict=True):
            if wish == final["status"]:
                assert (answer.status_code, answer.json()) == (200, final)
            else:
                body = problem(answer, 409, "invalid-task-transition")
                assert body["task_status"] == final["status"]
        assert [e.data["status"] for e in events] == [final["status"]]


async def test_an_attempt_that_is_over_reports_in_vain(ada, bob, events):
    first, second = await offer(ada, max_attempts=2), await offer(bob)
    task = await submit(ada)
    await claim(ada, first)
    await report(ada, task, "running", attempt=1)
    for attempt in (0, 2):
        answer = await report(ada, task, "completed", attempt=attempt)
        problem(answer, 409, "lease-lost")
    await ada.delete(f"/workers/{first}")
    requeued = await read(ada, task)
    assert (requeued["status"], requeued["attempt"]) == ("pending", 1)
    await claim(bob, second)
    events.clear()
    held = await read(ada, task)
    assert (held["status"], held["attempt"]) == ("claimed", 2)
    for status in ("completed", "failed", "running", "pending"):
        problem(await report(ada, task, status, attempt=1), 409, "lease-lost")
        problem(await report(bob, task, status, attempt=1), 409, "lease-lost")
    assert await read(ada, task) == held
    assert events == []
    for status in ("running", "completed"):
        answer = await report(bob, task, status, attempt=2)
        assert answer.status_code == 200
    # the report that won, repeated, is right about its attempt
    assert (await report(bob, task, "completed", attempt=2)).status_code == 200
    problem(await report(bob, task, "failed", attempt=2), 409, "lease-lost")


async def test_a_failed_attempt_is_tried_again_after_a_doubling_while(ada, session_maker):
    policy = {"max_attempts": 8, "retry_delay_seconds": 100}
    worker = await offer(ada, **policy)
    task = await submit(ada)
    assert task["max_attempts"] == 8
    waits = []
    for attempt in range(1, 8):
        await claim(ada, worker)
        again = (await report(ada, task, "failed", error=f"no. {attempt}")).json()
        assert (again["status"], again["attempt"]) == ("pending", attempt)
        assert (again["error"], again["error_type"]) == (f"no. {attempt}", "user_error")
        assert again["worker_id"] is None
        assert again["completed_at"] is None
        at = datetime.fromisoformat(again["available_at"])
        said = [(e["attempt"], e["error"]) for e in again["errors"]]
        assert said == [(n, f"no. {n}") for n in range(1, attempt + 1)][-5:]
        assert await claim(ada, worker) == [], "its time has not come"
        async with session_maker() as session:
            moment = await session.scalar(now())
        waits.append((at - moment).total_seconds())
        await execute(session_maker, update(Task).values(available_at=now(-1)))
    for n, wait in enumerate(waits):
        full = min(100 * 2**n, 3600)
        assert full / 2 - 30 <= wait <= full
    assert waits[0] < waits[2] < waits[4], "doubling outgrows its jitter"
    await claim(ada, worker)
    ended = (await report(ada, task, "failed", error="no. 8")).json()
    assert (ended["status"], ended["attempt"]) == ("failed", 8)
    assert ended["worker_id"] == worker
    again = (await ada.post(f"/tasks/{task['id']}/retry")).json()
    assert again["errors"] == ended["errors"]
    async with session_maker() as session:
        kept = await session.scalar(select(Task.errors))
    assert [json.loads(line) for line in kept.split("\n")] == ended["errors"]


async def test_no_number_of_failures_outgrows_the_longest_wait(ada, session_maker):
    worker = await offer(ada, max_attempts=2, retry_delay_seconds=0.01)
    task = await submit(ada)
    for failures in (20, 21, 31, 32, 63, 64, 5000):
        counts = {"failed_attempts": failures, "max_attempts": 10_000}
        await execute(session_maker, update(Task).values(available_at=None, **counts))
        await claim(ada, worker)
        again = (await report(ada, task, "failed")).json()
        async with session_maker() as session:
            moment = await session.scalar(now())
        wait = datetime.fromisoformat(again["available_at"]) - moment
        assert 1700 <= wait.total_seconds() <= 3600, failures


async def test_a_failure_for_good_is_not_tried_again(ada):
    worker = await offer(ada, max_attempts=5)
    task = await move(ada, worker, await submit(ada), "running")
    ended = (await report(ada, task, "failed", retryable=False)).json()
    assert (ended["status"], ended["attempt"]) == ("failed", 1)


async def test_handing_back_costs_no_attempt(ada, events):
    worker = await offer(ada)
    task = await submit(ada)
    for attempt in (1, 2, 3):
        (claimed,) = await claim(ada, worker)
        assert claimed["attempt"] == attempt
        events.clear()
        back = (await report(ada, task, "pending")).json()
        assert (back["worker_id"], back["queue_position"]) == (None, 1)
        assert [e.event for e in events] == ["task_status_event", "task_available"]
    await claim(ada, worker)
    assert (await report(ada, task, "failed")).json()["status"] == "failed"


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled"])
async def test_what_has_ended_can_be_set_going_again(ada, bob, admin, events, state):
    worker = await offer(ada)
    task = await submit(bob)
    if state == "cancelled":
        await report(bob, task, state)
    else:
        await claim(ada, worker)
        await report(ada, task, "running")
        await report(ada, task, state, error="why" if state == "failed" else None)
    url = f"/tasks/{task['id']}/retry"
    problem(await ada.post(url), 403, "forbidden")
    events.clear()
    again = await bob.post(url)
    assert again.status_code == 202
    assert again.headers["location"] == f"/v1/joblib/tasks/{task['id']}"
    body = again.json()
    assert (body["status"], body["queue_position"]) == ("pending", 1)
    assert (body["completed_at"], body["worker_id"]) == (None, None)
    assert body["error"] == ("why" if state == "failed" else None)
    assert [e.event for e in events] == ["task_status_event", "task_available"]
    for user in (bob, admin):
        problem(await user.post(url), 409, "invalid-task-transition")

    attempts = [task["attempt"]]
    for _ in range(2):
        (claimed,) = await claim(ada, worker)
        attempts.append(claimed["attempt"])
        await report(ada, task, "failed")
        assert (await admin.post(url)).status_code == 202
    assert all(a < b for a, b in pairwise(attempts))


@pytest.mark.parametrize("end", ["completed", "failed"])
async def test_what_is_set_going_again_begins_anew(ada, end):
    """Behind those who wait, with all its attempts, and with nothing of the last run."""
    worker = await offer(ada, max_attempts=2)
    task = await submit(ada)
    while (await read(ada, task))["status"] == "pending":
        await claim(ada, worker)
        await report(ada, task, "running")
        attempt = (await read(ada, task))["attempt"]
        said = {"id": task["id"], "attempt": attempt, "progress": 0.5, "message": "x"}
        await ada.patch(f"/workers/{worker}", json={"tasks": [said]})
        await report(ada, task, end, **({} if end == "failed" else {"result": 1}))
    done = await read(ada, task)
    assert (done["status"], done["result"]) == (end, None if end == "failed" else 1)
    assert done["progress"] == 0.5
    waiting = await submit(ada)
    again = (await ada.post(f"/tasks/{task['id']}/retry")).json()
    assert again["queue_position"] == 2
    of_the_run = (
        *("result", "progress", "progress_message", "worker_id"),
        *("claimed_at", "started_at", "completed_at"),
    )
    assert {again[name] for name in of_the_run} == {None}
    claimed = await claim(ada, worker, max_tasks=2)
    assert [t["id"] for t in claimed] == [waiting["id"], task["id"]]
    for status in ("pending", "failed"):
        assert (await report(ada, task, "failed")).json()["status"] == status
        await report(ada, waiting, "cancelled")
        await claim(ada, worker)


async def test_a_task_without_a_job_cannot_be_set_going(ada):
    worker = await offer(ada)
    task = await move(ada, worker, await submit(ada), "completed")
    await ada.delete(f"/workers/{worker}")
    problem(await ada.post(f"/tasks/{task['id']}/retry"), 404, "job-not-found")
    assert await read(ada, task) == task


async def test_of_two_retries_one_wins(ada, events):
    worker = await offer(ada)
    task = await move(ada, worker, await submit(ada), "completed")
    events.clear()
    url = f"/tasks/{task['id']}/retry"
    answers = await at_once(*(ada.post(url) for _ in range(4)))
    assert statuses(answers) == [202, 409, 409, 409]
    assert [e.event for e in events] == ["task_status_event", "task_available"]


#: No list is parsed, and none becomes another text.
LARGE = {
    "lists": [[0.1 + n, -1e22, 5e-324] for n in range(80_000)],
    "text": 'a"\\é旋\n' * 300_000,
    "empty lists": [[]] * 500_000,
    "an object": {f'a"{n}': None for n in range(150_000)},
}


@pytest.mark.makers("plain", "postgres")
@pytest.mark.parametrize("what", LARGE)
async def test_a_large_result_is_kept_as_it_was_written(ada, events, what):
    worker = await offer(ada)
    await submit(ada)
    (task,) = await claim(ada, worker)
    await report(ada, task, "running")
    where = f"/tasks/{task['id']}/result"
    problem(await ada.get(where), 404, "result-not-found")
    assert len(json.dumps(LARGE[what], separators=(",", ":"))) > 2**20
    events.clear()
    answer = await report(ada, task, "completed", attempt=1, result=LARGE[what])
    # who sent it is not sent it back
    ended = answer.json()
    assert (answer.status_code, ended["status"], ended["abridged"]) == (200, "completed", True)
    assert ended["result"] is None
    assert len(json.dumps([sent.data for sent in events])) < 2000
    answer = await ada.get(where, headers={"Prefer": "wait=1"})
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == LARGE[what] == (await read(ada, task))["result"]
    again = await report(ada, task, "completed", attempt=1, result=LARGE[what])
    assert again.status_code == 200
    answer = await report(ada, task, "completed", attempt=1, result=[LARGE[what]])
    problem(answer, 409, "lease-lost")
    # whose task it is not, and who may not enter its room, learns nothing of it
    problem(
        await ada.get("/tasks/00000000-0000-0000-0000-000000000000/result"), 404, "task-not-found"
    )
    listed = (await ada.get("/rooms/lab/tasks")).json()["items"]
    assert [(t["abridged"], t["result"]) for t in listed] == [(True, None)]


KINDS = {400: "malformed-body", 413: "payload-too-large", 422: "invalid-request"}
WRONG = {
    "not closed": (b'{"status":"completed","result":["%s"]', 400),
    "two values": (b'{"status":"completed","result":["%s"],[1]}', 400),
    "a list": (b'["%s"]', 413),
    "a number": (b'{"status":"completed","result":1,"error":"%s"}', 413),
    "an error": (b'{"status":"failed","error":"%s"}', 413),
    "NaN": (b'{"status":"completed","result":[NaN,"%s"]}', 400),
    "NUL": (b'{"status":"completed","result":["\\u0000%s"]}', 400),
    "a NUL at the end": (b'{"status":"completed","result":["%s"]}\0', 400),
    "not UTF-8": (b'{"status":"completed","result":["\xff%s"]}', 400),
    "another status": (b'{"status":"lost","result":["%s"]}', 422),
    "no status": (b'{"result":["%s"]}', 422),
}


@pytest.mark.makers("plain")
async def test_a_large_report_that_is_none_changes_nothing(app, ada):
    app.state.joblib_settings = JobLibSettings(max_payload_bytes=1000, max_result_bytes=3000)
    worker = await offer(ada)
    await submit(ada)
    (task,) = await claim(ada, worker, start=True)
    headers = {"Content-Type": "application/json"}
    for what, (body, status) in WRONG.items():
        content = body.replace(b"%s", b"x" * 2000)
        answer = await ada.patch(f"/tasks/{task['id']}", content=content, headers=headers)
        assert answer.status_code == status, (what, answer.text)
        problem(answer, status, KINDS[status])
    content = WRONG["not closed"][0].replace(b"%s", b"x" * 3000)
    answer = await ada.patch(f"/tasks/{task['id']}", content=content, headers=headers)
    assert problem(answer, 413, "payload-too-large")["detail"].endswith("limited to 3000 bytes")
    assert (await read(ada, task))["status"] == "running"
    limits = (await ada.get("/limits")).json()
    assert (limits["max_payload_bytes"], limits["max_result_bytes"]) == (1000, 3000)


async def test_what_is_interrupted_costs_no_attempt_so_many_times(ada, bob, events):
    worker = await offer(ada, max_attempts=1, max_interruptions=2)
    await submit(ada)
    behind = await submit(ada)
    for count in (1, 2):
        (task,) = await claim(ada, worker, start=count == 2)
        said = {"attempt": count, "interrupted": True}
        if count == 1:
            await report(ada, task, "running", attempt=1)
        problem(await report(bob, task, "pending", **said), 403, "forbidden")
        lost = await report(ada, task, "pending", **said | {"attempt": count + 1})
        problem(lost, 409, "lease-lost")
        events.clear()
        answer = (await report(ada, task, "pending", **said)).json()
        assert (answer["status"], answer["attempt"], answer["interruptions"]) == (
            "pending",
            count,
            count,
        )
        # in its old place
        assert (answer["queue_position"], answer["worker_id"], answer["errors"]) == (1, None, [])
        assert [e.data["status"] for e in events if e.event == "task_status_event"] == ["pending"]
        # it is nobody's now
        problem(await report(ada, task, "pending", **said), 409, "lease-lost")
    (task,) = await claim(ada, worker, start=True)
    ended = (await report(ada, task, "pending", attempt=3, interrupted=True)).json()
    assert (ended["status"], ended["error_type"], ended["interruptions"]) == (
        "failed",
        "worker_lost",
        2,
    )
    assert ended["error"] == "Interrupted too often"
    (task,) = await claim(ada, worker, start=True)
    assert task["id"] == behind["id"]


@pytest.mark.parametrize(
    "said",
    [
        {"status": "pending"},
        {"status": "completed", "attempt": 1},
        {"status": "pending", "attempt": 1, "interrupted": "yes"},
    ],
)
async def test_an_interruption_is_of_a_certain_attempt(ada, said):
    worker = await offer(ada)
    await submit(ada)
    (task,) = await claim(ada, worker, start=True)
    said = {"interrupted": True, **said}
    problem(await report(ada, task, **said), 422, "invalid-request")
    reports = {"reports": [{"id": task["id"], **said}]}
    problem(await ada.patch("/tasks", json=reports), 422, "invalid-request")
    assert (await read(ada, task)) == task


async def test_one_request_interrupts_several(ada):
    worker = await offer(ada, max_attempts=1, max_interruptions=1)
    for _ in range(3):
        await submit(ada)
    tasks = await claim(ada, worker, max_tasks=2, start=True)
    first = tasks[0]
    await report(ada, first, "pending", attempt=1, interrupted=True)
    (again, new) = await claim(ada, worker, max_tasks=2, start=True)
    assert again["id"] == first["id"]
    said = {"status": "pending", "interrupted": True}
    reports = [{"id": t["id"], "attempt": t["attempt"], **said} for t in (again, tasks[1], new)]
    outcomes = (await ada.patch("/tasks", json={"reports": reports})).json()["outcomes"]
    states = [(o["task"]["status"], o["task"]["interruptions"]) for o in outcomes]
    assert states == [("failed", 1), ("pending", 1), ("pending", 1)]
