"""What a notebook has of tasks: handles, lists, bars, and what they look like."""

import io
import json
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import httpx
import pytest
from pydantic import AliasChoices, AliasPath, ConfigDict, Field

from zndraw_joblib import (
    Category,
    ClaimedTask,
    Extension,
    Provider,
    TaskFailed,
    TaskHandle,
    as_completed,
    gather,
)
from zndraw_joblib.client import JobManager
from zndraw_joblib.exceptions import ProviderTimeoutError
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.testing import Host

HANG = 60
SCRIPT = "<script>alert(1)</script>"


class Square(Extension):
    category: ClassVar[Category] = Category.ANALYSIS
    number: float = 0

    def run(self, vis: Any, *, task: Any = None, **kwargs: Any) -> Any:
        if task is not None:
            task.progress(0.5, SCRIPT)
        if self.number < 0:
            raise ValueError(SCRIPT)
        return self.number**2


class Files(Provider):
    category: ClassVar[str] = "files"
    names: list[str] = Field(default=[])

    def read(self, handler: Any) -> Any:
        if self.names == ["none"]:
            raise FileNotFoundError("no such file")
        return {"names": self.names, "of": handler}


class Image(Provider):
    category: ClassVar[str] = "files"
    content_type: ClassVar[str] = "image/png"

    def read(self, handler: Any) -> bytes:
        return b"\x89PNG"


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture
def ada(host: Host) -> JobManager:
    """Return a manager whose tasks wait for `host.drain`."""
    manager = host.manager("ada")
    manager.register(Square, room="lab")
    return manager


def test_a_cancel_that_is_refused_is_not_taken_for_an_end(host: Host, ada: JobManager):
    task = ada.submit(Square(number=3), "lab")
    host.app.state.joblib_settings = JobLibSettings(max_payload_bytes=1, max_result_bytes=1)
    with pytest.raises(ValueError, match="limited to 1 bytes"):
        task.cancel()
    assert task.status == "pending"


def test_a_handle_is_the_id(host: Host, ada: JobManager):
    task = ada.submit(Square(number=3), "lab")
    assert (json.loads(json.dumps([task])), {task: 1}[str(task)]) == ([task], 1)
    assert (type(pickle.loads(pickle.dumps(task))), pickle.loads(pickle.dumps(task))) == (str, task)
    assert (task.status, task.progress) == ("pending", None)
    with pytest.raises(TimeoutError, match=f"{task} is still pending"):
        task.result(timeout=0)
    assert ada.task(task.upper()) == task
    host.drain()
    assert (task.status, task.result(), task.refresh().attempt) == ("completed", 9, 1)
    assert (task.cancel(), task.status) == (False, "completed")
    # what it has heard of the end is gone with the retry
    assert task.retry().status == "pending"
    assert task.cancel()
    assert task.cancel(), "it is cancelled, whoever did it"
    with pytest.raises(TaskFailed, match="cancelled"):
        task.result()
    with pytest.raises(PermissionError):
        host.manager("bob").task(task).retry()
    with pytest.raises(ValueError, match="not the id of a task"):
        ada.task("Square")


def test_tasks_are_taken_as_they_end(host: Host):
    gate = threading.Event()

    def execute(task: ClaimedTask) -> Any:
        if task.extension.number == 0:
            assert gate.wait(HANG)
        return task.extension.run(None)

    host.manager("bob", execute=execute, concurrency=2).register(Square, room="lab")
    manager = host.manager("ada")
    tasks = manager.submit_many([Square(number=n) for n in (0, 1, -1, 2)], "lab")
    assert all(isinstance(task, TaskHandle) for task in tasks)
    seen = []
    for task in as_completed([*tasks, tasks[1]], HANG):
        # it is known how it ended: nobody is asked again
        seen.append((tasks.index(task), task.status.value))
        if len(seen) == 3:
            gate.set()
    assert sorted(seen[:3]) == [(1, "completed"), (2, "failed"), (3, "completed")]
    assert seen[3:] == [(0, "completed")]
    assert gather([tasks[3], tasks[0]], HANG) == [4, 0]
    with pytest.raises(TaskFailed, match="alert"):
        gather(tasks, HANG)
    assert (gather([]), list(as_completed([]))) == ([], [])
    waiting = manager.submit(Square(), "lab", delay_seconds=600)
    with pytest.raises(TimeoutError):
        list(as_completed([tasks[0], waiting], timeout=0))


