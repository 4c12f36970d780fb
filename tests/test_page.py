"""The page of the example host, driven in a real Chromium: ``nox -s page``."""

import asyncio
import os
import re
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import conftest
import pytest
import servers
import steps
import test_beneath
from anyio.to_thread import run_sync
from conftest import User
from fastapi import FastAPI
from makers import SessionMaker
from pydantic import BaseModel, Field
from sqlalchemy import text

from zndraw_joblib import Category, Extension, JobManager, get_room_access

playwright = pytest.importorskip("playwright.async_api")
axe = pytest.importorskip("axe_playwright_python.async_playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")

pytestmark = [
    pytest.mark.makers("plain"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
]
#: milliseconds, against hangs
HANG = 60_000


class Axis(StrEnum):
    X = "x"
    Z = "z"


class Bath(BaseModel):
    """What the atoms exchange heat with."""

    temperature: float = Field(default=300, ge=0, json_schema_extra={"unit": "K"})


class Stretch(Extension):
    """Stretch the cell along an axis."""

    category: ClassVar[Category] = Category.MODIFIER
    factor: float = Field(default=1.1, gt=0, description="New length over old length")
    axis: Axis = Axis.Z

    def run(self, vis: Any, **kwargs: Any) -> dict[str, Any]:
        if self.factor > 9:
            raise ValueError("too far")
        energies = [{"step": n, "energy": round(-3.9 + 0.2 / 2**n, 4)} for n in range(5)]
        return {"length": 10 * self.factor, "energies": energies}


class Everything(Extension):
    """All kinds of fields."""

    category: ClassVar[Category] = Category.ANALYSIS
    name: str
    count: int
    mode: Literal["fast", "exact"] = "fast"
    label: str | None = None
    seed: int | None = 7
    wrap: bool = True
    sure: bool | None = None
    centre: tuple[float, float, float] = (0, 0, 0)
    atoms: list[int] = Field(default=[1, 2])
    bath: Bath = Bath()
    other: Bath | None = None
    baths: list[Bath] = Field(default=[])
    notes: dict[str, str] = Field(default={})
    either: int | list[int] = 3

    def run(self, vis: Any, **kwargs: Any) -> None:
        """Do nothing."""


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Any]:
    async with playwright.async_playwright() as driver:
        chromium = driver.chromium
        browser = await chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Any) -> AsyncIterator[Any]:
    context = await browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(HANG)
    playwright.expect.set_options(timeout=HANG)
    page = await context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # what is not the host's would be a dependency from outside
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    yield page
    await context.close()
    assert wrong == []
    assert len(hosts) <= 1


async def log_in(page: Any, user: User, password: str = conftest.PASSWORD) -> None:
    await page.get_by_label("E-mail").fill(user.email)
    await page.get_by_label("Password").fill(password)
    await page.get_by_role("button", name="Log in").click()


async def enter(page: Any, url: str, user: User) -> None:
    await page.goto(url)
    await log_in(page, user)
    await playwright.expect(page.locator("#line")).to_have_text("live")


async def hide(page: Any, hidden: bool) -> None:
    """Let the page believe that it is in a tab behind another one, or no longer."""
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    properties = f"{{value: {str(hidden).lower()}, configurable: true}}"
    await page.evaluate(f"Object.defineProperty(document, 'hidden', {properties}); {tell}")


async def draw(page: Any, name: str) -> None:
    """Draw a picture for the docs, where ``PICTURES`` says."""
    if directory := os.environ.get("PICTURES"):
        # what was said last would hide what is beneath it
        await page.evaluate("document.querySelector('#said').textContent = ''")
        await page.screenshot(path=Path(directory) / name, full_page=True)


def lane(page: Any, name: str) -> Any:
    return page.locator(f"#{name} .card")


async def connect(url: str, user: User, execute: Callable[[Any], Any], *jobs: Any) -> JobManager:
    login = {"user": user.email, "password": conftest.PASSWORD}
    manager = await run_sync(partial(JobManager.connect, url, **login, execute=execute))
    for job in jobs:
        await run_sync(partial(manager.register, job, room="lab"))
    return manager


