"""What the docs show is what the code does."""

import asyncio
import io
import json
import logging
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from xml.etree import ElementTree

import anyio
import conftest
import httpx
import pages
import pytest
import servers
import socketio
import sqlalchemy as sa
import states
import steps
import tables
from processes import Process, running
from taskiq.api import run_receiver_task
from taskiq_redis import ListQueueBroker

import zndraw_joblib
from zndraw_joblib import JobManager
from zndraw_joblib import __main__ as command
from zndraw_joblib.lifecycle import TRANSITIONS, TaskStatus, Transition
from zndraw_joblib.workers import Caller

pytestmark = pytest.mark.makers("plain")

#: what a block may be; of others nobody would know whether they are true
KINDS = {
    "python",
    "sh",
    "sql",
    "postgresql",
    "json",
    "ini",
    "mermaid",
    "text",
    "{literalinclude}",
    "{toctree}",
    "{include}",
}


TUTORIAL = pages.DOCS / "tutorial.md"
#: what a page needs of the environment that it is read in
SERVERS = {"DATABASE_URL": "postgres_url", "REDIS_URL": "redis_server_url"}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Run the servers that a page's blocks connect to."""
    shown = "".join(b.code for b in pages.blocks(request.getfixturevalue("page"), "python"))
    for variable, fixture in SERVERS.items():
        if variable in shown:
            monkeypatch.setenv(variable, request.getfixturevalue(fixture))


@pytest.mark.usefixtures("elsewhere", "environment")
@pytest.mark.parametrize(
    # the tutorial's are programs, and run as such
    "page",
    [page for page in pages.PAGES if page != TUTORIAL],
    ids=lambda page: page.name,
)
async def test_code_blocks_run(page: Path):
    assert {block.kind for block in pages.blocks(page)} <= KINDS
    await pages.run(page)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("page", [pages.DOCS / "replicas.md"])
async def test_replicas_prepare_one_database_at_once(page: Path):
    page = await pages.run(page)
    await steps.at_once(*(page["prepare"]() for _ in range(4)))
    await page["engine"].dispose()
    async with page["pooled"].connect() as connection:
        assert await connection.scalar(sa.text("SELECT count(*) FROM task")) == 0
    await page["pooled"].dispose()


async def test_the_tutorial_leads_from_nothing_to_a_result(elsewhere: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    programs = pages.programs(TUTORIAL)
    assert len(programs) == len(pages.blocks(TUTORIAL, "python"))
    for name, code in programs:
        (elsewhere / name).write_text(code.replace("8000", port))
    install, *shell = [block.code for block in pages.blocks(TUTORIAL, "sh")]
    assert all(line in install for line in ("venv .venv", "pip install -q . uvicorn"))
    shown = [block.code.strip() for block in pages.blocks(TUTORIAL, "text")]

    def run(command: str) -> AbstractAsyncContextManager[Process]:
        *env, program = (
            command.replace("8000", port).replace("\\\n", "").partition(".venv/bin/python ")
        )
        assert not env[0] or "=" in env[0]
        variables = dict(part.split("=") for part in env[0].split())
        log = elsewhere / f"{len(list(elsewhere.iterdir()))}.log"
        return running(*program.split(), log=log, **variables)

    host, register, worker, task, again = shell
    async with run(host) as hosting:
        await hosting.writes("Uvicorn running")
        async with run(register) as registering:
            assert await registering.ends() == 0
            assert registering.written().strip() == shown[0]
        async with run(worker) as working:
            await working.writes(re.escape(shown[1]))
            async with run(task) as submitting:
                assert await submitting.ends() == 0, submitting.written()
                assert submitting.written().strip() == shown[2]
            await working.writes("at work on")
            working.popen.send_signal(signal.SIGINT)
            assert await working.ends() == 0, working.written()
        async with run(again) as submitting:
            assert await submitting.ends() == 1
            assert submitting.written().splitlines()[-1] == shown[3]


async def test_a_mounted_host_is_one(elsewhere: Path):
    app = (await pages.run(pages.DOCS / "mount.md"))["app"]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        url = await stack.enter_async_context(servers.serve(app))
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url))
        ada = {"email": "ada@example.org", "password": "correct horse battery"}
        await http.post("/auth/register", json=ada)
        login = {"username": ada["email"], "password": ada["password"]}
        answer = await http.post("/auth/jwt/login", data=login)
        token = answer.json()["access_token"]
        http.headers["Authorization"] = f"Bearer {token}"
        tsio = socketio.AsyncClient()
        heard = asyncio.Queue()
        tsio.on("*", lambda event, data: heard.put_nowait(event))
        await tsio.connect(url, auth={"token": token})
        await tsio.call("join_room", {"room_id": "lab"})
        job = {"category": "analysis", "name": "Count", "schema": {}}
        path = "/v1/joblib/rooms/{}/jobs"
        # she is no superuser here
        assert (await http.put(path.format("@global"), json=job)).status_code == 403
        assert (await http.put(path.format("lab"), json=job)).status_code == 201
        assert await asyncio.wait_for(heard.get(), 10) == "jobs_invalidate"
        job["category"] = "selections"
        assert (await http.put(path.format("lab"), json=job)).status_code == 400
        await tsio.disconnect()
        with pytest.raises(socketio.exceptions.ConnectionError):
            await socketio.AsyncClient().connect(url, retry=False)


