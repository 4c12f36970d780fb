"""Reports: what workers and users say becomes of a task."""

import json
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.types import TypeEngine

from zndraw_joblib import lifecycle
from zndraw_joblib.attempts import NO_KEY, confirm_internal_start, error_entry, failed
from zndraw_joblib.database import execute, now
from zndraw_joblib.encoding import Written, equal_json, uncollected
from zndraw_joblib.events import TaskView
from zndraw_joblib.exceptions import Forbidden, InvalidTaskTransition, LeaseLost, ProblemException
from zndraw_joblib.lifecycle import HELD, REPORTABLE, TERMINAL, ErrorType, TaskStatus
from zndraw_joblib.models import JOB, TASK, constant, in_states, of_job, rechecked
from zndraw_joblib.schemas import TaskUpdateRequest
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.submissions import back_in_queue
from zndraw_joblib.tasks import SEEN, SHOWN, change, limits, require_visible
from zndraw_joblib.workers import OPERATE, Caller, RoomAccess, permits


class Reported(NamedTuple):
    """A task after a report, and whether this report changed it."""

    task: TaskView
    changed: bool


def _each(what: str, kind: TypeEngine[Any], count: int) -> sa.ColumnElement[Any]:
    """Return of each task what its own one of ``count`` reports says."""
    return sa.case(
        *(
            (
                TASK.c.id == sa.bindparam(f"task_{n}", type_=TASK.c.id.type),
                sa.bindparam(f"{what}_{n}", type_=kind),
            )
            for n in range(count)
        )
    )


def cancelled(user_id: Any, reason: Any) -> dict[Any, Any]:
    """Return what a user who cancels a task makes of it."""
    return {
        TASK.c.status: TaskStatus.CANCELLED,
        TASK.c.completed_at: now(),
        TASK.c.available_at: None,
        TASK.c.deadline_at: None,
        TASK.c.error_type: None,
        TASK.c.ended_by_id: user_id,
        TASK.c.reason: reason,
    }


def _reported(status: TaskStatus, interrupted: bool, count: int) -> dict[Any, Any]:
    """Return what ``count`` reports of one status make of their tasks."""
    if status is TaskStatus.PENDING:
        again = {TASK.c.interruptions: TASK.c.interruptions + 1} if interrupted else {}
        return back_in_queue() | again
    if status is TaskStatus.RUNNING:
        return {
            TASK.c.status: status,
            TASK.c.started_at: now(),
            TASK.c.deadline_at: now(of_job(JOB.c.timeout_seconds)),
            TASK.c.claim_key: sa.func.coalesce(
                sa.bindparam("key", type_=TASK.c.claim_key.type), TASK.c.claim_key, NO_KEY
            ),
        }
    error = _each("error", TASK.c.error.type, count)
    if status is TaskStatus.CANCELLED:
        by = sa.bindparam("canceller", type_=TASK.c.ended_by_id.type)
        return cancelled(by, _each("reason", TASK.c.reason.type, count)) | {
            TASK.c.error: error,
            TASK.c.result: _each("result", TASK.c.result.type, count),
        }
    if status is TaskStatus.FAILED:
        return failed(
            error,
            _each("entry", sa.String(), count),
            _each("error_type", TASK.c.error_type.type, count),
            sa.bindparam("longest_backoff", type_=sa.Float()),
            # a comparison, since a lone parameter is no condition everywhere
            _each("retryable", sa.Boolean(), count).is_(sa.true()),
        )
    return {
        TASK.c.status: status,
        TASK.c.completed_at: now(),
        TASK.c.available_at: None,
        TASK.c.deadline_at: None,
        TASK.c.error: error,
        TASK.c.error_type: None,
        TASK.c.result: _each("result", TASK.c.result.type, count),
    }


# What an executor says of the attempt that it started.
DELIVERED = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.PENDING})


@lru_cache(maxsize=128)
def _moving(
    status: TaskStatus, interrupted: bool, superuser: bool, count: int, keyed: bool
) -> ReturningUpdate[Any]:
    # built once for each shape
    ids = [sa.bindparam(f"task_{n}", type_=TASK.c.id.type) for n in range(count)]
    leased = _each("attempt", TASK.c.attempt.type, count)
    return (
        sa.update(TASK)
        .where(
            TASK.c.id.in_(ids),
            rechecked(_may_become(status, interrupted)),
            sa.true() if superuser else _is_callers(status),
            TASK.c.attempt == sa.func.coalesce(leased, TASK.c.attempt),
            _of_this_delivery(status, leased) if keyed else sa.true(),
        )
        .values(_reported(status, interrupted, count))
        .returning(*SHOWN)
    )


