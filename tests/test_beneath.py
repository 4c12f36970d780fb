"""Hosts that are served beneath a path, in each way that there is."""

from collections.abc import Callable
from typing import Any, ClassVar

import conftest
import host
import httpx
import monitoring
import pytest
import servers
import socketio
from anyio.to_thread import run_sync
from conftest import User
from fastapi import FastAPI

import zndraw_joblib as joblib


class Double(joblib.Extension):
    category: ClassVar[joblib.Category] = joblib.Category.ANALYSIS
    number: int

    def run(self, vis: Any, **kwargs: Any) -> int:
        return 2 * self.number


class Count(joblib.Provider):
    category: ClassVar[str] = "files"

    def read(self, handler: Any) -> Any:
        return handler


def mounted(app: FastAPI) -> Any:
    outer = FastAPI()
    outer.mount("/a tool", app)
    return outer


def left_by_a_proxy(app: FastAPI) -> Any:
    app.root_path = "/a tool"
    return app


def cut_off_by_a_proxy(app: FastAPI) -> Any:
    app.root_path = "/a tool"

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        assert path.startswith("/a tool/")
        await app({**scope, "path": path.removeprefix("/a tool")}, receive, send)

    return proxy


def routed(app: FastAPI) -> Any:
    for router in (joblib.router, host.accounts, monitoring.router):
        app.include_router(router, prefix="/a tool")
    sockets = socketio.ASGIApp(app.state.tsio, socketio_path="/")
    app.mount("/a tool/socket.io", sockets)
    return app


WAYS = [mounted, left_by_a_proxy, cut_off_by_a_proxy, routed]


@pytest.mark.parametrize("way", WAYS)
async def test_all_of_it_works_beneath_a_path(
    app: FastAPI, ada: User, way: Callable[[FastAPI], Any]
):
    async with servers.serve(way(app)) as url, httpx.AsyncClient() as http:
        http.headers["Authorization"] = f"Bearer {ada.token}"
        base = f"{url}/a%20tool"
        manager = joblib.JobManager.connect(
            base,
            user=ada.email,
            password=conftest.PASSWORD,
            execute=lambda task: task.extension.run(None),
            # nothing is found by looking: it has to be heard
            polling_interval=600,
        )
        try:
            await run_sync(lambda: manager.register(Double, room="lab"))
            await run_sync(
                lambda: manager.register_provider(Count, name="count", handler=[3], room="lab")
            )
            assert manager.tsio.connected
            tasks = f"{base}/v1/joblib/rooms/lab/tasks"
            for number in (1, 2):
                answer = await http.post(
                    f"{tasks}/lab:analysis:Double", json={"payload": {"number": number}}
                )
                where = httpx.URL(url).join(answer.headers["location"])
                task = await http.get(where, headers={"Prefer": "wait=10"})
                assert task.json()["result"] == 2 * number
            page = await http.get(tasks, params={"limit": 1})
            beyond = await http.get(httpx.URL(url).join(page.links["next"]["url"]))
            assert beyond.json()["items"][0]["payload"] == {"number": 1}
            read = await http.get(f"{base}/v1/joblib/rooms/lab/providers/lab:files:count")
            assert (read.status_code, read.json()) == (200, [3])
            missing = await http.get(f"{base}/v1/joblib/rooms/lab/jobs/a:b:c")
            assert missing.json()["instance"] == "/a tool/v1/joblib/rooms/lab/jobs/a:b:c"
            # what its script asks for is relative to where it is
            assert "<title>" in (await http.get(f"{base}/")).text
        finally:
            await run_sync(manager.disconnect)