async def test_private_rooms_are_private(elsewhere: Path, app, session_maker, ada, bob, admin):
    page = await pages.run(pages.DOCS / "private-rooms.md")
    page["with_private_rooms"](app)
    page["with_archived_rooms"](app)
    page["with_private_channels"](app.state.tsio, session_maker)
    members = page["members"]
    async with session_maker() as session:
        connection = await session.connection()
        await connection.run_sync(members.create)
        for room in ("lab", "thesis-2019"):
            row = {"room_id": room, "user_id": ada.id}
            await session.execute(members.insert().values(row))
        await session.commit()
    worker = await steps.offer(ada)
    assert worker
    assert (await bob.get("/rooms/lab/jobs")).status_code == 403
    assert (await bob.get("/rooms/@global/jobs")).status_code == 200
    task = await steps.submit(ada)
    assert (await bob.get(f"/tasks/{task['id']}")).status_code == 404
    archived = await steps.register(ada, room="thesis-2019")
    assert steps.problem(archived, 403, "forbidden")["detail"].endswith("archived")
    assert (await ada.get("/rooms/thesis-2019/jobs")).status_code == 200
    # Socket.IO asks the same question
    tsio = app.state.tsio
    entered = []

    async def enter_room(sid, channel):
        entered.append((sid, channel))

    async def get_session(sid):
        return {"caller": Caller({"ada": ada, "bob": bob}.get(sid, admin).id, sid == "admin")}

    tsio.enter_room, tsio.get_session = enter_room, get_session
    handlers = tsio.handlers["/"]
    for sid in ("ada", "bob", "admin"):
        await handlers["join_room"](sid, {"room_id": "lab"})
        for room in ("lab", "@global"):
            await handlers["join_job_room"](sid, {"job_name": f"{room}:analysis:A"})
            provider = {"provider_name": f"{room}:files:Disk"}
            await handlers["join_provider_room"](sid, provider)
    in_lab = ["room:lab", "jobs:lab:analysis:A", "providers:lab:files:Disk"]
    of_all = ["jobs:@global:analysis:A", "providers:@global:files:Disk"]
    assert entered == [
        *(("ada", channel) for channel in in_lab),
        *(("admin", channel) for channel in in_lab + of_all),
    ]


#: a page's ``work`` in a process of its own, where SIGTERM ends it
WORK = """
import asyncio, sys
from pathlib import Path
import pages

page = asyncio.run(pages.run(Path(sys.argv[1])))
page["work"](*sys.argv[2:])
"""