async def test_people_see_tasks_move_and_move_them(
    page: Any, server: str, ada: User, bob: User, monkeypatch: pytest.MonkeyPatch
):
    expect = playwright.expect
    monkeypatch.setattr("socket.gethostname", lambda: "node7")
    running, go = threading.Event(), threading.Event()

    def execute(task: Any) -> Any:
        task.progress(0.4, "pulling")
        task.log(f"stretching by {task.extension.factor}")
        running.set()
        assert go.wait(30)
        return task.extension.run(None)

    await page.goto(server)
    await log_in(page, bob, "wrong")
    await expect(page.get_by_text("not the password")).to_be_visible()
    await log_in(page, bob)
    await expect(page.locator("#line")).to_have_text("live")
    await expect(page.get_by_text("No job yet")).to_be_visible()

    # a worker comes, and the page hears of it
    manager = await connect(server, ada, execute, Stretch)
    try:
        job = page.locator("#jobs button")
        await expect(job).to_contain_text("1 worker alive")
        await expect(page.locator(".worker.alive")).to_contain_text("node7:")
        waiting, going, ended = (lane(page, name) for name in ("waiting", "running", "ended"))
        factor = page.get_by_label("Factor")

        async def send(value: str) -> None:
            await factor.fill(value)
            await page.get_by_role("button", name="Submit", exact=True).click()

        await job.press("Enter")
        await send("-1")
        await expect(factor).to_have_attribute("aria-invalid", "true")
        await expect(factor).to_be_focused()
        await expect(page.locator("#submit .field", has=factor)).to_contain_text("-1")
        await send("2")
        await expect(going).to_contain_text("running")
        await send("3")
        await expect(waiting).to_contain_text("place 1")
        await send("10")
        await expect(waiting).to_have_count(2)
        # of somebody else: it is told who that is, and it is not bob's to cancel
        await steps.submit(ada, "lab:modifiers:Stretch", payload={"factor": 4})
        await expect(waiting).to_have_count(3)
        hers = waiting.filter(has_text="factor 4")
        await expect(hers).to_contain_text("ada")
        await expect(hers.get_by_role("button")).to_have_count(0)
        assert await run_sync(running.wait, 30)
        await expect(going).to_contain_text("pulling")
        await expect(going).to_contain_text("you")
        await expect(job).to_contain_text("3 waiting · 1 running")
        await expect(waiting).to_contain_text(["place 1", "place 2", "place 3"])
        await waiting.filter(has_text="factor 3").get_by_role("button", name="Cancel").click()
        await expect(page.locator("#said")).to_contain_text("Cancelled Stretch")
        await expect(ended).to_contain_text("cancelled")
        await expect(page.locator("#ended h2")).to_have_text("Ended 1")
        await expect(waiting).to_contain_text(["place 1", "place 2"])
        await expect(job).to_contain_text("2 waiting · 1 running")
        await draw(page, "room.png")
        go.set()
        await expect(ended).to_have_count(4)
        await expect(page.locator(".card.failed")).to_contain_text("too far")
        done = page.locator(".card.completed")
        await expect(done).to_have_count(2)
        await page.locator(".card.cancelled").get_by_role("button", name="Retry").click()
        await expect(done).to_have_count(3)

        # a task has an address of its own
        link = done.filter(has_text="factor 2").get_by_role("link")
        await link.press("Enter")
        result = page.locator("#result")
        await expect(result.get_by_role("row", name="length")).to_contain_text("20")
        table = result.get_by_role("region", name="Table of energies")
        await expect(table.get_by_role("row").nth(2)).to_have_text("1-3.8")
        await expect(page.locator("#parameters")).to_contain_text("factor")
        await expect(result.get_by_role("img")).to_have_accessible_name(
            re.compile("energy over step")
        )
        await expect(page.get_by_role("log")).to_have_text("stretching by 2.0")
        await expect(job).to_contain_text("0 waiting · 0 running")
        await draw(page, "task.png")
        await page.reload()
        await expect(result.get_by_role("row", name="length")).to_contain_text("20")
        assert "completed" in await page.title()
        await page.get_by_role("button", name="Submit another").click()
        await expect(factor).to_have_value("2")
        await expect(page.get_by_text("Nobody offers this job")).to_be_hidden()
        await page.go_back()
        await page.get_by_role("link", name="All tasks").click()
        await expect(link).to_be_focused()
        await page.locator(".card.failed").get_by_role("link").click()
        await expect(page.locator("#error")).to_contain_text("ValueError: too far")
        await expect(page.get_by_role("log")).to_contain_text("Traceback (most recent call last):")
        await expect(result).to_be_hidden()
        await page.go_back()
    finally:
        go.set()
        await run_sync(manager.disconnect)

    # it looks the same to whoever comes later
    await page.reload()
    await expect(ended).to_have_count(4)
    await expect(page.get_by_text("No job yet")).to_be_visible()
    await page.get_by_role("button", name="Log out").click()
    await expect(page.get_by_label("E-mail")).to_be_visible()


