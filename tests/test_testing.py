"""What `zndraw_joblib.testing` is to those who write hosts and extensions."""

import runpy
import sys
from typing import Annotated, Any, ClassVar

import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import select
from zndraw_auth import SessionDep
from zndraw_auth.db import get_session_maker

from zndraw_joblib import (
    Category,
    Extension,
    JobPolicy,
    ProblemException,
    Provider,
    Task,
    TaskFailed,
    get_room_access,
    problem_exception_handler,
    router,
    testing,
)
from zndraw_joblib.testing import Host


class Count(Extension):
    category: ClassVar[Category] = Category.ANALYSIS
    symbols: list[str]

    def run(self, vis: Any, **kwargs: Any) -> Any:
        return {
            symbol: self.symbols.count(symbol) * kwargs.get("times", 1) for symbol in self.symbols
        }


class Flaky(Extension):
    category: ClassVar[Category] = Category.MODIFIER
    fails: ClassVar[int] = 0

    def run(self, vis: Any, **kwargs: Any) -> Any:
        if Flaky.fails:
            Flaky.fails -= 1
            raise ZeroDivisionError("no such luck")
        return "done"


class Numbers(Provider):
    category: ClassVar[str] = "files"
    upto: int = 3

    def read(self, handler: Any) -> Any:
        return list(range(self.upto)) + handler


#: what a conftest gets from ``pytest_plugins``
joblib_host = testing.joblib_host


def test_a_result_is_what_the_host_has(joblib_host: Host):
    assert joblib_host.run(Count(symbols=["Cu", "O", "Cu"])) == {"Cu": 2, "O": 1}
    assert joblib_host.run(Count(symbols=["O"]), room="other", times=3) == {"O": 3}
    with joblib_host.client("bob") as bob:
        (task,) = bob.get("/v1/joblib/rooms/other/tasks").json()["items"]
    assert (task["status"], task["result"], task["attempt"]) == ("completed", {"O": 3}, 1)


def test_what_run_raises_is_raised_and_told(joblib_host: Host):
    Flaky.fails = 1
    with pytest.raises(ZeroDivisionError, match="no such luck"):
        joblib_host.run(Flaky())
    tasks = joblib_host.client("ada").get("/v1/joblib/rooms/lab/tasks").json()["items"]
    assert [(task["status"], task["error"]) for task in tasks] == [
        ("failed", "ZeroDivisionError: no such luck")
    ]
    assert joblib_host.run(Flaky()) == "done"


def test_what_the_host_refuses_is_refused(joblib_host: Host):
    with pytest.raises(ValueError, match="nan"):
        joblib_host.run(Count(symbols=["x"]), times=float("nan"))
    with pytest.raises(PermissionError):
        joblib_host.run(Count(symbols=[]), room="@global")
    assert joblib_host.client().get("/v1/joblib/rooms/lab/tasks").status_code == 401
    # `admin` may
    joblib_host.manager("admin").register(Count)


def test_time_passes_where_it_is_told_to(joblib_host: Host):
    manager = joblib_host.manager()
    policy = JobPolicy(max_attempts=3, retry_delay_seconds=60)
    manager.register(Flaky, room="lab", policy=policy)
    Flaky.fails = 1
    task_id = manager.submit(Flaky(), "lab", job_room="lab")
    assert joblib_host.drain() == 1
    # the second attempt waits
    assert joblib_host.drain() == 0
    joblib_host.later(61)
    assert joblib_host.drain() == 1
    assert manager.wait_for(task_id, timeout=0).attempt == 2


def test_a_silent_worker_is_lost(joblib_host: Host):
    manager = joblib_host.manager()
    manager.register(Count, room="lab")
    task_id = manager.submit(Count(symbols=[]), "lab", job_room="lab")
    task = manager.claim()
    manager.start(task)
    joblib_host.later(61)
    with pytest.raises(TaskFailed, match="Worker disconnected"):
        manager.wait_for(task_id, timeout=0)
    lost = [e.data["status"] for e in joblib_host.events if e.event == "task_status_event"]
    assert lost == ["pending", "claimed", "running", "failed"]
    assert task.task_id == task_id


def test_workers_with_hands_and_providers_work_as_they_do(joblib_host: Host):
    worker = joblib_host.manager(
        "bob", execute=lambda task: task.extension.run(None), polling_interval=0.01
    )
    worker.register(Count, room="lab")
    worker.register_provider(Numbers, name="some", handler=[7], room="lab")
    ada = joblib_host.manager("ada")
    task_id = ada.submit(Count(symbols=["H"]), "lab", job_room="lab")
    assert ada.wait_for(task_id, timeout=30).result == {"H": 1}
    read = joblib_host.client("ada").get(
        "/v1/joblib/rooms/lab/providers/lab:files:some", params={"upto": 2}
    )
    assert read.json() == [0, 1, 7]


def test_a_host_of_ones_own_keeps_its_rules():
    app = FastAPI()
    app.add_exception_handler(ProblemException, problem_exception_handler)
    app.include_router(router)

    @app.get("/count")
    async def count(session: SessionDep) -> int:
        return len((await session.execute(select(Task.id))).all())

    @app.get("/hangs")
    async def hangs(session: SessionDep, maker: Annotated[Any, Depends(get_session_maker)]) -> int:
        async with maker():
            return 1

    async def only_the_lab():
        return lambda session, caller, room_id, action: is_lab(room_id)

    async def is_lab(room_id: str) -> bool:
        return room_id == "lab"

    app.dependency_overrides[get_room_access] = only_the_lab
    for _ in range(2):
        with Host(app) as host:
            host.run(Count(symbols=[]))
            with pytest.raises(PermissionError, match="attic"):
                host.run(Count(symbols=[]), room="attic")
            assert host.client().get("/count").json() == 1
            with pytest.raises(RuntimeError, match="a session is opened within another one"):
                host.client().get("/hangs")
    assert app.dependency_overrides == {get_room_access: only_the_lab}


def test_it_can_be_imported_without_pytest(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    assert "joblib_host" not in runpy.run_path(str(testing.__file__))
