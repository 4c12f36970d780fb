"""What this tree costs, beside the floor and the published release: ``nox -s bench``.

Three sides answer the same requests over HTTP: this tree's routes; the floor's
(``bench_floor.py``), in the same host process; and those of the published release, in a
process and an environment of its own. They take turns in short slices, and what is told
are medians of the ratios within a turn: what else the machine does meets all of them.
The CPU seconds of the host stand beside the clock; they know no neighbours.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from bench_sides import (
    FLOOR,
    KINDS,
    PEER,
    TREE,
    Database,
    Host,
    Slice,
    database,
    release_python,
    running,
    side,
)

#: in an order in which each finds what it needs
OPERATIONS = (
    "submit",
    "claim",
    "start",
    "status",
    "complete",
    "empty_claim",
    "heartbeat",
    "list",
    "list_on",
    "cycle",
)

Turns = dict[str, list[Slice | None]]


def ratio(over: list[Slice | None], under: list[Slice | None], field: str) -> float:
    """Return the median of what one side takes, in units of another's."""
    pairs = [
        (getattr(a, field), getattr(b, field))
        for a, b in zip(over, under, strict=True)
        if a and b
    ]
    return statistics.median([a / b for a, b in pairs if b] or [float("nan")])


def median(turns: list[Slice | None], field: str) -> float:
    taken = [getattr(turn, field) for turn in turns if turn]
    return statistics.median(taken or [float("nan")])


async def throughput(
    hosts: dict[str, Host], on: Database, connections: int, rounds: int, each: int
) -> dict[str, Turns]:
    """Measure every operation of every side at so many connections."""
    measured: dict[str, Turns] = {o: {name: [] for name in hosts} for o in OPERATIONS}
    async with AsyncExitStack() as stack:
        sides = [
            await stack.enter_async_context(side(name, host, connections))
            for name, host in hosts.items()
        ]
        for n in range(rounds + 1):
            for operation in OPERATIONS:
                for one in sides[n % len(sides) :] + sides[: n % len(sides)]:
                    taken = await one.turn(operation, each, on)
                    # the first round warms caches up
                    if n:
                        measured[operation][one.name].append(taken)
    return measured


def tell_throughput(kind: str, connections: int, measured: dict[str, Turns]) -> Any:
    """Print one table and return its rows."""
    print(f"\n{KINDS[kind]}, {connections} connection{'s' * (connections > 1)}")
    print(
        f"{'':12}{'per s':>8}{'cpu ms':>8}{'db ms':>8}   "
        f"{'of floor':>9}{'(cpu)':>7}   {'x release':>9}{'(cpu)':>7}  refused"
    )
    rows = {}
    for operation, turns in measured.items():
        tree = turns[TREE]
        row = {
            "per_second": 1 / median(tree, "seconds"),
            "cpu_ms": 1000 * median(tree, "cpu"),
            "database_cpu_ms": 1000 * median(tree, "database_cpu"),
        }
        for name, there in ((FLOOR, "of_floor"), (PEER, "of_release")):
            if name in turns:
                row[there] = ratio(turns[name], tree, "seconds")
                row[f"{there}_cpu"] = ratio(turns[name], tree, "cpu")
        refused = {
            name: sum(turn.failed for turn in turns[name] if turn) for name in turns
        }
        row["refused"] = {name: count for name, count in refused.items() if count}
        rows[operation] = row
        print(
            f"{operation:12}{row['per_second']:8.0f}{row['cpu_ms']:8.2f}"
            f"{row['database_cpu_ms']:8.2f}   {row.get('of_floor', 0):9.2f}"
            f"{row.get('of_floor_cpu', 0):7.2f}   {row.get('of_release', 0):9.2f}"
            f"{row.get('of_release_cpu', 0):7.2f}  {row['refused'] or ''}",
            flush=True,
        )
    return rows


async def bench(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with database(kind) as on:
        async with AsyncExitStack() as stack:
            hosts: dict[str, Host] = {}
            hosts[TREE] = hosts[FLOOR] = stack.enter_context(
                running(sys.executable, await on.create(), kind, "floor")
            )
            if options.release:
                hosts[PEER] = stack.enter_context(
                    running(options.release, await on.create(), kind, "")
                )
            for connections in options.connections:
                each = -(-options.requests // connections)
                measured = await throughput(
                    hosts, on, connections, options.rounds, each
                )
                found[str(connections)] = tell_throughput(kind, connections, measured)
            memory = {name: host.memory() for name, host in hosts.items()}
            print(f"memory, MiB: { {k: round(v) for k, v in memory.items()} }")
    return {"throughput": found, "memory": memory}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])

    def numbers(text: str) -> list[int]:
        return [*map(int, text.split(","))]

    parser.add_argument("--quick", action="store_true", help="ends within 4 minutes")
    parser.add_argument("--kinds", default=",".join(KINDS), help="databases")
    parser.add_argument("--connections", type=numbers)
    parser.add_argument("--rounds", type=int, help="turns of each side")
    parser.add_argument("--requests", type=int, help="requests in a turn")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--no-release", action="store_true")
    options = parser.parse_args()
    options.connections = options.connections or (
        [1, 8] if options.quick else [1, 8, 32]
    )
    options.rounds = options.rounds or (3 if options.quick else 9)
    options.requests = options.requests or (48 if options.quick else 96)
    options.release = (
        None if options.no_release else release_python(Path(sys.prefix) / "release")
    )
    return options


def main() -> None:
    options = parse()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
    }
    for kind in options.kinds.split(","):
        found[kind] = asyncio.run(bench(kind, options))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