async def test_a_connection_that_breaks_comes_back(
    page: Any, server: str, app: FastAPI, ada: User, session_maker: SessionMaker
):
    expect = playwright.expect
    # what lives is not for the browser's clock to say
    ahead = "const now = Date.now; Date.now = () => now() + 3600e3"
    await page.add_init_script(ahead)
    await enter(page, server, ada)
    line = page.locator("#line")
    engine = app.state.tsio.eio
    for sid in list(engine.sockets):
        await engine.disconnect(sid)
    await expect(line).to_have_text("offline")
    worker = await steps.offer(ada)
    await expect(line).to_have_text("live")
    # what it missed it has asked for, and it hears what comes
    await expect(page.locator("#jobs button")).to_contain_text("Rotate")
    await steps.submit(ada)
    await expect(lane(page, "waiting")).to_contain_text("just now")
    (task,) = await steps.claim(ada, worker)
    await expect(lane(page, "running")).to_have_count(1)
    await expect(page.locator(".worker.alive")).to_have_count(1)

    # what was told before comes late
    await app.state.tsio.emit("task_status_event", {**task, "status": "pending", "revision": 1})
    await steps.report(ada, task, "running")
    await steps.report(ada, task, "completed")
    await expect(lane(page, "ended")).to_have_count(1)
    late = {**task, "name": task["job_name"], "status": "running"}
    await app.state.tsio.emit("task_status_event", late)
    await steps.submit(ada)
    await expect(lane(page, "waiting")).to_have_count(1)
    await expect(lane(page, "running")).to_have_count(0)

    await steps.silence(session_maker, worker)
    await page.reload()
    await expect(page.locator(".worker")).to_contain_text("silent since")
    await expect(page.locator(".worker.alive")).to_have_count(0)


async def copy(session_maker: SessionMaker, task: Any, count: int) -> None:
    """Put copies of a task into the database, a second and a place apart."""
    changed = {
        "id": "lower(hex(randomblob(16)))",
        "created_at": "strftime('%Y-%m-%d %H:%M:%f', created_at, '+' || n || ' seconds')",
        "queue_order": "queue_order + n",
        "idempotency_key": "NULL",
    }
    async with session_maker() as session:
        columns = [row.name for row in await session.execute(text("PRAGMA table_info(task)"))]
        values = ", ".join(changed.get(name, name) for name in columns)
        await session.execute(
            text(
                f"INSERT INTO task ({', '.join(columns)})"
                " WITH RECURSIVE copies(n) AS"
                " (SELECT 1 UNION ALL SELECT n + 1 FROM copies WHERE n < :count)"
                f" SELECT {values} FROM task, copies WHERE id = :id"
            ),
            {"count": count, "id": task["id"].replace("-", "")},
        )
        await session.commit()


