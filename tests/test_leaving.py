"""Workers that have to leave: what they are at goes on elsewhere, and costs no attempt."""

import itertools
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest
from isolated_worker import Odd
from processes import HANG

from zndraw_joblib.client import Category, ClaimedTask, Extension, JobManager, TaskCancelled
from zndraw_joblib.schemas import JobPolicy, TaskResponse
from zndraw_joblib.testing import Host

pytestmark = [pytest.mark.makers("plain"), pytest.mark.usefixtures("own_directory")]

OFTEN = {"polling_interval": 0.05, "heartbeat_interval": 0.2}


class Slow(Extension):
    """Goes on until it is told to stop, where somebody holds it up."""

    category: ClassVar[Category] = Category.MODIFIER
    held_up: ClassVar[threading.Event] = threading.Event()

    def run(self, vis: Any, *, task: ClaimedTask, **kwargs: Any) -> str:
        while self.held_up.is_set():
            time.sleep(0.01)
        return "done"


class Quick(Extension):
    category: ClassVar[Category] = Category.MODIFIER

    def run(self, vis: Any, **kwargs: Any) -> str:
        return "done"


def execute(task: ClaimedTask) -> Any:
    asks = {"task": task} if isinstance(task.extension, Slow) else {}
    return task.extension.run(None, **asks)


@pytest.fixture
def host() -> Iterator[Host]:
    Slow.held_up.set()
    with Host() as host:
        yield host
        Slow.held_up.clear()


@pytest.fixture
def manager(host: Host) -> JobManager:
    return host.manager("ada")


def wait_until_they_run(manager: JobManager, *tasks: str) -> None:
    deadline = time.monotonic() + HANG
    while any(manager.task(task).status != "running" for task in tasks):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def status(manager: JobManager, task: str) -> tuple[str, int, int]:
    now: TaskResponse = manager.task(task).refresh()
    return now.status, now.attempt, now.interruptions


@pytest.mark.parametrize("concurrency", [1, 3])
def test_what_runs_when_the_grace_is_over_goes_on_elsewhere(
    host: Host, manager: JobManager, concurrency: int
):
    worker = host.manager(execute=execute, grace_seconds=0.2, concurrency=concurrency, **OFTEN)
    worker.register(Slow, room="lab")
    tasks = [manager.submit(Slow(), "lab") for _ in range(concurrency)]
    wait_until_they_run(manager, *tasks)
    worker.disconnect()
    assert {status(manager, task) for task in tasks} == {("pending", 1, 1)}
    Slow.held_up.clear()
    other = host.manager(execute=execute, **OFTEN)
    other.register(Slow, room="lab")
    ended = manager.wait_all(tasks, timeout=HANG)
    assert {(t.status, t.attempt, t.interruptions) for t in ended} == {("completed", 2, 1)}


def test_what_was_saved_last_goes_on_elsewhere(host: Host, manager: JobManager):
    saved: list[Any] = []

    def save(task: ClaimedTask) -> Any:
        saved.append(task.saved)
        # each heartbeat brings an older one: the last one goes by itself
        for step in itertools.count():
            task.save(step)
            task.log(f"step {step}")
            if task.cancelled:
                task.save({"last": step})
                raise TaskCancelled
            time.sleep(0.001)

    worker = host.manager(execute=save, grace_seconds=0.2, **OFTEN)
    worker.register(Slow, room="lab")
    task = manager.submit(Slow(), "lab")
    wait_until_they_run(manager, task)
    worker.disconnect()
    assert status(manager, task) == ("pending", 1, 1)
    kept = task.refresh().checkpoint
    assert kept["last"] > 0
    assert task.log()[-1] == f"step {kept['last']}"


def test_a_child_process_is_ended_before_its_task_goes_on_elsewhere(
    host: Host, manager: JobManager
):
    worker = host.manager(isolate=True, grace_seconds=0.2, **OFTEN)
    worker.register(Odd, room="lab")
    task = manager.submit(Odd(what="sleep", seconds=3600), "lab")
    wait_until_they_run(manager, task)
    began = time.monotonic()
    worker.disconnect()
    assert time.monotonic() - began < HANG
    assert status(manager, task) == ("pending", 1, 1)


def test_a_task_that_stops_in_time_may_still_complete(host: Host, manager: JobManager):
    worker = host.manager(execute=execute, grace_seconds=HANG, **OFTEN)
    worker.register(Slow, room="lab")
    task = manager.submit(Slow(), "lab")
    wait_until_they_run(manager, task)
    threading.Timer(0.3, Slow.held_up.clear).start()
    worker.disconnect()
    assert status(manager, task) == ("completed", 1, 0)


def test_an_allocation_that_ends_interrupts_what_runs(host: Host, manager: JobManager):
    worker = host.manager(execute=execute, until=15.0, **OFTEN)
    worker.register(Slow, room="lab")
    task = manager.submit(Slow(), "lab")
    began = time.monotonic()
    # it does not wait for its grace, and says that tasks had not ended
    assert worker.wait() is False
    assert 1 < time.monotonic() - began < HANG
    assert status(manager, task) == ("pending", 1, 1)


def test_only_what_fits_is_begun(host: Host, manager: JobManager):
    ends = datetime.now(UTC) + timedelta(seconds=60)
    worker = host.manager(execute=execute, until=ends, idle_seconds=1.0, **OFTEN)
    worker.register(Slow, room="lab", policy=JobPolicy(expected_seconds=3600))
    worker.register(Quick, room="lab", policy=JobPolicy(expected_seconds=1))
    slow, quick = manager.submit(Slow(), "lab"), manager.submit(Quick(), "lab")
    assert quick.result(timeout=HANG) == "done"
    assert worker.wait() is True
    assert status(manager, slow) == ("pending", 0, 0)


def test_a_worker_leaves_when_nothing_fits(host: Host):
    worker = host.manager(execute=execute, until=3 * HANG, **OFTEN)
    worker.register(Slow, room="lab", policy=JobPolicy(expected_seconds=3600))
    began = time.monotonic()
    assert worker.wait() is True
    assert time.monotonic() - began < HANG


def test_who_executes_nothing_can_not_be_idle(host: Host):
    with pytest.raises(ValueError, match="give execute"):
        host.manager(idle_seconds=1)
    with pytest.raises(ValueError, match="until is over"):
        host.manager(execute=execute, until=0)
