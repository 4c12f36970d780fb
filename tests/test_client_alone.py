"""The worker's side where no network is needed: what it makes of odd answers, and of itself."""

import os
import queue
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from importlib.metadata import version
from inspect import Parameter, signature
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import uuid4

import httpx
import pytest

from zndraw_joblib import client_worker
from zndraw_joblib.client import Category, Extension, JobManager
from zndraw_joblib.client_claims import Claims, HeldTasks
from zndraw_joblib.client_hands import End, Hands
from zndraw_joblib.client_transport import Transport
from zndraw_joblib.client_worker import Life
from zndraw_joblib.execution import Options, Report
from zndraw_joblib.testing import Host

# where a test fails, what it waits for hangs
HANG = 60


class Job(Extension):
    category: ClassVar[Category] = Category.ANALYSIS
    number: int = 0

    def run(self, vis: Any, **kwargs: Any) -> int:
        return self.number


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


class Api:
    """A host that answers what a function says."""

    base_url = "http://host"

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response], token: str = "") -> None:
        self.http = httpx.Client(transport=httpx.MockTransport(answer))
        self._token = token

    def get_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def raise_for_status(self, response: httpx.Response) -> None:
        response.raise_for_status()


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, html="<html>an app of one page"),
        httpx.Response(404, json={"error": "nothing here"}),
        httpx.Response(403, text="blocked"),
    ],
    ids=["a page", "another 404", "a wall"],
)
def test_a_host_whose_limits_nobody_tells_is_worked_for_all_the_same(host: Host, answer: Any):
    manager = host.manager(
        execute=lambda task: task.extension.number, concurrency=4, polling_interval=0.05
    )
    http = manager.api.http
    get = http.get
    http.get = lambda url, **options: answer if url.endswith("/limits") else get(url, **options)
    manager.register(Job, room="lab")
    ids = manager.submit_many([Job(number=n) for n in range(6)], "lab", job_room="lab")
    ended = manager.wait_all(ids, timeout=HANG)
    assert [task.result for task in ended] == list(range(6))


def test_threads_that_claim_at_once_claim_different_tasks(host: Host):
    manager = host.manager()
    manager.register(Job, room="lab")
    ids = manager.submit_many([Job() for _ in range(12)], "lab", job_room="lab")
    claimed: list[str] = []
    barrier = threading.Barrier(4)

    def claim() -> None:
        barrier.wait(HANG)
        while task := manager.claim():
            claimed.append(task.task_id)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert Counter(claimed) == Counter(ids)


def test_two_attempts_of_one_task_that_end_together_are_reported_one_by_one(host: Host):
    """One was given up by the host, and claimed again by the same worker."""
    manager = host.manager(execute=lambda task: None, concurrency=2, polling_interval=HANG)
    manager.register(Job, room="lab")
    hands = manager._shutdown.work
    assert isinstance(hands, Hands)
    batches: list[set[str]] = []
    alone: list[Any] = []

    def report_together(reports: Sequence[Report]) -> set[str]:
        batches.append({report["id"] for report in reports})
        return batches[-1]

    hands.claims.report_together = report_together  # type: ignore[method-assign]
    hands.claims.report = alone.append  # type: ignore[method-assign, assignment]
    reports: list[Report] = [
        {"id": i, "attempt": n, "status": "completed"} for i, n in ("x1", "y1", "x2")
    ]
    with hands._changed:
        hands._unreported = 3
        hands._ended += [(None, report) for report in reports]
        hands._changed.notify_all()
        assert hands._changed.wait_for(lambda: hands.busy == 0, HANG)
    assert batches == [{"x", "y"}]
    assert alone == [reports[-1]]


def test_hands_take_the_next_tasks_while_what_ended_is_reported(host: Host):
    ran: queue.SimpleQueue[int] = queue.SimpleQueue()
    manager = host.manager(
        execute=lambda task: ran.put(task.extension.number), concurrency=2, polling_interval=0.01
    )
    manager.register(Job, room="lab")
    hands = manager._shutdown.work
    assert isinstance(hands, Hands)
    report, answered = hands._report, threading.Event()

    def report_later(batch: list[End]) -> None:
        assert answered.wait(HANG)
        report(batch)

    hands._report = report_later  # type: ignore[method-assign]
    ids = manager.submit_many([Job(number=n) for n in range(8)], "lab", job_room="lab")
    first = [ran.get(timeout=HANG) for _ in range(4)]
    # what the host was not told of does not grow
    with pytest.raises(queue.Empty):
        ran.get(timeout=0.1)
    answered.set()
    manager.wait_all(ids, timeout=HANG)
    assert sorted([*first, *(ran.get(timeout=HANG) for _ in range(4))]) == list(range(8))


def in_two_seconds() -> str:
    # dates have whole seconds
    return formatdate(time.time() + 2, usegmt=True)