def _of_this_delivery(status: TaskStatus, leased: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """A keyed report of an ``@internal`` attempt is of the delivery that started it."""
    if status not in DELIVERED:
        return sa.true()
    key = sa.bindparam("key", type_=TASK.c.claim_key.type)
    running = TASK.c.status == constant(TaskStatus.RUNNING)
    return sa.or_(
        TASK.c.worker_id.is_not(None),
        TASK.c.claim_key.in_([NO_KEY, key]),
        sa.and_(TASK.c.claim_key.is_(None), sa.or_(running, leased.is_not(None))),
    )


_NOBODY = UUID(int=0)


async def _move(
    session: AsyncSession,
    status: TaskStatus,
    interrupted: bool,
    reports: Mapping[UUID, TaskUpdateRequest],
    caller: Caller,
    settings: JobLibSettings,
    key: str | None,
) -> list[TaskView]:
    """Move those tasks to the reported state that are the caller's to move."""
    names: dict[str, Any] = {
        "holder": caller.id,
        "submitter": caller.id,
        "canceller": caller.id,
        "key": key,
        "longest_backoff": settings.retry_delay_max_seconds,
    }
    # few shapes of the statement for any number: the nil UUID is no task's
    count = 1 << (len(reports) - 1).bit_length()
    padding = [(_NOBODY, TaskUpdateRequest(status=status))] * (count - len(reports))
    for n, (task_id, report) in enumerate([*reports.items(), *padding]):
        names |= {
            f"task_{n}": task_id,
            f"attempt_{n}": report.attempt,
            f"error_{n}": report.error,
            f"error_type_{n}": report.error_type.value,
            f"result_{n}": report.result,
            f"reason_{n}": report.reason,
            f"retryable_{n}": report.retryable,
            f"entry_{n}": error_entry(report.error, report.error_type),
        }
    moving = _moving(status, interrupted, caller.is_superuser, count, key is not None)
    return await change(session, moving, settings, names)


async def _move_all(
    session: AsyncSession,
    reports: Mapping[UUID, TaskUpdateRequest],
    caller: Caller,
    settings: JobLibSettings,
    key: str | None,
) -> dict[UUID, TaskView]:
    """Move those tasks that are the caller's to move; what is interrupted too often fails."""
    moved: dict[UUID, TaskView] = {}
    for kind in {(report.status, report.interrupted): None for report in reports.values()}:
        alike = {i: r for i, r in reports.items() if (r.status, r.interrupted) == kind}
        tasks = await _move(session, *kind, alike, caller, settings, key)
        moved |= {task.id: task for task in tasks}
    too_often = {
        task_id: _interrupted_too_often(report)
        for task_id, report in reports.items()
        if report.interrupted and task_id not in moved
    }
    if too_often:
        tasks = await _move(session, TaskStatus.FAILED, False, too_often, caller, settings, key)
        moved |= {task.id: task for task in tasks}
    return moved


# By id: two requests that lock in two orders would wait for each other.
_LOCKING = (
    sa.select(TASK.c.id)
    .where(TASK.c.id.in_(sa.bindparam("tasks", expanding=True)))
    .order_by(TASK.c.id)
    .with_for_update()
)


async def lock(session: AsyncSession, task_ids: Iterable[UUID]) -> None:
    """Lock tasks until the commit."""
    await execute(session, _LOCKING, {"tasks": list(task_ids)})


async def report(
    session: AsyncSession,
    reports: Mapping[UUID, TaskUpdateRequest],
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
    *,
    key: str | None = None,
) -> list[Reported | ProblemException]:
    """Move each task to the state that is reported of it, if it is the caller's to move.

    Parameters
    ----------
    reports : mapping of UUID to TaskUpdateRequest
        By task; one with ``attempt`` counts for that attempt only.
    caller : Caller
        Whose the task's worker is; a superuser; to cancel, its submitter and who may operate.
    may_enter : RoomAccess
        To whom else it is told that there is such a task.
    key : str, optional
        An idempotency key: of two deliveries of one task, each with a key of its own,
        one may start it.

    Returns
    -------
    list of Reported or ProblemException
        Of each report what came of it, or ``task-not-found``, ``forbidden``,
        ``invalid-task-transition`` or ``lease-lost``.
    """
    if len(reports) > 1:
        await lock(session, reports)
    moved = await _move_all(session, reports, caller, settings, key)
    # what has not moved: only now is it worth a read to tell why
    current = await _read(session, reports.keys() - moved.keys(), settings)
    outcomes: list[Reported | ProblemException] = []
    for task_id, request in reports.items():
        row = current.get(task_id)
        try:
            if task_id not in moved and (row is None or not _entitled(row, request.status, caller)):
                row = await require_visible(session, row, task_id, caller, may_enter)
                await _require_operator(session, row, request, caller, may_enter)
                operator = Caller(caller.id, is_superuser=True)
                moved |= await _move_all(session, {task_id: request}, operator, settings, key)
            if task_id in moved:
                outcomes.append(Reported(moved[task_id], changed=True))
            else:
                outcomes.append(await _repeated(session, row, request, key))
        except ProblemException as exc:
            outcomes.append(exc)
    return outcomes


async def _read(
    session: AsyncSession, task_ids: Collection[UUID], settings: JobLibSettings
) -> dict[UUID, sa.Row[Any]]:
    if not task_ids:
        return {}
    reading = SEEN.add_columns(TASK.c.claim_key).where(TASK.c.id.in_(task_ids))
    found = await execute(session, reading, limits(settings))
    return {row.id: row for row in found}


async def _require_operator(
    session: AsyncSession,
    row: sa.Row[Any],
    request: TaskUpdateRequest,
    caller: Caller,
    may_enter: RoomAccess,
) -> None:
    """Refuse a report on another's task, but for a cancel by who may operate its room."""
    cancels = request.status is TaskStatus.CANCELLED
    if not cancels or not await permits(may_enter, session, caller, row.room_id, OPERATE):
        # a zombie is told that its lease is over, and a stranger no more than that
        if _fenced_out(row, request):
            raise LeaseLost.exception()
        raise Forbidden.exception(f"task {row.id} is not yours to report on")


def _interrupted_too_often(request: TaskUpdateRequest) -> TaskUpdateRequest:
    """Return the report of a failed attempt that takes an interruption's place."""
    ended = {"error": lifecycle.INTERRUPTED_ERROR, "error_type": ErrorType.WORKER_LOST}
    return request.model_copy(update={"status": TaskStatus.FAILED, "interrupted": False, **ended})


def _may_become(status: TaskStatus, interrupted: bool) -> sa.ColumnElement[bool]:
    allowed = in_states(REPORTABLE.get(status, frozenset()))
    if interrupted:
        return sa.and_(allowed, TASK.c.interruptions < of_job(JOB.c.max_interruptions))
    if status is not TaskStatus.PENDING:
        return allowed
    started = sa.func.coalesce(TASK.c.started_at, TASK.c.claimed_at)
    return sa.and_(allowed, started == TASK.c.claimed_at)


def _is_callers(status: TaskStatus) -> sa.ColumnElement[bool]:
    # two of the same user: the columns are of two types
    holds: sa.ColumnElement[bool] = TASK.c.holder_id == sa.bindparam("holder")
    if status is TaskStatus.CANCELLED:
        return sa.or_(holds, TASK.c.created_by_id == sa.bindparam("submitter"))
    return holds


def _entitled(row: sa.Row[Any], status: TaskStatus, caller: Caller) -> bool:
    submitted = status is TaskStatus.CANCELLED and row.created_by_id == caller.id
    return caller.is_superuser or row.holder_id == caller.id or submitted


def _fenced_out(row: sa.Row[Any], request: TaskUpdateRequest) -> bool:
    return request.attempt is not None and (
        row.attempt != request.attempt or row.status not in HELD
    )


async def _repeated(
    session: AsyncSession, row: Any, request: TaskUpdateRequest, key: str | None
) -> Reported:
    """Return the task if the report repeats the one that won; else raise what it is."""
    task_id, status = row.id, row.status
    starts = request.status is TaskStatus.RUNNING
    internal = row.worker_id is None and request.status in DELIVERED
    unstarted = internal and status is TaskStatus.CLAIMED
    taken = (starts or internal) and (
        key is not None and (row.claim_key not in (None, NO_KEY, key) or unstarted)
    )
    current = request.attempt in (None, row.attempt)
    if current and not taken and _same_report(row, request):
        # the broker may deliver twice: a start can be repeated under its key alone
        if (
            starts
            and row.worker_id is None
            and not await confirm_internal_start(session, task_id, row.attempt, key)
        ):
            raise _lease_lost(row)
        return Reported(row, changed=False)
    if taken or _fenced_out(row, request):
        raise _lease_lost(row)
    raise InvalidTaskTransition.exception(
        f"a {status.value} task can't become {request.status.value}"
        if status != request.status
        else f"task {task_id} is {status.value} already, with another result or error",
        task_status=status.value,
    )


def _same_report(row: sa.Row[Any], request: TaskUpdateRequest) -> bool:
    if row.status != request.status or row.status not in REPORTABLE:
        return False
    if row.status not in TERMINAL:
        return True
    if isinstance(request.result, Written):
        return bool(row.error == request.error and row.result == request.result)
    with uncollected():
        result = json.loads(row.result or "null")
    return equal_json([row.error, result], [request.error, request.result])


def _lease_lost(row: sa.Row[Any]) -> ProblemException:
    return LeaseLost.exception(
        f"task {row.id} is {row.status.value} in attempt {row.attempt}, and not under this lease",
        task_status=row.status.value,
        attempt=row.attempt,
    )


_RESULT = sa.select(
    TASK.c.status,
    TASK.c.room_id,
    TASK.c.created_by_id,
    TASK.c.holder_id,
    sa.type_coerce(TASK.c.result, sa.Text).label("result"),
).where(TASK.c.id == sa.bindparam("task"))


async def read_result(
    session: AsyncSession, task_id: UUID, caller: Caller, may_enter: RoomAccess
) -> sa.Row[Any]:
    """Return the status and the result of a task, as text, to those who may see it.

    Raises
    ------
    ProblemException
        ``task-not-found``.
    """
    found = await execute(session, _RESULT, {"task": task_id})
    return await require_visible(session, found.one_or_none(), task_id, caller, may_enter)
