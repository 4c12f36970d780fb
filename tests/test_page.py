"""The page of the example host, driven in a real Chromium: ``nox -s page``."""

import os
import shutil
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import conftest
import pytest
from anyio.to_thread import run_sync
from conftest import User
from makers import SessionMaker
from pydantic import Field
from steps import claim, offer, silence, submit

from zndraw_joblib import Category, Extension, JobManager

playwright = pytest.importorskip("playwright.async_api")
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


class Stretch(Extension):
    """Stretch the cell."""

    category: ClassVar[Category] = Category.MODIFIER
    factor: float = Field(default=1.1, gt=0)
    axis: str = "z"

    def run(self, vis: Any, **kwargs: Any) -> dict[str, float]:
        if self.factor > 9:
            raise ValueError("too far")
        return {"length": 10 * self.factor}


@pytest.fixture
async def page(tmp_path: Path) -> AsyncIterator[Any]:
    async with playwright.async_playwright() as driver:
        context = await driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=CHROMIUM,
            headless=True,
            args=FLAGS,
            viewport={"width": 1280, "height": 800},
        )
        context.set_default_timeout(HANG)
        page = context.pages[0]
        page.wrong = []
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        # what is not the host's would be a dependency from outside
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]))
        yield page
        await context.close()


async def look(page: Any, name: str) -> None:
    """Keep pictures of the page where ``SCREENSHOTS`` says, for people to look at."""
    if directory := os.environ.get("SCREENSHOTS"):
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            for width in (1280, 400):
                await page.set_viewport_size({"width": width, "height": 800})
                path = Path(directory) / f"{name}-{scheme}-{width}.png"
                await page.screenshot(path=path, full_page=True)
        await page.set_viewport_size({"width": 1280, "height": 800})


async def log_in(page: Any, user: User, password: str) -> None:
    await page.get_by_label("E-mail").fill(user.email)
    await page.get_by_label("Password").fill(password)
    await page.get_by_role("button", name="Log in").click()


async def test_people_see_tasks_move_and_move_them(page: Any, server: str, ada: User, bob: User):
    expect = playwright.expect
    running, go = threading.Event(), threading.Event()

    def execute(task: Any) -> Any:
        task.progress(0.4, "pulling")
        running.set()
        assert go.wait(30)
        return task.extension.run(None)

    async def serve() -> JobManager:
        login = {"user": ada.email, "password": conftest.PASSWORD}
        manager = await run_sync(partial(JobManager.connect, server, **login, execute=execute))
        await run_sync(partial(manager.register, Stretch, room="lab"))
        return manager

    await page.goto(server)
    await look(page, "login")
    await log_in(page, bob, "wrong")
    await expect(page.get_by_text("not the password")).to_be_visible()
    await log_in(page, bob, conftest.PASSWORD)
    await expect(page.get_by_role("status").first).to_have_text("live")
    await expect(page.get_by_text("No job yet")).to_be_visible()

    # a worker comes, and the page hears of it
    manager = await serve()
    try:
        job = page.locator("#jobs button")
        await expect(job).to_contain_text("1 worker alive")
        await expect(page.locator(".worker.alive")).to_have_count(1)
        waiting, going, ended = (
            page.locator(f"#{lane} .card") for lane in ("waiting", "going", "ended")
        )

        async def send(factor: str) -> None:
            await page.get_by_label("Factor").fill(factor)
            await page.get_by_role("button", name="Submit").click()

        await job.click()
        await send("-1")
        await expect(page.locator("#submit .told")).to_contain_text("/factor")
        await send("2")
        await expect(going).to_contain_text("running")
        await send("3")
        await expect(waiting).to_contain_text("place 1")
        await send("10")
        await expect(waiting).to_have_count(2)
        assert await run_sync(running.wait, 30)
        await expect(going).to_contain_text("pulling")
        await expect(job).to_contain_text("2 waiting · 1 running")

        # the one that was submitted before the last
        await waiting.last.get_by_role("button", name="Cancel").click()
        await expect(ended).to_contain_text("cancelled")
        await look(page, "moving")
        go.set()
        await expect(ended).to_have_count(3)
        failed = page.locator(".card.failed")
        await expect(failed).to_contain_text("too far")
        done = page.locator(".card.completed")
        await done.get_by_role("button", name="Show").click()
        await expect(done.locator("pre")).to_contain_text('"length": 20')
        await page.locator(".card.cancelled").get_by_role("button", name="Retry").click()
        await expect(done).to_have_count(2)
        await look(page, "ended")
    finally:
        go.set()
        await run_sync(manager.disconnect)

    # it looks the same to whoever comes later
    await page.reload()
    await expect(ended).to_have_count(3)
    await expect(page.get_by_text("No job yet")).to_be_visible()
    await page.get_by_role("button", name="Log out").click()
    await expect(page.get_by_label("E-mail")).to_be_visible()
    assert page.wrong == []
    assert page.hosts == {server.removeprefix("http://")}


async def test_a_connection_that_breaks_comes_back(
    page: Any, server: str, app: Any, ada: User, session_maker: SessionMaker
):
    expect = playwright.expect
    # what lives is not for the browser's clock to say
    ahead = "const now = Date.now; Date.now = () => now() + 3600e3"
    await page.add_init_script(ahead)
    await page.goto(server)
    await log_in(page, ada, conftest.PASSWORD)
    line = page.locator("#line")
    await expect(line).to_have_text("live")
    engine = app.state.tsio.eio
    for sid in list(engine.sockets):
        await engine.disconnect(sid)
    await expect(line).to_have_text("offline")
    worker = await offer(ada)
    await expect(line).to_have_text("live")
    # what it missed it has asked for, and it hears what comes
    await expect(page.locator("#jobs button")).to_contain_text("Rotate")
    await submit(ada)
    await expect(page.locator("#waiting .card")).to_have_count(1)
    await claim(ada, worker)
    await expect(page.locator("#going .card")).to_have_count(1)
    await expect(page.locator(".worker.alive")).to_have_count(1)
    await silence(session_maker, worker)
    await page.reload()
    await expect(page.locator(".worker")).to_contain_text("silent since")
    await expect(page.locator(".worker.alive")).to_have_count(0)
    assert page.wrong == []