def test_the_rooms_own_job_comes_first_then_the_one_for_all(host: Host):
    admin, ada = host.manager("admin"), host.manager("ada")
    admin.register(Square)
    everywhere = ada.submit(Square(number=1), "lab")
    ada.register(Square, room="lab")
    here = ada.submit(Square(number=2), "lab")
    asked = ada.submit(Square(number=3), "lab", job_room="@global")
    names = [task.refresh().job_name for task in (everywhere, here, asked)]
    assert names == [f"{room}:analysis:Square" for room in ("@global", "lab", "@global")]
    many = ada.submit_many([Square(), Square()], "attic")
    assert {task.refresh().job_name for task in many} == {"@global:analysis:Square"}
    assert [job.full_name for job in ada.jobs("attic")] == ["@global:analysis:Square"]


def test_a_job_by_its_name(host: Host, ada: JobManager):
    task = ada.submit("lab:analysis:Square", {"number": 5}, "lab", priority=0)
    plain = ada.submit("lab:analysis:Square", room="lab")
    host.drain()
    assert (task.result(), plain.result()) == (25, 0)
    for wrong, told in {
        "lab:analysis:Sqare": "did you mean 'lab:analysis:Square'",
        "square": "did you mean 'lab:analysis:Square'",
        "": "did you mean 'lab:analysis:Square'",
        "attic:x:Y": "there is 'lab:analysis:Square'",
    }.items():
        with pytest.raises(KeyError, match=told):
            ada.submit(wrong, {}, "lab")
    with pytest.raises(ValueError, match="has no parameter 'numbr'; did you mean 'number'"):
        ada.submit("lab:analysis:Square", {"numbr": 5}, "lab")
    with pytest.raises(ValueError, match="can't be kept as JSON"):
        ada.submit("lab:analysis:Square", {"number": float("nan")}, "lab")


def test_a_parameter_that_a_class_lacks_is_refused():
    class Renamed(Square):
        first: int = Field(default=1, alias="one")
        second: int = Field(default=1, validation_alias=AliasChoices("two", AliasPath("both", 1)))

    class Lenient(Square):
        model_config = ConfigDict(extra="ignore")

    with pytest.raises(ValueError, match="Square has no parameter 'nmber'; did you mean 'number'"):
        Square(nmber=1)
    assert Renamed(number=1, one=2, both=[3, 4]).second == 4
    assert Renamed(two=5).second == 5
    with pytest.raises(ValueError, match="Renamed has no parameter 'three'"):
        Renamed(three=1)
    assert Lenient(nmber=1).number == 0
    # another release of the class may have sent it
    assert Square.model_validate_json('{"nmber": 1}').number == 0
    assert "additionalProperties" not in Square.model_json_schema()


def test_what_a_room_has(host: Host, ada: JobManager):
    good, bad = ada.submit_many([Square(number=1), Square(number=-1)], "lab")
    host.drain()
    late = ada.submit(Square(), "lab")
    assert [str(task.id) for task in ada.tasks("lab")] == [late, bad, good]
    assert [str(task.id) for task in ada.tasks("lab", status="failed")] == [bad]
    assert len(ada.tasks("lab", limit=2, job="lab:analysis:Square")) == 2
    (worker,) = ada.workers("lab")
    assert (worker.id, worker.alive) == (ada.worker_id, True)
    with pytest.raises(ValueError, match="pending"):
        ada.tasks("lab", status="waiting")
    with pytest.raises(KeyError, match="job not found"):
        ada.tasks("lab", job="lab:analysis:Cube")