@pytest.mark.parametrize("count", [300, 100_000])
async def test_a_long_queue_hides_nothing(
    page: Any, server: str, ada: User, session_maker: SessionMaker, count: int
):
    expect = playwright.expect
    worker = await steps.offer(ada)
    failed = await steps.submit(ada)
    await steps.claim(ada, worker, start=True)
    await steps.report(ada, failed, "failed", error="it broke")
    running = await steps.submit(ada)
    await steps.claim(ada, worker, start=True)
    first = await steps.submit(ada, payload={"number": 1})
    await copy(session_maker, first, count - 1)
    await enter(page, server, ada)
    waiting = lane(page, "waiting")
    await expect(page.locator("#waiting h2")).to_have_text(f"Waiting {count:,}")
    await expect(waiting).to_have_count(min(count, 60))
    await expect(waiting.first.get_by_role("link")).to_contain_text(first["id"][-6:])
    await expect(waiting.first).to_contain_text("place 1 ")
    await expect(waiting.nth(2)).to_contain_text("place 3 ")
    await expect(lane(page, "running")).to_contain_text(running["id"][-6:])
    await expect(lane(page, "ended")).to_contain_text("it broke")
    more = page.locator("#waiting").get_by_role("button", name="Show more")
    if count > 60:
        await more.click()
        await expect(waiting).to_have_count(180)
    else:
        await expect(more).to_be_hidden()
    await page.get_by_role("searchbox").fill(first["id"])
    await expect(waiting).to_have_count(1)
    await expect(lane(page, "running")).to_have_count(0)
    await page.get_by_role("searchbox").fill("")
    await page.get_by_label("How they ended").select_option("completed")
    await expect(lane(page, "ended")).to_have_count(0)
    await steps.offer(ada, "Other")
    await page.get_by_label("Job", exact=True).select_option("lab:modifiers:Other")
    await expect(page.locator("#waiting h2")).to_have_text("Waiting 0")
    await expect(page.locator(".card")).to_have_count(0)


async def test_a_refused_room_shows_nothing_of_another(
    page: Any, server: str, app: FastAPI, ada: User, bob: User
):
    expect = playwright.expect

    async def may_enter(session: Any, caller: Any, room_id: str) -> bool:
        return room_id != "secret" or caller.id == ada.id

    async def room_access() -> Any:
        return may_enter

    app.dependency_overrides[get_room_access] = room_access
    await steps.offer(ada)
    await steps.submit(bob)
    await steps.offer(ada, room="secret")
    hidden = await steps.submit(ada, "secret:modifiers:Rotate", "secret")
    await enter(page, server, bob)
    await expect(lane(page, "waiting")).to_have_count(1)
    await page.get_by_role("textbox", name="Room").fill("secret")
    await page.get_by_role("button", name="Enter").click()
    await expect(page.locator("#refused")).to_contain_text("You can't enter this room")
    await expect(page.get_by_role("heading", name="secret")).to_be_visible()
    await expect(page.locator("#room")).to_be_hidden()
    await expect(page.locator(".card, #jobs li, .worker")).to_have_count(0)
    await page.goto(f"{server}/#lab/{hidden['id']}")
    await expect(page.locator("#task [role=alert]")).to_contain_text("not found")
    await expect(page.locator("#task .box")).to_be_hidden()
    await page.get_by_role("link", name="All tasks").click()
    await expect(lane(page, "waiting")).to_have_count(1)


