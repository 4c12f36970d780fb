"""A task's log: what a worker sends with its heartbeats, and who reads it."""

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any, ClassVar
from uuid import uuid4

import anyio
import pytest
from conftest import User
from processes import HANG
from sqlalchemy import func, select
from steps import claim, offer, problem, read, report, submit

from zndraw_joblib import Category, ClaimedTask, Extension, JobPolicy, TaskFailed, TaskLogHandler
from zndraw_joblib.execution import run_extension
from zndraw_joblib.models import TaskLog
from zndraw_joblib.testing import Host


async def say(user: User, worker: str, task: Any, first: int, *lines: Any, **more: Any) -> Any:
    """Send lines with a heartbeat; return its answer."""
    entry = {"id": task["id"], "attempt": task["attempt"], **more}
    entry["log"] = {"first": first, "lines": list(lines)}
    body, headers = json.dumps({"tasks": [entry]}), {"Content-Type": "application/json"}
    return await user.patch(f"/workers/{worker}", content=body, headers=headers)


async def log_of(user: User, task: Any, after: int = 0, wait: int = 0) -> Any:
    headers = {"Prefer": f"wait={wait}"} if wait else {}
    answer = await user.get(f"/tasks/{task['id']}/log", params={"after": after}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def texts(log: Any) -> list[str]:
    return [line["text"] for line in log["lines"]]


@pytest.fixture
async def worker(ada: User) -> str:
    return await offer(ada, max_attempts=2)


@pytest.fixture
async def task(ada: User, worker: str) -> Any:
    await submit(ada)
    (task,) = await claim(ada, worker, start=True)
    return task


async def test_lines_are_kept_in_their_order_and_once(ada, bob, worker, task):
    assert await log_of(ada, task) == {"lines": [], "next": 0, "ended": False}
    for _ in range(2):
        assert (await say(ada, worker, task, 1, "a", "", "c")).json()["lost"] == []
    await say(ada, worker, task, 4, "dé\U0001f600")
    log = await log_of(bob, task)
    assert (texts(log), log["next"], log["ended"]) == (["a", "", "c", "dé\U0001f600"], 4, False)
    assert log["lines"][2] == {"number": 3, "attempt": 1, "text": "c", "omitted": 0}
    for after, rest in (
        (1, ["", "c", "dé\U0001f600"]),
        (3, ["dé\U0001f600"]),
        (4, []),
        (2**63 - 1, []),
    ):
        log = await log_of(ada, task, after)
        assert (texts(log), log["next"]) == (rest, max(after, 4))
    await report(ada, task, "completed")
    assert (await log_of(ada, task, 4))["ended"]


async def test_a_log_goes_on_with_the_next_attempt_and_goes_with_the_task(
    ada, worker, task, session_maker
):
    await say(ada, worker, task, 1, "first")
    await report(ada, task, "failed", attempt=1)
    # of an attempt that is over nothing more is taken
    assert (await say(ada, worker, task, 2, "late")).json()["lost"] == [task["id"]]
    (again,) = await claim(ada, worker, start=True)
    assert (await say(ada, worker, task, 2, "late")).json()["lost"] == [task["id"]]
    await say(ada, worker, again, 1, "second", progress=0.5)
    await report(ada, again, "completed")
    assert (await ada.post(f"/tasks/{task['id']}/retry")).status_code == 202
    assert not (await log_of(ada, task, 2))["ended"]
    (third,) = await claim(ada, worker, start=True)
    await say(ada, worker, third, 1, "third")
    lines = [(x["number"], x["attempt"], x["text"]) for x in (await log_of(ada, task))["lines"]]
    assert lines == [(1, 1, "first"), (2, 2, "second"), (3, 3, "third")]

    async def rows() -> int:
        async with session_maker() as session:
            return await session.scalar(select(func.count()).select_from(TaskLog))

    await report(ada, third, "completed")
    assert await rows() == 3
    assert (await ada.delete(f"/tasks/{task['id']}")).status_code == 204
    assert await rows() == 0
    problem(await ada.get(f"/tasks/{task['id']}/log"), 404, "task-not-found")


async def test_only_the_tasks_own_worker_writes_its_log(ada, bob, worker, task):
    other = await offer(bob, "Other")
    await say(bob, other, task, 1, "forged")
    problem(await say(bob, worker, task, 1, "forged"), 403, "forbidden")
    assert texts(await log_of(ada, task)) == []


async def test_of_a_long_log_the_first_part_and_the_last_are_kept(app, ada, worker, task):
    app.state.joblib_settings.max_log_bytes = 8000
    for n in range(50):
        lines = [f"{n * 10 + k:>4}" + "x" * 60 for k in range(1, 11)]
        await say(ada, worker, task, n * 10 + 1, *lines)
    log = await log_of(ada, task)
    (gap,) = (at for at, line in enumerate(log["lines"]) if line["omitted"])
    kept = [int(line["text"][:4]) for line in log["lines"] if not line["omitted"]]
    omitted = log["lines"][gap]
    assert omitted["text"] == f"... {omitted['omitted']} lines left out ..."
    assert len(kept) + omitted["omitted"] == 500
    assert kept == [*range(1, gap + 1), *range(gap + omitted["omitted"] + 1, 501)]
    assert 6000 < sum(len(line["text"]) + 1 for line in log["lines"]) <= 8000
    # what is left out is left out wherever one begins to read, and doesn't keep one from it
    assert (await log_of(ada, task, 300))["lines"][0]["number"] == omitted["number"]
    assert texts(await log_of(ada, task, omitted["number"])) == texts(log)[gap + 1 :]
    app.state.joblib_settings.max_log_bytes = 0
    await say(ada, worker, task, 501, "gone")
    assert texts(await log_of(ada, task)) == []


async def test_a_log_is_read_in_parts(ada, worker, task):
    for n in range(150):
        await say(ada, worker, task, n + 1, str(n))
    await report(ada, task, "completed")
    first = await log_of(ada, task)
    assert (len(first["lines"]), first["next"], first["ended"]) == (100, 100, False)
    rest = await log_of(ada, task, first["next"])
    assert texts(first) + texts(rest) == [str(n) for n in range(150)]
    assert rest["ended"]


async def test_bad_lines_are_cut_or_refused(ada, worker, task):
    await say(ada, worker, task, 1, "a\tb\nc\x1b[1m \U0001f600", "x" * 5000)
    shown = texts(await log_of(ada, task))
    assert shown[0] == "a b c [1m \U0001f600"
    assert shown[1] == "x" * 3950 + "... (1050 characters left out)"
    for first, *lines in (
        [1, *["x"] * 101], [1], [0, "x"], [2**31, "x"], ["1", "x"], [1, None], [1, 5], [1, ["x"]],
        [1, *["\U0001f600" * 3000] * 6],
    ):  # fmt: skip
        body = problem(await say(ada, worker, task, first, *lines), 422, "invalid-request")
        assert body["errors"][0]["pointer"].startswith("/body/tasks/0/log"), body
    for unfit in ("\ud800", "\0"):
        problem(await say(ada, worker, task, 3, unfit), 400, "malformed-body")
    assert len((await log_of(ada, task))["lines"]) == 2
    for after in ("-1", "x", str(2**63)):
        answer = await ada.get(f"/tasks/{task['id']}/log", params={"after": after})
        problem(answer, 422, "invalid-request")


async def test_who_follows_a_log_is_woken(app, ada, worker, task):
    app.state.joblib_settings.recheck_seconds = 0.2
    found: list[Any] = []

    async def follow(after: int) -> None:
        found.append(await log_of(ada, task, after, wait=60))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(follow, 0)
            await anyio.sleep(0.1)
            await say(ada, worker, task, 1, "one")
        assert texts(found.pop()) == ["one"]
        async with anyio.create_task_group() as group:
            group.start_soon(follow, 1)
            await anyio.sleep(0.5)
            assert not found
            await report(ada, task, "completed")
    assert found == [{"lines": [], "next": 1, "ended": True}]


async def test_the_hosts_hook_hears_of_each_line_once(app, ada, worker, task):
    heard: list[Any] = []

    async def keep(logged: list[Any]) -> None:
        heard.extend(logged)
        raise OSError("full")

    app.state.on_task_log = keep
    for _ in range(2):
        assert (await say(ada, worker, task, 7, "a", "b")).status_code == 200
    assert [(str(x.task_id), x.attempt, x.first, x.lines) for x in heard] == [
        (task["id"], 1, 7, ["a", "b"])
    ]


async def test_lines_and_progress_of_many_tasks_go_together(ada, worker):
    for _ in range(3):
        await submit(ada)
    held = await claim(ada, worker, max_tasks=3, start=True)
    entries = [
        {"id": t["id"], "attempt": 1, "progress": 0.5, "log": {"first": 1, "lines": [t["id"]]}}
        for t in held
    ]
    del entries[1]["log"], entries[2]["progress"]
    assert (await ada.patch(f"/workers/{worker}", json={"tasks": entries})).status_code == 200
    shown = [texts(await log_of(ada, t)) for t in held]
    assert shown == [[held[0]["id"]], [], [held[2]["id"]]]
    assert [(await read(ada, t))["progress"] for t in held] == [0.5, 0.5, None]


# --- workers, and who reads ---


class Loud(Extension):
    category: ClassVar[Category] = Category.ANALYSIS
    what: str = ""

    def run(self, vis: Any, *, task: ClaimedTask) -> Any:
        match self.what:
            case "much":
                for n in range(5000):
                    task.log(f"line {n}")
            case "raise":
                try:
                    raise OSError("no disk")
                except OSError as exc:
                    raise ExceptionGroup("both", [ValueError("x" * 20_000), exc]) from exc
            case _:
                task.log("\x1b[1mone\x1b[0m\n 10%|#\r 20%|##\r\n\ud800\0" + "y" * 5000)
                logging.getLogger("theirs").warning("of %s", "this task")
        return 1


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def logging_handler() -> Iterator[None]:
    handler = TaskLogHandler()
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)