def test_long_lists_come_page_by_page(host: Host, ada: JobManager, monkeypatch: Any):
    monkeypatch.setattr("zndraw_joblib.client_user.PAGE", 2)
    ids = ada.submit_many([Square(number=n) for n in range(5)], "lab")
    assert [str(task.id) for task in ada.tasks("lab")] == ids[::-1]
    assert [str(task.id) for task in ada.tasks("lab", limit=3)] == ids[:1:-1]


def test_what_a_notebook_shows_is_escaped(host: Host, ada: JobManager, monkeypatch: Any):
    monkeypatch.setattr("zndraw_joblib.client_handles.SHOWN_ROWS", 2)
    shown = ada.submit(Square(number=-1), "lab")
    many = ada.submit_many([Square() for _ in range(3)], "lab")
    host.drain()
    for item in (shown, shown.refresh(), ada.tasks("lab", status="failed")):
        html = item._repr_html_()
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
        assert "<script>" not in html
        assert shown in html
        assert "failed" in html
    html = many._repr_html_()
    assert (html.count("</tr>"), html.count("completed")) == (3, 2)
    assert html.endswith("<p>and 1 more</p>")
    assert "lab:analysis:Square" in ada.jobs("lab")._repr_html_()
    assert str(ada.worker_id) in ada.workers("lab")._repr_html_()
    assert "nothing" in ada.tasks("lab", status="running")._repr_html_()


def test_a_notebook_shows_a_handle_of_a_host_that_is_away(host: Host, ada: JobManager):
    task = ada.submit(Square(), "lab")
    began = time.monotonic()
    ada.api.http = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(502)))
    html = task._repr_html_()
    assert task in html
    assert "answered 502" in html
    assert time.monotonic() - began < HANG


def test_data_is_read(host: Host, ada: JobManager):
    worker = host.manager("bob")
    worker.register_provider(Files, name="tree", handler=1, room="lab")
    worker.register_provider(Image, name="shot", handler=1, room="lab")
    assert ada.read("lab:files:tree", names=["a", "b"]) == {"names": ["a", "b"], "of": 1}
    assert ada.read("lab:files:shot") == b"\x89PNG"
    with pytest.raises(ValueError, match="no such file"):
        ada.read("lab:files:tree", names=["none"])
    with pytest.raises(KeyError, match="did you mean 'lab:files:tree'"):
        ada.read("lab:files:trees")
    with pytest.raises(ValueError, match="room:category:name"):
        ada.read("tree")


def test_a_provider_that_does_not_answer_is_told(host: Host, ada: JobManager):
    host.app.state.joblib_settings = JobLibSettings(provider_long_poll_max_seconds=0.1)
    body = {"category": "files", "name": "mute", "schema": {}}
    host.client("bob").put("/v1/joblib/rooms/lab/providers", json=body).raise_for_status()
    with pytest.raises(ProviderTimeoutError, match="lab:files:mute"):
        ada.read("lab:files:mute")


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_a_bar_moves_with_each_tasks_own_fraction(
    host: Host, ada: JobManager, monkeypatch: pytest.MonkeyPatch, with_tqdm: bool
):
    drawn = io.StringIO()
    monkeypatch.setattr(sys, "stderr", drawn)
    if not with_tqdm:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    first, second = ada.submit_many([Square(number=2), Square(number=3)], "lab")
    task = ada.claim()
    ada.start(task)
    task.progress(0.5)
    ada.heartbeat()
    with pytest.raises(TimeoutError):
        gather([first, second], timeout=0, progress=True)
    half = drawn.getvalue()
    assert ("0.5/2" in half) if with_tqdm else (half.count("#") == 10)
    assert "0 of 2 tasks" in half or with_tqdm
    ada.complete(task, "done")
    host.drain()
    assert gather([first, second], HANG, progress=True) == ["done", 9]
    assert ("2/2" if with_tqdm else "2 of 2 tasks\n") in drawn.getvalue()