async def test_a_burst_of_events_leaves_the_focus_where_it_is(page: Any, server: str, ada: User):
    expect = playwright.expect
    worker = await steps.offer(ada, schema=Stretch.model_json_schema())
    await steps.submit(ada)
    (task,) = await steps.claim(ada, worker, start=True)
    await enter(page, server, ada)
    going = lane(page, "running")

    async def burst(start: int) -> None:
        for n in range(start, start + 40):
            said = {"id": task["id"], "attempt": 1, "progress": n / 100, "message": f"step {n}"}
            await ada.patch(f"/workers/{worker}", json={"tasks": [said]})
            if n % 10 == 0:
                await steps.submit(ada)
        await expect(going).to_contain_text(f"step {start + 39}")

    await page.locator("#jobs button").click()
    field = page.get_by_label("Factor")
    await field.fill("")
    bursting = asyncio.create_task(burst(0))
    await field.press_sequentially("3.14159265", delay=40)
    await bursting
    await expect(field).to_be_focused()
    await expect(field).to_have_value("3.14159265")
    cancel = going.get_by_role("button", name="Cancel")
    await cancel.focus()
    await burst(40)
    await expect(cancel).to_be_focused()
    await expect(lane(page, "waiting")).to_have_count(8)
    # the card goes to another lane, and so does the focus
    await cancel.press("Enter")
    await expect(lane(page, "ended").get_by_role("link")).to_be_focused()


async def test_a_form_has_a_field_for_each_kind(page: Any, server: str, ada: User):
    expect = playwright.expect
    await steps.offer(ada, "Everything", schema=Everything.model_json_schema())
    await enter(page, server, ada)
    await page.locator("#jobs button").click()
    submit = page.get_by_role("button", name="Submit", exact=True)

    async def submitted() -> Any:
        await submit.click()
        await expect(page.locator("#said")).to_contain_text("Submitted")
        tail = (await page.locator("#said").inner_text()).split()[-1].rstrip(".")
        tasks = (await ada.get("/rooms/lab/tasks")).json()["items"]
        (task,) = [task for task in tasks if task["id"].endswith(tail)]
        await page.evaluate("document.querySelector('#said').textContent = ''")
        return Everything.model_validate(task["payload"])

    await page.get_by_label("Name").fill("ada")
    await page.get_by_label("Count").fill("3")
    assert await submitted() == Everything(name="ada", count=3)

    await page.get_by_label("Mode").select_option("exact")
    await page.get_by_label("Seed").fill("")
    await page.get_by_label("Label").fill("first")
    await page.get_by_label("Wrap").uncheck()
    await page.get_by_label("Sure").select_option("false")
    await page.get_by_label("Centre 2").fill("0.5")
    await page.get_by_role("button", name="Remove from Atoms").first.click()
    await page.get_by_role("button", name="Add to Atoms").click()
    await page.get_by_label("Atoms 2").last.fill("9")
    await page.get_by_role("button", name="Add to Other").click()
    await page.get_by_label("Temperature (K)").last.fill("10")
    await page.get_by_role("button", name="Add to Baths").click()
    await page.get_by_label("Notes").fill('{"a": "b"}')
    await page.get_by_label("Either").fill("[4]")
    changed = Everything(
        name="ada",
        count=3,
        mode="exact",
        seed=None,
        label="first",
        wrap=False,
        sure=False,
        centre=(0, 0.5, 0),
        atoms=[2, 9],
        other=Bath(temperature=10),
        baths=[Bath()],
        notes={"a": "b"},
        either=[4],
    )
    assert await submitted() == changed
    # as JSON and back it is the same
    toggle = page.get_by_role("button", name="As JSON")
    await toggle.click()
    await expect(page.get_by_label("Parameters")).to_have_value(re.compile('"first"'))
    assert await submitted() == changed
    await toggle.click()
    assert await submitted() == changed

    await page.get_by_label("Notes").fill("{")
    await submit.click()
    await expect(page.get_by_label("Notes")).to_have_attribute("aria-invalid", "true")
    await page.get_by_label("Notes").fill('{"a": 1}')
    await page.get_by_label("Temperature (K)").first.fill("-1")
    await page.get_by_label("Temperature (K)").first.evaluate("node => node.min = ''")
    await submit.click()
    await expect(page.get_by_label("Temperature (K)").first).to_have_attribute(
        "aria-invalid", "true"
    )


