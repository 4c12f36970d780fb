"""Three replicas on one PostgreSQL and one Redis, and what may befall them.

They are started once, and used up: the last tests kill them. Longer, and with figures::

    nox -s replicas -- --seconds 60
    nox -s soak -- --seconds 600
"""

import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import processes
import psutil
import pytest
import races
import servers
from internal_jobs import Composition
from load import Load
from makers import SessionMaker, postgres_service
from processes import DOCS, HANG, Browser, Host, browsing, read, replicas, running, submit, until
from races import NAMES, ORDERS, Race, Scene
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from steps import at_once, meet, silence, statuses

# they have a database of their own
pytestmark = pytest.mark.makers("plain")

FAULTY = Path(processes.__file__).parent / "faulty_host.py"
COMPOSITION = f"@internal:analysis:{Composition.__name__}"
DAY = 86400
#: within which the service is well again once what it depends on is back; figures are printed
RECOVERY = 20.0


@dataclass
class House:
    """The replicas, what they share, and what runs beside them."""

    hosts: list[Host]
    postgres: servers.Service
    redis: servers.Service
    session_maker: SessionMaker

    @asynccontextmanager
    async def browsers(self, room: str) -> AsyncIterator[list[Browser]]:
        """Yield a browser at each replica, all in one room."""
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(browsing(host, room)) for host in self.hosts]

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[list[httpx.AsyncClient]]:
        """Yield a client of each replica, all of one user."""
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(host.client()) for host in self.hosts]


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    directory = tmp_path_factory.mktemp("house")
    env = {
        # longer than the tests: nobody is lost that a test doesn't lose
        "ZNDRAW_JOBLIB_WORKER_TIMEOUT_SECONDS": "1800",
        "ZNDRAW_JOBLIB_SWEEPER_INTERVAL_SECONDS": "1",
        "ZNDRAW_JOBLIB_INTERNAL_REDISPATCH_SECONDS": "3",
        # a clock may be off by a day
        "ZNDRAW_AUTH_TOKEN_LIFETIME_SECONDS": str(10 * DAY),
    }
    taskiq = ("-m", "taskiq", "worker", "--workers=1", f"--app-dir={DOCS}")
    with (
        # what was committed stays, also when the server is stopped in a hurry
        postgres_service("fsync", "full_page_writes") as postgres,
        servers.redis_service() as redis,
    ):
        engine = create_async_engine(postgres.url)
        async with (
            replicas(directory, 3, postgres.url, redis.url, script=FAULTY, **env) as hosts,
            running(
                *taskiq,
                "internal_jobs:worker_broker",
                log=directory / "taskiq.log",
                HOST_URL=hosts[-1].url,
                REDIS_URL=redis.url,
                # it has neither database nor secret
                DATABASE_URL="none://",
            ),
        ):
            yield House(hosts, postgres, redis, async_sessionmaker(engine))
        await engine.dispose()


@pytest.fixture
def seconds(pytestconfig: pytest.Config) -> float:
    """Return how long a load is to last."""
    return pytestconfig.option.seconds


@pytest.fixture
def long(seconds: float) -> None:
    """Skip what says nothing under a short load; `nox -s soak` and `replicas` have a long one."""
    if seconds < 20:
        pytest.skip("a short load says nothing")


def say(line: str) -> None:
    """Print a figure; pytest shows it with ``-s``."""
    sys.stdout.write(f"\n{line}")


def told(browser: Browser) -> dict[str, Counter[str]]:
    """Return how often each task's states were told."""
    states: dict[str, Counter[str]] = {}
    for event, data in browser.heard:
        if event == "task_status_event":
            states.setdefault(data["id"], Counter())[data["status"]] += 1
    return states


async def hear(browsers: list[Browser], task: str, *expected: str) -> None:
    """Wait until all have heard that a task is where it ends; each state once."""
    for browser in browsers:
        await until(
            lambda browser=browser: told(browser).get(task, {}).get(expected[-1]),
            lambda browser=browser: browser.heard,
        )
    for browser in browsers:
        assert told(browser)[task] == dict.fromkeys(expected, 1)


async def offer(http: httpx.AsyncClient, room: str, **policy: Any) -> str:
    job = {"category": "modifiers", "name": "Work", "schema": {}, **policy}
    answer = await http.put(f"/rooms/{room}/jobs", json=job)
    return answer.raise_for_status().json()["worker_id"]


async def claim(http: httpx.AsyncClient, worker: str, **headers: str) -> list[Any]:
    body = {"worker_id": worker, "max_tasks": 32}
    answer = await http.post("/tasks/claim", json=body, headers=headers)
    return answer.raise_for_status().json()["tasks"]


