"""What this tree costs, beside the floor and the published release: ``nox -s bench``.

Four sides answer the same requests over HTTP: this tree's routes; in the same host process
the bare floor's (``bench_bare.py``: plain SQL, raw JSON), and those of a floor that pays for
SQLAlchemy's types and Pydantic too (``bench_floor.py``); and those of the published release,
in a process and an environment of its own. Hosts override one dependency, as every real one
does, and are measured without that as well. The sides take turns in short slices, and what is told
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
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import bench_batches
import bench_depth
from bench_client import User
from bench_sides import (
    BARE,
    FLOOR,
    KINDS,
    OVERRIDES,
    PEER,
    RELEASE,
    TREE,
    Database,
    Host,
    Slice,
    database,
    release_python,
    running,
    side,
)
from servers import redis_server

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
    "short_cycle",
)
#: what the pictures of cost against depth are called
PICTURES = {"locked": "sqlite", "wal": "sqlite-wal", "postgres": "postgresql"}
#: what of the release something is compared with, where it has not the same
INSTEAD = {"short_cycle": "cycle"}

Turns = dict[str, list[Slice | None]]


def ratio(over: list[Slice | None], under: list[Slice | None], field: str) -> float:
    """Return the median of what one side takes, in units of another's."""
    pairs = [
        (getattr(a, field), getattr(b, field)) for a, b in zip(over, under, strict=True) if a and b
    ]
    return statistics.median([a / b for a, b in pairs if b] or [float("nan")])


def median(turns: list[Slice | None], field: str) -> float:
    taken = [getattr(turn, field) for turn in turns if turn]
    return statistics.median(taken or [float("nan")])


def percentile(turns: list[Slice | None], percent: int) -> float:
    """Return in how many ms so many of a hundred requests are answered."""
    latencies = [latency for turn in turns if turn for latency in turn.latencies]
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return 1000 * cuts[percent - 1]


