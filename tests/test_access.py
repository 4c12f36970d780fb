"""Who may do what: the table of docs/access.md, walked against the routes themselves."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import documented
import httpx
import pytest
from conftest import PREFIX
from fastapi import FastAPI
from sqlalchemy import update
from steps import claim, execute, move, offer, problem, register, report, stored, submit
from zndraw_auth import User as UserRow

from zndraw_joblib import Action, expel, get_room_access, request_hash, verify_writable_room
from zndraw_joblib.exceptions import Forbidden
from zndraw_joblib.workers import RoomAccess

pytestmark = pytest.mark.makers("plain", "postgres")

PAGE = Path(__file__).parent.parent / "docs" / "access.md"
UPLOAD = {"X-Request-Hash": request_hash({})}

Row = tuple[str, str]
#: What each row of the table says: a status code for each role.
Table = dict[Row, dict[str, int]]


def read_table(page: str) -> Table:
    lines = re.findall(r"^\|(.*)\|$", page, re.MULTILINE)
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    table = {
        (route.strip("`"), what): dict(zip(head[2:], map(int, cells), strict=True))
        for route, what, *cells in rows
    }
    assert len(table) == len(rows), "a row stands twice"
    return table


DOCUMENTED = read_table(PAGE.read_text())


class Scene:
    """A private room with a worker, its job, a task of that job, and a provider."""

    def __init__(self, room: str, users: dict[str, Any]) -> None:
        self.room = room
        self.owner, self.submitter = users["owner"], users["submitter"]
        self.job = f"{room}:modifiers:Rotate"
        self.files = {"category": "files", "name": "files", "schema": {}}
        self.provider = f"{room}:files:files"

    async def set_up(self) -> None:
        self.worker = await offer(self.owner, room=self.room)
        done = await submit(self.submitter, self.job, self.room)
        self.done = await move(self.owner, self.worker, done, "completed")
        self.task = await submit(self.submitter, self.job, self.room)
        offered = await self.owner.put(f"/rooms/{self.room}/providers", json=self.files)
        self.provider_id = offered.json()["id"]

    async def upload(self, user: httpx.AsyncClient) -> httpx.Response:
        results = f"/providers/{self.provider_id}/results"
        return await user.post(results, content=b"{}", headers=UPLOAD)

    async def read(self, user: httpx.AsyncClient) -> httpx.Response:
        """Read from the provider, whose worker answers as soon as it is asked."""
        reading = asyncio.create_task(user.get(f"/rooms/{self.room}/providers/{self.provider}"))
        # what was not asked for is dropped
        while not reading.done():
            await self.upload(self.owner)
            await asyncio.sleep(0.01)
        return await reading

    async def offer(
        self, user: httpx.AsyncClient, noun: str, room: str = "", **fields: Any
    ) -> httpx.Response:
        body = {"category": "modifiers", "name": uuid4().hex, "schema": {}, **fields}
        return await user.put(f"/rooms/{room or self.room}/{noun}", json=body)

    async def report(self, user: httpx.AsyncClient, before: str, status: str) -> httpx.Response:
        await self.bring_to(before)
        return await user.patch(f"/tasks/{self.task['id']}", json={"status": status})

    async def report_in_batch(self, user: httpx.AsyncClient, status: str) -> httpx.Response:
        """Return the answer as if it were that of the one report in it."""
        await self.bring_to("running")
        reports = [{"id": self.task["id"], "status": status}]
        answer = await user.patch("/tasks", json={"reports": reports})
        if answer.is_success:
            (outcome,) = answer.json()["outcomes"]
            answer.status_code = outcome["status"]
        return answer

    async def query(self, user: httpx.AsyncClient) -> httpx.Response:
        answer = await user.post("/tasks/query", json={"ids": [self.task["id"]]})
        if answer.is_success and answer.json()["missing"]:
            answer.status_code = 404
        return answer

    async def retry(self, user: httpx.AsyncClient) -> httpx.Response:
        await self.bring_to("failed")
        return await user.post(f"/tasks/{self.task['id']}/retry")

    async def delete(self, user: httpx.AsyncClient) -> httpx.Response:
        await self.bring_to("failed")
        return await user.delete(f"/tasks/{self.task['id']}")

    async def bring_to(self, status: str) -> None:
        if self.task["status"] != status:
            self.task = await move(self.owner, self.worker, self.task, status)


#: How a row is asked: a request that succeeds where it may.
ASKED: dict[Row, Callable[[Scene, httpx.AsyncClient], Awaitable[httpx.Response]]] = {
    ("POST /workers", ""): lambda s, u: u.post("/workers"),
    ("GET /workers", ""): lambda s, u: u.get("/workers"),
    ("GET /limits", ""): lambda s, u: u.get("/limits"),
    ("PATCH /workers/{worker_id}", "heartbeat"): lambda s, u: u.patch(f"/workers/{s.worker}"),
    ("PATCH /workers/{worker_id}", "state"): lambda s, u: u.patch(
        f"/workers/{s.worker}", json={"state": "draining"}
    ),
    ("DELETE /workers/{worker_id}", ""): lambda s, u: u.delete(f"/workers/{s.worker}"),
    ("GET /rooms/{room_id}/workers", ""): lambda s, u: u.get(f"/rooms/{s.room}/workers"),
    ("PUT /rooms/{room_id}/jobs", ""): lambda s, u: s.offer(u, "jobs"),
    ("PUT /rooms/{room_id}/jobs", "in `@global`"): lambda s, u: s.offer(u, "jobs", "@global"),
    ("PUT /rooms/{room_id}/jobs", "in `@internal`"): lambda s, u: s.offer(u, "jobs", "@internal"),
    ("PUT /rooms/{room_id}/jobs", "with the owner's worker"): lambda s, u: s.offer(
        u, "jobs", worker_id=s.worker
    ),
    ("GET /rooms/{room_id}/jobs", ""): lambda s, u: u.get(f"/rooms/{s.room}/jobs"),
    ("GET /rooms/{room_id}/jobs", "of `@global`"): lambda s, u: u.get("/rooms/@global/jobs"),
    ("GET /rooms/{room_id}/stats", ""): lambda s, u: u.get(f"/rooms/{s.room}/stats"),
    ("GET /rooms/{room_id}/jobs/{job_name}", ""): lambda s, u: u.get(
        f"/rooms/{s.room}/jobs/{s.job}"
    ),
    ("PATCH /rooms/{room_id}/jobs/{job_name}", ""): lambda s, u: u.patch(
        f"/rooms/{s.room}/jobs/{s.job}", json={"paused": True}
    ),
    ("POST /rooms/{room_id}/tasks/bulk", ""): lambda s, u: u.post(
        f"/rooms/{s.room}/tasks/bulk", json={"action": "cancel", "job": s.job}
    ),
    ("DELETE /tasks/{task_id}", ""): lambda s, u: s.delete(u),
    ("GET /rooms/{room_id}/jobs/{job_name}", "from another room"): lambda s, u: u.get(
        f"/rooms/open/jobs/{s.job}"
    ),
    ("GET /rooms/{room_id}/jobs/{job_name}/tasks", ""): lambda s, u: u.get(
        f"/rooms/{s.room}/jobs/{s.job}/tasks"
    ),
    ("POST /rooms/{room_id}/tasks/{job_name}", ""): lambda s, u: u.post(
        f"/rooms/{s.room}/tasks/{s.job}", json={}
    ),
    ("POST /rooms/{room_id}/tasks/{job_name}", "from another room"): lambda s, u: u.post(
        f"/rooms/open/tasks/{s.job}", json={}
    ),
    ("POST /rooms/{room_id}/batches/{job_name}", ""): lambda s, u: u.post(
        f"/rooms/{s.room}/batches/{s.job}", json={"tasks": [{}]}
    ),
    ("GET /rooms/{room_id}/tasks", ""): lambda s, u: u.get(f"/rooms/{s.room}/tasks"),
    ("POST /tasks/claim", ""): lambda s, u: u.post("/tasks/claim", json={"worker_id": s.worker}),
    ("GET /tasks/{task_id}", ""): lambda s, u: u.get(f"/tasks/{s.task['id']}"),
    ("POST /tasks/query", "404: `missing`"): lambda s, u: s.query(u),
    ("PATCH /tasks", "outcome of `completed`"): lambda s, u: s.report_in_batch(u, "completed"),
    ("PATCH /tasks", "outcome of `cancelled`"): lambda s, u: s.report_in_batch(u, "cancelled"),
    ("GET /tasks/{task_id}/result", ""): lambda s, u: u.get(f"/tasks/{s.done['id']}/result"),
    ("GET /tasks/{task_id}/log", ""): lambda s, u: u.get(f"/tasks/{s.done['id']}/log"),
    ("PATCH /tasks/{task_id}", "`running`"): lambda s, u: s.report(u, "claimed", "running"),
    ("PATCH /tasks/{task_id}", "`completed`"): lambda s, u: s.report(u, "running", "completed"),
    ("PATCH /tasks/{task_id}", "`failed`"): lambda s, u: s.report(u, "running", "failed"),
    ("PATCH /tasks/{task_id}", "`cancelled`"): lambda s, u: s.report(u, "running", "cancelled"),
    ("POST /tasks/{task_id}/retry", ""): lambda s, u: s.retry(u),
    ("PUT /rooms/{room_id}/providers", ""): lambda s, u: s.offer(u, "providers"),
    ("PUT /rooms/{room_id}/providers", "in the owner's place"): lambda s, u: s.offer(
        u, "providers", **s.files
    ),
    ("PUT /rooms/{room_id}/providers", "in `@global`"): lambda s, u: s.offer(
        u, "providers", "@global"
    ),
    ("PUT /rooms/{room_id}/providers", "in `@internal`"): lambda s, u: s.offer(
        u, "providers", "@internal"
    ),
    ("GET /rooms/{room_id}/providers", ""): lambda s, u: u.get(f"/rooms/{s.room}/providers"),
    ("GET /rooms/{room_id}/providers/{provider_name}/info", ""): lambda s, u: u.get(
        f"/rooms/{s.room}/providers/{s.provider}/info"
    ),
    ("GET /rooms/{room_id}/providers/{provider_name}", ""): lambda s, u: s.read(u),
    ("GET /rooms/{room_id}/providers/{provider_name}", "from another room"): lambda s, u: u.get(
        f"/rooms/open/providers/{s.provider}"
    ),
    ("POST /providers/{provider_id}/results", ""): lambda s, u: s.upload(u),
    ("DELETE /providers/{provider_id}", ""): lambda s, u: u.delete(f"/providers/{s.provider_id}"),
}


def test_each_route_has_a_row_and_each_row_a_route():
    routes = {
        f"{method.upper()} {path.removeprefix(PREFIX)}"
        for path, operations in documented.document()["paths"].items()
        for method in operations
    }
    assert {route for route, _ in DOCUMENTED} == routes
    assert DOCUMENTED.keys() == ASKED.keys()


@pytest.fixture
async def users(app: FastAPI, client, admin, register, session_maker) -> dict[str, Any]:
    """Return the roles of the table, and close all rooms but `open` to strangers."""
    users = {"anonymous": client, "inactive": await register("inactive")}
    for role in ("stranger", "member", "submitter", "owner"):
        users[role] = await register(role)
    users["superuser"] = admin
    inactive = UserRow.id == users["inactive"].id
    await execute(session_maker, update(UserRow).where(inactive).values(is_active=False))
    members = {users[role].id for role in ("member", "submitter", "owner")}

    async def may_enter(session: Any, caller: Any, room_id: str) -> bool:
        public = room_id in ("open", "@global", "@internal")
        return public or caller.is_superuser or caller.id in members

    async def room_access() -> RoomAccess:
        return may_enter

    app.dependency_overrides[get_room_access] = room_access
    return users


# who is let in is no question of the database
@pytest.mark.makers("plain")
async def test_the_table_is_what_the_routes_answer(users):
    observed: Table = {}
    scenes = 0
    scene = None
    for row, ask in ASKED.items():
        observed[row] = {}
        for role, user in users.items():
            if scene is None:
                scene = Scene(f"room{scenes}", users)
                await scene.set_up()
                scenes += 1
            answer = await ask(scene, user)
            observed[row][role] = answer.status_code
            if answer.is_success and answer.request.method != "GET":
                # it may have changed
                scene = None
    assert observed == DOCUMENTED


READING, SUBMITTING, REGISTERING = (
    Action("read"),
    Action("submit", "modifiers"),
    Action("register", "modifiers"),
)
OPERATING = Action("operate")
#: What the host is asked of each route in a room, before it is answered.
ASKS = {
    "GET /rooms/{room_id}/workers": READING,
    "PUT /rooms/{room_id}/jobs": REGISTERING,
    "GET /rooms/{room_id}/jobs": READING,
    "GET /rooms/{room_id}/stats": READING,
    "GET /rooms/{room_id}/jobs/{job_name}": READING,
    "PATCH /rooms/{room_id}/jobs/{job_name}": OPERATING,
    "POST /rooms/{room_id}/tasks/bulk": OPERATING,
    "GET /rooms/{room_id}/jobs/{job_name}/tasks": READING,
    "POST /rooms/{room_id}/tasks/{job_name}": SUBMITTING,
    "POST /rooms/{room_id}/batches/{job_name}": SUBMITTING,
    "GET /rooms/{room_id}/tasks": READING,
    "GET /tasks/{task_id}": READING,
    "POST /tasks/query": READING,
    "POST /tasks/{task_id}/retry": SUBMITTING,
    "PUT /rooms/{room_id}/providers": REGISTERING,
    "GET /rooms/{room_id}/providers": READING,
    "GET /rooms/{room_id}/providers/{provider_name}/info": READING,
    "GET /rooms/{room_id}/providers/{provider_name}": READING,
    "GET /tasks/{task_id}/result": READING,
    "GET /tasks/{task_id}/log": READING,
}


@pytest.mark.makers("plain")
async def test_the_host_is_told_what_it_is_asked_for(app, ada, bob, admin):
    """Each route asks for its own action; refused, it is refused."""
    scene = Scene("lab", {"owner": ada, "submitter": bob})
    await scene.set_up()
    await scene.bring_to("failed")
    asked: list[tuple[str, Action]] = []
    refused: set[Action] = set()

    async def may(session: Any, caller: Any, room_id: str, action: Action) -> bool:
        asked.append((room_id, action))
        return action not in refused

    async def room_access() -> RoomAccess:
        return may

    app.dependency_overrides[get_room_access] = room_access
    for route, action in ASKS.items():
        who = bob if "retry" in route else admin
        ask = next(ask for (path, _), ask in ASKED.items() if path == route)
        for refuses in (action, None):
            refused.clear()
            refused.update({refuses} if refuses else ())
            asked.clear()
            answer = await ask(scene, who)
            assert set(asked) == {("lab", action)}, route
            assert answer.is_success == (refuses is None), (route, answer.text)
            assert answer.is_success or answer.status_code in (403, 404)
            if answer.status_code == 403:
                why = "not open" if action.kind == "read" else f"not let you {action.kind}"
                assert why in answer.json()["detail"]


async def test_a_room_that_is_archived_takes_nothing(app, ada, bob, admin, session_maker):
    """Each route that writes asks for that room; refused, it leaves nothing."""
    scene = Scene("lab", {"owner": ada, "submitter": bob})
    await scene.set_up()
    await scene.bring_to("failed")
    writing = {
        f"{method.upper()} {path.removeprefix(PREFIX)}"
        for path, operations in documented.document()["paths"].items()
        for method in operations
        if method != "get" and "{room_id}" in path
    }
    writing.add("POST /tasks/{task_id}/retry")
    # what is there may be cleared up: only what is retried is new
    operating = {route for route, action in ASKS.items() if action == OPERATING}
    writing -= operating
    assert writing == {route for route, action in ASKS.items() if action != READING} - operating
    asked, archived = [], set()

    async def writable(room_id: str) -> str:
        asked.append(room_id)
        if room_id in archived:
            raise Forbidden.exception("archived")
        return room_id

    app.dependency_overrides[verify_writable_room] = writable
    for route in sorted(writing):
        who = bob if "retry" in route else admin
        ask = next(ask for (path, _), ask in ASKED.items() if path == route)
        before = await stored(session_maker)
        archived.add("lab")
        problem(await ask(scene, who), 403, "forbidden")
        assert await stored(session_maker) == before, route
        archived.clear()
        assert (await ask(scene, who)).is_success, route
        assert asked == ["lab", "lab"], route
        asked.clear()


async def test_who_lost_a_room_retries_nothing_there(app, ada, bob, admin):
    """By the older override too."""
    worker = await offer(ada)
    task = await submit(bob)
    await move(ada, worker, task, "failed")
    retry = f"/tasks/{task['id']}/retry"
    closed = {bob.id}

    async def may_enter(session: Any, caller: Any, room_id: str) -> bool:
        return caller.id not in closed

    async def room_access() -> RoomAccess:
        return may_enter

    app.dependency_overrides[get_room_access] = room_access
    assert (await bob.get(f"/tasks/{task['id']}")).json()["status"] == "failed"
    problem(await bob.post(retry), 403, "forbidden")
    closed.clear()
    assert (await bob.post(retry)).status_code == 202


async def test_who_is_expelled_serves_nothing_there(ada, bob, session_maker, tsio, events):
    """What is elsewhere stays, and so does what others offer in the room."""
    worker = await offer(bob)
    await register(bob, "Alone", worker_id=worker)
    await register(bob, room="attic", worker_id=worker)
    other = await offer(ada)
    files = {"category": "files", "schema": {}, "worker_id": worker}
    for room in ("lab", "attic"):
        await bob.put(f"/rooms/{room}/providers", json={"name": "his", **files})
    held = await submit(ada)
    (running,) = await claim(bob, worker, start=True)
    assert running["id"] == held["id"]
    waiting = await submit(ada)
    elsewhere = await submit(ada, "attic:modifiers:Rotate", "attic")
    withdrawn: list[str] = []

    async def removed(names: Any) -> None:
        withdrawn.extend(map(str, names))

    events.clear()
    assert await expel(session_maker, bob.id, "lab", None, tsio, removed) == 2
    assert withdrawn == ["lab:files:his"]
    assert {(e.event, e.room) for e in events} == {
        ("jobs_invalidate", "room:lab"),
        ("providers_invalidate", "room:lab"),
    }
    assert [t["id"] for t in await claim(bob, worker, max_tasks=9)] == [elsewhere["id"]]
    assert (await report(bob, held, "completed")).status_code == 200
    listed = (await ada.get("/rooms/lab/jobs")).json()["items"]
    assert [(job["name"], job["workers"]) for job in listed] == [("Rotate", [other])]
    assert [t["id"] for t in await claim(ada, other)] == [waiting["id"]]
    assert (await ada.get("/rooms/lab/providers")).json()["total"] == 0
    assert (await ada.get("/rooms/attic/providers")).json()["total"] == 1
    assert await expel(session_maker, bob.id, "lab") == 0
