"""Isolated hands: real child processes, really killed."""

import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import anyio
import isolated_worker
import psutil
import pytest
from isolated_worker import Odd
from processes import HANG, Process, read, running, submit, until

from zndraw_joblib import JobLibSettings, client_hands
from zndraw_joblib.client import Category, ClaimedTask, Extension, JobManager
from zndraw_joblib.schemas import JobPolicy, TaskResponse
from zndraw_joblib.testing import Host

pytestmark = pytest.mark.makers("plain")

JOB = "@global:analysis:Odd"


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def isolated(host: Host, **options: Any) -> JobManager:
    manager = host.manager(isolate=True, polling_interval=0.05, heartbeat_interval=0.2, **options)
    manager.register(Odd, room="lab", run_kwargs={"given": 1})
    return manager


def run(manager: JobManager, *whats: str, **options: Any) -> list[TaskResponse]:
    ids = [manager.submit(Odd(what=what, **options), "lab", job_room="lab") for what in whats]
    return manager.wait_all(ids, timeout=HANG)


def test_what_ends_a_process_ends_one_attempt_and_nothing_else(host: Host):
    # servers of other tests
    others = psutil.Process().children()
    manager = isolated(host, setup=isolated_worker.set_up)
    ends = {
        "segfault": ("crashed", "was killed by signal 11 (SIGSEGV)"),
        "kill": ("crashed", "was killed by signal 9 (SIGKILL, as when memory is short)"),
        "family": ("crashed", "ended with exit code 5"),
        "sys.exit": ("user_error", "SystemExit: 3"),
    }
    first, again, *ended, last = run(manager, "", "", *ends, "")
    assert first.result == {
        "pid": first.result["pid"],
        "given": 1,
        "loaded_in": first.result["pid"],
    }
    assert again.result == first.result
    assert last.result["pid"] == last.result["loaded_in"] != first.result["pid"]
    assert first.result["pid"] != os.getpid()
    for task, (error_type, error) in zip(ended, ends.values(), strict=True):
        assert (task.status, task.error_type, task.attempt) == ("failed", error_type, 1)
        assert str(task.error).endswith(error)
    own = [process for process in psutil.Process().children() if process not in others]
    left = own + [child for process in own for child in process.children(recursive=True)]
    assert last.result["pid"] in [process.pid for process in left]
    manager.disconnect()
    assert not [p for p in left if p.is_running() and "resource_tracker" not in str(p.cmdline())]


def test_a_crash_is_tried_again_as_the_policy_says(host: Host):
    manager = isolated(host)
    manager.register(Odd, room="lab", policy=JobPolicy(max_attempts=2))
    # a validator of parameters is code of the task's too
    (task,) = run(manager, "unfit")
    assert (task.status, task.attempt) == ("failed", 2)
    assert [error.error_type for error in task.errors] == ["crashed", "crashed"]


def test_a_crashed_task_goes_on_where_it_was(host: Host):
    manager = isolated(host)
    manager.register(Odd, room="lab", policy=JobPolicy(max_attempts=3))
    raised, crashed = run(manager, "steps", "steps and crash")
    for task in (raised, crashed):
        assert (task.status, task.attempt) == ("completed", 2)
        assert task.result["steps"] == list(range(5, 10))
    assert [task.errors[0].error_type for task in (raised, crashed)] == ["user_error", "crashed"]


def test_what_a_child_prints_is_the_log_of_its_task(host: Host, capfd: Any):
    manager = isolated(host)
    loud, quiet, raised, crashed = run(manager, "loud", "", "raise", "loud and crash")
    logs = [manager.task(task.id).log() for task in (loud, quiet, raised, crashed)]
    lines = [
        "printed",
        "by another program",
        "in C \u00e9\ufffd",
        "logged",
        "said",
        "and more",
        "20 %",
    ]
    assert logs[:2] == [lines, []]
    assert logs[2][0].startswith("Traceback")
    assert logs[2][-1] == raised.error == "ValueError: as asked"
    assert sum("ValueError: as asked" in line for line in logs[2]) == 1
    # the end of it at least, and where it crashed
    assert "29999" in logs[3]
    at = logs[3].index("29999")
    assert logs[3][at + 1].startswith("the last wordFatal Python error: Segmentation fault")
    assert any("in run" in line for line in logs[3][at:])
    assert str(crashed.error).endswith("(SIGSEGV)")
    manager.disconnect()
    printed = capfd.readouterr().err
    for line in (*lines[:-1], "ValueError: as asked", "29999"):
        assert line in printed