async def test_what_waits_says_why_and_what_has_ended_can_go(
    page: Any, server: str, ada: User, admin: User, session_maker: SessionMaker
):
    expect = playwright.expect
    worker = await steps.offer(ada, worker={"name": "node7:42"})
    ended = await steps.submit(ada)
    await steps.report(ada, ended, "cancelled", reason="no use")
    await steps.submit(ada)
    await page.goto(f"{server}/#lab")
    await log_in(page, ada)
    waiting = lane(page, "waiting")
    await expect(waiting).to_contain_text("place 1")
    await expect(page.locator(".worker")).to_contain_text("node7:42")
    for paused in (True, False):
        await admin.patch(f"/rooms/lab/jobs/{steps.JOB}", json={"paused": paused})
        for shown, word in ((page.locator("#jobs"), "paused"), (waiting, "its job is paused")):
            told = expect(shown)
            await (told.to_contain_text(word) if paused else told.not_to_contain_text(word))
    await ada.delete(f"/workers/{worker}")
    await expect(waiting).to_contain_text("no worker is alive")
    await lane(page, "ended").get_by_role("button", name="Delete").click()
    await expect(lane(page, "ended")).to_have_count(0)
    # another one hears of it
    await steps.report(ada, await steps.submit(ada), "cancelled")
    await expect(lane(page, "ended")).to_have_count(1)
    body = {"action": "delete", "status": "cancelled"}
    assert (await admin.post("/rooms/lab/tasks/bulk", json=body)).json()["count"] == 1
    await expect(lane(page, "ended")).to_have_count(0)


@pytest.mark.parametrize("who", ["superuser", "owner"])
async def test_who_runs_a_room_pauses_jobs_and_changes_many_tasks(
    page: Any, server: str, app: FastAPI, ada: User, bob: User, admin: User, who: str
):
    expect = playwright.expect
    runner = {"superuser": admin, "owner": bob}[who]

    async def may(session: Any, caller: Any, room_id: str, action: Any) -> bool:
        return action.kind != "operate" or caller.id == runner.id

    async def room_access() -> Any:
        return may

    app.dependency_overrides[get_room_access] = room_access
    worker = await steps.offer(ada)
    for _ in range(3):
        await steps.submit(ada)
    await enter(page, server, runner)
    waiting, ended = lane(page, "waiting"), lane(page, "ended")
    said = page.locator("#said")
    await page.locator("#jobs button").click()
    await page.get_by_role("button", name="Pause").click()
    await expect(said).to_have_text("Rotate is paused.")
    await expect(waiting).to_contain_text(["its job is paused"] * 3)
    await page.get_by_role("button", name="Resume").click()
    await expect(waiting).to_contain_text(["place 1", "place 2", "place 3"])

    # one of another's, and then the rest
    await waiting.first.get_by_role("button", name="Cancel").click()
    await expect(ended).to_have_count(1)
    await page.get_by_text("Many tasks at once").click()
    many = page.locator("#many")
    await expect(many).to_contain_text("Choose at least one")
    await many.get_by_label("In the state").select_option("pending")
    await many.get_by_label("older than").fill("60")
    await expect(many).to_contain_text("There is no such task")
    await many.get_by_label("older than").fill("")
    await many.get_by_label("Reason").fill("wrong cell")
    await expect(many.get_by_role("button", name="Cancel 2 tasks")).to_be_visible()
    await draw(page, "many.png")
    await many.get_by_role("button", name="Cancel 2 tasks").click()
    await expect(said).to_have_text("Cancelled 2 tasks.")
    await expect(ended).to_have_count(3)
    await ended.first.get_by_role("link").click()
    await expect(page.locator("#task dl")).to_contain_text("Cancelled byyouReasonwrong cell")
    await page.go_back()
    await many.get_by_label("What to do").select_option("retry")
    await many.get_by_label("In the state").select_option("")
    await many.get_by_label("Submitted by").select_option("by ada")
    await many.get_by_role("button", name="Retry 3 tasks").click()
    await expect(waiting).to_have_count(3)
    await waiting.first.get_by_role("link").click()
    await expect(page.locator("#task dl")).to_contain_text("Retried byyou")
    await page.go_back()
    for task in await steps.claim(ada, worker, max_tasks=3):
        await steps.report(ada, task, "failed", error="it broke")
    await many.get_by_label("What to do").select_option("delete")
    await many.get_by_role("button", name="Delete 3 tasks").click()
    await expect(ended).to_have_count(0)


