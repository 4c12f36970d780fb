"""Replicas, workers and submitters that are killed at random, and what they tell of it.

::

    python tests/history_run.py --seconds 180 --seed 7

Replicas on one PostgreSQL and one Redis, a TaskIQ worker, and workers, in processes of
their own: they are forked from one that has all imported, so that they are back at once. Users submit, cancel and retry. When it is over the histories and the
database are judged. A seed draws what happens; when exactly, the machine says.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import history
import host
import httpx
import internal_jobs
import processes
import uvicorn
from history_worker import ROOM, Often, Once, Replicas, work
from makers import postgres_server
from servers import redis_server
from sqlalchemy import func, select
from taskiq.api import run_receiver_task
from zndraw_auth import create_engine_for_url

from zndraw_joblib import JobManager
from zndraw_joblib.client_transport import path as api_path
from zndraw_joblib.lifecycle import TERMINAL
from zndraw_joblib.models import Task, Worker, in_states

NURSERY = multiprocessing.get_context("forkserver")
NURSERY.set_forkserver_preload(["host", "history_worker", "taskiq.api"])
WORKER_TIMEOUT = 4.0
#: how long what is left may take when nobody is killed any more
DRAIN_SECONDS = 60
START_SECONDS = 60
SETTINGS = {
    "ZNDRAW_JOBLIB_WORKER_TIMEOUT_SECONDS": str(WORKER_TIMEOUT),
    "ZNDRAW_JOBLIB_SWEEPER_INTERVAL_SECONDS": "0.5",
    "ZNDRAW_JOBLIB_RECHECK_SECONDS": "0.5",
    "ZNDRAW_JOBLIB_INTERNAL_REDISPATCH_SECONDS": "3",
    "ZNDRAW_JOBLIB_INTERNAL_TASK_TIMEOUT_SECONDS": "8",
    "ZNDRAW_AUTH_DEFAULT_ADMIN_EMAIL": processes.ADMIN["username"],
    "ZNDRAW_AUTH_DEFAULT_ADMIN_PASSWORD": processes.ADMIN["password"],
    **processes.SECRET,
}


class Plan(NamedTuple):
    """How long, how many, and how often one of them is killed, in seconds."""

    seconds: float
    seed: int
    workers: int
    between_workers: float
    between_hosts: float
    replicas: int = 3
    submitters: int = 6


class Outcome(NamedTuple):
    """What was found, what happened, and what was done to the processes."""

    findings: list[str]
    figures: dict[str, int]
    done_to: dict[str, int]


def live(log: Path, act: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Be a process of its own, until killed or until its parent is."""
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)

    def die_with_parent() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die_with_parent, daemon=True).start()
    act(*args)


def serve(port: int, env: dict[str, str]) -> None:
    """Be a replica."""
    os.environ.update(env)
    uvicorn.run(host.create_app(), port=port, timeout_graceful_shutdown=1)


def execute(env: dict[str, str]) -> None:
    """Be the process that runs what the server runs itself."""
    os.environ.update(env)

    async def receive() -> None:
        broker = internal_jobs.worker_broker()
        await broker.startup()
        await run_receiver_task(broker)

    asyncio.run(receive())


@dataclass
class Actor:
    """A process that is started again when it has ended."""

    log: Path
    act: Callable[..., None]
    args: tuple[Any, ...]
    process: Any = None

    def start(self) -> None:
        self.process = NURSERY.Process(
            target=live, args=(self.log, self.act, self.args), daemon=True
        )
        self.process.start()

    def alive(self) -> bool:
        return self.process.is_alive()

    def signal(self, signum: int) -> None:
        if self.alive():
            os.kill(self.process.pid, signum)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def listens(actor: Actor) -> bool:
    """Return whether a replica takes requests; of others, whether it is there."""
    if actor.act is not serve:
        return actor.alive()
    with suppress(OSError), socket.create_connection(("127.0.0.1", actor.args[0]), 1):
        return True
    return False