@pytest.mark.makers("plain")
def test_a_task_logs_all_of_it_before_its_end(host: Host, logging_handler: None):
    manager = host.manager("ada", execute=run_extension, concurrency=2)
    manager.register(Loud, room="lab")
    talk, much, broken = (manager.submit(Loud(what=w), "lab") for w in ("", "much", "raise"))
    logging.getLogger("theirs").warning("of nobody")
    assert talk.result(HANG) == much.result(HANG) == 1
    one, bar, cut, record = talk.log()
    assert (one, bar, record) == ("one", " 20%|##", "of this task")
    assert cut.startswith("  yyy")
    assert cut.endswith("... (1052 characters left out)")
    lines = much.log()
    (gap,) = (at for at, line in enumerate(lines) if line.endswith("lines left out ..."))
    omitted = int(lines[gap].split()[1])
    assert lines[:gap] == [f"line {n}" for n in range(gap)]
    assert lines[gap + 1 :] == [f"line {n}" for n in range(gap + omitted, 5000)]
    assert len(lines) > 2000
    with pytest.raises(TaskFailed):
        broken.result(HANG)
    text = "\n".join(broken.log())
    assert text.startswith(("Traceback", "  + Exception Group Traceback"))
    assert "in run" in text
    assert "OSError: no disk" in text[-200:]
    assert "characters left out" in text
    assert len(text) < 20_000
    # the error is as short as it was
    assert "Traceback" not in str(broken.refresh().error)