def test_a_worker_lives_while_its_children_start(host: Host):
    host.app.state.joblib_settings = JobLibSettings(worker_timeout_seconds=1.5)
    manager = host.manager(isolate=True, setup=isolated_worker.set_up_slowly)
    manager.register(Odd, room="lab")
    worker, task = manager.worker_id, manager.submit(Odd(), "lab")
    while task.status == "pending":
        time.sleep(0.1)
        host.later(0)
    assert task.result(HANG)
    assert manager.worker_id == worker


def test_code_that_holds_the_lock_loses_nothing(host: Host):
    host.app.state.joblib_settings = JobLibSettings(worker_timeout_seconds=1)
    manager = isolated(host)
    task_id = manager.submit(Odd(what="lock", seconds=2), "lab", job_room="lab")
    client, status = host.client("ada"), "pending"
    while status not in ("completed", "failed"):
        time.sleep(0.1)
        host.later(0)
        task = client.get(f"/v1/joblib/tasks/{task_id}").json()
        status = task["status"]
    assert (task["status"], task["attempt"], task["errors"]) == ("completed", 1, [])


def test_a_cancel_is_heard_and_who_is_deaf_is_killed(host: Host):
    manager = isolated(host, kill_after=0.3)
    client = host.client("ada")

    def cancelled(what: str, reached: Callable[[dict[str, Any]], Any], **options: Any) -> None:
        task_id = manager.submit(Odd(what=what, **options), "lab", job_room="lab")
        while not reached(task := client.get(f"/v1/joblib/tasks/{task_id}").json()):
            time.sleep(0.02)
        assert task["status"] == "running"
        client.patch(f"/v1/joblib/tasks/{task_id}", json={"status": "cancelled"})

    (before,) = run(manager, "")
    cancelled("polite", lambda task: task["progress_message"] == "half")
    (after,) = run(manager, "")
    assert after.result == before.result
    for what in ("sleep", "lock"):
        cancelled(what, lambda task: task["status"] == "running", seconds=60)
        (after,) = run(manager, "")
        assert after.result["pid"] != before.result["pid"]
        assert not psutil.pid_exists(before.result["pid"])
        before = after


def test_a_worker_whose_children_cannot_begin_gives_up(host: Host):
    manager = isolated(host, setup=isolated_worker.fail, concurrency=2)
    with pytest.raises(RuntimeError, match="could not begin: LookupError: no GPU here"):
        manager.wait()


