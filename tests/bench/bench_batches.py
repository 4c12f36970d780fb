"""Thousands of tasks at once, as somebody with thousands of structures has them.

One program submits tasks that do nothing and waits for all of them, one worker process
does them, 32 or 4 at a time, in threads or in as many child processes, and the clock runs
from the first submission until every result is known. This tree is asked through its own
client, in batches; the published release has no batches and gets fewer tasks; procrastinate
(``bench_queue.py``), where there is a PostgreSQL, says what the same database does with no
host in between, 32 at a time as well.

They take turns, each with a new worker and a new submitter, and what is told are medians
of the ratios within a turn.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench_sides import HERE, PEER, TREE, Database, Host, cpu_of, database, environment, running

QUEUE = "procrastinate"
ISOLATED, FEW, FEW_ISOLATED = "isolated", "4 threads", "4 isolated"
#: this tree's, by the role that they have in the worker's program
ROLES = {TREE: "work", ISOLATED: "isolated", FEW: "few", FEW_ISOLATED: "few_isolated"}
#: how many of this tree's tasks there are for one of the release's
FEWER, FEWEST = 50, 100
#: what a turn begins with, unmeasured: connections are open and caches warm afterwards
WARM = dict.fromkeys(ROLES, 64) | {PEER: 8, QUEUE: 64}


class Program:
    """A process that says when it is ready, and answers what it is asked."""

    def __init__(self, python: str | Path, script: str, *words: str) -> None:
        self.process = subprocess.Popen(
            [python, HERE / script, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(python == sys.executable),
        )
        try:
            self.hear()
        except Exception:
            self.stop()
            raise

    def hear(self) -> str:
        """Return its next line.

        Raises
        ------
        RuntimeError
            When it has ended instead.
        """
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.process.args} has ended")
        return line

    def ask(self, word: object) -> str:
        assert self.process.stdin
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.hear()

    def cpu(self) -> float:
        return cpu_of(self.process.pid)

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate(timeout=20)


@contextmanager
def program(python: str | Path, script: str, *words: str) -> Iterator[Program]:
    one = Program(python, script, *words)
    try:
        yield one
    finally:
        one.stop()


class Contender(NamedTuple):
    """One of those that are compared."""

    name: str
    tasks: int
    host: Host | None
    python: str | Path
    script: str
    #: where to work, as the programs are told
    words: tuple[str, ...]
    role: str = "work"

    def turn(self, on: Database) -> dict[str, float]:
        """Return tasks a second, and what each process spent on a task, in ms."""
        start = self.python, self.script
        with (
            program(*start, self.role, *self.words) as worker,
            program(*start, "submit", *self.words) as submitter,
        ):
            submitter.ask(WARM[self.name])
            clocks: dict[str, Callable[[], float]] = {
                "worker": worker.cpu,
                "submitter": submitter.cpu,
                "database": on.cpu,
            }
            if self.host:
                clocks["host"] = self.host.cpu
            before = {who: cpu() for who, cpu in clocks.items()}
            seconds = float(submitter.ask(self.tasks))
            return {"per_second": self.tasks / seconds} | {
                f"{who}_cpu_ms": 1000 * (cpu() - before[who]) / self.tasks
                for who, cpu in clocks.items()
            }


async def batches(kind: str, release: Path | None, tasks: int, rounds: int) -> dict[str, Any]:
    """Measure all of them in turns, print a table and return its rows."""
    with database(kind) as on, ExitStack() as stack:
        contenders = []
        pythons: dict[str, str | Path] = {TREE: sys.executable}
        if release:
            pythons[PEER] = release
        for name, python in pythons.items():
            beside = "floor" if name == TREE else ""
            host = stack.enter_context(running(python, await on.create(), kind, beside))
            own = tasks if name == TREE else max(tasks // FEWER, FEWEST)
            words = f"http://127.0.0.1:{host.port}", host.token
            one = Contender(name, own, host, python, "bench_worker.py", words)
            contenders.append(one)
            if name == TREE:
                contenders = [one._replace(name=name, role=role) for name, role in ROLES.items()]
        if kind == "postgres":
            url = (await on.create()).replace("+asyncpg", "")
            python, script = sys.executable, "bench_queue.py"
            with program(python, script, "prepare", url):
                contenders.append(Contender(QUEUE, tasks, None, python, script, (url,)))
        turns: dict[str, list[dict[str, float]]] = {one.name: [] for one in contenders}
        for n in range(rounds):
            first = n % len(contenders)
            for one in contenders[first:] + contenders[:first]:
                turns[one.name].append(one.turn(on))
    rows: dict[str, Any] = {
        one.name: {"tasks": one.tasks}
        | {
            field: statistics.median(turn[field] for turn in turns[one.name])
            for field in turns[one.name][0]
        }
        for one in contenders
    }
    for one in rows.keys() - {TREE}:
        rows[one][f"{TREE} of it"] = _median(turns, TREE, one, lambda ours, its: ours / its)
    for name, threads in ((ISOLATED, TREE), (FEW_ISOLATED, FEW)):
        rows[name]["ms more"] = _median(
            turns, name, threads, lambda ours, its: 1000 / ours - 1000 / its
        )
        if QUEUE in rows:
            ratio = _median(turns, name, QUEUE, lambda ours, its: ours / its)
            rows[name][f"of {QUEUE}"] = ratio
    return rows


def _median(
    turns: dict[str, list[dict[str, float]]],
    one: str,
    other: str,
    compare: Callable[[float, float], float],
) -> float:
    """Return the median of what comes of comparing tasks a second within a turn."""
    return statistics.median(
        compare(a["per_second"], b["per_second"])
        for a, b in zip(turns[one], turns[other], strict=True)
    )


def tell(title: str, rows: dict[str, Any]) -> None:
    """Print one table."""
    clocks = ("host", "worker", "submitter", "database")
    print(f"\n{title}, tasks that do nothing, from submission to all results")
    print(
        f"{'':16}{'tasks':>8}{'per s':>9}   {'cpu ms a task:':14}"
        + "".join(f"{who:>11}" for who in clocks)
        + "   tree / it"
    )
    for name, row in rows.items():
        spent = [row.get(f"{who}_cpu_ms") for who in clocks]
        of = row.get(f"{TREE} of it")
        print(
            f"{name:16}{row['tasks']:8}{row['per_second']:9.0f}   {'':14}"
            + "".join(f"{'' if ms is None else f'{ms:.2f}':>11}" for ms in spent)
            + (f"{of:12.2f}" if of else ""),
            flush=True,
        )
    for name in (ISOLATED, FEW_ISOLATED):
        row = rows[name]
        queue = f", {row[f'of {QUEUE}']:.2f} times {QUEUE}" if f"of {QUEUE}" in row else ""
        print(f"{name}: {row['ms more']:+.2f} ms a task beside as many threads{queue}", flush=True)
