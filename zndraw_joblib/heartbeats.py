"""Heartbeats: what a worker reports of its tasks, and what it is told of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Float,
    Row,
    String,
    bindparam,
    case,
    cast,
    func,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import logs, workers
from zndraw_joblib.events import TaskLogged, TaskView
from zndraw_joblib.lifecycle import HELD, TaskStatus
from zndraw_joblib.models import LINK, PROVIDER, TASK, held, rechecked
from zndraw_joblib.schemas import HeartbeatResponse, TaskHeartbeat, WorkerUpdateRequest
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import BRIEF, change
from zndraw_joblib.workers import Caller


class Beat(NamedTuple):
    """What came of a heartbeat: its answer, the tasks whose progress was stored, new lines."""

    answer: HeartbeatResponse
    progressed: list[TaskView]
    logged: list[TaskLogged]


def _count_of(table: Any) -> ColumnElement[int]:
    served = table.c.worker_id == bindparam("touched", type_=table.c.worker_id.type)
    return select(func.count()).select_from(table).where(served).scalar_subquery()


_LINE = (
    cast(TASK.c.id, String) + " " + cast(TASK.c.attempt, String) + " " + cast(TASK.c.status, String)
)
# id, attempt and status of the reported tasks that are the worker's, as text: this way the
# heartbeat stays one statement, and returns one row
_STATES = (
    select(func.aggregate_strings(_LINE, ","))
    .where(
        TASK.c.worker_id == bindparam("touched", type_=TASK.c.worker_id.type),
        TASK.c.id.in_(bindparam("reported", expanding=True)),
    )
    .scalar_subquery()
)
BEATING = workers.TOUCHING.returning(
    _count_of(LINK).label("jobs"), _count_of(PROVIDER).label("providers")
)
BEATING_WITH_TASKS = BEATING.returning(_STATES.label("states"))


async def beat(
    session: AsyncSession,
    worker_id: UUID,
    caller: Caller,
    request: WorkerUpdateRequest,
    settings: JobLibSettings,
) -> Beat:
    """Record that a worker lives, store the progress of its tasks, tell which to drop.

    The worker's row is locked until the commit.

    Parameters
    ----------
    caller : Caller
        The worker's owner; a superuser may set the state of another's.
    request : WorkerUpdateRequest
        The state that the worker is to have, and the tasks that it believes to be its own.

    Raises
    ------
    ProblemException
        ``worker-not-found``, or ``forbidden`` for another user's worker.
    """
    reported = {task.id: task for task in request.tasks}
    statement = BEATING_WITH_TASKS if reported else BEATING
    worker = await workers.touch(
        session,
        worker_id,
        caller,
        statement,
        state=request.state,
        stuck=request.stuck,
        reported=list(reported),
    )
    states = _states(worker, reported) if reported else {}
    kept = {task_id for task_id, status in states.items() if status in HELD}
    cancelled = [task_id for task_id, s in states.items() if s is TaskStatus.CANCELLED]
    answer = HeartbeatResponse(
        id=worker.id,
        last_heartbeat=worker.last_heartbeat,
        state=worker.state,
        desired_state=worker.state,
        jobs=worker.jobs,
        providers=worker.providers,
        cancelled=cancelled,
        lost=sorted(reported.keys() - kept - {*cancelled}),
    )
    held_still = [task for task in request.tasks if task.id in kept]
    logged: list[TaskLogged] = []
    if any(task.log for task in held_still):
        # first: it locks all of them, by id
        logged = await logs.append(session, worker_id, held_still, settings)
    return Beat(answer, await _store(session, worker_id, held_still, settings), logged)


def _states(worker: Row[Any], reported: dict[UUID, TaskHeartbeat]) -> dict[UUID, TaskStatus]:
    """Return the states of the reported attempts that are the worker's."""
    states = {}
    for line in worker.states.split(",") if worker.states else ():
        task_id, attempt, status = line.split()
        if int(attempt) == reported[UUID(task_id)].attempt:
            states[UUID(task_id)] = TaskStatus[status]
    return states


async def _store(
    session: AsyncSession,
    worker_id: UUID,
    reported: Sequence[TaskHeartbeat],
    settings: JobLibSettings,
) -> list[TaskView]:
    """Store progress and checkpoints; what ended meanwhile is left to the next heartbeat."""
    reported = [t for t in reported if (t.progress, t.message, t.checkpoint) != (None,) * 3]
    if not reported:
        return []
    fractions = ((TASK.c.id == t.id, literal(t.progress, Float)) for t in reported)
    messages = ((TASK.c.id == t.id, literal(t.message, String)) for t in reported)
    # by id, as reports lock them
    theirs = (
        select(TASK.c.id)
        .where(
            held(),
            TASK.c.worker_id == worker_id,
            tuple_(TASK.c.id, TASK.c.attempt).in_([(t.id, t.attempt) for t in reported]),
        )
        .order_by(TASK.c.id)
        .with_for_update()
    )
    # what is not reported stays: a message alone erases no progress
    values: dict[Any, Any] = {
        TASK.c.progress: func.coalesce(case(*fractions), TASK.c.progress),
        TASK.c.progress_message: func.coalesce(case(*messages), TASK.c.progress_message),
    }
    saved = [
        (TASK.c.id == t.id, literal(t.checkpoint, TASK.c.checkpoint.type))
        for t in reported
        if t.checkpoint is not None
    ]
    if saved:
        values[TASK.c.checkpoint] = case(*saved, else_=TASK.c.checkpoint)
    storing = update(TASK).where(rechecked(held()), TASK.c.id.in_(theirs)).values(values)
    return await change(session, storing.returning(*BRIEF), settings)