@pytest.mark.makers("plain")
def test_a_log_is_followed_to_its_end(host: Host):
    said, gate = threading.Event(), threading.Event()

    def execute(task: ClaimedTask) -> None:
        task.log(f"attempt {task.attempt}")
        said.set()
        assert gate.wait(HANG)
        if task.attempt == 1:
            raise ValueError("once more")
        task.log("done")

    manager = host.manager("ada", execute=execute)
    manager.register(Loud, room="lab", policy=JobPolicy(max_attempts=2))
    task = manager.submit(Loud(), "lab")
    lines = task.log(follow=True)
    assert next(lines) == "attempt 1"
    assert task.log() == ["attempt 1"]
    gate.set()
    *trace, mark, again, done = lines
    assert trace[-1] == "ValueError: once more"
    assert (mark, again, done) == ("--- attempt 2 ---", "attempt 2", "done")
    with pytest.raises(KeyError, match="not found"):
        manager.task(uuid4()).log()


@pytest.mark.makers("plain")
def test_who_runs_tasks_by_themselves_logs_too(host: Host):
    manager = host.manager("ada")
    manager.register(Loud, room="lab")
    for end in (manager.complete, lambda task: manager.fail(task, "no")):
        submitted = manager.submit(Loud(), "lab")
        task = manager.claim()
        manager.start(task)
        task.log("by hand")
        end(task)
        assert submitted.log() == ["by hand"]
