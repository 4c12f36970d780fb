"""Programs of 0.1.7 at our host, and ours at a host of 0.1.7.

``nox -s compat`` installs 0.1.7 beside us, and says in ``OLD_PYTHON`` where. One program
is run under both: it knows only what the contract says of 0.1.7.
"""

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest
from processes import HANG, Host, Process, hosting, read, running, submit

pytestmark = [pytest.mark.makers("plain"), pytest.mark.timeout(300)]

HERE = Path(__file__).parent
OLD = os.environ.get("OLD_PYTHON", "")
JOB, PROVIDER = "lab:modifiers:Double", "lab:text:letters"


class Pair(NamedTuple):
    """A host, and the Python of a program for it."""

    host: Host
    python: str

    @property
    def old_host(self) -> bool:
        return self.python == sys.executable


@pytest.fixture(scope="module", params=["old program", "old host"])
async def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Pair]:
    directory = tmp_path_factory.mktemp("host")
    options: dict[str, Any] = {"ZNDRAW_JOBLIB_SWEEPER_INTERVAL_SECONDS": "1"}
    python = OLD
    if request.param == "old host":
        options |= {"script": HERE / "compat_host.py", "python": OLD, "PYTHONPATH": ""}
        python = sys.executable
    async with hosting(directory, **options) as host:
        yield Pair(host, python)


@asynccontextmanager
async def program(pair: Pair, role: str, log: Path) -> AsyncIterator[Process]:
    command = (HERE / "compat_worker.py", role, pair.host.url, pair.host.token)
    # not ours, where 0.1.7 is to be found
    path = "" if pair.python == OLD else str(HERE.parent.parent)
    async with running(*command, log=log, python=pair.python, PYTHONPATH=path) as process:
        yield process


def facts(process: Process) -> Any:
    return json.loads(process.written().splitlines()[-1])


async def offered(http: Any) -> list[str]:
    """Return what workers offer to the room."""
    jobs = (await read(http, "/rooms/lab/jobs"))["items"]
    providers = (await read(http, "/rooms/lab/providers"))["items"]
    names = [entry["full_name"] for entry in jobs + providers]
    return [name for name in names if not name.startswith("@internal:")]


async def ended(http: Any, task_id: str) -> Any:
    with anyio.fail_after(HANG):
        while True:
            task = await read(http, f"/tasks/{task_id}", prefer="wait=5")
            if task["status"] in ("completed", "failed", "cancelled"):
                return task


async def test_a_program_claims_by_hand(pair: Pair, tmp_path: Path):
    async with program(pair, "claims", tmp_path / "log") as process, pair.host.client() as http:
        assert await process.ends() == 0, process.written()
        told = facts(process)
        assert told["nothing"]
        assert told["made"]
        assert told["order"]
        assert told["listened"]
        assert told["failed is over"]
        assert told["by id is over"]
        assert told["cancelled is over"]
        tasks = {name: await read(http, f"/tasks/{task}") for name, task in told["tasks"].items()}
        assert {name: (task["status"], task["error"]) for name, task in tasks.items()} == {
            "completed": ("completed", None),
            "failed": ("failed", "it did not work"),
            "by id": ("failed", "nor did this"),
            "cancelled": ("cancelled", None),
            "listened": ("completed", None),
        }
        workers = (await read(http, "/workers"))["items"]
        assert told["worker"] not in [worker["id"] for worker in workers]
        assert await offered(http) == []


async def test_a_program_serves_until_it_is_told_to_go(pair: Pair, tmp_path: Path):
    async with program(pair, "serves", tmp_path / "log") as process, pair.host.client() as http:
        await process.writes(r'"worker"')
        assert facts(process)["jobs"] == [JOB]
        assert await offered(http) == [JOB, PROVIDER]
        # it looks once an hour: each of them wakes it
        for fails in (False, True, False):
            await anyio.sleep(0.3)
            task = await ended(http, await submit(http, "lab", JOB, fails=fails))
            assert task["status"] == ("failed" if fails else "completed"), task
            assert ("as it was told to" in (task["error"] or "")) == fails
            assert task["started_at"] < task["completed_at"]
        answer = await http.get(f"/rooms/lab/providers/{PROVIDER}?size=3")
        assert answer.content == b"ababab", answer.text
        assert answer.headers["content-type"].startswith("text/plain")

        # whatever it makes of it, the next task is run
        cancelled = await submit(http, "lab", JOB, seconds=1.5)
        with anyio.fail_after(HANG):
            while (await read(http, f"/tasks/{cancelled}"))["status"] != "running":
                await anyio.sleep(0.05)
        report = {"status": "cancelled"}
        answer = await http.patch(f"/tasks/{cancelled}", json=report)
        assert answer.status_code == 200, answer.text
        await anyio.sleep(2)
        task = await ended(http, await submit(http, "lab", JOB))
        assert task["status"] == "completed"
        assert (await read(http, f"/tasks/{cancelled}"))["status"] == "cancelled"

        process.popen.send_signal(signal.SIGTERM)
        assert await process.ends() == 0, process.written()
        assert facts(process) == {"gone": True}
        assert await offered(http) == []


async def test_a_program_that_is_killed(pair: Pair, tmp_path: Path):
    async with program(pair, "serves", tmp_path / "log") as process, pair.host.client() as http:
        await process.writes(r'"worker"')
        # longer than its silence may last: until then its heartbeats keep it
        task_id = await submit(http, "lab", JOB, seconds=60)
        await anyio.sleep(5)
        assert (await read(http, f"/tasks/{task_id}"))["status"] == "running"
        process.popen.kill()
        task = await ended(http, task_id)
        assert (task["status"], task["error"]) == ("failed", "Worker disconnected")
        with anyio.fail_after(HANG):
            while await offered(http):
                await anyio.sleep(0.1)