class Chaos:
    """Kills, freezes and restarts, at the moments that a seed draws."""

    def __init__(self, plan: Plan, workers: list[Actor], hosts: list[Actor]) -> None:
        self.rng = random.Random(f"{plan.seed}-chaos")
        self.plan = plan
        self.workers = workers
        self.hosts = hosts
        self.thaws: list[tuple[float, Actor]] = []
        self.counts: dict[str, int] = {}

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def run(self) -> None:
        end = time.monotonic() + self.plan.seconds
        due = {self.hit_worker: self.plan.between_workers, self.hit_host: self.plan.between_hosts}
        next_at = {hit: time.monotonic() + self.draw(due[hit]) for hit in due}
        while (now := time.monotonic()) < end:
            for hit, at in next_at.items():
                if now >= at:
                    hit()
                    next_at[hit] = now + self.draw(due[hit])
            self.thaw(now)
            self.revive()
            time.sleep(0.02)
        self.thaw(float("inf"))
        self.revive()

    def draw(self, mean: float) -> float:
        return self.rng.uniform(0.2, 1.8) * mean

    def thaw(self, now: float) -> None:
        for at, actor in list(self.thaws):
            if at <= now:
                actor.signal(signal.SIGCONT)
                self.thaws.remove((at, actor))

    def revive(self) -> None:
        """Start again what has ended, at a signal or of its own accord."""
        for actor in self.workers + self.hosts:
            if not actor.alive():
                actor.start()

    def hit_worker(self) -> None:
        actor = self.rng.choice(self.workers)
        what = self.rng.choices(("kill", "freeze", "terminate"), (6, 3, 1))[0]
        self.count(f"{actor.act.__name__}: {what}")
        if what == "kill":
            actor.kill()
        elif what == "terminate":
            actor.signal(signal.SIGTERM)
        else:
            actor.signal(signal.SIGSTOP)
            # half of them wake up to find that they are lost
            silence = WORKER_TIMEOUT * self.rng.uniform(0.5, 2)
            self.thaws.append((time.monotonic() + silence, actor))

    def hit_host(self) -> None:
        # on a slow machine nothing would ever be served, if they were not left time to
        # come back
        if not all(map(listens, self.hosts)):
            return
        # now and then all at once
        count = self.rng.choices((1, 2, len(self.hosts)), (7, 2, 1))[0]
        for actor in self.rng.sample(self.hosts, count):
            self.count(f"{actor.act.__name__}: kill")
            actor.kill()


# --- those who submit ---


def submit_and_watch(
    name: str, seed: str, path: Path, token: str, urls: list[str], stop: threading.Event
) -> None:
    """Submit a few tasks at a time, meddle with some, and wait until they have ended."""
    rng = random.Random(seed)
    api = Replicas(urls, token, history.recorder(path), rng)
    manager = JobManager(api, max_unreachable_seconds=DRAIN_SECONDS)
    number = 0
    while not stop.is_set():
        tasks: list[str] = []
        for _ in range(rng.randint(1, 8)):
            number += 1
            # the job may be gone, if all of its workers are
            with suppress(KeyError, ConnectionError):
                tasks += submit(manager, f"{name}-{number}", rng)
        for task in tasks:
            meddle(api, task, rng)
        with suppress(TimeoutError, ConnectionError):
            manager.wait_all(tasks, timeout=4)
        if tasks and rng.random() < 0.3:
            send(api, "post", rng.choice(tasks), "retry")


def submit(manager: JobManager, name: str, rng: random.Random) -> list[str]:
    """Submit a task, sometimes twice under one key; return the ids."""
    room = {"room": ROOM, "idempotency_key": name}
    if rng.random() < 0.1:
        again = partial(
            manager.submit, internal_jobs.Composition(symbols=[name]), job_room="@internal", **room
        )
    else:
        job = rng.choices((Often, Once), (4, 1))[0]
        seconds = rng.choice((0, 0.1, 0.5, 2, 4))
        work = job(name=name, seconds=seconds, fails=rng.random() < 0.1)
        again = partial(manager.submit, work, job_room=ROOM, **room)
    return sorted({again() for _ in range(rng.choice((1, 1, 1, 2)))})


def meddle(api: Replicas, task: str, rng: random.Random) -> None:
    if rng.random() < 0.1:
        time.sleep(rng.uniform(0, 0.5))
        send(api, "patch", task, json={"status": "cancelled"})


def send(api: Replicas, method: str, *parts: str, **content: Any) -> None:
    """Ask once; whether it was done may stay unknown."""
    with suppress(httpx.TransportError):
        url = api.base_url + api_path("tasks", *parts)
        getattr(api.http, method)(url, headers=api.get_headers(), **content)


# --- the run ---


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            if done():
                return True
        time.sleep(0.1)
    return False


def log_in(url: str, user: dict[str, str]) -> str:
    answer = httpx.post(f"{url}/auth/jwt/login", data=user)
    return str(answer.raise_for_status().json()["access_token"])


def register(url: str, name: str) -> str:
    password = processes.ADMIN["password"]
    email = f"{name}@example.org"
    httpx.post(
        f"{url}/auth/register", json={"email": email, "password": password}
    ).raise_for_status()
    return log_in(url, {"username": email, "password": password})


async def read_rows(database_url: str, *, ended: bool) -> list[history.Row]:
    """Return the tasks of the database: all of them, or those that have not ended."""
    statement = select(Task) if ended else select(Task).where(~in_states(TERMINAL))
    engine = create_engine_for_url(database_url)
    async with engine.connect() as connection:
        found = (await connection.execute(statement)).all()
    await engine.dispose()
    return [
        history.Row(
            str(row.id),
            row.status.value,
            row.attempt,
            row.payload.get("name") or row.payload["symbols"][0],
            row.result,
            tuple(json.loads(line)["attempt"] for line in (row.errors or "").split("\n") if line),
            row.failed_attempts,
            row.max_attempts,
            row.job_name.startswith("@internal:"),
        )
        for row in found
    ]


