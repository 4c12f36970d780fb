"""Heartbeats: what a worker says of its tasks and is told of them, and what these log."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import workers
from zndraw_joblib.database import execute, number
from zndraw_joblib.events import TaskLogged, TaskView
from zndraw_joblib.lifecycle import HELD, TERMINAL, TaskStatus
from zndraw_joblib.models import LINK, LOG, PROVIDER, TASK, held, rechecked
from zndraw_joblib.schemas import HeartbeatResponse, TaskHeartbeat, WorkerUpdateRequest
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import BRIEF, change, require_visible
from zndraw_joblib.workers import Caller, RoomAccess


class Beat(NamedTuple):
    """What came of a heartbeat: its answer, the tasks whose progress was stored, new lines."""

    answer: HeartbeatResponse
    progressed: list[TaskView]
    logged: list[TaskLogged]


def _count_of(table: Any) -> sa.ColumnElement[int]:
    served = table.c.worker_id == sa.bindparam("touched", type_=table.c.worker_id.type)
    return sa.select(sa.func.count()).select_from(table).where(served).scalar_subquery()


_LINE = (
    sa.cast(TASK.c.id, sa.String)
    + " "
    + sa.cast(TASK.c.attempt, sa.String)
    + " "
    + sa.cast(TASK.c.status, sa.String)
)
# id, attempt and status of the reported tasks that are the worker's, as text: this way the
# heartbeat stays one statement, and returns one row
_STATES = (
    sa.select(sa.func.aggregate_strings(_LINE, ","))
    .where(
        TASK.c.worker_id == sa.bindparam("touched", type_=TASK.c.worker_id.type),
        TASK.c.id.in_(sa.bindparam("reported", expanding=True)),
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
    # first: it locks all of them, by id
    logged = await append_log(session, held_still, settings)
    return Beat(answer, await _store(session, worker_id, held_still, settings), logged)


def _states(worker: sa.Row[Any], reported: dict[UUID, TaskHeartbeat]) -> dict[UUID, TaskStatus]:
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
    fractions = ((TASK.c.id == t.id, sa.literal(t.progress, sa.Float)) for t in reported)
    messages = ((TASK.c.id == t.id, sa.literal(t.message, sa.String)) for t in reported)
    # by id, as reports lock them
    theirs = (
        sa.select(TASK.c.id)
        .where(
            held(),
            # the attempts say so too, but for pairs SQLite searches no index
            TASK.c.worker_id == worker_id,
            sa.tuple_(TASK.c.id, TASK.c.attempt).in_([(t.id, t.attempt) for t in reported]),
        )
        .order_by(TASK.c.id)
        .with_for_update()
    )
    # what is not reported stays: a message alone erases no progress
    values: dict[Any, Any] = {
        TASK.c.progress: sa.func.coalesce(sa.case(*fractions), TASK.c.progress),
        TASK.c.progress_message: sa.func.coalesce(sa.case(*messages), TASK.c.progress_message),
    }
    saved = [
        (TASK.c.id == t.id, sa.literal(t.checkpoint, TASK.c.checkpoint.type))
        for t in reported
        if t.checkpoint is not None
    ]
    if saved:
        values[TASK.c.checkpoint] = sa.case(*saved, else_=TASK.c.checkpoint)
    storing = sa.update(TASK).where(rechecked(held()), TASK.c.id.in_(theirs)).values(values)
    return await change(session, storing.returning(*BRIEF), settings)


# --- what tasks log ---

# What a row counts beside its text, so that their number is bounded too.
ROW_BYTES = 64
#: Rows that one answer is made of, of up to a hundred lines each.
ROWS = 100


def of_last_row(column: sa.Column[int]) -> sa.ColumnElement[int]:
    """Return a column of the last row of a task's log, inside any statement."""
    return (
        sa.select(column)
        .where(LOG.c.task_id == TASK.c.id)
        .order_by(LOG.c.attempt.desc(), LOG.c.first.desc())
        .limit(number(1))
        .correlate(TASK)
        .scalar_subquery()
        .label(f"last_{column.key}")
    )