async def test_who_runs_no_room_is_offered_nothing(page: Any, server: str, ada: User, bob: User):
    expect = playwright.expect
    await steps.offer(ada)
    await steps.submit(ada)
    async with page.expect_response("**/tasks/bulk") as answer:
        await enter(page, server, bob)
    assert (await answer.value).status == 403
    await expect(lane(page, "waiting")).to_have_count(1)
    await page.locator("#jobs button").click()
    await expect(page.get_by_role("button", name="Submit", exact=True)).to_be_visible()
    await expect(page.get_by_role("button", name=re.compile("Pause|Cancel"))).to_have_count(0)
    await expect(page.get_by_text("Many tasks at once")).to_be_hidden()


async def test_a_result_is_shown_as_what_it_is(page: Any, server: str, ada: User):
    expect = playwright.expect
    worker = await steps.offer(ada)
    task = await steps.submit(ada)
    await steps.claim(ada, worker, start=True)
    result = {
        "r": [0.5, 1, 1.5, 2],
        "g": [0, 0.2, 2.5, 1],
        "loss": [9, 4, 2, 1, 0.5],
        "centre": [0, 0, 1],
        "scan": [{"n": n, "energy": -n, "note": "ok"} for n in range(3)],
        "atoms": {
            "numbers": [8, 1, 1],
            "positions": [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]],
            "cell": [[9, 0, 0], [0, 9, 0], [0, 0, 9.5]],
            "pbc": [True, True, False],
        },
    }
    await steps.report(ada, task, "completed", result=result)
    await enter(page, f"{server}/#lab/{task['id']}", ada)
    shown = page.locator("#result")
    plots = shown.get_by_role("img")
    await expect(plots).to_have_count(3)
    for name in ("g over r: 0 to 2.5", "loss over number: 0.5 to 9", "energy over n: -2 to 0"):
        await expect(shown.get_by_role("img", name=f"Plot of {name}")).to_be_visible()
    points = (
        await shown.get_by_role("img", name="g over r").locator("polyline").get_attribute("points")
    )
    assert points == "62.0,138.0 202.0,127.6 342.0,8.0 482.0,86.0"
    await expect(shown.get_by_role("row", name="formula H2O", exact=True)).to_be_visible()
    await expect(
        shown.get_by_role("row", name="cell 9, 0, 0 0, 9, 0 0, 0, 9.5", exact=True)
    ).to_be_visible()
    atoms = shown.get_by_role("region", name="Table of atoms")
    await expect(atoms.get_by_role("row").nth(3)).to_have_text("H-0.760.590")