async def count_workers(database_url: str) -> int:
    engine = create_engine_for_url(database_url)
    async with engine.connect() as connection:
        found = await connection.scalar(select(func.count()).select_from(Worker))
    await engine.dispose()
    return int(found or 0)


@contextmanager
def living(actors: list[Actor]) -> Iterator[list[Actor]]:
    """Start the actors; none of them outlives the block."""
    try:
        for actor in actors:
            actor.start()
        yield actors
    finally:
        for actor in actors:
            if actor.process is not None:
                actor.kill()


@contextmanager
def replicas(
    directory: Path, count: int, database_url: str
) -> Iterator[tuple[list[Actor], list[str]]]:
    """Run the replicas and their TaskIQ worker, all to be killed; yield their URLs."""
    with redis_server() as redis_url, ExitStack() as stack:
        env = {**SETTINGS, "DATABASE_URL": database_url, "REDIS_URL": redis_url}
        ports = free_ports(count)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        actors = [Actor(directory / f"replica-{port}.log", serve, (port, env)) for port in ports]
        stack.enter_context(living(actors))
        for url in urls:
            assert wait_until(lambda url=url: bool(httpx.get(url)), START_SECONDS), url
        own = {**env, "DATABASE_URL": "none://", "HOST_URL": urls[0]}
        executor = Actor(directory / "taskiq.log", execute, (own,))
        stack.enter_context(living([executor]))
        yield [*actors, executor], urls


def submitting(
    plan: Plan, directory: Path, token: str, urls: list[str], stop: threading.Event
) -> tuple[ThreadPoolExecutor, list[Future[None]]]:
    pool = ThreadPoolExecutor(plan.submitters)
    names = [f"submitter-{n}" for n in range(plan.submitters)]
    return pool, [
        pool.submit(
            submit_and_watch,
            name,
            f"{plan.seed}-{name}",
            directory / f"{name}.jsonl",
            token,
            urls,
            stop,
        )
        for name in names
    ]


def run(plan: Plan, directory: Path) -> Outcome:
    """Run it all, and judge what was written down."""
    with ExitStack() as stack:
        database_url = stack.enter_context(postgres_server())
        hosts, urls = stack.enter_context(replicas(directory, plan.replicas, database_url))
        # two users, so that nothing is allowed because one may do everything
        owner, submitter = register(urls[0], "owner"), register(urls[0], "submitter")
        workers = [
            Actor(
                directory / f"worker-{n}.log",
                work,
                (
                    directory / f"worker-{n}.jsonl",
                    owner,
                    f"{plan.seed}-worker-{n}",
                    n % 4 == 0,
                    urls,
                ),
            )
            for n in range(plan.workers)
        ]
        stack.enter_context(living(workers))
        wait_until(lambda: asyncio.run(count_workers(database_url)) >= plan.workers, START_SECONDS)
        chaos = Chaos(plan, workers, hosts)
        stop = threading.Event()
        pool, submitters = submitting(plan, directory, submitter, urls, stop)
        with pool:
            try:
                chaos.run()
            finally:
                stop.set()
        for each in submitters:
            each.result()

        def nothing_left() -> bool:
            chaos.revive()
            return not asyncio.run(read_rows(database_url, ended=False))

        wait_until(nothing_left, DRAIN_SECONDS)
        for actor in workers:
            actor.signal(signal.SIGTERM)
        wait_until(lambda: not any(actor.alive() for actor in workers), 15)
        rows = asyncio.run(read_rows(database_url, ended=True))
    found = history.History(*history.read(directory), rows)
    return Outcome(history.judge(found), history.count_up(found), chaos.counts)


def main() -> None:
    """Run it, print what happened, and say whether anything must not have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--keep", action="store_true", help="keep what was written")
    options = parser.parse_args()
    plan = Plan(
        options.seconds,
        options.seed,
        workers=options.workers,
        between_workers=min(1.5, options.seconds / 4),
        between_hosts=min(6.0, options.seconds / 4),
    )
    out = sys.stdout.write
    out(f"{plan}\n")
    with ExitStack() as stack:
        if options.keep:
            directory = tempfile.mkdtemp(prefix="history")
            out(f"written to {directory}\n")
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="history"))
        outcome = run(plan, Path(directory))
    for what, times in (outcome.done_to | outcome.figures).items():
        out(f"{times:8} {what}\n")
    for finding in outcome.findings:
        out(f"WRONG: {finding}\n")
    out(f"{len(outcome.findings)} findings\n")
    sys.exit(bool(outcome.findings))


if __name__ == "__main__":
    main()