# by id, as reports lock them
_LAST_ROWS = (
    sa.select(
        TASK.c.id,
        TASK.c.attempt,
        *map(of_last_row, (LOG.c.attempt, LOG.c.first, LOG.c.last_number, LOG.c.end_byte)),
    )
    .where(held(), TASK.c.id.in_(sa.bindparam("tasks", expanding=True)))
    .order_by(TASK.c.id)
    .with_for_update()
)
# what is neither of the first part nor of the last
_CUTTING = sa.delete(LOG).where(
    LOG.c.task_id == sa.bindparam("task"),
    LOG.c.end_byte > sa.bindparam("first_part", type_=sa.BigInteger()),
    LOG.c.begin_byte < sa.bindparam("last_part", type_=sa.BigInteger()),
)


async def append_log(
    session: AsyncSession, reported: Sequence[TaskHeartbeat], settings: JobLibSettings
) -> list[TaskLogged]:
    """Keep what tasks at work logged, but for what came before; return the new lines.

    If any logged, all of the tasks are locked.
    """
    if not any(task.log for task in reported):
        return []
    by_id = {task.id: task for task in reported}
    logged: list[TaskLogged] = []
    rows: list[dict[str, Any]] = []
    for last in await execute(session, _LAST_ROWS, {"tasks": list(by_id)}):
        task = by_id[last.id]
        if task.log is None or task.attempt != last.attempt:
            continue
        if last.last_attempt == task.attempt and task.log.first <= last.last_first:
            # an answer got lost
            continue
        logged.append(TaskLogged(last.id, task.attempt, task.log.first, task.log.lines))
        text, begin = "\n".join(task.log.lines), last.last_end_byte or 0
        row = {"task_id": last.id, "attempt": task.attempt, "first": task.log.first, "text": text}
        row["last_number"] = (last.last_last_number or 0) + len(task.log.lines)
        row |= {"begin_byte": begin, "end_byte": begin + len(text.encode()) + ROW_BYTES}
        rows.append(row)
    if rows:
        await execute(session, sa.insert(LOG), rows)
    half = settings.max_log_bytes // 2
    too_long = [
        {"task": row["task_id"], "first_part": half, "last_part": row["end_byte"] - half}
        for row in rows
        if row["end_byte"] > settings.max_log_bytes
    ]
    if too_long:
        await execute(session, _CUTTING, too_long)
    return logged


_TASK = sa.select(TASK.c.status, TASK.c.room_id, TASK.c.created_by_id, TASK.c.holder_id).where(
    TASK.c.id == sa.bindparam("task")
)
_ROWS = (
    sa.select(LOG.c.attempt, LOG.c.last_number, LOG.c.text)
    .where(
        LOG.c.task_id == sa.bindparam("task"),
        LOG.c.last_number > sa.bindparam("after", type_=sa.BigInteger()),
    )
    .order_by(LOG.c.attempt, LOG.c.first)
    .limit(number(ROWS))
)


async def read_log(
    session: AsyncSession, task_id: UUID, after: int, caller: Caller, may_enter: RoomAccess
) -> dict[str, Any]:
    """Return what follows line ``after`` of a task's log, to those who may see the task.

    Raises
    ------
    ProblemException
        ``task-not-found``.
    """
    # the task first: of one that has ended, all lines are there
    found = (await execute(session, _TASK, {"task": task_id})).one_or_none()
    task = await require_visible(session, found, task_id, caller, may_enter)
    rows = (await execute(session, _ROWS, {"task": task_id, "after": after})).all()
    lines: list[dict[str, Any]] = []
    for row in rows:
        texts = row.text.split("\n")
        first = row.last_number - len(texts) + 1
        if omitted := max(0, first - after - 1):
            text = f"... {omitted} lines left out ..."
            lines.append(_line(first - 1, row.attempt, text, omitted))
        lines += [
            _line(at, row.attempt, text) for at, text in enumerate(texts, first) if at > after
        ]
        after = row.last_number
    return {"lines": lines, "next": after, "ended": task.status in TERMINAL and len(rows) < ROWS}


def _line(at: int, attempt: int, text: str, omitted: int = 0) -> dict[str, Any]:
    return {"number": at, "attempt": attempt, "text": text, "omitted": omitted}