def test_what_a_child_could_not_import_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch):
    class Local(Extension):
        category: ClassVar[Category] = Category.ANALYSIS

        def run(self, vis: Any, **kwargs: Any) -> None: ...

    with pytest.raises(ValueError, match="execute or setup can't go to a child"):
        host.manager(isolate=True, execute=lambda task: None)
    with pytest.raises(ValueError, match="needs isolate=True"):
        host.manager(setup=isolated_worker.fail)
    manager = host.manager(isolate=True)
    with pytest.raises(ValueError, match="lab:analysis:Local or its run_kwargs can't go"):
        manager.register(Local, room="lab")
    # as if typed at a prompt
    monkeypatch.setattr(sys.modules["__main__"], "Odd", Odd, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    monkeypatch.setattr(Odd, "__module__", "__main__")
    with pytest.raises(ValueError, match="notebook or at a prompt"):
        manager.register(Odd, room="lab")
    assert len(manager) == 0


def test_a_thread_whose_task_is_over_is_no_free_hand(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(client_hands, "STUCK_SECONDS", 0.1)
    go_on = []

    def execute(task: ClaimedTask) -> None:
        while not go_on and task.extension.what == "deaf":
            time.sleep(0.01)

    manager = host.manager(execute=execute, polling_interval=0.05, heartbeat_interval=0.1)
    manager.register(Odd, room="lab")
    deaf, waiting = (manager.submit(Odd(what=what), "lab", job_room="lab") for what in ("deaf", ""))
    client = host.client("ada")
    while client.get(f"/v1/joblib/tasks/{deaf}").json()["status"] != "running":
        time.sleep(0.02)
    client.patch(f"/v1/joblib/tasks/{deaf}", json={"status": "cancelled"})
    while f"task {deaf} of lab:analysis:Odd is over, and its code still runs" not in caplog.text:
        time.sleep(0.02)
    assert client.get(f"/v1/joblib/tasks/{waiting}").json()["status"] == "pending"
    while (shown := manager.workers("lab")[0]).stuck != 1:
        time.sleep(0.02)
    # the task is nobody's any more
    assert shown.held == 0
    go_on.append(True)
    (task,) = manager.wait_all([waiting], timeout=HANG)
    assert task.status == "completed"
    while manager.workers("lab")[0].stuck != 0:
        time.sleep(0.02)
    assert caplog.text.count("is over") == 1


# --- a worker in a process of its own ---


@pytest.fixture
async def worker(
    server: str, admin: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[Process]:
    command = getattr(request, "param", [isolated_worker.__file__])
    harness = str(Path(isolated_worker.__file__).parent)
    async with running(
        *command, server, admin.token, log=tmp_path / "log", PYTHONPATH=harness
    ) as process:
        yield process


def family(process: Process) -> list[psutil.Process]:
    return psutil.Process(process.popen.pid).children(recursive=True)


async def begun(user: Any, **payload: Any) -> str:
    with anyio.fail_after(HANG):
        while not (await read(user, "/rooms/lab/jobs"))["items"]:
            await anyio.sleep(0.02)
        task_id = await submit(user, "lab", JOB, **payload)
        while (await read(user, f"/tasks/{task_id}"))["status"] != "running":
            await anyio.sleep(0.02)
    # it holds the lock by then, if it is to
    await anyio.sleep(0.3)
    return task_id


async def test_no_child_outlives_a_killed_worker(worker: Process, ada: Any):
    await begun(ada, what="lock", seconds=60)
    children = family(worker)
    assert len(children) >= 1
    worker.popen.kill()
    await until(lambda: not any(p.is_running() for p in children), lambda: children)


@pytest.mark.parametrize("worker", [["-m", "isolated_worker"]], indirect=True)
async def test_a_signal_to_all_processes_lets_the_task_finish(worker: Process, ada: Any):
    task_id = await begun(ada, seconds=1, what="sleep")
    children = family(worker)
    for process in [*children, worker.popen]:
        process.terminate()
    assert await worker.ends() == 0, worker.written()
    task = await read(ada, f"/tasks/{task_id}")
    assert task["status"] == "completed", (task, worker.written())
    await until(lambda: not any(p.is_running() for p in children), lambda: children)


UNGUARDED = """
import sys
from isolated_worker import Odd
from zndraw_joblib import JobManager

with JobManager.connect(sys.argv[1], token=sys.argv[2], isolate=True) as manager:
    manager.register(Odd)
    manager.wait()
"""


async def test_a_script_without_guard_is_told_so(server: str, admin: Any, ada: Any, tmp_path: Path):
    script, harness = tmp_path / "worker.py", str(Path(isolated_worker.__file__).parent)
    script.write_text(UNGUARDED)
    async with running(
        script, server, admin.token, log=tmp_path / "log", PYTHONPATH=harness
    ) as process:
        assert await process.ends() == 1
    written = process.written()
    assert "put the lines that start the worker beneath `if __name__ == '__main__':`" in written
    assert "RuntimeError: the worker gave up: a process for tasks ended with exit code 1" in written
    assert (await read(admin, "/workers"))["items"] == []
