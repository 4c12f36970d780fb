"""Random walks through the life of tasks: the real routes against a model in memory.

A walk is a program of requests, passes of the sweeper and leaps of time. After each step
what the routes show and what left over Socket.IO has to be what the model says. By default
a few walks, always the same ones; for other ones, as many as wanted::

    LIFECYCLE_WALKS=1000 pytest --timeout 0 --maker postgres tests/test_lifecycle.py
"""

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import anyio
import httpx
import pytest
from anyio import from_thread
from conftest import Sent, User
from fastapi import FastAPI
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture.engine import ConjectureRunner
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from makers import SessionMaker
from sqlalchemy import bindparam, delete, select, update

from zndraw_joblib.lifecycle import TRANSITIONS
from zndraw_joblib.models import Job as JobRow
from zndraw_joblib.models import Task as TaskRow
from zndraw_joblib.models import Worker as WorkerRow
from zndraw_joblib.models import WorkerJobLink
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.sweeper import cleanup_overdue_attempts, cleanup_stale_workers

WALKS = int(os.environ.get("LIFECYCLE_WALKS", "0"))
PENDING, CLAIMED, RUNNING = "pending", "claimed", "running"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
HELD = {CLAIMED, RUNNING}
TERMINAL = {COMPLETED, FAILED, CANCELLED}
MAY_FOLLOW = {
    PENDING: {CLAIMED},
    RUNNING: {CLAIMED},
    COMPLETED: {RUNNING},
    FAILED: HELD,
    CANCELLED: {PENDING, *HELD},
}

# whence and where; what is not there before comes from nowhere
WAYS = {(source, way.target) for way in TRANSITIONS for source in way.sources or [None]}

# Time leaps by whole hours and everything is due between two of them: the seconds that a
# walk takes, and the jitter of the backoff, decide nothing.
HOUR = 3600.0
BACKOFF = 0.9 * HOUR
WORKER_TIMEOUT = 2.5 * HOUR
POLICIES: dict[str, dict[str, Any]] = {
    "Once": {},
    "Eager": {"max_attempts": 2},
    "Patient": {
        "max_attempts": 3,
        "retry_delay_seconds": BACKOFF,
        "start_timeout_seconds": 0.5 * HOUR,
        "timeout_seconds": 1.5 * HOUR,
    },
}


@dataclass(eq=False)
class Worker:
    name: str
    id: str
    owner: str
    seen: float
    draining: bool = False
    gone: bool = False

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.name)


@dataclass(eq=False)
class Task:
    name: str
    id: str
    job: str
    by: str
    priority: int
    number: int
    place: int
    max_attempts: int
    #: the earliest and latest time at which its delay can be over
    delayed: tuple[float, float] | None = None
    #: since when it waits, and since when it will once its delay is over
    queued_at: float = 0
    ready_at: float = 0
    state: str = PENDING
    attempt: int = 0
    failed: int = 0
    worker: Worker | None = None
    claim_key: str | None = None
    deadline: float | None = None
    claimed: bool = False
    started: bool = False
    #: its claim started it, and nobody else
    unbegun: bool = False
    error_type: str | None = None
    errors: list[tuple[int, str]] = field(default_factory=list)
    result: Any = None
    progress: float | None = None
    message: str | None = None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.name)

    @property
    def order(self) -> tuple[int, int, int]:
        return -self.priority, self.place, self.number


