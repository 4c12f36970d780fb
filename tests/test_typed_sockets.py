"""A host and a worker whose Socket.IO is wrapped, so that models stand for events."""

from typing import Any, ClassVar

import pytest
import servers
import socketio
from anyio.to_thread import run_sync
from fastapi import FastAPI
from processes import until
from zndraw_socketio import AsyncServerWrapper, get_event_name, wrap

import zndraw_joblib as joblib
from zndraw_joblib.client import Category, Extension, JobManager
from zndraw_joblib.client_api import HostApi
from zndraw_joblib.events import FrozenEvent, jobs_channel, providers_channel, room_channel

pytestmark = pytest.mark.makers("plain")

JOB, PROVIDER = "lab:analysis:Double", "lab:numbers:count"


class Double(Extension):
    category: ClassVar[Category] = Category.ANALYSIS
    number: int

    def run(self, vis: Any, **kwargs: Any) -> int:
        return 2 * self.number


class Numbers(joblib.Provider):
    category: ClassVar[str] = "numbers"
    size: int = 0

    def read(self, handler: range) -> list[int]:
        return list(handler[: self.size])


@pytest.fixture
def typed(app: FastAPI) -> AsyncServerWrapper:
    """Put a wrapped server into the host, with handlers that models register."""
    tsio = wrap(socketio.AsyncServer(async_mode="asgi"))

    @tsio.on(joblib.JoinJobRoom)
    async def join_job(sid: str, data: joblib.JoinJobRoom) -> None:
        await tsio.enter_room(sid, jobs_channel(data.job_name))

    @tsio.on(joblib.LeaveJobRoom)
    async def leave_job(sid: str, data: joblib.LeaveJobRoom) -> None:
        await tsio.leave_room(sid, jobs_channel(data.job_name))

    @tsio.on(joblib.JoinProviderRoom)
    async def join_provider(sid: str, data: joblib.JoinProviderRoom) -> None:
        await tsio.enter_room(sid, providers_channel(data.provider_name))

    @tsio.on("connect")
    async def connect(sid: str, environ: dict, auth: dict | None) -> None:
        await tsio.enter_room(sid, room_channel("lab"))

    app.state.tsio = tsio
    return tsio


async def test_a_wrapped_host_and_a_wrapped_worker_hear_each_other(app, typed, ada):
    heard: list[Any] = []
    page, socket = wrap(socketio.AsyncClient()), wrap(socketio.Client())

    @page.on(joblib.TaskStatusEvent)
    async def changed(data: joblib.TaskStatusEvent) -> None:
        heard.append(data.status)

    @page.on(joblib.JobsInvalidate)
    async def jobs_changed(data: joblib.JobsInvalidate) -> None:
        heard.append(data)

    async with servers.serve(socketio.ASGIApp(typed, app)) as url:
        await page.connect(url, auth={})
        await run_sync(lambda: socket.connect(url, auth={}))
        api = HostApi(url, token=ada.token)
        # nothing is found by looking: it has to be heard
        manager = JobManager(
            api,
            socket,
            execute=lambda task: task.extension.run(None),
            polling_interval=600,
            heartbeat_interval=600,
        )
        try:
            await run_sync(lambda: manager.register(Double, room="lab"))
            await run_sync(
                lambda: manager.register_provider(
                    Numbers, name="count", handler=range(9), room="lab"
                )
            )
            await until(lambda: joblib.JobsInvalidate() in heard)
            answer = await ada.post(f"/rooms/lab/tasks/{JOB}", json={"payload": {"number": 4}})
            assert answer.status_code == 202
            await until(lambda: heard[-1] == "completed", lambda: heard)
            answer = await ada.get(f"/rooms/lab/providers/{PROVIDER}?size=3")
            assert (answer.status_code, answer.json()) == (200, [0, 1, 2])
        finally:
            await run_sync(manager.disconnect)
            await run_sync(api.close)
            await run_sync(socket.disconnect)
            await page.disconnect()


@pytest.mark.parametrize("event", FrozenEvent.__subclasses__())
def test_a_wrapper_calls_an_event_as_the_wire_does(event: type[FrozenEvent]):
    assert get_event_name(event) == event.event_name
    assert event.event_name.replace("_", "") == event.__name__.lower()


def test_a_host_may_name_an_event_of_its_own():
    class Renamed(FrozenEvent):
        event_name: ClassVar[str] = "other:name"

    class Derived(Renamed):
        pass

    assert Renamed().event_name == "other:name"
    assert Derived.event_name == "derived"