async def report(http: httpx.AsyncClient, task: str, status: str) -> httpx.Response:
    return await http.patch(f"/tasks/{task}", json={"status": status})


# --- one house ---


async def test_what_one_takes_another_does_and_all_hear_of(house: House, seconds: float):
    load = Load(house.hosts, "lab")
    async with house.browsers("lab") as browsers:
        async with load.running():
            await anyio.sleep(seconds)
        await load.check(house.hosts[0])
        assert load.taken
        for task in load.taken:
            await hear(browsers, task, "pending", "claimed", "running", "completed")
    requests = sum(load.answers.values())
    say(f"{len(load.taken)} tasks, {requests} requests in {seconds:g} s, all told once")


async def test_what_the_server_runs_itself_runs_once(house: House):
    async with house.browsers("office") as browsers, house.clients() as clients:
        for http in clients:
            task = await submit(http, "office", COMPOSITION, symbols=["Cu", "O"])
            await hear(browsers, task, "claimed", "running", "completed")
            assert (await read(http, f"/tasks/{task}"))["attempt"] == 1


async def test_three_sweepers_tell_a_loss_once(house: House):
    async with house.browsers("cellar") as browsers, house.clients() as clients:
        lost = []
        for http in clients * 2:
            worker = await offer(http, "cellar")
            task = await submit(http, "cellar", "cellar:modifiers:Work")
            (claimed,) = await claim(http, worker)
            assert claimed["id"] == task
            lost.append((worker, task))
        await silence(house.session_maker, *(worker for worker, _ in lost))
        for _, task in lost:
            await hear(browsers, task, "pending", "claimed", "failed")


@asynccontextmanager
async def setting(house: House, room: str) -> AsyncIterator[Scene]:
    """Yield a scene at three replicas; whoever acts is one user."""
    async with browsing(house.hosts[2], room) as browser, house.clients() as clients:

        async def hears(task: Any, *states: str) -> None:
            heard = Counter(states)
            await until(
                lambda: told(browser).get(task["id"], Counter()) >= heard, lambda: browser.heard
            )
            assert told(browser)[task["id"]] == heard

        meet_there = partial(meet, house.session_maker)
        yield Scene(*clients, room, house.session_maker, meet_there, hears)


@pytest.mark.parametrize(("race", "first"), ORDERS, ids=NAMES)
async def test_race(house: House, race: Race, first: int):
    async with setting(house, f"{race.__name__}-{first}") as scene:
        await races.run(race, first, scene)


async def test_a_heartbeat_during_a_sweep_learns_of_it(house: House):
    async with setting(house, "beat") as scene:
        worker = await scene.offer()
        task = await scene.task(worker, "running")
        gone = {"error_type": None}

        async def swept() -> None:
            while gone["error_type"] is None:
                gone.update(await read(scene.ada, f"/tasks/{task['id']}"))
                await anyio.sleep(0.01)

        async def silent(session: AsyncSession) -> None:
            await races.links(worker)(session)
            await silence(house.session_maker, worker)

        # one of the three sweepers has the worker, and waits for its links
        beat = partial(scene.elsewhere.patch, f"/workers/{worker}")
        _, late = await meet(house.session_maker, silent, swept, beat)
        assert (late.status_code, gone["error_type"]) == (404, "worker_lost")
        await scene.hears(task, "pending", "claimed", "running", "failed")
        await races.intact(scene)


async def test_at_three_replicas_there_is_one_of_each(house: House):
    async with house.clients() as clients:
        worker = (await clients[0].post("/workers")).json()["id"]
        job = {"category": "modifiers", "name": "Work", "schema": {}}
        job["worker_id"] = worker
        answers = await at_once(*(http.put("/rooms/once/jobs", json=job) for http in clients))
        assert statuses(answers) == [200, 200, 201]
        url, key = "/rooms/once/tasks/once:modifiers:Work", {"Idempotency-Key": "k"}
        answers = await at_once(*(http.post(url, json={}, headers=key) for http in clients))
        assert statuses(answers) == [202] * 3
        (task,) = {answer.json()["id"] for answer in answers}
        claims = await at_once(*(claim(http, worker, **key) for http in clients))
        assert {task["id"] for tasks in claims for task in tasks} == {task}
        assert {task["attempt"] for tasks in claims for task in tasks} == {1}