class Host:
    """The host, for a thread that is not its event loop's."""

    def __init__(self, app: FastAPI, users: dict[str, User], events: list[Sent]) -> None:
        self.users = users
        self.events = events
        self.session_maker: SessionMaker = app.state.session_maker
        self.tsio = app.state.tsio
        self.settings = JobLibSettings(
            worker_timeout_seconds=WORKER_TIMEOUT, retry_delay_max_seconds=BACKOFF
        )
        app.state.joblib_settings = self.settings

    def request(self, user: str, method: str, path: str, **options: Any) -> httpx.Response:
        return from_thread.run(partial(self.users[user].request, method, path, **options))

    def sweep(self) -> tuple[int, int]:
        async def sweep() -> tuple[int, int]:
            exits = self.session_maker, self.settings, self.tsio
            return (await cleanup_stale_workers(*exits), await cleanup_overdue_attempts(*exits))

        return from_thread.run(sweep)

    def empty(self) -> None:
        async def empty() -> None:
            async with self.session_maker() as session:
                for table in (TaskRow, WorkerJobLink, JobRow, WorkerRow):
                    await session.execute(delete(table))
                await session.commit()

        from_thread.run(empty)

    def leap(self, seconds: float) -> None:
        """Let time pass: what was to be in an hour is to be now."""

        async def leap() -> None:
            async with self.session_maker() as session:
                for column in (
                    WorkerRow.last_heartbeat,
                    TaskRow.available_at,
                    TaskRow.queued_at,
                    TaskRow.deadline_at,
                ):
                    table = column.class_
                    found = await session.execute(
                        select(table.id, column).where(column.is_not(None))
                    )
                    earlier = [
                        {"row": id_, "then": then - timedelta(seconds=seconds)}
                        for id_, then in found
                    ]
                    if earlier:
                        connection = await session.connection()
                        await connection.execute(
                            update(table)
                            .where(table.id == bindparam("row"))
                            .values({column.key: bindparam("then")}),
                            earlier,
                        )
                await session.commit()

        from_thread.run(leap)


def one_of(choices: Callable[[Any], list[Any]]) -> st.SearchStrategy[Any]:
    """Draw from what the walk has at that moment."""
    return st.runner().flatmap(lambda walk: st.sampled_from(choices(walk)))


def present(walk: Any) -> list[Worker]:
    return [w for w in walk.workers if not w.gone]


def known(walk: Any) -> list[Worker]:
    """Return the workers that are there, and the one that went last."""
    return [*present(walk) * 2, *[w for w in walk.workers if w.gone][-1:]]


def ways_on(walk: Any) -> list[tuple[Task, str]]:
    """Return what the holders of tasks may report of them."""
    ways = (RUNNING, FAILED, COMPLETED, PENDING)
    return [(t, s) for t in walk.held() for s in ways if may_follow(t, s)]


def may_follow(task: Task, state: str) -> bool:
    if state == PENDING and task.state == RUNNING:
        return task.unbegun
    return task.state in MAY_FOLLOW[state]


def retriable(walk: Any) -> list[Task]:
    return [t for t in walk.tasks if t.state in TERMINAL] or walk.tasks


USERS = st.sampled_from(["ada", "bob"])
CALLERS = st.sampled_from(["ada", "bob", "admin"])
JOBS = st.sampled_from(["Patient", "Patient", "Eager", "Once"])
KEYS = st.sampled_from([None, None, "k", "l"])
STATES = st.sampled_from(sorted(MAY_FOLLOW))


STEPS: list[tuple[Callable[[Any], Any], st.SearchStrategy[Any]]] = []


def step(
    weight: int, when: Callable[[Any], Any] = lambda walk: True, **drawn: Any
) -> Callable[..., Any]:
    """Mark a step that a walk may take ``when`` there is something to take it with.

    Of a state machine's rules all are as likely as each other, and half of them are left
    out of each walk: few walks would come as far as to a second attempt.
    """

    def mark(method: Any) -> Any:
        choice = st.tuples(st.just(method.__name__), st.fixed_dictionaries(drawn))
        STEPS.extend([(when, choice)] * weight)
        return method

    return mark