@asynccontextmanager
async def working(page: Path, elsewhere: Path, *arguments: str) -> AsyncIterator[None]:
    """Let the worker that a page shows work, and leave when it is asked to."""
    command, log = ("-c", WORK, page, *arguments), elsewhere / "worker.log"
    paths = os.pathsep.join(map(str, (pages.ROOT / "tests" / "harness", pages.DOCS)))
    async with running(*command, log=log, PYTHONPATH=paths) as process:
        yield
        process.popen.send_signal(signal.SIGTERM)
        assert await process.ends() == 0, process.written()


async def is_there(user: Any, job: str, room: str = "lab") -> None:
    """Wait until a worker offers a job."""
    with anyio.fail_after(120):
        while (await user.get(f"/rooms/{room}/jobs/{job}")).status_code == 404:
            await anyio.sleep(0.05)


async def test_the_worker_of_the_readme_counts(elsewhere: Path, server, admin):
    readme = pages.ROOT / "README.md"
    page = await pages.run(readme)
    login = (server, admin.email, conftest.PASSWORD)
    async with working(readme, elsewhere, *login):
        await is_there(admin, "@global:analysis:Composition", "my-room")
        counted = await asyncio.to_thread(page["count"], *login)
    assert counted == {"Cu": 2, "O": 1}
    await page["engine"].dispose()


async def test_a_gpu_worker_loads_once_and_works(elsewhere: Path, server, ada):
    page = pages.DOCS / "gpu-workers.md"
    async with working(page, elsewhere, server, ada.token, "cuda:7"):
        await is_there(ada, "lab:modifiers:Relax")
        task = await steps.submit(ada, "lab:modifiers:Relax", payload={"steps": 3})
        answer = await ada.get(f"/tasks/{task['id']}", headers={"Prefer": "wait=20"})
    assert answer.json()["result"] == {"steps": 3, "device": "cuda:7"}


async def test_a_long_job_reports_drains_and_is_looped_over(elsewhere, server, app, ada):
    page = await pages.run(pages.DOCS / "gpu-workers.md")

    def work() -> tuple[Any, ...]:
        with JobManager.connect(server, token=ada.token) as manager:
            relax = page["Relax"]
            page["work_patiently"](manager, {"potential": page["Potential"]("cpu")})
            ids = [manager.submit(relax(), "lab", job_room="lab") for _ in range(2)]
            page["serve"](manager, 2)
            http = httpx.Client(base_url=server, headers=ada.headers)
            page["drain"](http, str(manager.worker_id))
            ended = manager.wait_all(ids, 10)
            listed = http.get("/v1/joblib/workers").json()["items"]
            http.close()
            return ended, listed

    ended, listed = await asyncio.to_thread(work)
    assert [task.status for task in ended] == ["completed"] * 2
    assert ended[0].result == {"steps": 100, "device": "cuda:0"}
    assert ended[0].max_attempts == page["policy"].max_attempts == 3
    assert [worker["state"] for worker in listed] == ["draining"]


async def test_a_scan_is_submitted_and_served_in_batches(elsewhere, server, ada):
    page = await pages.run(pages.DOCS / "batches.md")

    def scan() -> tuple[Any, ...]:
        with page["work"](server, ada.token, "lab") as manager:
            results = page["scan"](manager, "lab")
            once, again = (page["scan_once"](manager, "lab") for _ in range(2))
            return results, once, again

    results, once, again = await asyncio.to_thread(scan)
    assert results == [{"Cu": n} for n in range(1, 101)]
    assert once == again
    assert len(set(once)) == 100


async def thumbnails(page: dict[str, Any], user: Any) -> list[dict[str, Any]]:
    """Return what becomes of a good task and of one that fails."""
    run, ended = page["Thumbnail"].run, []
    for how in (run, Mock(side_effect=ValueError("no picture"))):
        page["Thumbnail"].run = how
        task = await steps.submit(user, "@internal:analysis:Thumbnail", payload={"width": 7})
        answer = await user.get(f"/tasks/{task['id']}", headers={"Prefer": "wait=20"})
        ended.append({k: answer.json()[k] for k in ("status", "result", "error")})
    page["Thumbnail"].run = run
    return ended


THUMBNAILS = [
    {"status": "completed", "result": {"width": 7}, "error": None},
    {"status": "failed", "result": None, "error": "ValueError: no picture"},
]


