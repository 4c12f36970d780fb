"""A room at work: submitters, workers and watchers, spread over the replicas of a host.

Whoever gets no answer, or 503, asks again as a good client does: with the same
``Idempotency-Key``. What comes out can be checked, whatever happened meanwhile.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Any
from uuid import uuid4

import anyio
import httpx
from processes import Host
from steps import problem

#: how long a client that was refused waits before it asks again
PAUSE = 0.1


class Load:
    """What was asked, and what was answered.

    Attributes
    ----------
    taken : list of str
        Ids of tasks whose submission was answered.
    claims : Counter
        How often each task and attempt was handed out.
    answers : Counter
        By what was asked and the status; 0 for no answer at all.
    refused : dict
        When each kind of request was last refused.
    seconds : dict
        How long the answers took that came.
    """

    def __init__(self, hosts: Sequence[Host], room: str = "lab") -> None:
        self.hosts = hosts
        self.room = room
        self.stopped = False
        self.taken: list[str] = []
        self.claims: Counter[tuple[str, int]] = Counter()
        self.completed: set[str] = set()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.refused: dict[str, float] = {}
        self.served: dict[str, float] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._submitting = 0
        self._clients: list[httpx.AsyncClient] = []

    @property
    def job(self) -> str:
        return f"{self.room}:modifiers:Work"

    def client(self, at: int) -> httpx.AsyncClient:
        return self._clients[at % len(self._clients)]

    async def ask(
        self, at: int, what: str, method: str, url: str, **content: Any
    ) -> httpx.Response:
        """Ask until there is an answer that is no refusal."""
        while True:
            code = 0
            begun = time.monotonic()
            try:
                answer = await self.client(at).request(method, url, **content)
                code = answer.status_code
            except httpx.TransportError:
                # a replica may be gone: another one will do
                at = random.randrange(len(self._clients))
            self.answers[what, code] += 1
            if code not in (0, 503):
                self.served.setdefault(what, time.monotonic())
                self.seconds[what].append(time.monotonic() - begun)
                return answer
            if code == 503:
                problem(answer, 503, "service-unavailable")
                assert int(answer.headers["Retry-After"]) > 0
            self.refused[what] = time.monotonic()
            await anyio.sleep(PAUSE)

    def forget_times(self) -> None:
        """Begin anew to note when what was served, and how fast."""
        self.served.clear()
        self.refused.clear()
        self.seconds.clear()

    async def submit(self, at: int) -> None:
        """Submit one task after the other, and wait for some of them."""
        self._submitting += 1
        while not self.stopped:
            answer = await self.ask(
                at,
                "submit",
                "POST",
                f"/rooms/{self.room}/tasks/{self.job}",
                json={"payload": {"n": len(self.taken)}},
                headers={"Idempotency-Key": str(uuid4())},
            )
            assert answer.status_code == 202, answer.text
            self.taken.append(answer.json()["id"])
            if len(self.taken) % 5 == 0:
                # in bounds: who submits waits now and then
                url = f"/tasks/{self.taken[-1]}"
                answer = await self.ask(at, "wait", "GET", url, headers={"Prefer": "wait=5"})
                assert answer.status_code == 200, answer.text
        self._submitting -= 1

    async def register(self, at: int) -> str:
        job = {"category": "modifiers", "name": "Work", "schema": {}}
        answer = await self.ask(at, "register", "PUT", f"/rooms/{self.room}/jobs", json=job)
        return answer.json()["worker_id"]

    async def work(self, at: int, worker: str) -> None:
        """Work off what comes, as one worker, until all is done."""
        while self._submitting or len(self.completed) < len(self.taken):
            answer = await self.ask(
                at,
                "claim",
                "POST",
                "/tasks/claim",
                json={"worker_id": worker, "max_tasks": 4},
                headers={"Idempotency-Key": str(uuid4()), "Prefer": "wait=1"},
            )
            assert answer.status_code == 200, answer.text
            for task in answer.json()["tasks"]:
                self.claims[task["id"], task["attempt"]] += 1
                for what, status in (("start", "running"), ("complete", "completed")):
                    answer = await self.ask(
                        at,
                        what,
                        "PATCH",
                        f"/tasks/{task['id']}",
                        json={"status": status, "attempt": task["attempt"]},
                    )
                    assert answer.status_code == 200, answer.text
                self.completed.add(task["id"])
            await self.ask(at, "heartbeat", "PATCH", f"/workers/{worker}")

    async def watch(self, at: int) -> None:
        """Look at what the room has."""
        paths = (f"/rooms/{self.room}/tasks?limit=20", f"/rooms/{self.room}/jobs")
        while not self.stopped:
            for path in paths:
                answer = await self.ask(at, "list", "GET", path)
                assert answer.status_code == 200, answer.text
            if self.taken:
                url = f"/tasks/{random.choice(self.taken)}"
                answer = await self.ask(at, "status", "GET", url)
                assert answer.status_code == 200, answer.text
            await anyio.sleep(0.02)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load every replica while the block runs, then work off what is left."""
        self.stopped = False
        async with AsyncExitStack() as stack:
            self._clients = [await stack.enter_async_context(host.client()) for host in self.hosts]
            async with anyio.create_task_group() as group:
                for at in range(len(self.hosts)):
                    worker = await self.register(at)
                    group.start_soon(self.submit, at)
                    group.start_soon(self.watch, at)
                    group.start_soon(self.work, at, worker)
                yield
                self.stopped = True

    async def check(self, host: Host) -> None:
        """Nothing that was taken is lost, handed out twice, or there twice."""
        assert self.completed == set(self.taken)
        assert set(self.claims.values()) <= {1}
        async with host.client() as http:
            listed = (await http.get(f"/rooms/{self.room}/tasks?limit=0")).json()
            done = await http.get(f"/rooms/{self.room}/tasks?limit=0&status=completed")
        assert listed["total"] == done.json()["total"] == len(self.taken)
        assert len(self.taken) == len(set(self.taken))

    def medians(self) -> dict[str, float]:
        """Return how many seconds each kind of request took."""
        return {what: median(times) for what, times in sorted(self.seconds.items())}
