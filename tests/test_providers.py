"""Providers: who may offer data, who sees it, and what becomes of it."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from fastapi import FastAPI
from steps import problem, silence
from taskiq import InMemoryBroker

from zndraw_joblib import (
    cleanup_stale_workers,
    cleanup_worker,
    ensure_internal_providers,
    register_internal_providers,
    router,
)
from zndraw_joblib.dependencies import get_room_access
from zndraw_joblib.lifecycle import FullName
from zndraw_joblib.settings import JobLibSettings

FILES = {"category": "filesystem", "name": "files", "schema": {"type": "object"}}
FULL_NAME = "lab:filesystem:files"


async def offer(user: Any, room: str = "lab", **changes: Any) -> dict[str, Any]:
    answer = await user.put(f"/rooms/{room}/providers", json={**FILES, **changes})
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


async def seen(user: Any, room: str) -> set[str]:
    answer = await user.get(f"/rooms/{room}/providers")
    return {item["full_name"] for item in answer.raise_for_status().json()["items"]}


# --- registering ---


async def test_a_provider_is_made_then_replaced_by_its_owner(ada, bob, admin, events):
    made = await ada.put("/rooms/lab/providers", json=FILES)
    assert made.status_code == 201
    provider = made.json()
    assert provider == {
        "id": provider["id"],
        "room_id": "lab",
        "category": "filesystem",
        "name": "files",
        "full_name": FULL_NAME,
        "schema": {"type": "object"},
        "content_type": "application/json",
        "worker_id": provider["worker_id"],
        "created_at": provider["created_at"],
        "abridged": False,
    }
    assert [e[:] for e in events] == [("providers_invalidate", {}, "room:lab")]
    worker = (await ada.post("/workers")).json()["id"]
    changed = {**FILES, "schema": {}, "content_type": "text/plain", "worker_id": worker}
    replaced = await ada.put("/rooms/lab/providers", json=changed)
    assert replaced.status_code == 200
    want = {**provider, "schema": {}, "content_type": "text/plain", "worker_id": worker}
    assert replaced.json() == want
    # it left with its later worker, not with its first
    await ada.delete(f"/workers/{provider['worker_id']}")
    assert await seen(ada, "lab") == {FULL_NAME}
    answer = await bob.put("/rooms/lab/providers", json=FILES)
    problem(answer, 403, "forbidden")
    info = await bob.get(f"/rooms/lab/providers/{FULL_NAME}/info")
    assert info.json() == want
    taken = await admin.put("/rooms/lab/providers", json=FILES)
    assert taken.status_code == 200
    # a new id: what the former owner still uploads is nobody's
    assert taken.json()["id"] != provider["id"]
    answer = await ada.put("/rooms/lab/providers", json=FILES)
    problem(answer, 403, "forbidden")


async def test_rooms_categories_and_workers_are_checked(app, ada, bob, admin):
    async def refused(user: Any, room: str, status: int, kind: str, **changes: Any) -> None:
        body = {**FILES, **changes}
        problem(await user.put(f"/rooms/{room}/providers", json=body), status, kind)

    await refused(ada, "@global", 403, "forbidden")
    await refused(admin, "@internal", 403, "forbidden")
    await refused(ada, "a@b", 400, "invalid-room-id")
    someones = (await bob.post("/workers")).json()["id"]
    for worker_id in (someones, str(uuid4())):
        await refused(ada, "lab", 404, "worker-not-found", worker_id=worker_id)
    app.state.joblib_settings = JobLibSettings(allowed_provider_categories=["frames"])
    await refused(ada, "lab", 400, "invalid-category")
    assert (await ada.get("/rooms/lab/providers")).json()["total"] == 0
    assert (await ada.get("/workers")).json()["total"] == 1
    await offer(ada, category="frames")
    await offer(admin, "@global", category="frames")


async def test_what_no_provider_can_be_is_refused(ada):
    for wrong in (
        {"content_type": "json"},
        {"content_type": "text/html\r\nX-Injected: 1"},
        {"content_type": "text/html\n"},
        {"content_type": "text/html;"},
        {"name": ""},
        {"name": "a:b"},
        {"name": "a\nb"},
        {"name": "a" * 256},
        {"category": ""},
        {"schema": {"type": "no such type"}},
        {"schema": []},
    ):
        answer = await ada.put("/rooms/lab/providers", json={**FILES, **wrong})
        kind = "invalid-schema" if "type" in wrong.get("schema", []) else None
        problem(answer, 422, kind or "invalid-request")
    assert (await ada.get("/rooms/lab/providers")).json()["total"] == 0
    assert (await ada.get("/workers")).json()["total"] == 0


async def test_of_eight_registrations_at_once_one_makes_it(ada):
    worker = (await ada.post("/workers")).json()["id"]
    answers = []

    async def register() -> None:
        body = {**FILES, "worker_id": worker}
        answers.append(await ada.put("/rooms/lab/providers", json=body))

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(register)
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1


# --- who sees it ---


async def test_a_room_sees_its_own_and_the_shared_ones(ada, admin):
    for user, room in ((ada, "lab"), (ada, "office"), (admin, "@global")):
        await offer(user, room)
    lab, office, everywhere = (f"{room}:filesystem:files" for room in ("lab", "office", "@global"))
    assert await seen(ada, "lab") == {lab, everywhere}
    assert await seen(ada, "@global") == {everywhere}
    assert await seen(ada, "@internal") == set()
    hidden = [("lab", office), ("@global", lab), ("@internal", everywhere)]
    malformed = [("lab", name) for name in ("lab", "lab:filesystem", "lab:a:b%00")]
    for room, name in hidden + malformed:
        for path in (f"{name}/info", name):
            answer = await ada.get(f"/rooms/{room}/providers/{path}")
            problem(answer, 404, "provider-not-found")


async def test_names_may_hold_slashes_and_be_percent_encoded(ada):
    provider = await offer(ada, category="a/b", name="c d/é?")
    for name in ("lab:a/b:c d/é%3F", "lab%3Aa%2Fb%3Ac%20d%2F%C3%A9%3F"):
        info = await ada.get(f"/rooms/lab/providers/{name}/info")
        assert info.json()["id"] == provider["id"]


async def test_every_route_asks_who_may_enter_the_room(app, ada, bob, admin):
    provider = await offer(ada)
    closed_to = set()

    async def may_enter(session: Any, caller: Any, room_id: str) -> bool:
        return room_id != "lab" or caller.id not in closed_to

    async def get_access() -> Any:
        return may_enter

    app.dependency_overrides[get_room_access] = get_access
    closed_to |= {bob.id, ada.id}
    by_room = [
        ("GET", "/rooms/lab/providers"),
        ("PUT", "/rooms/lab/providers"),
        ("GET", f"/rooms/lab/providers/{FULL_NAME}/info"),
        ("GET", f"/rooms/lab/providers/{FULL_NAME}"),
    ]
    for method, path in by_room:
        body = FILES if method == "PUT" else None
        answer = await bob.request(method, path, json=body)
        problem(answer, 403, "forbidden")
    results = f"/providers/{provider['id']}/results"
    upload = {"content": b"1", "headers": {"X-Request-Hash": "0" * 64}}
    answer = await ada.post(results, **upload)
    problem(answer, 404, "provider-not-found")
    answer = await ada.delete(f"/providers/{provider['id']}")
    problem(answer, 404, "provider-not-found")
    closed_to.clear()
    assert (await ada.post(results, **upload)).status_code == 204
    assert (await ada.delete(f"/providers/{provider['id']}")).status_code == 204


async def test_no_route_is_open_to_strangers(client):
    of_providers = [
        (method, route.path.removeprefix(router.prefix))
        for route in router.routes
        if "provider" in route.path
        for method in route.methods
    ]
    assert len(of_providers) == 6
    for method, path in of_providers:
        path = path.replace("{provider_name:fullname}", FULL_NAME)
        path = path.format(room_id="lab", provider_id=uuid4())
        assert (await client.request(method, path)).status_code == 401, path


# --- going away ---


async def test_a_provider_goes_at_its_owners_or_a_superusers_word(ada, bob, admin, events):
    for user in (ada, admin):
        provider = await offer(ada)
        path = f"/providers/{provider['id']}"
        problem(await bob.delete(path), 403, "forbidden")
        events.clear()
        assert (await user.delete(path)).status_code == 204
        assert [e[:] for e in events] == [("providers_invalidate", {}, "room:lab")]
        assert await seen(ada, "lab") == set()
        problem(await user.delete(path), 404, "provider-not-found")


class Hook:
    """What the host hears of removed providers; it looks at the host meanwhile."""

    def __init__(self, user: Any) -> None:
        self.user = user
        self.heard: list[FullName] = []
        self.raises = False

    async def __call__(self, names: list[FullName]) -> None:
        # it is called after the commit, and holds up nobody
        assert not {str(name) for name in names} & await seen(self.user, "lab")
        self.heard += names
        if self.raises:
            raise RuntimeError("the hook's own fault")


@pytest.fixture
def hook(app: FastAPI, bob: Any) -> Hook:
    app.state.on_providers_removed = Hook(bob)
    return app.state.on_providers_removed


FILES_OF_LAB = FullName("lab", "filesystem", "files")
FRAMES_OF_LAB = FullName("lab", "frames", "files")


@pytest.mark.parametrize("raises", [False, True])
async def test_the_host_hears_of_providers_that_a_route_removes(ada, hook, events, raises, caplog):
    hook.raises = raises
    provider = await offer(ada)
    assert not hook.heard
    answer = await ada.delete(f"/providers/{provider['id']}")
    assert answer.status_code == 204
    assert hook.heard == [FILES_OF_LAB]
    assert str(hook.heard[0]) == FULL_NAME
    again = await offer(ada)
    await offer(ada, category="frames", worker_id=again["worker_id"])
    hook.heard.clear()
    events.clear()
    answer = await ada.delete(f"/workers/{again['worker_id']}")
    assert answer.status_code == 204
    assert sorted(hook.heard) == [FILES_OF_LAB, FRAMES_OF_LAB]
    assert [e[:] for e in events] == [("providers_invalidate", {}, "room:lab")]
    assert ("the hook's own fault" in caplog.text) == raises


@pytest.mark.parametrize("raises", [False, True])
async def test_the_host_hears_of_providers_that_the_sweeper_removes(
    app, ada, hook, session_maker, events, raises, caplog
):
    hook.raises = raises
    kept = await offer(ada, "office")
    gone = [await offer(ada), await offer(ada, category="frames")]
    await silence(session_maker, *[provider["worker_id"] for provider in gone])
    settings = JobLibSettings()
    events.clear()
    swept = await cleanup_stale_workers(
        session_maker, settings, app.state.tsio, on_providers_removed=hook
    )
    assert swept == 2
    assert sorted(hook.heard) == [FILES_OF_LAB, FRAMES_OF_LAB]
    assert [e[:] for e in events] == [("providers_invalidate", {}, "room:lab")]
    assert await seen(ada, "office") == {"office:filesystem:files"}
    events.clear()
    assert await cleanup_worker(
        session_maker, UUID(kept["worker_id"]), settings, app.state.tsio, hook
    )
    assert hook.heard[2:] == [FullName("office", "filesystem", "files")]
    assert [e[:] for e in events] == [("providers_invalidate", {}, "room:office")]
    assert ("the hook's own fault" in caplog.text) == raises


# --- the server's own ---


class Kind(StrEnum):
    FRAMES = "frames"


class Frames:
    """A host's own class: nothing of the library's."""

    category = Kind.FRAMES
    content_type = "application/octet-stream"

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return {"properties": {"index": {"type": "string"}}}


FRAMES = "@internal:frames:Frames"


async def test_the_servers_own_providers_are_run_by_the_broker(
    app, ada, bob, admin, session_maker, events
):
    async def execute(cls: Any, params: Any, provider_id: str, request_id: str) -> None:
        assert cls is Frames
        failed = params["index"] == "7"
        headers = {"X-Request-Hash": request_id}
        answer = await admin.post(
            f"/providers/{provider_id}/results",
            content=b"no such frame" if failed else f"frame {params['index']}",
            headers=headers | ({"X-Result-Status": "error"} if failed else {}),
        )
        assert answer.status_code == 204, answer.text

    broker = InMemoryBroker()
    registry = register_internal_providers(broker, [Frames], execute)
    assert set(broker.get_all_tasks()) >= {FRAMES}
    path = f"/rooms/lab/providers/{FRAMES}"
    problem(await bob.get(f"{path}/info"), 404, "provider-not-found")
    async with anyio.create_task_group() as replicas:
        for _ in range(3):
            replicas.start_soon(
                partial(ensure_internal_providers, [Frames], session_maker, user_id=admin.id)
            )
    info = (await bob.get(f"{path}/info")).json()
    assert info["worker_id"] is None
    assert info["schema"] == Frames.model_json_schema()
    for room in ("lab", "office", "@internal"):
        assert await seen(bob, room) == {FRAMES}
    assert await seen(bob, "@global") == set()

    problem(await bob.get(path), 503, "internal-provider-not-configured")
    app.state.internal_provider_registry = registry
    answer = await bob.get(f"{path}?index=3")
    assert (answer.status_code, answer.content) == (200, b"frame 3")
    assert answer.headers["Content-Type"] == "application/octet-stream"
    failed = await bob.get(f"{path}?index=7")
    problem(failed, 400, "provider-execution-failed")
    assert failed.json()["detail"] == "no such frame"
    assert {e.event for e in events} == {"provider_result_ready"}

    own = f"/providers/{info['id']}"
    for user in (bob, admin):
        problem(await user.delete(own), 403, "forbidden")
    forged = await bob.post(f"{own}/results", headers={"X-Request-Hash": "0" * 64})
    problem(forged, 403, "forbidden")
    assert await seen(bob, "lab") == {FRAMES}


async def test_the_servers_own_providers_follow_its_code(ada, bob, admin, session_maker):
    class Changed(Frames):
        content_type = "text/plain"

    Changed.__name__ = "Frames"
    for version in (Frames, Changed):
        await ensure_internal_providers([version], session_maker, user_id=admin.id)
        info = (await bob.get(f"/rooms/lab/providers/{FRAMES}/info")).json()
        assert info["content_type"] == version.content_type
    assert (await bob.get("/rooms/lab/providers")).json()["total"] == 1


async def test_a_broker_that_is_down_is_told(app, bob, admin, session_maker):
    class Down(InMemoryBroker):
        async def kick(self, message: Any) -> None:
            raise ConnectionError("no broker")

    async def execute(*args: Any) -> None:
        raise AssertionError("nothing was sent")

    app.state.internal_provider_registry = register_internal_providers(Down(), [Frames], execute)
    await ensure_internal_providers([Frames], session_maker, user_id=admin.id)
    for _ in range(2):
        answer = await bob.get(f"/rooms/lab/providers/{FRAMES}")
        problem(answer, 503, "service-unavailable")


# --- a worker's process ---


@asynccontextmanager
async def provider_process(
    *arguments: str,
) -> AsyncIterator[tuple[Process, Callable[[], Awaitable[bytes]]]]:
    """Run a provider; yield its process, and what returns its next line."""
    script = str(Path(__file__).parent / "harness" / "provider_process.py")
    command = [sys.executable, script, *arguments]
    async with await anyio.open_process(command, stderr=None) as process:
        assert process.stdout is not None
        lines = BufferedByteReceiveStream(process.stdout)

        async def line() -> bytes:
            with anyio.fail_after(120):
                return await lines.receive_until(b"\n", 100)

        try:
            assert await line() == b"ready"
            yield process, line
        finally:
            with suppress(ProcessLookupError):
                process.kill()


@pytest.mark.makers("plain")
async def test_a_process_is_killed_in_the_middle_of_a_read(ada, bob, server, session_maker):
    path = "/rooms/lab/providers/lab:numbers:slow"
    answers = []

    async def read() -> None:
        answers.append(await bob.get(path, headers={"Prefer": "wait=2"}))

    async with (
        provider_process(server, ada.token, "") as (process, line),
        anyio.create_task_group() as readers,
    ):
        for _ in range(5):
            readers.start_soon(read)
        assert await line() == b"reads"
        process.kill()
    assert len(answers) == 5
    for answer in answers:
        problem(answer, 504, "provider-timeout")
        assert answer.headers["Retry-After"] == "2"
    # its successor is asked, although the first request is still marked as under way
    async with provider_process(server, ada.token, "42") as (_, line):
        assert (await bob.get(path)).text == "42"
        assert await line() == b"reads"