@pytest.mark.usefixtures("long")
async def test_three_are_no_slower_than_one(house: House, seconds: float):
    """Side by side, the same clients on one replica and on three; figures are printed."""
    spread, alone = Load(house.hosts, "spread"), Load(house.hosts[:1] * 3, "alone")
    rounds = 2
    for _ in range(rounds):
        for load in (spread, alone):
            async with load.running():
                await anyio.sleep(seconds / rounds)
    slower = {}
    for what, one in alone.medians().items():
        three = spread.medians()[what]
        slower[what] = three / one
        say(f"{what:>10}: {three * 1e3:6.1f} ms on three, {one * 1e3:6.1f} ms on one")
    say(f"{len(spread.taken)} tasks on three, {len(alone.taken)} on one")
    # waiting claims end when there is work: they say nothing of the replica
    del slower["claim"], slower["wait"]
    assert max(slower.values()) < 2, slower


# --- nothing grows ---


async def inside(host: Host) -> dict[str, int]:
    """Return what a replica holds at rest."""
    async with httpx.AsyncClient(base_url=host.url) as http:
        for _ in range(50):
            counts = (await http.get("/inside")).raise_for_status().json()
            if not counts["connections"]:
                break
            # its sweeper is at work
            await anyio.sleep(0.05)
    process = psutil.Process(host.process.popen.pid)
    return {
        **counts,
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "MB": process.memory_info().rss // 2**20,
    }


@pytest.mark.usefixtures("long")
async def test_nothing_grows(house: House, seconds: float):
    """Some objects for each request, left behind in half a minute, are noticed."""
    load = Load(house.hosts, "soak")

    async def work() -> list[dict[str, int]]:
        async with load.running():
            await anyio.sleep(seconds / rounds)
        return await at_once(*map(inside, house.hosts))

    # at ten seconds or more each; the first one fills caches and pools
    rounds = max(3, min(20, int(seconds / 10)))
    held = [await work()]
    warm = sum(load.answers.values())
    held += [await work() for _ in range(rounds - 1)]
    requests = sum(load.answers.values()) - warm
    await load.check(house.hosts[0])
    for at, host in enumerate(house.hosts):
        course = [counts[at] for counts in held]
        for what in course[0]:
            say(f"{what:>12} of {host.url}: {[counts[what] for counts in course]}")
    say(f"{len(load.taken)} tasks, {requests} requests after the first round")
    for before, after in zip(held[0], held[-1], strict=True):
        assert after["connections"] == 0
        assert after["tasks"] <= before["tasks"] + 2
        # caches fill for longer than the first round
        assert after["objects"] <= before["objects"] + 2000 + requests / len(house.hosts) / 10
        # pools hold as many threads and connections as were ever needed at once
        assert after["threads"] <= before["threads"] + 5
        assert after["files"] <= before["files"] + 10
        assert after["MB"] <= before["MB"] + 30


# --- what they depend on goes, and comes back ---


@asynccontextmanager
async def without(service: servers.Service) -> AsyncIterator[None]:
    await anyio.to_thread.run_sync(service.stop)
    yield
    await anyio.to_thread.run_sync(service.start)


def outage(seconds: float) -> float:
    return min(max(seconds / 5, 2), 15)


async def test_postgres_goes_and_comes_back(house: House, seconds: float):
    load = Load(house.hosts, "outage")
    asked = {"submit", "claim", "heartbeat", "list", "status"}
    async with load.running():
        await anyio.sleep(1)
        async with without(house.postgres):
            await anyio.sleep(outage(seconds))
        back = time.monotonic()
        load.forget_times()
        await until(lambda: load.served.keys() >= asked)
        await anyio.sleep(1)
    took = {what: at - back for what, at in load.served.items()}
    say(f"after PostgreSQL: served again after {max(took.values()):.2f} s at most")
    late = {what: at - back for what, at in load.refused.items()}
    say(f"last refusals after {max(late.values(), default=0):.2f} s")
    refused = sum(n for (_, code), n in load.answers.items() if code == 503)
    say(f"{refused} times 503, {sum(load.answers.values())} requests")
    assert refused
    assert max(took.values()) < RECOVERY
    assert max(late.values(), default=0) < RECOVERY
    await load.check(house.hosts[0])
    assert {code for _, code in load.answers} <= {200, 201, 202, 503}


