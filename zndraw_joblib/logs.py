"""Logs of tasks: what workers send with their heartbeats, kept and read."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib.database import execute, number
from zndraw_joblib.events import TaskLogged
from zndraw_joblib.lifecycle import TERMINAL
from zndraw_joblib.models import LOG, TASK, held
from zndraw_joblib.schemas import TaskHeartbeat
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import require_visible
from zndraw_joblib.workers import Caller, RoomAccess

# What a row counts beside its text, so that their number is bounded too.
ROW_BYTES = 64
#: Rows that one answer is made of, of up to a hundred lines each.
ROWS = 100


def _last(column: sa.Column[int]) -> sa.ColumnElement[int]:
    """Return a column of a task's last row."""
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
        *map(_last, (LOG.c.attempt, LOG.c.first, LOG.c.last_number, LOG.c.end_byte)),
    )
    .where(
        held(),
        TASK.c.worker_id == sa.bindparam("worker", type_=TASK.c.worker_id.type),
        TASK.c.id.in_(sa.bindparam("tasks", expanding=True)),
    )
    .order_by(TASK.c.id)
    .with_for_update()
)
_later = LOG.alias("later")
_HALF = sa.bindparam("half", type_=sa.BigInteger())
_END = sa.select(sa.func.max(_later.c.end_byte)).where(_later.c.task_id == LOG.c.task_id)
# what is neither of the first half nor of the last
_CUTTING = sa.delete(LOG).where(
    LOG.c.task_id.in_(sa.bindparam("tasks", expanding=True)),
    LOG.c.end_byte > _HALF,
    LOG.c.begin_byte < _END.correlate(LOG).scalar_subquery() - _HALF,
)


async def append(
    session: AsyncSession,
    worker_id: UUID,
    reported: Sequence[TaskHeartbeat],
    settings: JobLibSettings,
) -> list[TaskLogged]:
    """Keep what a worker's tasks logged, but for what came before; return the new lines.

    All of the tasks are locked, those of which nothing was logged too.
    """
    by_id = {task.id: task for task in reported}
    asked = {"worker": worker_id, "tasks": list(by_id)}
    logged: list[TaskLogged] = []
    rows: list[dict[str, Any]] = []
    for last in await execute(session, _LAST_ROWS, asked):
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
    too_long = [row["task_id"] for row in rows if row["end_byte"] > settings.max_log_bytes]
    if too_long:
        half = settings.max_log_bytes // 2
        await execute(session, _CUTTING, {"tasks": too_long, "half": half})
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


async def read(
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
