"""Ten ways to die, in a thread and in a child process; the table of docs/deaths.md.

::

    python tests/programs/deaths.py [--write]

Host and workers are processes of their own, which are really killed. Each way has a worker
with two hands: one dies, the other runs a task beside it, and a third task comes later.
"""

import argparse
import asyncio
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import dying
import httpx
import processes
from processes import Host, Process, hosting, running

PAGE = processes.DOCS / "deaths.md"
BEGIN, END = "<!-- table -->", "<!-- end -->"
WORKER_TIMEOUT = 20
AWAY = 60
SETTINGS = {
    "ZNDRAW_JOBLIB_WORKER_TIMEOUT_SECONDS": str(WORKER_TIMEOUT),
    # an idle worker is heard as often
    "ZNDRAW_JOBLIB_LONG_POLL_MAX_WAIT_SECONDS": "2",
}
AT_ONCE = 5
PATH = os.pathsep.join(map(os.path.abspath, sys.path))
#: how long the task beside it takes, and how long the last one may
BESIDE, LAST = 6, 20
#: how long any of it may take
PATIENCE = 150


class Way(NamedTuple):
    """A way to die: what a task does, or what is done to its worker meanwhile."""

    what: str
    how: str
    seconds: float = 0
    kill: Callable[[Process], None] | None = None
    away: bool = False


WAYS = (
    Way("holds the interpreter's lock for 30 s", "lock", 30),
    Way("loops for ever in C", "loop"),
    Way("segmentation fault", "segfault"),
    Way("out of memory (`RLIMIT_AS`)", "memory"),
    Way("`os._exit`", "exit"),
    Way("SIGKILL of the process that runs it", "kill"),
    Way("SIGKILL of the worker", "sleep", 8, lambda worker: worker.popen.kill()),
    Way("SIGTERM, and 2 s of grace", "sleep", 8, lambda worker: worker.popen.terminate()),
    Way(f"the host is away for {AWAY} s", "sleep", 8, away=True),
    Way("the disk is full", "disk"),
)


class Room:
    """What a submitter sees of one worker."""

    def __init__(self, http: httpx.AsyncClient, name: str) -> None:
        self.http, self.name = http, name
        self.job = f"{name}:analysis:{dying.Die.__name__}"

    async def submit(self, how: str, seconds: float = 0) -> str:
        """Return the id of a new task; nothing when the job is gone with its worker."""
        body = {"payload": {"how": how, "seconds": seconds}}
        answer = await self.http.post(f"/rooms/{self.name}/tasks/{self.job}", json=body)
        return answer.json().get("id", "") if answer.is_success else ""

    async def reaches(self, task: str, states: str, within: float = PATIENCE) -> Any:
        """Return a task when it is in one of the states, or as it is when time is up."""
        deadline = time.monotonic() + within
        found: Any = {"status": "gone"}
        while task and found["status"] not in states.split() and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                found = await processes.read(self.http, f"/tasks/{task}")
            if found.get("interruptions"):
                # it waits for another worker
                break
            await asyncio.sleep(0.1)
        return found


async def die(way: Way, isolated: bool, host: Host, log: Path, restart: Any = None) -> str:
    """Let a task die, and return what became of it and of what was beside it."""
    name = f"{way.how}-{int(way.seconds)}-{log.stem}"
    work = ["-m", "zndraw_joblib", "work", "dying:Die", "--room", name, "--concurrency", "2"]
    work += ["--grace", "2", *["--isolate"] * isolated]
    work += ["--policy", "timeout_seconds=35"] * (way.how == "loop")
    login = {"ZNDRAW_JOBLIB_URL": host.url, "ZNDRAW_JOBLIB_TOKEN": host.token}
    path = {"PYTHONPATH": PATH}
    async with running(*work, log=log, **login, **path) as worker, host.client() as http:
        room = Room(http, name)
        await worker.writes("offers")
        beside = await room.submit("sleep", BESIDE)
        await room.reaches(beside, "running")
        task = await room.submit(way.how, way.seconds)
        await worker.writes(f"{task} of .* started")
        began = time.monotonic()
        if way.kill is not None:
            await asyncio.sleep(1)
            way.kill(worker)
        if restart is not None:
            await restart()
        ended = await room.reaches(task, "completed failed cancelled")
        took = time.monotonic() - began
        other = await room.reaches(beside, "completed failed cancelled")
        last = await room.reaches(await room.submit(""), "completed failed", LAST)
    return told(ended, took, other, last)


def told(ended: Any, took: float, other: Any, last: Any) -> str:
    why = f" (`{ended['error_type']}`)" if ended.get("error_type") else ""
    became = f"`{ended['status']}`{why}"
    if ended.get("interruptions"):
        became = "given back: `pending` again, at no attempt's cost,"
    lost = []
    if other["status"] != "completed" and not other.get("interruptions"):
        lost.append("the task beside it")
    if last["status"] != "completed":
        lost.append("the worker")
    return f"{became} after {took:.0f} s; lost: {' and '.join(lost) or 'nothing'}"


async def die_without_host(way: Way, isolated: bool, directory: Path) -> str:
    """Do so with a host of its own, which goes and comes back."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    async with hosting(directory, PORT=port, **SETTINGS) as host:

        async def restart() -> None:
            host.process.popen.kill()
            await asyncio.sleep(AWAY)
            again = hosting(directory, name="again", PORT=port, **SETTINGS)
            later.append(again)
            await again.__aenter__()

        later: list[Any] = []
        try:
            return await die(way, isolated, host, directory / "worker.log", restart)
        finally:
            for again in later:
                await again.__aexit__(None, None, None)


async def all_ways(directory: Path) -> list[list[str]]:
    """Return the rows of the table."""
    few = asyncio.Semaphore(AT_ONCE)

    async def one(run: Callable[[], Awaitable[str]], what: str) -> str:
        async with few:
            outcome = await run()
        print(f"{what}: {outcome}", flush=True)
        return outcome

    async with hosting(directory, **SETTINGS) as host:
        runs = []
        for n, way in enumerate(WAYS):
            for isolated in (False, True):
                place = directory / f"{n}-{isolated}"
                place.mkdir()
                log = place / f"worker{n}{isolated}.log"

                def run(way: Way = way, isolated: bool = isolated, log: Path = log) -> Any:
                    if way.away:
                        return die_without_host(way, isolated, log.parent)
                    return die(way, isolated, host, log)

                runs.append(one(run, f"{way.what}, {'isolated' if isolated else 'in a thread'}"))
        outcomes = await asyncio.gather(*runs)
    pairs = zip(outcomes[::2], outcomes[1::2], strict=True)
    return [[way.what, *pair] for way, pair in zip(WAYS, pairs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table into the page")
    options = parser.parse_args()
    # what is stopped stops its own children first
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as directory:
        # results that can't be reported are kept where their worker runs
        os.chdir(directory)
        rows = asyncio.run(all_ways(Path(directory)))
    lines = ["| what happens | in a thread | isolated |", "|---|---|---|"]
    table = "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
    print(table)
    if options.write:
        page = PAGE.read_text()
        page = re.sub(f"(?s){BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table}\n{END}", page)
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