async def throughput(
    hosts: dict[str, Host], on: Database, connections: int, rounds: int, each: int, warm: int
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
                    # the first round warms caches up
                    taken = await one.turn(operation, each if n else warm, on)
                    if n:
                        measured[operation][one.name].append(taken)
    return measured


def tell_throughput(kind: str, override: str, connections: int, measured: dict[str, Turns]) -> Any:
    """Print one table and return its rows."""
    how = "a dependency overridden" if override == "override" else "nothing overridden"
    plural = "s" * (connections > 1)
    print(f"\n{KINDS[kind]}, {connections} connection{plural}, {how}")
    print(
        f"{'':12}{'per s':>8}{'p50 ms':>8}{'p99 ms':>8}{'floor':>8}{'cpu ms':>8}{'db ms':>8}"
        f"{'WAL B':>8}   {'of bare':>9}{'(cpu)':>7}   {'of floor':>9}"
        f"   {'x release':>9}{'(cpu)':>7}  refused"
    )
    rows = {}
    for operation, turns in measured.items():
        tree = turns[TREE]
        row = {
            "per_second": 1 / median(tree, "seconds"),
            "p50_ms": percentile(tree, 50),
            "p99_ms": percentile(tree, 99),
            "floor_p99_ms": percentile(turns[FLOOR], 99),
            "cpu_ms": 1000 * median(tree, "cpu"),
            "database_cpu_ms": 1000 * median(tree, "database_cpu"),
            "wal_bytes": median(tree, "wal"),
        }
        for name, there in ((BARE, "of_bare"), (FLOOR, "of_floor"), (PEER, "of_release")):
            if name in turns:
                theirs = turns[name]
                if name == PEER:
                    theirs = measured[INSTEAD.get(operation, operation)][name]
                row[there] = ratio(theirs, tree, "seconds")
                row[f"{there}_cpu"] = ratio(theirs, tree, "cpu")
        refused = {name: sum(turn.failed for turn in turns[name] if turn) for name in turns}
        row["refused"] = {name: count for name, count in refused.items() if count}
        rows[operation] = row
        print(
            f"{operation:12}{row['per_second']:8.0f}{row['p50_ms']:8.1f}{row['p99_ms']:8.1f}"
            f"{row['floor_p99_ms']:8.1f}{row['cpu_ms']:8.2f}{row['database_cpu_ms']:8.2f}"
            f"{row['wal_bytes']:8.0f}   {row['of_bare']:9.2f}{row['of_bare_cpu']:7.2f}"
            f"   {row['of_floor']:9.2f}"
            f"   {row.get('of_release', 0):9.2f}{row.get('of_release_cpu', 0):7.2f}"
            f"  {row['refused'] or ''}",
            flush=True,
        )
    means = {
        there: statistics.geometric_mean(
            row[there] for row in rows.values() if row.get(there, 0) > 0
        )
        for there in ("of_bare", "of_floor", "of_release")
        if any(row.get(there, 0) > 0 for row in rows.values())
    }
    told = ", ".join(f"{there} {mean:.2f}" for there, mean in means.items())
    print(f"geometric means: {told}")
    return rows | {"geometric_means": means}


async def bench(kind: str, override: str, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    value = OVERRIDES[override]
    with database(kind) as on:
        async with AsyncExitStack() as stack:
            hosts: dict[str, Host] = {}
            url = await on.create()
            host = stack.enter_context(running(sys.executable, url, kind, "floor", override=value))
            hosts |= dict.fromkeys((TREE, BARE, FLOOR), host)
            if options.release:
                url = await on.create()
                hosts[PEER] = stack.enter_context(
                    running(options.release, url, kind, "", override=value)
                )
            for connections in options.connections:
                each = max(-(-options.requests // connections), 2)
                # PostgreSQL plans a statement anew five times for each connection
                warm = each if options.quick else max(each, 10)
                measured = await throughput(hosts, on, connections, options.rounds, each, warm)
                found[str(connections)] = tell_throughput(kind, override, connections, measured)
            memory = {name: host.memory() for name, host in hosts.items()}
            print(f"memory, MiB: { {k: round(v) for k, v in memory.items()} }")
    return {"throughput": found, "memory": memory}


async def depths(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure single requests against what waits and what is done."""
    pythons: dict[str, Any] = {TREE: sys.executable}
    if options.release:
        pythons[PEER] = options.release
    told: dict[str, Any] = {}
    with database(kind) as on:
        for name, jobs, steps in bench_depth.shapes(options.most):
            if options.quick and jobs == 1:
                continue
            found = await bench_depth.series(on, pythons, jobs, steps, options.rounds, options.each)
            told[name] = {"depth": [depth for _, depth, _ in steps]} | {
                operation: {
                    who: [1000 * median(at[operation][who], "seconds") for at in found.values()]
                    for who in next(iter(found.values()))[operation]
                }
                for operation in bench_depth.OPERATIONS
            }
            tell_depths(kind, name, told[name], list(found))
    return told


def tell_depths(kind: str, name: str, told: dict[str, Any], labels: list[str]) -> None:
    print(f"\n{KINDS[kind]}, {name}: ms a request at {'; '.join(labels)}")
    for operation in bench_depth.OPERATIONS:
        sides = told[operation]
        row = [f"{operation:12}"]
        for who, costs in sides.items():
            growth = costs[-1] / costs[0]
            row.append(f"{who} {' '.join(f'{c:8.2f}' for c in costs)} x{growth:<7.2f}")
        print("  ".join(row), flush=True)


async def wake_ups(kind: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure how soon a waiting request hears of what it waits for, in ms."""
    found: dict[str, dict[str, float]] = {}
    with database(kind) as on, redis_server() as redis_url, ExitStack() as stack:

        def host(url: str, redis_url: str = "") -> Host:
            started = running(sys.executable, url, kind, "floor", redis_url)
            return stack.enter_context(started)

        url = await on.create()
        first = host(url)
        pairs = {"same process": (first, first)}
        if kind != "locked":
            # a lock of one process can't keep another one out
            pairs["another process"] = first, host(url)
            shared = await on.create()
            pairs["another process, Redis"] = (host(shared, redis_url), host(shared, redis_url))
        if options.release:
            release = stack.enter_context(running(options.release, await on.create(), kind, ""))
            pairs[PEER] = release, release
        for name, (here, there) in pairs.items():
            async with side("", here, 1) as one, side("", there, 1) as other:
                asking, waiting = one.users[0], other.users[0]
                found[f"status, {name}"] = await lags(
                    partial(until_ended, asking, waiting), options.rounds
                )
                # claims of the release don't wait
                if name != PEER:
                    found[f"claim, {name}"] = await lags(
                        partial(until_claimed, asking, waiting), options.rounds
                    )
    for name, lag in found.items():
        print(f"{name:32} {lag['median']:8.1f} ms, worst {lag['worst']:8.1f} ms", flush=True)
    return found


async def lags(wake: Callable[[], Awaitable[float]], times: int) -> dict[str, float]:
    taken = [1000 * await wake() for _ in range(times)]
    return {"median": statistics.median(taken), "worst": max(taken)}


WAIT = "Prefer: wait=10\r\n"
#: in which a request has begun to wait
PAUSE = 0.3


async def until_ended(worker: User, waiting: User) -> float:
    """Return the seconds from the report of a task's end to the waiting one's answer."""
    await worker.submit()
    await worker.claim()
    await worker.start()
    path = f"/tasks/{worker.held[0]}"
    answer = asyncio.create_task(waiting.ask("GET", path, more=WAIT))
    await asyncio.sleep(PAUSE)
    begun = time.perf_counter()
    await worker.complete()
    await answer
    return time.perf_counter() - begun


async def until_claimed(submitter: User, waiting: User) -> float:
    """Return the seconds from a submission to the waiting claim's answer."""
    body = {"worker_id": waiting.worker}
    answer = asyncio.create_task(waiting.ask("POST", "/tasks/claim", body, WAIT))
    await asyncio.sleep(PAUSE)
    begun = time.perf_counter()
    await submitter.submit()
    await answer
    return time.perf_counter() - begun


def draw(kind: str, told: dict[str, Any], path: Path) -> None:
    """Draw cost against depth."""
    from matplotlib import pyplot, ticker

    pyplot.rcParams |= {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "bench"}
    figure, axes = pyplot.subplots(
        1, len(bench_depth.DRAWN), figsize=(11, 3.1), sharey=True, layout="constrained"
    )
    colours = {TREE: "#1769aa", FLOOR: "#8a8a8a", PEER: "#c2571a"}
    names = {TREE: "this release", FLOOR: "the floor", PEER: RELEASE}
    series = {name: s for name, s in told.items() if name.startswith("waiting")}
    for axis, operation in zip(axes, bench_depth.DRAWN, strict=True):
        for name, at in series.items():
            for who, costs in at[operation].items():
                if any(cost != cost for cost in costs):
                    continue
                axis.plot(
                    at["depth"],
                    costs,
                    color=colours[who],
                    linestyle="-" if "50" in name else ":",
                    marker="o",
                    markersize=3,
                    label=f"{names[who]}, {name.partition(', ')[2]}",
                )
        title = {"list_on": "list, by cursor"}.get(operation, operation)
        axis.set(xscale="log", yscale="log", title=title, xlabel="waiting tasks")
        axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axis.grid(color="#e4e4e4", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms a request")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])

    def numbers(text: str) -> list[int]:
        return [*map(int, text.split(","))]

    parser.add_argument("--quick", action="store_true", help="some minutes, less exact")
    parser.add_argument("--kinds", help=f"databases, of {', '.join(KINDS)}")
    parser.add_argument("--overrides", help=f"hosts, of {', '.join(OVERRIDES)}")
    parser.add_argument("--connections", type=numbers)
    parser.add_argument("--rounds", type=int, help="turns of each side")
    parser.add_argument("--requests", type=int, help="requests in a turn")
    parser.add_argument("--most", type=int, help="tasks that wait, at most")
    parser.add_argument("--tasks", type=int, help="tasks in a turn of batches")
    parser.add_argument("--parts", default="throughput,depth,wakeups,batches")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--no-release", action="store_true")
    options = parser.parse_args()
    options.connections = options.connections or ([1, 8] if options.quick else [1, 8, 32])
    options.kinds = options.kinds or ("locked,postgres" if options.quick else ",".join(KINDS))
    options.overrides = options.overrides or ("override" if options.quick else ",".join(OVERRIDES))
    options.most = options.most or (10**5 if options.quick else 10**6)
    options.each = 4 if options.quick else 8
    options.tasks = options.tasks or (500 if options.quick else 10**4)
    # a turn of batches takes as long as all turns of an operation
    options.batch_rounds = options.rounds or (1 if options.quick else 3)
    options.rounds = options.rounds or (2 if options.quick else 7)
    options.requests = options.requests or (16 if options.quick else 64)
    options.release = None if options.no_release else release_python(Path(sys.prefix) / "release")
    return options


def main() -> None:
    options = parse()
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "python": platform.python_version(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in options.kinds.split(","):
        found[kind] = {}
        if "throughput" in options.parts:
            for override in options.overrides.split(","):
                found[kind][override] = asyncio.run(bench(kind, override, options))
        if "wakeups" in options.parts:
            found[kind]["wakeups"] = asyncio.run(wake_ups(kind, options))
        if "batches" in options.parts and kind != "wal":
            asked = options.release, options.tasks, options.batch_rounds
            rows = asyncio.run(bench_batches.batches(kind, *asked))
            bench_batches.tell(KINDS[kind], rows)
            found[kind]["batches"] = rows
        if "depth" in options.parts:
            found[kind]["depth"] = asyncio.run(depths(kind, options))
            draw(kind, found[kind]["depth"], options.out / f"depth-{PICTURES[kind]}.svg")
        (options.out / "bench.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