@pytest.mark.parametrize(
    ("retry_after", "least"), [(lambda: "1", 1.0), (lambda: "0.2", 0.2), (in_two_seconds, 0.9)]
)
def test_a_report_waits_as_long_as_the_host_asks_for(retry_after: Callable[[], str], least: float):
    asked: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(time.monotonic())
        if len(asked) < 3:
            return httpx.Response(429, headers={"Retry-After": retry_after()})
        return httpx.Response(200, json={"id": "x", "status": "completed"})

    # it is less patient than the host asks for
    transport = Transport(Api(answer), patience=0.1)
    given_up: list[Any] = []
    life = Life(given_up.append, given_up.append)
    claims = Claims(transport, None, life, HeldTasks())  # type: ignore[arg-type]
    assert claims.report({"id": "x", "status": "completed", "result": 1})
    assert given_up == []
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert min(pauses) >= least


@pytest.mark.parametrize("token", ["s3cr3t\x00", "s3c\\r3t\n", "s3cr'3t\n", 's3cr"3t\r', "s3cr3t"])
def test_no_message_has_the_token(token: str):
    def echo(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError(f"could not send {request.headers}: Bearer {token}")

    for api in (Api(echo, token), Real(token)):
        with pytest.raises((ConnectionError, ValueError)) as caught:
            Transport(api).exchange("get", "/x", timeout=1)
        assert "s3c" not in str(caught.value)


class Real(Api):
    """Nobody is there: a header that can't be sent is found out before."""

    base_url = "http://127.0.0.1:9"

    def __init__(self, token: str) -> None:
        self.http = httpx.Client()
        self._token = token


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(502, headers={"content-type": "application/json"}, content=b"[" * 200_000),
        httpx.Response(503, headers={"retry-after": "Fri, 31 Dec 9999999999999999999 0:0:0 GMT"}),
        httpx.Response(503, headers={"retry-after": "nan"}),
        httpx.Response(503, headers={"retry-after": "1e999"}),
    ],
    ids=["deep", "the end of time", "no number", "for ever"],
)
def test_whatever_a_gateway_says_is_no_answer(answer: httpx.Response):
    with pytest.raises(ConnectionError):
        Transport(Api(lambda _: answer)).exchange("get", "/x")


def test_who_waits_for_a_host_that_is_away_is_told_when_time_is_up():
    def away(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody is there")

    manager = JobManager(Api(away))
    manager._transport.reached = True
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="nobody is there"):
        manager.wait_for(str(uuid4()), timeout=0.7)
    assert 0.7 <= time.monotonic() - began < HANG


def test_ids_may_be_written_as_uuids_are(host: Host):
    manager = host.manager(execute=lambda task: task.extension.number, polling_interval=0.05)
    manager.register(Job, room="lab")
    ids = manager.submit_many([Job(number=1), Job(number=2)], "lab", job_room="lab")
    ended = manager.wait_all([ids[1].upper(), ids[0].replace("-", "")], timeout=HANG)
    assert [task.result for task in ended] == [2, 1]
    with pytest.raises(ValueError, match="not the id of a task"):
        manager.wait_all(["nonsense"], timeout=HANG)


def test_an_address_has_no_password():
    with pytest.raises(ValueError, match="credentials") as caught:
        JobManager.connect("http://ada:hunter2@host", token="a-token")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("chosen", "devices"),
    [
        (None, ["cuda:0 NVIDIA A100", "cuda:1"]),
        ("", []),
        ("-1,0", []),
        ("1, GPU-8932f937", ["cuda:1", "cuda:GPU-8932f937"]),
        ("2,-1,3", ["cuda:2"]),
    ],
)
def test_a_worker_tells_where_it_runs(host, monkeypatch, tmp_path, chosen, devices):
    for name, text in (("0", "Model: \t NVIDIA A100\nIRQ: 1\n"), ("1", "IRQ: 2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "information").write_text(text)
    monkeypatch.setattr(client_worker, "NVIDIA", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    with host.manager() as manager:
        manager.register(Job, room="lab")
        (worker,) = manager.workers("lab")
    assert worker.name == f"{socket.gethostname()}:{os.getpid()}"
    assert worker.info.model_dump() == {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": version("zndraw-joblib"),
        "devices": devices,
    }


def test_a_class_that_is_defined_anew_is_served_where_it_is(host, monkeypatch):
    """Its other worker, of the same user, gets none of its tasks, and ends."""
    fields = {"__annotations__": {"factor": int}, "factor": 2, "__module__": __name__}
    run = {"run": lambda self, vis, **kwargs: self.number * self.factor}
    anew: Any = type("Job", (Job,), fields | run)
    first, second = (host.manager(execute=lambda t: t.extension.run(None)) for _ in range(2))
    first.register(Job, room="lab")
    with pytest.raises(ValueError, match=r"/properties/factor.*yours.*replace"):
        second.register(anew, room="lab")
    # as a notebook would
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    with pytest.raises(ValueError, match="/properties/factor"):
        second.register(anew, room="lab", replace=False)
    second.register(anew, room="lab")
    task = second.submit(anew(number=3), "lab")
    assert task.result(HANG) == 6
    assert task.refresh().worker_id == second.worker_id
    first.heartbeat()
    with pytest.raises(RuntimeError, match="lab:analysis:Job is offered no more"):
        first.wait()
    assert [worker.id for worker in second.workers("lab")] == [second.worker_id]
    second.disconnect()


def test_connect_shows_every_option_of_a_manager():
    parameters = signature(JobManager.__init__).parameters.values()
    options = {p.name: p.annotation for p in parameters if p.kind is Parameter.KEYWORD_ONLY}
    assert options == Options.__annotations__