async def test_a_log_is_read_as_it_grows(page: Any, server: str, ada: User):
    expect = playwright.expect
    worker = await steps.offer(ada, max_attempts=2)
    task = await steps.submit(ada)

    async def log(first: int, *lines: str, attempt: int = 1) -> None:
        logged = {"first": first, "lines": lines}
        told = {"id": task["id"], "attempt": attempt, "log": logged}
        await ada.patch(f"/workers/{worker}", json={"tasks": [told]})

    await enter(page, f"{server}/#lab/{task['id']}", ada)
    shown = page.get_by_role("log")
    await expect(page.locator("#task dl")).to_contain_text("lab:modifiers:Rotate")
    await expect(shown).to_be_hidden()
    await steps.claim(ada, worker, start=True)
    await log(1, "reading", "<b>cell</b>")
    await expect(shown).to_have_text("reading <b>cell</b>")
    await expect(page.get_by_role("heading", name="Log")).to_have_text("Log")
    trace = ["Traceback (most recent call last):", '  File "run.py", line 3', "ValueError: too far"]
    await log(3, *trace)
    await steps.report(ada, task, "failed", error="ValueError: too far")
    (again,) = await steps.claim(ada, worker, start=True)
    await log(1, "second try", *trace, "the end", attempt=2)
    await steps.report(ada, again, "failed", error="ValueError: too far")
    lines = ["reading", "<b>cell</b>", *trace, "attempt 2", "second try", *trace, "the end"]
    await expect(shown).to_have_text(" ".join(lines))
    await expect(shown.locator(".error")).to_have_text(trace * 2)
    await expect(page.get_by_role("heading", name="Log and traceback")).to_be_visible()
    attempts = page.get_by_role("region", name="Table of attempts")
    await expect(attempts.get_by_role("row")).to_have_count(3)
    # it has ended, and is followed again once it goes on
    await page.get_by_role("button", name="Retry").click()
    await expect(page.locator("#card")).to_contain_text("pending")
    await steps.claim(ada, worker, start=True)
    await log(1, "third try", attempt=3)
    await expect(shown).to_contain_text("attempt 3 third try")
    # a tab that nobody sees waits for nothing: a browser has few connections

    def reading(request: Any) -> bool:
        return "/log?" in request.url

    async with page.expect_event("requestfailed", reading):
        await hide(page, True)
    await log(2, "meanwhile", attempt=3)
    await hide(page, False)
    await expect(shown).to_contain_text("meanwhile")
    # what is left is followed no longer
    async with page.expect_event("requestfailed", reading):
        await page.get_by_role("link", name="All tasks").click()
    await expect(lane(page, "running")).to_have_count(1)


async def test_nobody_is_left_out(page: Any, server: str, ada: User, admin: User):
    expect = playwright.expect
    worker = await steps.offer(ada, "Everything", schema=Everything.model_json_schema())
    payload = {"name": "ada", "count": 3, "atoms": list(range(50))}
    tasks = [await steps.submit(ada, "lab:modifiers:Everything", payload=payload) for _ in range(3)]
    await steps.claim(ada, worker, max_tasks=2, start=True)
    logged = {"first": 1, "lines": ["reading", "Traceback (most recent call last):", "no"]}
    told = {"id": tasks[0]["id"], "attempt": 1, "log": logged}
    await ada.patch(f"/workers/{worker}", json={"tasks": [told]})
    curve = {"r": [0.1, 0.2, 0.3], "g": [1.0, 2.0, 3.0]}
    result = {**curve, "cells": [[1, 2], [3, 4]], "deep": [{}]}
    await steps.report(ada, tasks[0], "completed", result=result)

    async def check() -> None:
        for width, scheme in ((400, "dark"), (1280, "light")):
            await page.set_viewport_size({"width": width, "height": 800})
            await page.emulate_media(color_scheme=scheme)
            found = await axe.Axe().run(page)
            assert found.violations_count == 0, found.generate_report()
            overflow = "document.documentElement.scrollWidth - innerWidth"
            assert await page.evaluate(overflow) <= 0

    await page.goto(server)
    await check()
    await log_in(page, admin)
    await expect(lane(page, "ended")).to_have_count(1)
    await page.get_by_text("Many tasks at once").click()
    await page.locator("#jobs button").click()
    await expect(page.locator("#submit")).to_be_visible()
    await check()
    await lane(page, "ended").get_by_role("link").click()
    table = page.get_by_role("region", name="Table of r, g")
    await expect(table.get_by_role("row").nth(2)).to_have_text("0.22")
    await expect(page.get_by_role("log").locator(".error")).to_have_count(2)
    await check()


@pytest.mark.parametrize("way", test_beneath.WAYS)
async def test_it_works_beneath_a_path(page: Any, app: FastAPI, ada: User, way: Any):
    expect = playwright.expect
    await steps.offer(ada)
    async with servers.serve(way(app)) as url:
        await enter(page, f"{url}/a%20tool/", ada)
        await page.locator("#jobs button").click()
        await page.get_by_role("button", name="Submit", exact=True).click()
        await lane(page, "waiting").get_by_role("link").click()
        await expect(page.locator("#task dl")).to_contain_text("lab:modifiers:Rotate")
        await page.close()
