"""What many actors did and were told, written down by each, and judged together.

Each actor appends to a file of its own, one write a line, so that what it wrote survives
when it is killed. A request without an answer is one whose answer nobody heard: it may
have been carried out or not. All times are of one clock, `time.monotonic` of one machine.

`judge` compares what all of them wrote with the rows of the database afterwards. It
takes nothing for granted but this: what an answer says was true at some moment between
the request and the answer.
"""

import json
import math
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx

PREFIX = "/v1/joblib"
ENDED = frozenset({"completed", "failed", "cancelled"})

Record = Callable[..., None]


class Call(NamedTuple):
    """A request, and its answer if somebody heard it."""

    actor: str
    method: str
    path: str
    asked: float
    answered: float = math.inf
    status: int = 0
    key: str | None = None
    body: Any = None
    answer: Any = None


class Run(NamedTuple):
    """An execution of a task by a worker; one that was killed has no end."""

    actor: str
    task: str
    attempt: int
    began: float
    ended: float = math.inf
    result: Any = None


class Row(NamedTuple):
    """A task in the database, after all is over.

    `errors` are the attempts that failed. What the server runs itself is `internal`: its
    executions are in nobody's history.
    """

    id: str
    status: str
    attempt: int
    name: str
    result: Any = None
    errors: tuple[int, ...] = ()
    failed_attempts: int = 0
    max_attempts: int = 1
    internal: bool = False


class History(NamedTuple):
    """What all actors wrote, and the tasks that were there in the end."""

    calls: list[Call]
    runs: list[Run]
    rows: list[Row]


# --- writing and reading ---