async def test_redis_goes_and_comes_back(house: House, seconds: float):
    load = Load(house.hosts, "blackout")
    async with house.browsers("blackout") as browsers, house.clients() as clients, load.running():
        await anyio.sleep(1)
        async with without(house.redis):
            load.forget_times()
            lost = await submit(clients[0], "void", COMPOSITION, symbols=[])
            await anyio.sleep(outage(seconds))
            slowest = {what: max(times) for what, times in load.seconds.items()}
        back = time.monotonic()
        for browser in browsers:
            browser.heard.clear()
        await until(lambda: all(map(told, browsers)))
        heard = time.monotonic() - back
        ended = await read(clients[1], f"/tasks/{lost}", prefer="wait=20")
        # the broker is given a while: sent late, or told to be lost
        assert (ended["status"], ended["error_type"]) in [
            ("completed", None),
            ("failed", "dispatch"),
        ]
        task = await submit(clients[0], "void", COMPOSITION, symbols=[])
        ended = await read(clients[1], f"/tasks/{task}", prefer="wait=20")
        assert ended["status"] == "completed"
        ran = time.monotonic() - back
    del slowest["claim"], slowest["wait"]
    say(f"without Redis: answered after {max(slowest.values()):.2f} s at most")
    say(f"after Redis: heard again after {heard:.2f} s, run again after {ran:.2f} s")
    await load.check(house.hosts[0])
    # Socket.IO and the broker fail no request
    assert {code for _, code in load.answers} <= {200, 201, 202}
    assert heard < RECOVERY
    assert ran < RECOVERY


async def test_clocks_of_replicas_may_be_off_and_jump(house: House):
    """All times are the database's; a task's place in its queue is one of them."""
    room, job = "clock", "clock:modifiers:Work"
    async with house.clients() as clients, httpx.AsyncClient() as http:
        worker = await offer(clients[1], room)
        for at, off in ((0, DAY), (1, -DAY), (0, -DAY), (0, 0), (1, 0)):
            url = f"{house.hosts[at].url}/harm/clock?seconds={off}"
            (await http.post(url)).raise_for_status()
            tasks = [await submit(client, room, job) for client in clients * 2]
            url = f"/rooms/{room}/tasks/{job}"
            delayed = await clients[at].post(url, json={"delay_seconds": 0.5})
            claimed = await claim(clients[2], worker)
            assert [task["id"] for task in claimed] == tasks
            times = [task[at] for task in claimed for at in ("created_at", "claimed_at")]
            spread = datetime.fromisoformat(max(times)) - datetime.fromisoformat(min(times))
            assert spread.total_seconds() < HANG
            (late,) = await claim(clients[at], worker, prefer="wait=20")
            assert late["id"] == delayed.json()["id"]
        # three sweepers have looked since, and nobody was lost
        listed = await read(clients[0], "/workers?limit=500")
        assert worker in [worker["id"] for worker in listed["items"]]


# --- a host dies, in the middle of a request ---


async def dies_at(host: Host, what: str, url: str, **content: Any) -> None:
    """Let a replica end with the first commit that it would tell of: this one."""
    async with host.client() as http:
        (await http.post(f"{host.url}/harm/{what}")).raise_for_status()
        # the answer may have left before
        with suppress(httpx.TransportError):
            assert (await http.post(url, **content)).status_code == 202
    assert await host.process.ends() == -signal.SIGKILL


async def test_a_host_dies_between_commit_and_event(house: House):
    dying, *others = house.hosts
    room = "funeral"
    submission = {"json": {"payload": {"n": 1}}, "headers": {"Idempotency-Key": "k"}}
    url = f"/rooms/{room}/tasks/{room}:modifiers:Work"
    found: list[Any] = []
    async with (
        browsing(others[0], room) as browser,
        others[0].client() as http,
        others[1].client() as worker_http,
    ):
        worker = await offer(worker_http, room)

        async def wait() -> None:
            found.extend(await claim(worker_http, worker, prefer="wait=20"))

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await dies_at(dying, "event", url, **submission)
            begun = time.monotonic()
        say(f"a claim elsewhere had the task after {time.monotonic() - begun:.2f} s")
        assert time.monotonic() - begun < RECOVERY
        # who had no answer asks again, and there is one task
        again = await http.post(url, **submission)
        assert [task["id"] for task in found] == [again.json()["id"]]
        await report(http, found[0]["id"], "running")
        await until(lambda: told(browser).get(found[0]["id"], {}).get("running"))


async def test_a_host_dies_between_commit_and_broker(house: House):
    _, dying, other = house.hosts
    async with browsing(other, "wake") as browser, other.client() as http:
        url = f"/rooms/wake/tasks/{COMPOSITION}"
        await dies_at(dying, "broker", url, json={"payload": {"symbols": ["Cu"]}})
        (task,) = (await read(http, "/rooms/wake/tasks"))["items"]
        assert task["status"] == "claimed"
        # the sweeper of the one that is left sends it again
        await until(lambda: told(browser).get(task["id"], {}).get("completed"))
        done = await read(http, f"/tasks/{task['id']}")
        assert (done["status"], done["attempt"]) == ("completed", 1)
        assert told(browser)[task["id"]]["running"] == 1
