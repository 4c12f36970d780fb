"""What a thousand requests that wait, or arrive at once, cost others; prints figures as JSON.

Run it with ``nox -s waiting``. The host is a process of its own, on a SQLite file; the
heartbeats are those of a user who waits for nothing.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
import httpx
from processes import HANG, Host, hosting

PASSWORD = "correct horse battery staple"
JOB = {"category": "modifiers", "name": "Rotate", "schema": {}}
# the host is not asked to take all of them in at once
AT_A_TIME = 20
LONG = 600


async def become_someone_else(client: httpx.AsyncClient, host: Host) -> None:
    """Register a new user and log it in."""
    who = {"email": "else@example.org", "password": PASSWORD}
    (await client.post(f"{host.url}/auth/register", json=who)).raise_for_status()
    form = {"username": who["email"], "password": PASSWORD}
    answer = await client.post(f"{host.url}/auth/jwt/login", data=form)
    token = answer.raise_for_status().json()["access_token"]
    client.headers["Authorization"] = f"Bearer {token}"


async def heartbeats(client: httpx.AsyncClient, count: int) -> list[float]:
    """Return how many milliseconds each of ``count`` heartbeats took."""
    worker = (await client.post("/workers")).raise_for_status().json()["id"]
    took = []
    for _ in range(count):
        began = time.perf_counter()
        (await client.patch(f"/workers/{worker}")).raise_for_status()
        took.append(1000 * (time.perf_counter() - began))
    return took


async def measure(host: Host, waiting: int, count: int) -> dict[str, Any]:
    """Return the times of heartbeats, without and with so many who wait."""
    # a connection that the host is about to close for its idleness is not used again
    limits = httpx.Limits(max_connections=None, keepalive_expiry=1)
    headers, url = {"Prefer": f"wait={LONG}"}, f"{host.url}/v1/joblib"
    web = httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {host.token}"} | headers,
        limits=limits,
        timeout=LONG,
    )
    answered: list[int] = []

    async with web, host.client() as client:
        await become_someone_else(client, host)
        made = await web.put("/rooms/lab/jobs", json=JOB)
        worker = made.raise_for_status().json()["worker_id"]
        submitted = await web.post("/rooms/lab/tasks/lab:modifiers:Rotate", json={})
        task = submitted.raise_for_status().json()["id"]
        await web.post("/tasks/claim", json={"worker_id": worker})

        async def wait(n: int) -> None:
            if n % 2:
                answer = await web.get(f"/tasks/{task}")
            else:
                answer = await web.post("/tasks/claim", json={"worker_id": worker})
            answered.append(answer.status_code)

        alone = await heartbeats(client, count)
        async with anyio.create_task_group() as group:
            for n in range(waiting):
                group.start_soon(wait, n)
                if n % AT_A_TIME == AT_A_TIME - 1:
                    # a heartbeat of the same host: it has taken in what came before
                    await heartbeats(client, 1)
            await anyio.sleep(2)
            beside = await heartbeats(client, count)
            assert not answered, f"did not wait: {answered}"
            group.cancel_scope.cancel()
        after = await heartbeats(client, count)
    told = {"alone": alone, "beside": beside, "after they hung up": after}
    figures: dict[str, Any] = {
        name: {"median_ms": statistics.median(took), "max_ms": max(took)}
        for name, took in told.items()
    }
    ratio = figures["beside"]["median_ms"] / figures["alone"]["median_ms"]
    return {"waiting": waiting, "heartbeats": count, **figures, "ratio": ratio}


async def crowd(host: Host, count: int) -> dict[str, Any]:
    """Return the times of heartbeats while so many claims arrive at the same moment."""
    async with host.client() as admin, host.client() as client:
        await become_someone_else(client, host)
        made = await admin.put("/rooms/lab/jobs", json=JOB)
        body = json.dumps({"worker_id": made.raise_for_status().json()["worker_id"]}).encode()
        asked = (
            f"POST /v1/joblib/tasks/claim HTTP/1.1\r\nHost: host\r\nPrefer: wait={LONG}\r\n"
            f"Authorization: Bearer {host.token}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        where = httpx.URL(host.url)
        # connected beforehand, and as bytes: a client that is busy itself measures itself
        connections = [await asyncio.open_connection(where.host, where.port) for _ in range(count)]
        await heartbeats(client, 20)
        for _, writer in connections:
            writer.write(asked)
        took = await heartbeats(client, 100)
        for reader, writer in connections:
            assert not reader._buffer, "did not wait"  # type: ignore[attr-defined]
            writer.close()
    return {
        "claims at once": count,
        "heartbeats": len(took),
        "max_ms": max(took),
        "median_ms": statistics.median(took),
        "first": took[:5],
    }


async def run(waiting: int, count: int) -> dict[str, Any]:
    """Measure on a host of its own."""
    with tempfile.TemporaryDirectory() as directory:
        settings = {
            "ZNDRAW_JOBLIB_LONG_POLL_MAX_WAIT_SECONDS": str(LONG),
            "ZNDRAW_JOBLIB_WORKER_TIMEOUT_SECONDS": str(LONG),
        }
        async with hosting(Path(directory), **settings) as host:
            with anyio.fail_after(HANG + waiting):
                return {**await measure(host, waiting, count), "crowd": await crowd(host, waiting)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--heartbeats", type=int, default=200)
    asked = parser.parse_args()
    found = anyio.run(run, asked.waiting, asked.heartbeats)
    print(json.dumps(found, indent=2))
    if found["beside"]["median_ms"] > 100:
        raise SystemExit("a heartbeat takes more than 100 ms")