def recorder(path: Path) -> Record:
    """Return a function that appends a line to a file, in one write."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def record(**line: Any) -> None:
        told = json.dumps({"at": time.monotonic(), **line})
        os.write(file, told.encode() + b"\n")

    return record


def recorded(
    record: Record, rng: random.Random, lost: float
) -> dict[str, list[Callable[..., None]]]:
    """Return event hooks for an `httpx.Client` that write down what it asks and hears.

    Parameters
    ----------
    record : Record
        Where to.
    rng : random.Random
        Draws which answers are lost.
    lost : float
        The fraction of answers that are lost on their way, after all was done.
    """
    numbers = count()
    life = f"{os.getpid()}-{time.monotonic_ns()}"

    def asked(request: httpx.Request) -> None:
        number = f"{life}-{next(numbers)}"
        request.extensions["history"] = number
        record(
            ask=number,
            method=request.method,
            path=request.url.path.removeprefix(PREFIX),
            key=request.headers.get("Idempotency-Key"),
            body=json.loads(request.content or b"null"),
        )

    def answered(response: httpx.Response) -> None:
        response.read()
        if rng.random() < lost:
            raise httpx.ReadError("the answer got lost", request=response.request)
        is_json = "json" in response.headers.get("content-type", "")
        record(
            answer=response.request.extensions["history"],
            status=response.status_code,
            body=response.json() if is_json else response.text,
        )

    return {"request": [asked], "response": [answered]}


def read(directory: Path) -> tuple[list[Call], list[Run]]:
    """Return what the actors wrote, from one file each."""
    calls: dict[str, Call] = {}
    runs: dict[Any, Run] = {}
    for path in sorted(directory.glob("*.jsonl")):
        for number, text in enumerate(path.read_text().splitlines()):
            match json.loads(text):
                case {"ask": ask, "at": at, **asked}:
                    calls[ask] = Call(path.stem, asked=at, **asked)
                case {"answer": ask, "at": at, "status": status, "body": body}:
                    calls[ask] = calls[ask]._replace(answered=at, status=status, answer=body)
                case {"run": run, "task": task, "attempt": attempt, "at": at}:
                    # a second one under the same name would be a mistake of the actor
                    assert run not in runs, (path, number)
                    runs[run] = Run(path.stem, task, attempt, at)
                case {"ran": run, "result": result, "at": at}:
                    runs[run] = runs[run]._replace(ended=at, result=result)
    return [one for call in calls.values() for one in single(call)], list(runs.values())


def single(call: Call) -> Iterator[Call]:
    """Take a batch of reports apart: each has an outcome of its own."""
    if call.method != "PATCH" or call.path != "/tasks":
        yield call
        return
    outcomes: dict[str, Any] = {}
    if agreed(call):
        outcomes = {outcome["id"]: outcome for outcome in call.answer["outcomes"]}
    for report in call.body["reports"]:
        outcome = outcomes.get(report["id"], {"status": call.status, "task": None})
        yield call._replace(
            path=f"/tasks/{report['id']}",
            body=report,
            status=outcome["status"],
            answer=outcome["task"],
        )


# --- what the answers say ---


class Seen(NamedTuple):
    """A task as somebody saw it, at some moment between two times."""

    task: str
    attempt: int
    status: str
    after: float
    before: float
    by: str


def is_report(call: Call, *statuses: str) -> bool:
    return (
        call.method == "PATCH"
        and call.path.startswith("/tasks/")
        and call.body["status"] in statuses
    )


def is_claim(call: Call) -> bool:
    return call.path == "/tasks/claim"


def is_retry(call: Call) -> bool:
    return call.method == "POST" and call.path.endswith("/retry")


def is_submission(call: Call) -> bool:
    return call.method == "POST" and call.path.startswith("/rooms/")


def task_of(call: Call) -> str:
    return call.path.split("/")[2]


def agreed(call: Call) -> bool:
    return 200 <= call.status < 300


def views(call: Call) -> list[Any]:
    """Return the tasks that an answer shows."""
    if not agreed(call) or not isinstance(call.answer, dict):
        return []
    if is_claim(call):
        return call.answer["tasks"]
    return [call.answer] if "attempt" in call.answer else []


def sightings(history: History) -> dict[str, list[Seen]]:
    """Return everything that was ever told of each task."""
    seen: dict[str, list[Seen]] = defaultdict(list)
    for call in history.calls:
        for task in views(call):
            seen[task["id"]].append(
                Seen(
                    task["id"],
                    task["attempt"],
                    task["status"],
                    call.asked,
                    call.answered,
                    call.actor,
                )
            )
        if agreed(call) and call.path.startswith("/workers/") and call.body:
            # a worker that is not told to stop is told that its lease goes on
            over = {*call.answer["lost"], *call.answer["cancelled"]}
            for task in call.body.get("tasks", ()):
                if task["id"] not in over:
                    seen[task["id"]].append(
                        Seen(
                            task["id"],
                            task["attempt"],
                            "held",
                            call.asked,
                            call.answered,
                            call.actor,
                        )
                    )
    for row in history.rows:
        seen[row.id].append(
            Seen(row.id, row.attempt, row.status, math.inf, math.inf, "the database")
        )
    return seen


# --- what must hold ---

Finding = Iterator[str]


def no_errors(history: History) -> Finding:
    """The host answers, or it is not there: it never fails."""
    for call in history.calls:
        if call.status >= 500:
            yield f"{call.method} {call.path} was answered {call.status}: {call.answer}"


def nothing_is_lost(history: History) -> Finding:
    """What was acknowledged is there, once for each key, and has ended."""
    rows = {row.id: row for row in history.rows}
    tasks: dict[tuple[str, str], set[str]] = defaultdict(set)
    for call in history.calls:
        if is_submission(call) and agreed(call):
            task = call.answer["id"]
            tasks[call.actor, str(call.key)].add(task)
            if task not in rows:
                yield f"{task} was acknowledged and is lost"
    for (_, key), ids in tasks.items():
        if len(ids) > 1:
            yield f"key {key} made more than one task: {sorted(ids)}"
    for name, times in Counter(row.name for row in history.rows).items():
        if times > 1:
            yield f"{name} was submitted once and is there {times} times"
    for row in history.rows:
        if row.status not in ENDED:
            yield f"{row.id} never ended: it is {row.status}"


def an_attempt_has_one_holder(history: History) -> Finding:
    """A claim is an attempt: no number is given twice."""
    holders: dict[tuple[str, int], set[Any]] = defaultdict(set)
    for call in history.calls:
        if is_claim(call):
            for task in views(call):
                holders[task["id"], task["attempt"]].add((call.body["worker_id"], call.key))
    for (task, attempt), claims in holders.items():
        workers = {worker for worker, _ in claims}
        if len(workers) > 1:
            yield f"attempt {attempt} of {task} has two holders: {sorted(workers)}"
        elif len(claims) > 1:
            yield f"attempt {attempt} of {task} was given in two claims"
    for call in history.calls:
        if is_report(call, "running", "completed", "failed") and agreed(call):
            attempt = call.body["attempt"]
            if call.answer["attempt"] != attempt:
                yield f"{task_of(call)}: a report on {attempt} moved another attempt"


def attempts_do_not_overlap(history: History) -> Finding:
    """Once somebody has seen an attempt, no earlier one is acknowledged any more."""
    for task, seen in sightings(history).items():
        for earlier in seen:
            for later in seen:
                if later.after > earlier.before and later.attempt < earlier.attempt:
                    yield (
                        f"{task}: attempt {later.attempt} was acknowledged to {later.by}"
                        f" after {earlier.by} saw attempt {earlier.attempt}"
                    )


def what_ended_stays(history: History) -> Finding:
    """An attempt that ended is not continued; only a retry sets the task going."""
    retries: dict[str, list[Call]] = defaultdict(list)
    for call in history.calls:
        if is_retry(call):
            retries[task_of(call)].append(call)
    for task, seen in sightings(history).items():
        for end in (s for s in seen if s.status in ENDED):
            for later in seen:
                if (
                    later.after > end.before
                    and later.attempt >= end.attempt
                    and (later.status, later.attempt) != (end.status, end.attempt)
                    and not any(
                        retry.asked < later.before and retry.answered > end.after
                        for retry in retries[task]
                    )
                ):
                    yield (
                        f"{task} had ended as {end.status} in attempt {end.attempt}, and"
                        f" was {later.status} in attempt {later.attempt} for {later.by}"
                    )


def completions_are_acknowledged_once(history: History) -> Finding:
    """One attempt completes a task, is told so once, and its result is what is kept."""
    told: dict[str, list[Call]] = defaultdict(list)
    asked: dict[tuple[str, int], list[Call]] = defaultdict(list)
    retried = Counter(task_of(call) for call in history.calls if is_retry(call))
    for call in history.calls:
        if is_report(call, "completed"):
            asked[task_of(call), call.body["attempt"]].append(call)
            if agreed(call):
                told[task_of(call)].append(call)
    for task, calls in told.items():
        for attempt, times in Counter(c.body["attempt"] for c in calls).items():
            if times > 1:
                yield f"attempt {attempt} of {task}: completion acknowledged {times} times"
        if len(calls) > 1 + retried[task]:
            yield f"{task}: completion acknowledged for {len(calls)} attempts"
    for row in history.rows:
        if row.status != "completed" or row.internal:
            continue
        if row.result not in [c.body.get("result") for c in asked[row.id, row.attempt]]:
            yield f"{row.id} is completed with a result that nobody reported"


def nothing_runs_unseen(history: History) -> Finding:
    """Each execution is an attempt that was started, and that ended for a reason."""
    started: set[tuple[str, int]] = set()
    closed: set[tuple[str, int]] = set()
    interrupted: set[tuple[str, int]] = set()
    cancelled: set[str] = set()
    retried: set[str] = set()
    for call in history.calls:
        if is_report(call, "running") and agreed(call):
            started.add((task_of(call), call.body["attempt"]))
        if is_report(call, "completed", "failed"):
            closed.add((task_of(call), call.body["attempt"]))
        if is_report(call, "pending") and call.body.get("interrupted"):
            interrupted.add((task_of(call), call.body["attempt"]))
        if is_claim(call) and call.body.get("start"):
            started |= {(task["id"], task["attempt"]) for task in views(call)}
        if is_report(call, "cancelled"):
            cancelled.add(task_of(call))
        if is_retry(call):
            retried.add(task_of(call))
    rows = {row.id: row for row in history.rows}
    for (task, attempt), times in Counter((run.task, run.attempt) for run in history.runs).items():
        if times > 1:
            yield f"attempt {attempt} of {task} was executed {times} times"
        if (task, attempt) not in started:
            yield f"attempt {attempt} of {task} was executed and not started"
        row = rows.get(task)
        if row is None or attempt == row.attempt or attempt in row.errors:
            continue
        if (task, attempt) in interrupted:
            continue
        ended = (task, attempt) in closed or task in cancelled
        if not (ended and task in retried):
            yield f"attempt {attempt} of {task} was executed, and nothing tells its end"
    for row in history.rows:
        if row.failed_attempts > row.max_attempts:
            yield f"{row.id} failed {row.failed_attempts} of {row.max_attempts} times"


RULES = (
    no_errors,
    nothing_is_lost,
    an_attempt_has_one_holder,
    attempts_do_not_overlap,
    what_ended_stays,
    completions_are_acknowledged_once,
    nothing_runs_unseen,
)


def judge(history: History) -> list[str]:
    """Return everything that must not have happened, and did."""
    return sorted({found for rule in RULES for found in rule(history)})


def cancelled_runs(history: History) -> list[float]:
    """Return how long executions went on after an acknowledged cancel, in seconds."""
    return [
        run.ended - call.answered
        for call in history.calls
        if is_report(call, "cancelled") and agreed(call)
        for run in history.runs
        if run.task == task_of(call)
        if run.began < call.answered < run.ended < math.inf
    ]


def count_up(history: History) -> dict[str, int]:
    """Return how much happened: a run in which little did proves little."""
    calls, runs, rows = history

    def answered(these: Iterable[Call]) -> int:
        return sum(map(agreed, these))

    stopped = cancelled_runs(history)
    attempts: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        attempts[run.task].append(run)
    return {
        "requests": len(calls),
        "without an answer": sum(call.status == 0 for call in calls),
        "answered 409": sum(call.status == 409 for call in calls),
        "submissions acknowledged": answered(filter(is_submission, calls)),
        "tasks": len(rows),
        **{status: sum(row.status == status for row in rows) for status in sorted(ENDED)},
        "claims": len(
            {(task["id"], task["attempt"]) for c in calls if is_claim(c) for task in views(c)}
        ),
        "attempts that failed": sum(len(row.errors) for row in rows),
        "executions": len(runs),
        "executions cut off": sum(run.ended == math.inf for run in runs),
        "tasks executed again": sum(len(them) > 1 for them in attempts.values()),
        # they had lost their lease, and did not know it yet
        "executions that overlap": sum(
            one.began < other.began < one.ended < math.inf
            for them in attempts.values()
            for one in them
            for other in them
        ),
        "cancels acknowledged": answered(c for c in calls if is_report(c, "cancelled")),
        "executions stopped by a cancel": len(stopped),
        "ms until they stopped, median": int(1000 * median(stopped or [0])),
        "retries acknowledged": answered(filter(is_retry, calls)),
        "completions acknowledged": answered(c for c in calls if is_report(c, "completed")),
    }
