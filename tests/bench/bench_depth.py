"""What a single request costs when much waits, is delayed, or is done."""

import sqlite3
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any, NamedTuple

import asyncpg
from bench_client import ROOM
from bench_sides import FLOOR, PEER, TREE, Database, Host, Side, Slice, running, side

#: in an order in which each finds what it needs
OPERATIONS = ("submit", "claim", "start", "status", "complete", "heartbeat", "list", "list_on")
#: of one request, what is drawn
DRAWN = ("submit", "claim", "status", "list", "list_on")

_FILL = {
    TREE: """
INSERT INTO task (id, job_id, job_name, room_id, payload, status, priority, queue_order,
    attempt, failed_attempts, max_attempts, batch_index, dispatches, revision, interruptions,
    payload_checked, created_at, queued_at, completed_at, available_at)
SELECT {id}, job.id, '@global:modifiers:' || job.name, '{room}', '{{}}', '{status}', 0,
    n, 0, 0, 1, 0, 1, 1, 0, true, {moment}, {moment}, {completed}, {available}
FROM {numbers} JOIN job ON job.name = 'J' || (n % {jobs})""",
    FLOOR: """
INSERT INTO floor_task (id, job_name, room_id, payload, status, attempt, max_attempts,
    priority, created_at, completed_at, available_at)
SELECT {id}, '@global:modifiers:J0', '{room}', '{{}}', lower('{status}'), 0, 1,
    0, {moment}, {completed}, {available}
FROM {numbers}""",
    PEER: """
INSERT INTO task (id, job_id, room_id, payload, status, created_at, completed_at)
SELECT {id}, job.id, '{room}', '{{}}', '{status}', {moment}, {completed}
FROM {numbers} JOIN job ON job.name = 'J' || (n % {jobs})""",
}
_POSTGRES = {
    "id": "lpad(to_hex(n), 32, '0')::uuid",
    "moment": "now() - make_interval(secs => 9000000 - n)",
    "later": "now() + make_interval(secs => 900000 + n % 1000)",
    "numbers": "generate_series({first}, {last}) AS numbers(n)",
}
_SQLITE = {
    "id": "printf('%032x', n)",
    "moment": "strftime('%Y-%m-%d %H:%M:%f000', 'now', (n - 9000000) || ' seconds')",
    "later": "strftime('%Y-%m-%d %H:%M:%f000', 'now', (n % 1000 + 900000) || ' seconds')",
    "numbers": "(WITH RECURSIVE numbers(n) AS (SELECT {first} UNION ALL "
    "SELECT n + 1 FROM numbers WHERE n < {last}) SELECT n FROM numbers)",
}


class Load(NamedTuple):
    """Rows to put into a table: so many of one status, from this number on."""

    status: str
    first: int
    count: int
    delayed: bool = False


async def fill(url: str, name: str, jobs: int, *loads: Load) -> None:
    """Put tasks into one side's table, and let the database look at it."""
    sql = _POSTGRES if url.startswith("postgresql") else _SQLITE
    statements = []
    for load in loads:
        done = load.status == "COMPLETED"
        statement = _FILL[name].format(
            id=sql["id"],
            room=ROOM,
            status=load.status,
            moment=sql["moment"],
            completed=sql["moment"] if done else "NULL",
            available=sql["later"] if load.delayed else "NULL",
            jobs=jobs,
            numbers=sql["numbers"].format(first=load.first, last=load.first + load.count - 1),
        )
        statements.append(statement)
    if sql is _SQLITE:
        with sqlite3.connect(url.partition("///")[2]) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()
        return
    postgres = await asyncpg.connect(url.replace("+asyncpg", ""))
    for statement in statements:
        await postgres.execute(statement, timeout=3600)
    # what autovacuum would do in the middle of a measurement
    await postgres.execute("VACUUM ANALYZE", timeout=3600)
    await postgres.close()


async def measure(
    sides: list[Side], on: Database, rounds: int, each: int
) -> dict[str, dict[str, list[Slice | None]]]:
    """Return what one request of each side costs, in turns."""
    taken: dict[str, dict[str, list[Slice | None]]] = {
        o: {s.name: [] for s in sides} for o in OPERATIONS
    }
    slow: set[str] = set()
    for n in range(rounds + 1):
        for operation in OPERATIONS:
            for one in sides[n % len(sides) :] + sides[: n % len(sides)]:
                count = 1 if one.name in slow else each
                turn = await one.turn(operation, count, on)
                if turn and turn.seconds > 0.2:
                    slow.add(one.name)
                if n:
                    taken[operation][one.name].append(turn)
    return taken


def shapes(most: int) -> Iterator[tuple[str, int, list[tuple[str, int, list[Load]]]]]:
    """Yield for each series its name, its jobs, and what to add before each look."""
    depths = [10**n for n in range(3, 7) if 10**n <= most]
    for jobs in (1, 50):
        steps = []
        before = 0
        for depth in depths:
            steps.append((f"{depth}", depth, [Load("PENDING", before, depth - before)]))
            before = depth
        yield f"waiting, {jobs} job{'s' * (jobs > 1)}", jobs, steps
    finished, delayed = most, max(most // 10, 1000)
    yield (
        "finished and delayed, 50 jobs",
        50,
        [
            ("1000", 1000, [Load("PENDING", 0, 1000)]),
            (
                f"1000 and {finished} finished, {delayed} delayed",
                finished,
                [
                    Load("COMPLETED", 1000, finished),
                    Load("PENDING", 1000 + finished, delayed, delayed=True),
                ],
            ),
        ],
    )


async def series(
    on: Database,
    pythons: dict[str, Any],
    jobs: int,
    steps: list[tuple[str, int, list[Load]]],
    rounds: int,
    each: int,
) -> dict[str, dict[str, dict[str, list[Slice | None]]]]:
    """Measure every operation after each step of a series, on databases of its own."""
    found = {}
    with ExitStack() as processes:
        hosts: dict[str, Host] = {}
        for name, python in pythons.items():
            beside = "floor" if name == TREE else ""
            hosts[name] = processes.enter_context(
                running(python, await on.create(), on.kind, beside)
            )
        hosts[FLOOR] = hosts[TREE]
        async with AsyncExitStack() as stack:
            sides = [
                await stack.enter_async_context(side(name, host, 1, jobs))
                for name, host in hosts.items()
            ]
            for label, _, loads in steps:
                for one in sides:
                    await fill(one.host.url, one.name, jobs, *loads)
                    one.users[0].cursor = ""
                found[label] = await measure(sides, on, rounds, each)
    return found
