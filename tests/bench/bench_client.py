"""What the bench asks with: next to nothing beside what a server spends on an answer."""

import asyncio
import json
from collections import deque
from typing import Any, Self


class Refused(Exception):
    """An answer that is no success."""


class Connection:
    """A keep-alive HTTP/1.1 connection of one user.

    Less than any client library does, on purpose: the server shares the machine.
    """

    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._head = f"Host: bench\r\nAuthorization: Bearer {token}\r\n"

    @classmethod
    async def open(cls, port: int, token: str) -> Self:
        connection = cls(port, token)
        await connection._open()
        return connection

    async def _open(self) -> None:
        there = await asyncio.open_connection("127.0.0.1", self._port)
        self._reader, self._writer = there

    async def ask(
        self, method: str, path: str, body: Any = None, more: str = ""
    ) -> tuple[str, bytes]:
        """Return head and body of the answer.

        Raises
        ------
        Refused
            When its status is no success, or there is none.
        """
        sent = b"" if body is None else json.dumps(body).encode()
        kind = "Content-Type: application/json\r\n" if sent else ""
        self._writer.write(
            f"{method} {path} HTTP/1.1\r\n{self._head}{kind}{more}"
            f"Content-Length: {len(sent)}\r\n\r\n".encode()
            + sent
        )
        try:
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = head.lower().partition("content-length: ")[2].partition("\r")[0]
            answered = await self._reader.readexactly(int(length or 0))
        except (OSError, asyncio.IncompleteReadError) as exc:
            # a server hangs up after a failure that it did not expect
            self._writer.close()
            await self._open()
            raise Refused(f"{method} {path}: {exc!r}") from None
        if head[9] != "2":
            raise Refused(f"{method} {path}: {head[:12]} {answered[:300]!r}")
        return head, answered

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


ROOM = "bench"
PAYLOAD = {"structure": "Cu", "steps": 100, "scale": [1.0, 1.0, 1.5]}


class User:
    """A submitter and a worker in one, on one connection, at one prefix."""

    def __init__(self, connection: Connection, prefix: str) -> None:
        self.connection = connection
        self.prefix = prefix
        self.worker = ""
        self.job = "@global:modifiers:J0"
        #: the tasks that it claimed and has not completed
        self.held: deque[str] = deque()
        #: the task that it submitted last
        self.submitted = ""
        self.cursor = ""

    async def ask(self, method: str, path: str, body: Any = None, more: str = "") -> bytes:
        asked = await self.connection.ask(method, self.prefix + path, body, more)
        return asked[1]

    async def begin(self, jobs: int) -> None:
        """Make a worker and register jobs."""
        self.worker = json.loads(await self.ask("POST", "/workers"))["id"]
        for n in range(jobs):
            job = {
                "category": "modifiers",
                "name": f"J{n}",
                "schema": {"type": "object"},
                "worker_id": self.worker,
            }
            await self.ask("PUT", "/rooms/@global/jobs", job)

    async def submit(self) -> None:
        path = f"/rooms/{ROOM}/tasks/{self.job}"
        answer = await self.ask("POST", path, {"payload": PAYLOAD})
        self.submitted = json.loads(answer)["id"]

    async def claim(self, **more: Any) -> None:
        body = {"worker_id": self.worker, **more}
        answer = await self.ask("POST", "/tasks/claim", body)
        task = json.loads(answer)["task"]
        if task is None:
            raise Refused("nothing to claim")
        self.held.append(task["id"])

    async def empty_claim(self) -> None:
        await self.ask("POST", "/tasks/claim", {"worker_id": self.worker})

    async def start(self) -> None:
        self.held.rotate(-1)
        await self.ask("PATCH", f"/tasks/{self.held[-1]}", {"status": "running"})

    async def status(self) -> None:
        await self.ask("GET", f"/tasks/{self.submitted}")

    async def complete(self) -> None:
        task = self.held.popleft()
        await self.ask("PATCH", f"/tasks/{task}", {"status": "completed"})

    async def heartbeat(self) -> None:
        await self.ask("PATCH", f"/workers/{self.worker}")

    async def list(self) -> None:
        await self.ask("GET", f"/rooms/{ROOM}/tasks?limit=50")

    async def list_on(self) -> None:
        """Ask for the second page, as the first one's link says."""
        if not self.cursor:
            path = f"{self.prefix}/rooms/{ROOM}/tasks?limit=50"
            head, _ = await self.connection.ask("GET", path)
            link = head.partition("link: <")[2].partition(">")[0]
            self.cursor = link.removeprefix(self.prefix) or path[len(self.prefix) :]
        await self.ask("GET", self.cursor)

    async def short_cycle(self) -> None:
        """Take a task through its whole life, with a claim that starts it."""
        await self.submit()
        await self.claim(start=True)
        await self.complete()

    async def cycle(self) -> None:
        """Take a task through its whole life."""
        await self.submit()
        await self.claim()
        await self.start()
        await self.complete()