@pytest.fixture
async def service(app) -> AsyncIterator[httpx.AsyncClient]:
    """Yield the client that ``@internal`` tasks are reported with."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as http:
        yield http


async def test_internal_jobs_of_the_page_run(elsewhere, app, ada, admin, service):
    page = await pages.run(pages.DOCS / "internal-jobs.md")
    mint_token = page["make_mint_token"](app.state.auth_settings, admin.id)
    broker = await page["register"](app, page["make_executor"](service), mint_token)
    assert await thumbnails(page, ada) == THUMBNAILS
    await broker.shutdown()


async def test_internal_jobs_of_the_page_run_beside_the_host(
    elsewhere, app, session_maker, ada, admin, service, redis_url
):
    page = await pages.run(pages.DOCS / "internal-jobs.md")
    sender = ListQueueBroker(redis_url)
    mint_token = page["make_mint_token"](app.state.auth_settings, admin.id)
    await zndraw_joblib.register_internal_jobs(
        app, sender, [page["Thumbnail"]], None, session_maker, mint_token
    )
    broker = page["worker_broker"](redis_url, service)
    await broker.startup()
    receiving = asyncio.create_task(run_receiver_task(broker))
    assert await thumbnails(page, ada) == THUMBNAILS
    receiving.cancel()
    await asyncio.wait([receiving])
    await broker.shutdown()
    await sender.shutdown()


async def test_a_route_behind_the_lock_lets_go_of_it(elsewhere):
    page = await pages.run(pages.DOCS / "sqlite-lock.md")
    transport = httpx.ASGITransport(page["app"])
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as http:
        answers = await steps.at_once(*(http.post("/reports") for _ in range(4)))
    assert [answer.json() for answer in answers] == [42] * 4
    assert not any(lock.locked() for lock in page["locks"].values())
    await page["engine"].dispose()


async def test_numbers_and_lines_of_the_page_are_told(elsewhere, ada, session_maker, capsys):
    page = await pages.run(pages.DOCS / "operations.md")
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(page["JsonLines"]())
    log = logging.getLogger("zndraw_joblib")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        await steps.offer(ada)
        task = await steps.submit(ada)
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    (told,) = map(json.loads, lines.getvalue().splitlines())
    assert told == {
        "message": f"task {task['id']} of {steps.JOB} submitted",
        "event": "submitted",
        "task_id": task["id"],
        "job_name": steps.JOB,
        "room_id": "lab",
        "worker_id": None,
        "attempt": 0,
    }
    async with session_maker() as session:
        await page["print_queues"](session)
    assert re.fullmatch(rf"{steps.JOB} 1 0 \d+\.\d+\n", capsys.readouterr().out)


async def test_a_host_raises_problems_of_the_page(elsewhere, app, ada):
    page = await pages.run(pages.DOCS / "problems.md")
    app.get("/quota/{used}")(page["check_quota"])
    assert (await ada.get("http://host/quota/100")).status_code == 200
    refused = steps.problem(await ada.get("http://host/quota/101"), 403, "forbidden")
    assert refused["detail"] == "your group has used its hours"


def test_shell_blocks_name_what_there_is():
    sessions = (pages.ROOT / "noxfile.py").read_text()
    for page in pages.PAGES:
        shell = "".join(block.code for block in pages.blocks(page, "sh"))
        for session in re.findall(r'nox\b.* -s "?(\w+)', shell):
            assert f"\ndef {session}(" in sessions, (page, session)
        for file in re.findall(r"(?:docs|tests)/[\w/.]+", shell):
            assert (pages.ROOT / file).exists(), (page, file)


def test_variables_that_are_named_are_settings():
    prefix = zndraw_joblib.JobLibSettings.model_config["env_prefix"]
    known = {f"{prefix}{n}".upper() for n in zndraw_joblib.JobLibSettings.model_fields}
    known |= {command.URL, command.TOKEN, command.PASSWORD}
    programs = sorted(pages.DOCS.glob("*.py"))
    for page in (*pages.PAGES, *programs):
        named = set(re.findall(rf"\b{prefix}[A-Z_]*[A-Z]", page.read_text()))
        assert named <= known, page


def ways() -> Iterator[tuple[str | None, str]]:
    for way in TRANSITIONS:
        for source in way.sources or [None]:
            yield source, way.target


def test_the_picture_shows_all_ways_and_no_others():
    picture = states.PICTURE.read_text()
    assert picture == states.draw(), "nox -s pictures"
    drawn = set()
    for group in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}g"):
        rows = {float(dot.get("cy")) for dot in group if dot.get("cy")}
        assert len(rows) == 1
        name, sources, target = (group.get(f"data-{key}") for key in ("name", "from", "to"))
        dots = {int(dot.get("cx")) for dot in group if dot.get("cx")}
        assert dots == {states.X[s] for s in sources.split()} or not sources
        tips = {int(path.get("d")[1:].split()[0]) for path in group if path.get("d")}
        assert all(abs(tip - states.X[target]) <= 2 for tip in tips)
        drawn.add((name, frozenset(sources.split()), target))
    assert drawn == {(w.name, w.sources, w.target) for w in TRANSITIONS}
    # one that comes from both sides has two arrows
    both = Transition("x", frozenset({"pending", "failed"}), TaskStatus.RUNNING)
    assert states.draw((both,)).count("<path") == 2


def test_the_diagram_of_the_readme_shows_all_ways_and_no_others():
    (diagram,) = pages.blocks(pages.ROOT / "README.md", "mermaid")
    arrows = re.findall(r"(\S+) --> (\w+):", diagram.code)
    drawn = {(None if source == "[*]" else source, to) for source, to in arrows}
    assert len(arrows) == diagram.code.count("-->")
    assert drawn == set(ways())


def test_the_reference_tells_everything():
    for what in tables.GENERATED:
        assert f"<!-- generated: {what} -->" in (pages.DOCS / f"{what}.md").read_text(), what
    made = {what: make() for what, make in tables.GENERATED.items()}
    operations = list(tables.operations(tables.openapi()))
    # what the app serves, not what is generated, says what there is
    served = {
        (method, route.path.removeprefix("/v1/joblib"))
        for route in zndraw_joblib.router.routes
        for method in route.methods
    }
    assert {(method, tables.unnamed(path)) for method, path, _ in operations} == {
        (method, tables.unnamed(path)) for method, path in served
    }
    for method, path, operation in operations:
        assert f"\n## `{method} {path}`\n\n{operation['description']}" in "\n" + (made["routes"])
    for name in zndraw_joblib.__all__:
        module = zndraw_joblib._MODULE_OF[name]
        directive = rf":: zndraw_joblib\.({module}\.)?{name}\n"
        assert sum(bool(re.search(directive, text)) for text in made.values()) == 1, name
    for name, field in zndraw_joblib.JobLibSettings.model_fields.items():
        assert " ".join(field.description.split()) in made["settings"], name
        assert f"| `{name}` |" in made["settings"]
    assert zndraw_joblib.JobLibSettings.model_config["env_prefix"] == "ZNDRAW_JOBLIB_"


def test_every_problem_and_event_is_told():
    def heirs(cls: type) -> Iterator[type]:
        for heir in cls.__subclasses__():
            # what others are derived from is none by itself
            if not heir.__subclasses__():
                yield heir
            yield from heirs(heir)

    ours = [zndraw_joblib.exceptions.Problem, zndraw_joblib.FrozenEvent]
    for base, made in zip(ours, (tables.problems(), tables.event_sections()), strict=True):
        for cls in heirs(base):
            if cls.__module__.startswith("zndraw_joblib"):
                name = tables.title(cls) if base is ours[0] else cls.event_name
                assert f"## {name}\n\n{tables.told(cls)}" in made


def test_links_of_the_front_page_lead_somewhere():
    """The site's own links are checked when it is built; these pages are not of it."""
    for page in (pages.ROOT / "README.md", pages.ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("http") or (pages.ROOT / link).exists(), link
