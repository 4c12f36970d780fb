"""What is promised holds while replicas and workers are killed, as all of them tell it.

A judge that never finds anything would not be noticed: it is shown histories of things
that must not happen.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import history_run
import pytest
from history import PREFIX, Call, History, Row, Run, judge, read, recorder, single

# its processes have a database of their own
pytestmark = pytest.mark.makers("plain")

TASK, KEY = "a-task", "name-1"
HERE = Path(history_run.__file__).parent


def submission(at: float, actor: str = "submitter") -> Call:
    path, body = "/rooms/lab/tasks/lab:analysis:Often", {"payload": {"name": KEY}}
    view = {"id": TASK, "status": "pending", "attempt": 0}
    return Call(actor, "POST", path, at, at + 1, 202, KEY, body, view)


def claim(worker: str, attempt: int, at: float, key: str = "") -> Call:
    view = {"id": TASK, "status": "claimed", "attempt": attempt}
    body = {"worker_id": worker}
    key = key or f"{worker}-{attempt}"
    return Call(worker, "POST", "/tasks/claim", at, at + 1, 200, key, body, {"tasks": [view]})


def started(worker: str, attempt: int, at: float) -> Call:
    call = claim(worker, attempt, at)
    return call._replace(body={**call.body, "start": True})


def report(worker: str, attempt: int, status: str, at: float, **fields: Any) -> Call:
    body = {"status": status, "attempt": attempt, **fields}
    view = {"id": TASK, "status": status, "attempt": attempt}
    return Call(worker, "PATCH", f"/tasks/{TASK}", at, at + 1, 200, None, body, view)


def cancel(at: float) -> Call:
    body, view = {"status": "cancelled"}, {"id": TASK, "status": "cancelled"}
    path = f"/tasks/{TASK}"
    return Call("submitter", "PATCH", path, at, at + 1, 200, None, body, {**view, "attempt": 2})


def retry(at: float) -> Call:
    view = {"id": TASK, "status": "pending", "attempt": 2}
    path = f"/tasks/{TASK}/retry"
    return Call("submitter", "POST", path, at, at + 1, 202, None, None, view)


def beat(worker: str, attempt: int, at: float) -> Call:
    body = {"tasks": [{"id": TASK, "attempt": attempt}]}
    answer = {"lost": [], "cancelled": []}
    return Call(worker, "PATCH", f"/workers/{worker}", at, at + 1, 200, None, body, answer)


def in_batch(call: Call, status: int = 200) -> list[Call]:
    """Make a report as one of two, and take the two apart again."""
    here = {"id": TASK, "status": status, "task": call.answer}
    reports = [{"id": "other", "status": "failed", "attempt": 1}, {"id": TASK, **call.body}]
    outcomes = [{"id": "other", "status": 409, "task": None}, here]
    together = call._replace(
        path="/tasks", body={"reports": reports}, answer={"outcomes": outcomes}
    )
    return list(single(together))


#: the first worker is killed, the second one completes
CALLS = [
    submission(0),
    claim("ada", 1, 10),
    report("ada", 1, "running", 12),
    beat("ada", 1, 14),
    claim("bob", 2, 20),
    report("bob", 2, "running", 22),
    report("bob", 2, "completed", 26, result=2),
]
RUNS = [Run("ada", TASK, 1, 13), Run("bob", TASK, 2, 23, 25, 2)]
ROW = Row(TASK, "completed", 2, KEY, 2, (1,), 1, 5)
STORY = History(CALLS, RUNS, [ROW])


def told(*calls: Call) -> History:
    return STORY._replace(calls=[*CALLS, *calls])


def ran(*runs: Run) -> History:
    return STORY._replace(runs=[*RUNS, *runs])


def found(**fields: Any) -> History:
    return STORY._replace(rows=[ROW._replace(**fields)])


AGAIN = submission(40)._replace(answer={**CALLS[0].answer, "id": "other"})
UNHEARD = report("bob", 2, "completed", 26)._replace(answered=float("inf"), status=0, answer=None)

GOOD = {
    "as it should be": STORY,
    "a claim answered again": told(claim("bob", 2, 21)),
    "a submission answered again": told(submission(3)),
    "a zombie that is told so": told(
        report("ada", 1, "completed", 30)._replace(status=409, answer={})
    ),
    "a report on its way while the lease was lost": told(
        beat("ada", 1, 20.5)._replace(answered=33)
    ),
    "a report whose answer was lost": told(UNHEARD),
    "a claim that starts, and a report among others": STORY._replace(
        calls=[*CALLS[:4], started("bob", 2, 20), *in_batch(CALLS[-1])]
    ),
    "a retry": History(
        [*CALLS, retry(30), claim("ada", 3, 32), report("ada", 3, "running", 34)],
        [*RUNS, Run("ada", TASK, 3, 35)],
        [ROW._replace(status="failed", attempt=3, result=None, errors=(1, 3))],
    ),
}

BAD = {
    "lost": (STORY._replace(rows=[]), "was acknowledged and is lost"),
    "never ended": (found(status="running"), "never ended"),
    "two tasks": (told(AGAIN), "made more than one task"),
    "two rows": (STORY._replace(rows=[ROW, ROW._replace(id="other")]), "is there 2 times"),
    "two holders": (told(claim("eve", 2, 21)), "has two holders"),
    "a number reused": (told(claim("bob", 2, 21, "another key")), "given in two claims"),
    "an overlapping report": (
        told(report("ada", 1, "running", 30)),
        "attempt 1 was acknowledged to ada after bob saw attempt 2",
    ),
    "an overlapping lease": (
        told(beat("ada", 1, 30)),
        "attempt 1 was acknowledged to ada after bob saw attempt 2",
    ),
    "an attempt that fell": (found(attempt=1), "attempt 1 was acknowledged to the data"),
    "another attempt moved": (
        told(report("ada", 1, "failed", 23)._replace(answer=CALLS[-1].answer)),
        "moved another attempt",
    ),
    "acknowledged twice": (
        told(report("bob", 2, "completed", 28, result=2)),
        "completion acknowledged 2 times",
    ),
    "acknowledged again in a batch": (
        told(*in_batch(report("bob", 2, "completed", 28, result=2))),
        "completion acknowledged 2 times",
    ),
    "completed in two attempts": (
        told(report("ada", 1, "completed", 19, result=1)),
        "completion acknowledged for 2 attempts",
    ),
    "a result of nobody": (found(result=1), "a result that nobody reported"),
    "completed and taken back": (found(status="failed"), "had ended as completed"),
    "cancelled and completed": (told(cancel(23)), "had ended as cancelled"),
    "completed and claimed again": (told(claim("ada", 3, 30)), "had ended as completed"),
    "held after its end": (told(beat("bob", 2, 30)), "was held in attempt 2 for bob"),
    "executed twice": (ran(Run("bob", TASK, 2, 24)), "was executed 2 times"),
    "not started": (ran(Run("eve", TASK, 3, 30)), "executed and not started"),
    "unseen": (found(errors=()), "nothing tells its end"),
    "tried too often": (found(failed_attempts=6), "failed 6 of 5 times"),
    "an error": (told(cancel(50)._replace(status=500)), "was answered 500"),
}


@pytest.mark.parametrize("told", GOOD.values(), ids=list(GOOD))
def test_what_may_happen_is_let_through(told: History):
    assert judge(told) == []


@pytest.mark.parametrize(("told", "finding"), BAD.values(), ids=list(BAD))
def test_what_must_not_happen_is_found(told: History, finding: str):
    assert any(finding in wrong for wrong in judge(told)), judge(told)


def test_a_history_outlives_its_actor(tmp_path: Path):
    record = recorder(tmp_path / "ada.jsonl")
    path = f"{PREFIX}/workers"
    record(ask="1", method="POST", path=path, key=None, body=None)
    record(ask="2", method="POST", path=path, key="k", body={"a": 1})
    record(answer="1", status=201, body={"id": "w"})
    record(run="r", task=TASK, attempt=3)
    calls, (run,) = read(tmp_path)
    assert [(c.actor, c.status, c.answer) for c in calls] == [
        ("ada", 201, {"id": "w"}),
        ("ada", 0, None),
    ]
    assert calls[0].asked < calls[1].asked < calls[0].answered < calls[1].answered
    assert (run.task, run.attempt, run.ended) == (TASK, 3, float("inf"))


def figures(printed: str) -> Callable[[str], int]:
    counts = {what: int(n) for n, what in re.findall(r"^ *(\d+) (.+)$", printed, re.MULTILINE)}
    return lambda what: counts.get(what, 0)


def test_nothing_is_lost_and_nothing_runs_unseen():
    """A few seconds of what ``nox -s history`` does for minutes."""
    options = ["--seconds", "6", "--workers", "4", "--seed", "4"]
    with subprocess.Popen(
        [sys.executable, HERE / "history_run.py", *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    ) as running:
        try:
            printed, _ = running.communicate(timeout=500)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, printed
    count = figures(printed)
    assert count("completions acknowledged") > 0, printed
    assert count("work: kill") + count("work: freeze") > 0, printed
    assert count("serve: kill") + count("execute: kill") > 0, printed