class Walk(RuleBasedStateMachine):
    """The model, and the steps that it and the host take together."""

    host: Host

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0.0
        self.began = time.monotonic()
        self.numbers = itertools.count(1)
        self.tasks: list[Task] = []
        self.workers: list[Worker] = []
        #: who serves a job; None while it is not there
        self.jobs: dict[str, list[Worker] | None] = dict.fromkeys(POLICIES)
        self.shown_jobs: dict[str, set[str]] = {}
        self.submissions: dict[tuple[str, str, str], tuple[Task, Any]] = {}
        #: every attempt that there was, and who held it
        self.attempts: list[tuple[Task, int, Worker]] = []
        #: what has to leave, by task
        self.told: dict[str, list[Any]] = defaultdict(list)
        #: jobs whose workers have to hear of a task
        self.available: set[str] = set()
        #: the state in which each task was last heard of, and its number
        self.shown: dict[str, str] = {}
        self.revisions: dict[str, int] = defaultdict(int)

    @rule(
        step=one_of(lambda walk: [choice for when, choice in STEPS if when(walk)]).flatmap(
            lambda choice: choice
        )
    )
    def take(self, step: tuple[str, dict[str, Any]]) -> None:
        name, drawn = step
        getattr(self, name)(**drawn)
        self.check()

    # --- what happens to the model ---

    def tell(self, task: Task) -> None:
        worker = task.worker and task.worker.id
        self.told[task.id].append((task.state, task.attempt, worker, task.progress, task.message))
        if task.state == PENDING and not task.delayed:
            self.available.add(full_name(task.job))

    def time(self) -> float:
        # the walk itself takes time
        return self.clock + time.monotonic() - self.began

    def end_of_all(self) -> int:
        return next(self.numbers) * 1000

    def new_place(self, job: str, priority: int, user: str) -> int:
        lane = [t for t in self.waiting(job) if t.priority == priority]
        queued = [t.place for t in lane if not t.delayed]
        own = [t.place for t in lane if t.by == user]
        head = min(queued) + 1 if queued else self.end_of_all()
        return max([head, *(place + 1 for place in own)])

    def place_again(self, task: Task) -> int:
        lane = [t for t in self.queued(task.job) if t.priority == task.priority]
        return max(task.place, lane[0].place if lane else self.end_of_all())

    def queue(self, task: Task, delay: float = 0, place: int | None = None) -> None:
        task.place = self.place_again(task) if place is None else place
        task.progress = task.message = None
        task.claimed = False
        task.state, task.worker, task.claim_key = PENDING, None, None
        task.deadline, task.started, task.unbegun = None, False, False
        if delay:
            task.delayed = (self.clock + delay / 2, self.clock + delay)
        self.tell(task)

    def end(self, task: Task, state: str) -> None:
        task.state, task.deadline, task.delayed = state, None, None
        self.tell(task)

    def lose(self, task: Task, error_type: str, retryable: bool = True) -> None:
        task.failed += 1
        task.error_type = error_type
        task.errors.append((task.attempt, error_type))
        if retryable and task.failed < task.max_attempts:
            self.queue(task, POLICIES[task.job].get("retry_delay_seconds", 0))
        else:
            self.end(task, FAILED)

    def retire(self, worker: Worker) -> None:
        worker.gone = True
        for task in self.held(worker):
            self.lose(task, "worker_lost")
        for job, serving in self.jobs.items():
            if serving and worker in serving:
                serving.remove(worker)
                if not serving and not self.waiting(job):
                    self.jobs[job] = None

    def held(self, *by: Worker) -> list[Task]:
        held = [t for t in self.tasks if t.state in HELD]
        return [t for t in held if not by or t.worker in by]

    def waiting(self, *for_: str) -> list[Task]:
        waiting = [t for t in self.tasks if t.state == PENDING]
        return [t for t in waiting if not for_ or t.job in for_]

    def queued(self, *for_: str) -> list[Task]:
        queued = [t for t in self.waiting(*for_) if not t.delayed]
        return sorted(queued, key=lambda t: t.order)

    def in_turn(self, queues: list[list[Task]]) -> list[Task]:
        # of which the first has waited longest, comes first
        queues = sorted(filter(None, queues), key=lambda q: (-q[0].priority, q[0].queued_at))
        return [task for queue in queues for task in queue]

    def due_in(self, task: Task, policy: str) -> float | None:
        seconds = POLICIES[task.job].get(policy)
        return None if seconds is None else self.clock + seconds

    # --- what the host shows ---

    def assert_shown(self, task: Task, body: dict[str, Any]) -> None:
        ahead = [t for t in self.queued(task.job) if t.order < task.order]
        expected = {
            "id": task.id,
            "job_name": full_name(task.job),
            "status": task.state,
            "attempt": task.attempt,
            "max_attempts": task.max_attempts,
            "worker_id": task.worker and task.worker.id,
            "queue_position": len(ahead) + 1 if task.state == PENDING else None,
            "priority": task.priority,
            "error_type": task.error_type,
            "result": task.result,
            "progress": task.progress,
            "progress_message": task.message,
        }
        assert {key: body[key] for key in expected} == expected
        errors = [(e["attempt"], e["error_type"]) for e in body["errors"]]
        assert errors == task.errors[-5:]
        assert (body["completed_at"] is not None) == (task.state in TERMINAL)
        assert (body["started_at"] is not None) == task.started
        assert (body["claimed_at"] is not None) == task.claimed
        assert body["revision"] >= self.revisions[task.id]
        if task.delayed:
            available_at = datetime.fromisoformat(body["available_at"])
            ahead_of_now = (available_at - datetime.now(UTC)).total_seconds()
            earliest, latest = task.delayed
            task.ready_at = self.time() + ahead_of_now
            assert earliest - 300 <= self.clock + ahead_of_now <= latest + 1

    def request(
        self, user: str, method: str, path: str, expected: int, problem: str = "", **options: Any
    ) -> Any:
        answer = self.host.request(user, method, path, **options)
        assert answer.status_code == expected, answer.text
        body = answer.json() if answer.content else None
        if problem:
            assert body["type"] == f"/v1/problems/{problem}"
        return body

    def check(self) -> None:
        told, available = defaultdict(list), set()
        for event, data, room in self.host.events:
            if event == "task_status_event":
                assert room == "room:lab"
                what = data["status"], data["attempt"], data["worker_id"]
                before = self.shown.get(data["id"])
                # of progress it is told in the same state
                assert what[0] == before or (before, what[0]) in WAYS
                self.shown[data["id"]] = what[0]
                told[data["id"]].append((*what, data["progress"], data["progress_message"]))
                # each change has a number of its own
                assert data["revision"] > self.revisions[data["id"]]
                self.revisions[data["id"]] = data["revision"]
            elif event == "task_available":
                # once for all tasks of a change
                available.add(data["job_name"])
        assert told == self.told
        assert available == self.available
        self.host.events.clear()
        self.told.clear()
        self.available.clear()

        page = self.request("ada", "GET", "/rooms/lab/tasks?limit=500", 200)
        listed = {body["id"]: body for body in page["items"]}
        assert list(listed) == [t.id for t in reversed(self.tasks)]
        for task in self.tasks:
            self.assert_shown(task, listed[task.id])

        serving = {
            job: {w.id for w in workers}
            for job, workers in self.jobs.items()
            if workers is not None
        }
        if serving != self.shown_jobs:
            page = self.request("ada", "GET", "/rooms/lab/jobs", 200)
            assert {job["name"]: set(job["workers"]) for job in page["items"]} == serving
            self.shown_jobs = serving

    @initialize()
    def begin(self) -> None:
        self.host.empty()
        self.host.events.clear()
        for owner, *jobs in (("ada", "Once", "Patient"), ("bob", "Eager", "Patient")):
            worker = None
            for job in jobs:
                self.register(owner, job, worker)
                worker = self.workers[-1]
        for job in POLICIES:
            self.submit(job, "ada", 0, 0, None)
        self.check()

    # --- tasks ---

    @step(
        10,
        ways_on,
        way=one_of(ways_on),
        fenced=st.booleans(),
        retryable=st.booleans(),
        batched=st.booleans(),
    )
    def report_as_holder(
        self, way: tuple[Task, str], fenced: bool, retryable: bool, batched: bool
    ) -> None:
        task, state = way
        fence = task.attempt if fenced else None
        self.report(task, task.worker.owner, state, fence, retryable, batched)

    @step(
        2,
        lambda walk: walk.attempts,
        held=one_of(lambda walk: walk.attempts),
        state=STATES,
        fenced=st.booleans(),
        batched=st.booleans(),
    )
    def report_late(
        self, held: tuple[Task, int, Worker], state: str, fenced: bool, batched: bool
    ) -> None:
        task, attempt, worker = held
        fence = attempt if fenced else None
        self.report(task, worker.owner, state, fence, batched=batched)

    @step(
        1,
        task=one_of(lambda walk: walk.tasks),
        user=CALLERS,
        state=st.just(CANCELLED) | STATES,
        fenced=st.booleans(),
    )
    def report_as_anybody(self, task: Task, user: str, state: str, fenced: bool) -> None:
        self.report(task, user, state, task.attempt if fenced else None)

    def report(
        self,
        task: Task,
        user: str,
        state: str,
        fence: int | None,
        retryable: bool = True,
        batched: bool = False,
    ) -> None:
        body = {"status": state, "retryable": retryable, "attempt": fence}
        if state == COMPLETED:
            body["result"] = f"of attempt {task.attempt}"
        report = partial(self.request, user, "PATCH", f"/tasks/{task.id}", json=body)
        if batched:
            report = partial(self.report_in_batch, user, {"id": task.id, **body})
        worker = task.worker
        holds = worker is not None and worker.owner == user
        submitted = state == CANCELLED and task.by == user
        entitled = user == "admin" or holds or submitted
        current = fence in (None, task.attempt)
        if entitled and current and (may_follow(task, state) or task.state == state):
            if task.state != state:
                self.move(task, state, retryable, body.get("result"))
            elif task.result != body.get("result"):
                report(409, "lease-lost" if fence else "invalid-task-transition")
                return
            self.assert_shown(task, report(200))
        elif fence is not None and not (current and task.state in HELD):
            report(409, "lease-lost")
        elif not entitled:
            report(403, "forbidden")
        else:
            report(409, "invalid-task-transition")

    def report_in_batch(self, user: str, report: Any, expected: int, problem: str = "") -> Any:
        body = {"reports": [report]}
        answer = self.request(user, "PATCH", "/tasks", 200, json=body)
        (outcome,) = answer["outcomes"]
        assert (outcome["id"], outcome["status"]) == (report["id"], expected)
        if problem:
            assert outcome["problem"]["type"] == f"/v1/problems/{problem}"
        return outcome["task"]

    def move(self, task: Task, state: str, retryable: bool, result: Any) -> None:
        if state == PENDING:
            self.queue(task)
        elif state == RUNNING:
            task.state, task.started = RUNNING, True
            task.deadline = self.due_in(task, "timeout_seconds")
            self.tell(task)
        elif state == FAILED:
            self.lose(task, "user_error", retryable)
        else:
            task.result, task.error_type = result, None
            self.end(task, state)

    @step(
        6,
        lambda walk: present(walk) and (walk.waiting() or walk.held()),
        worker=one_of(known),
        limit=st.integers(1, 3),
        key=KEYS,
        start=st.booleans(),
    )
    def claim(self, worker: Worker, limit: int, key: str | None, start: bool = False) -> None:
        claim = partial(
            self.request,
            worker.owner,
            "POST",
            "/tasks/claim",
            json={"worker_id": worker.id, "max_tasks": limit, "start": start},
            headers={"Idempotency-Key": key} if key else {},
        )
        if worker.gone:
            claim(404, "worker-not-found")
            return
        worker.seen = self.clock
        jobs = [job for job, serving in self.jobs.items() if worker in (serving or ())]
        brought = [t for t in self.held(worker) if key and t.claim_key == key]
        if not (brought or worker.draining):
            # what is due takes its place when somebody asks for it
            for task in self.tasks:
                if task.job in jobs and task.delayed and task.delayed[1] <= self.clock:
                    task.place, task.delayed = self.place_again(task), None
                    task.queued_at = task.ready_at
        if not brought and not worker.draining:
            brought = self.in_turn([self.queued(job) for job in jobs])[:limit]
            for task in brought:
                task.state, task.worker, task.claim_key = CLAIMED, worker, key
                task.attempt += 1
                task.claimed = True
                task.deadline = self.due_in(task, "start_timeout_seconds")
                if start:
                    task.state, task.started, task.unbegun = RUNNING, True, True
                    task.deadline = self.due_in(task, "timeout_seconds")
                self.attempts.append((task, task.attempt, worker))
                self.tell(task)
        answer = claim(200)
        brought.sort(key=lambda t: t.order)
        by_job = [[t for t in brought if t.job == job] for job in POLICIES]
        brought = self.in_turn(by_job)
        assert [body["id"] for body in answer["tasks"]] == [t.id for t in brought]
        assert answer["task"] == next(iter(answer["tasks"]), None)
        for task, body in zip(brought, answer["tasks"], strict=True):
            self.assert_shown(task, body)

    @step(
        4,
        lambda walk: len(walk.waiting()) < 5,
        job=JOBS,
        user=USERS,
        priority=st.sampled_from([0, 0, -1, 1]),
        delay=st.sampled_from([0, 0, 0.5 * HOUR, 1.5 * HOUR]),
        key=KEYS,
    )
    def submit(self, job: str, user: str, priority: int, delay: float, key: str | None) -> None:
        body = {"payload": {}, "priority": priority, "delay_seconds": delay}
        submit = partial(
            self.request,
            user,
            "POST",
            f"/rooms/lab/tasks/{full_name(job)}",
            json=body,
            headers={"Idempotency-Key": key} if key else {},
        )
        if self.jobs[job] is None:
            submit(404, "job-not-found")
            return
        if key and (earlier := self.submissions.get((job, user, key))):
            task, same = earlier
            if body == same:
                self.assert_shown(task, submit(202))
            else:
                submit(422, "idempotency-key-reused")
            return
        place = self.new_place(job, priority, user)
        answer = submit(202)
        number = next(self.numbers)
        task = Task(
            f"t{number}",
            answer["id"],
            job,
            user,
            priority,
            number=number,
            place=place,
            queued_at=self.time(),
            max_attempts=POLICIES[job].get("max_attempts", 1),
            delayed=(self.clock + delay, self.clock + delay) if delay else None,
        )
        self.tasks.append(task)
        self.tell(task)
        self.assert_shown(task, answer)
        if key:
            self.submissions[job, user, key] = task, body

    @step(1, task=one_of(retriable), user=CALLERS)
    def retry(self, task: Task, user: str) -> None:
        retry = partial(self.request, user, "POST", f"/tasks/{task.id}/retry")
        if user not in (task.by, "admin"):
            retry(403, "forbidden")
        elif self.jobs[task.job] is None:
            retry(404, "job-not-found")
        elif task.state not in TERMINAL:
            retry(409, "invalid-task-transition")
        else:
            place = self.new_place(task.job, task.priority, task.by)
            task.failed, task.result, task.queued_at = 0, None, self.time()
            self.queue(task, place=place)
            self.assert_shown(task, retry(202))

    @step(
        2,
        present,
        worker=one_of(present),
        reported=st.runner().flatmap(
            lambda walk: st.lists(st.sampled_from(walk.attempts or [None]), max_size=3)
        ),
        progress=st.sampled_from([None, 0.25, 0.75]),
        message=st.sampled_from([None, "so far"]),
    )
    def beat(
        self, worker: Worker, reported: list[Any], progress: float | None, message: str | None
    ) -> None:
        worker.seen = self.clock
        attempts = {task: attempt for task, attempt, _ in filter(None, reported)}
        cancelled, lost = [], []
        for task, attempt in attempts.items():
            if (task.worker, task.attempt) != (worker, attempt):
                lost.append(task.id)
            elif task.state in HELD:
                if progress is not None or message is not None:
                    task.progress = task.progress if progress is None else progress
                    task.message = message or task.message
                    self.tell(task)
            else:
                (cancelled if task.state == CANCELLED else lost).append(task.id)
        body = [
            {"id": task.id, "attempt": attempt, "progress": progress, "message": message}
            for task, attempt in attempts.items()
        ]
        answer = self.request(
            worker.owner, "PATCH", f"/workers/{worker.id}", 200, json={"tasks": body}
        )
        assert sorted(answer["cancelled"]) == sorted(cancelled)
        assert sorted(answer["lost"]) == sorted(lost)
        state = "draining" if worker.draining else "active"
        assert answer["desired_state"] == state

    # --- time ---

    @step(4, hours=st.sampled_from([2, 1, 3, 0]), sweep=st.sampled_from([True, False]))
    def let_time_pass(self, hours: int, sweep: bool) -> None:
        self.clock += hours * HOUR
        self.host.leap(hours * HOUR)
        if not sweep:
            return
        silent = [w for w in present(self) if w.seen + WORKER_TIMEOUT < self.clock]
        for worker in silent:
            self.retire(worker)
        overdue = [t for t in self.tasks if t.deadline and t.deadline <= self.clock]
        for task in [t for t in overdue if t.state == RUNNING]:
            self.lose(task, "timeout")
        for task in [t for t in overdue if t.state == CLAIMED]:
            self.queue(task)
        assert self.host.sweep() == (len(silent), len(overdue))

    # --- workers and jobs ---

    @step(
        2,
        lambda walk: len(present(walk)) < 4,
        user=USERS,
        job=JOBS,
        worker=st.none() | one_of(known),
    )
    def register(self, user: str, job: str, worker: Worker | None) -> None:
        body = {"category": "modifiers", "name": job, **POLICIES[job]}
        register = partial(self.request, user, "PUT", "/rooms/lab/jobs")
        if worker:
            body["worker_id"] = worker.id
            if worker.gone or worker.owner != user:
                register(404, "worker-not-found", json=body)
                return
        answer = register(201 if self.jobs[job] is None else 200, json=body)
        if not worker:
            id_ = answer["worker_id"]
            worker = Worker(f"w{next(self.numbers)}", id_, user, self.clock)
            self.workers.append(worker)
        assert answer["worker_id"] == worker.id
        serving = self.jobs[job] or []
        self.jobs[job] = serving if worker in serving else [*serving, worker]
        worker.seen = self.clock

    @step(1, lambda walk: len(present(walk)) > 1, worker=one_of(present), by_admin=st.booleans())
    def delete_worker(self, worker: Worker, by_admin: bool) -> None:
        user = "admin" if by_admin else worker.owner
        self.request(user, "DELETE", f"/workers/{worker.id}", 204)
        self.retire(worker)

    @step(1, present, worker=one_of(present), draining=st.booleans())
    def drain(self, worker: Worker, draining: bool) -> None:
        body = {"state": "draining" if draining else "active"}
        self.request("admin", "PATCH", f"/workers/{worker.id}", 200, json=body)
        worker.draining = draining


def full_name(job: str) -> str:
    return f"lab:modifiers:{job}"


@pytest.mark.makers("plain", "strict", "postgres")
async def test_walks(
    maker: str,
    app: FastAPI,
    ada: User,
    bob: User,
    admin: User,
    events: list[Sent],
    monkeypatch: pytest.MonkeyPatch,
):
    # of each walk it would make five more by repeating one of its steps
    monkeypatch.setattr(ConjectureRunner, "generate_mutations_from", lambda self, data: None)
    host = Host(app, {"ada": ada, "bob": bob, "admin": admin}, events)
    walks = settings(
        max_examples=WALKS or (15 if maker == "plain" else 4),
        stateful_step_count=40,
        derandomize=not WALKS,
        print_blob=bool(WALKS),
        # to make a walk shorter takes minutes
        phases=[Phase.generate, *([Phase.shrink] if WALKS else [])],
        database=None,
        deadline=None,
    )

    class HostedWalk(Walk):
        pass

    HostedWalk.host = host
    await anyio.to_thread.run_sync(partial(run_state_machine_as_test, HostedWalk, settings=walks))
