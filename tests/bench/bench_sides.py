"""Who is measured: host processes, on databases of their own, and turns between them."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import asyncpg
from bench_client import Connection, Refused, User
from makers import postgres_server

RELEASE = "0.1.7"
TREE, PEER = "tree", f"release {RELEASE}"
#: the bare statement; and the same with what SQLAlchemy and Pydantic make of it
BARE, FLOOR = "bare", "floor"
PREFIXES = {BARE: "/bare", FLOOR: "/floor"}
#: how a host opens its database
KINDS = {"locked": "SQLite, lock-wrapped", "wal": "SQLite, WAL", "postgres": "PostgreSQL"}
#: the release pages by offset alone, and its claims start nothing
NOT_THERE = {(PEER, "list_on"), (PEER, "short_cycle")}
#: whether hosts override a dependency, as every real one does
OVERRIDES = {"override": "1", "plain": ""}
HERE = Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")


def release_python(directory: Path) -> Path:
    """Return a Python that has the published release installed, and nothing of ours."""
    python = directory / "bin" / "python"
    if not python.exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "-q", "-p", sys.executable, directory], check=True)
        wanted = [f"zndraw-joblib=={RELEASE}", "aiosqlite", "asyncpg", "uvicorn"]
        subprocess.run([*uv, "pip", "install", "-q", "--python", python, *wanted], check=True)
    return python


def environment(ours: bool) -> dict[str, str]:
    """Return the variables of a process of this tree, or of what knows nothing of it."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return environ | ({"PYTHONPATH": str(HERE.parent.parent)} if ours else {})


class Database:
    """Makes databases of one kind."""

    def __init__(self, kind: str, directory: Path, server: str | None) -> None:
        self.kind, self.directory, self.server = kind, directory, server

    async def create(self) -> str:
        """Return the URL of an empty one."""
        name = f"bench{uuid4().hex}"
        if self.server is None:
            return f"sqlite+aiosqlite:///{self.directory / name}.sqlite"
        plain = self.server.replace("+asyncpg", "")
        connection = await asyncpg.connect(plain)
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()
        return self.server.replace("/postgres?", f"/{name}?")

    async def wal(self) -> int:
        """Return how many bytes of WAL the server has written."""
        if self.server is None:
            return 0
        connection = await asyncpg.connect(self.server.replace("+asyncpg", ""))
        written = await connection.fetchval("SELECT pg_current_wal_lsn() - '0/0'")
        await connection.close()
        return int(written)

    def cpu(self) -> float:
        """Return the CPU seconds that a server and its backends used so far."""
        if self.server is None:
            return 0.0
        postmaster = Path(self.server.rpartition("host=")[2]) / "postmaster.pid"
        pid = postmaster.read_text().split()[0]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return sum(cpu_of(child, 4) for child in [pid, *children])


@contextmanager
def database(kind: str) -> Iterator[Database]:
    directory = Path(tempfile.mkdtemp(prefix="bench"))
    try:
        if kind == "postgres":
            with postgres_server() as url:
                yield Database(kind, directory, url)
        else:
            yield Database(kind, directory, None)
    finally:
        shutil.rmtree(directory)


def cpu_of(pid: int | str, fields: int = 2) -> float:
    """Return the CPU seconds of a process: user, system, and of its dead children."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, stat[11 : 11 + fields])) / TICKS


class Host:
    """A host process."""

    def __init__(
        self,
        python: str | Path,
        url: str,
        kind: str,
        beside: str,
        redis_url: str = "",
        override: str = "1",
    ) -> None:
        self.url = url
        self.process = subprocess.Popen(
            [python, HERE / "bench_host.py", url, kind, beside],
            stdout=subprocess.PIPE,
            # nothing of this tree on the path of the release
            env=environment(beside == "floor") | {"REDIS_URL": redis_url, "OVERRIDE": override},
        )
        assert self.process.stdout
        told = json.loads(self.process.stdout.readline())
        self.port, self.token = told["port"], told["token"]

    def cpu(self) -> float:
        return cpu_of(self.process.pid)

    def memory(self) -> float:
        """Return the resident set in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@contextmanager
def running(
    python: str | Path, url: str, kind: str, beside: str, redis_url: str = "", override: str = "1"
) -> Iterator[Host]:
    """Run a host; with Redis it tells others of its database whom to wake."""
    host = Host(python, url, kind, beside, redis_url, override)
    try:
        yield host
    finally:
        host.stop()


class Slice(NamedTuple):
    """What one side did in its turn: seconds are of one unit of work, latencies of each."""

    seconds: float
    cpu: float
    database_cpu: float
    wal: float
    failed: int
    latencies: list[float]


class Side:
    """One of those that are compared, and users who work with it."""

    def __init__(self, name: str, host: Host, users: list[User]) -> None:
        self.name, self.host, self.users = name, host, users

    async def turn(self, operation: str, each: int, on: Database) -> Slice | None:
        """Let every user do ``operation`` so many times, side by side."""
        if (self.name, operation) in NOT_THERE:
            return None
        failed = 0
        latencies: list[float] = []

        async def work(user: User) -> None:
            nonlocal failed
            for _ in range(each):
                sent = time.perf_counter()
                try:
                    await getattr(user, operation)()
                    latencies.append(time.perf_counter() - sent)
                except (Refused, IndexError):
                    failed += 1

        wal = await on.wal()
        cpu, database_cpu = self.host.cpu(), on.cpu()
        begun = time.perf_counter()
        await asyncio.gather(*map(work, self.users))
        seconds = time.perf_counter() - begun
        done = len(latencies)
        if not done:
            return None
        spent = self.host.cpu() - cpu, on.cpu() - database_cpu, await on.wal() - wal
        return Slice(seconds / done, *(each / done for each in spent), failed, latencies)


@asynccontextmanager
async def side(name: str, host: Host, connections: int, jobs: int = 1) -> AsyncIterator[Side]:
    prefix = PREFIXES.get(name, "/v1/joblib")
    users = [User(await Connection.open(host.port, host.token), prefix) for _ in range(connections)]
    for user in users:
        await user.begin(0 if name in PREFIXES else jobs)
    yield Side(name, host, users)
    for user in users:
        await user.connection.close()
