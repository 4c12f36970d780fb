"""Reports: what workers and users say becomes of a task."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Float,
    Row,
    String,
    and_,
    bindparam,
    case,
    func,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.types import TypeEngine

from zndraw_joblib.attempts import NO_KEY, confirm_internal_start, error_entry, failed
from zndraw_joblib.database import execute, now
from zndraw_joblib.exceptions import Forbidden, InvalidTaskTransition, LeaseLost, ProblemException
from zndraw_joblib.lifecycle import HELD, REPORTABLE, TERMINAL, ErrorType, TaskStatus
from zndraw_joblib.models import JOB, TASK, constant, in_states, rechecked
from zndraw_joblib.schemas import TaskResponse, TaskUpdateRequest, equal_json
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import (
    VIEW,
    back_in_queue,
    not_found,
    of_job,
    read_changed,
    read_view,
    seen,
)
from zndraw_joblib.workers import Caller, RoomAccess, permits


class Reported(NamedTuple):
    """A task after a report, and whether this report changed it."""

    task: TaskResponse
    changed: bool


def _each(what: str, kind: TypeEngine[Any], count: int) -> ColumnElement[Any]:
    """Return of each task what its own one of ``count`` reports says."""
    return case(
        *(
            (
                TASK.c.id == bindparam(f"task_{n}", type_=TASK.c.id.type),
                bindparam(f"{what}_{n}", type_=kind),
            )
            for n in range(count)
        )
    )


def _reported(status: TaskStatus, count: int) -> dict[Any, Any]:
    """Return what ``count`` reports of one status make of their tasks."""
    if status is TaskStatus.PENDING:
        return back_in_queue()
    if status is TaskStatus.RUNNING:
        return {
            TASK.c.status: status,
            TASK.c.started_at: now(),
            TASK.c.deadline_at: now(of_job(JOB.c.timeout_seconds)),
            TASK.c.claim_key: func.coalesce(
                bindparam("key", type_=TASK.c.claim_key.type), TASK.c.claim_key, NO_KEY
            ),
        }
    error = _each("error", TASK.c.error.type, count)
    if status is TaskStatus.FAILED:
        return failed(
            error,
            _each("entry", String(), count),
            ErrorType.USER_ERROR,
            bindparam("longest_backoff", type_=Float()),
            # a comparison, since a lone parameter is no condition everywhere
            _each("retryable", Boolean(), count).is_(true()),
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
def _moving(status: TaskStatus, superuser: bool, count: int, keyed: bool) -> ReturningUpdate[Any]:
    # built once for each shape
    ids = [bindparam(f"task_{n}", type_=TASK.c.id.type) for n in range(count)]
    leased = _each("attempt", TASK.c.attempt.type, count)
    return (
        update(TASK)
        .where(
            TASK.c.id.in_(ids),
            rechecked(_may_become(status)),
            _may_report(superuser, status, bindparam("holder"), bindparam("submitter")),
            TASK.c.attempt == func.coalesce(leased, TASK.c.attempt),
            _of_this_delivery(status, leased) if keyed else true(),
        )
        .values(_reported(status, count))
        .returning(*VIEW)
    )


def _of_this_delivery(status: TaskStatus, leased: ColumnElement[Any]) -> ColumnElement[bool]:
    """A keyed report of an ``@internal`` attempt is of the delivery that started it."""
    if status not in DELIVERED:
        return true()
    key = bindparam("key", type_=TASK.c.claim_key.type)
    running = TASK.c.status == constant(TaskStatus.RUNNING)
    return or_(
        TASK.c.worker_id.is_not(None),
        TASK.c.claim_key.in_([NO_KEY, key]),
        and_(TASK.c.claim_key.is_(None), or_(running, leased.is_not(None))),
    )


_NOBODY = UUID(int=0)


async def _move(
    session: AsyncSession,
    status: TaskStatus,
    reports: Mapping[UUID, TaskUpdateRequest],
    caller: Caller,
    settings: JobLibSettings,
    key: str | None,
) -> list[TaskResponse]:
    """Move those tasks to the reported state that are the caller's to move."""
    names: dict[str, Any] = {
        "holder": caller.id,
        "submitter": caller.id,
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
            f"result_{n}": report.result,
            f"retryable_{n}": report.retryable,
            f"entry_{n}": error_entry(report.error, ErrorType.USER_ERROR),
        }
    moving = _moving(status, caller.is_superuser, count, key is not None)
    moved = await execute(session, moving, names)
    return await read_changed(session, moved.all(), settings)


# By id: two requests that lock in two orders would wait for each other.
_LOCKING = (
    select(TASK.c.id)
    .where(TASK.c.id.in_(bindparam("tasks", expanding=True)))
    .order_by(TASK.c.id)
    .with_for_update()
)


async def report(
    session: AsyncSession,
    task_id: UUID,
    caller: Caller,
    may_enter: RoomAccess,
    request: TaskUpdateRequest,
    settings: JobLibSettings,
    *,
    key: str | None = None,
) -> Reported:
    """Move a task to the reported state, if it is the caller's to move.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits.
    task_id : UUID
        The task.
    caller : Caller
        The owner of the task's worker, a superuser, or to cancel the submitter.
    may_enter : RoomAccess
        To whom else it is told that there is such a task.
    request : TaskUpdateRequest
        The report; with ``attempt`` it counts for that attempt only.
    settings : JobLibSettings
        The host's.
    key : str, optional
        An idempotency key: of two deliveries of one task, each with a key of its own,
        one may start it.

    Raises
    ------
    ProblemException
        ``task-not-found``, ``forbidden``, ``invalid-task-transition``, ``lease-lost``.
    """
    reports = {task_id: request}
    (outcome,) = await report_many(session, reports, caller, may_enter, settings, key=key)
    if isinstance(outcome, ProblemException):
        raise outcome
    return outcome


async def report_many(
    session: AsyncSession,
    reports: Mapping[UUID, TaskUpdateRequest],
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
    *,
    key: str | None = None,
) -> list[Reported | ProblemException]:
    """Move each task to the state that is reported of it, if it is the caller's to move.

    Parameters, but for ``reports``, are those of :func:`report`.

    Parameters
    ----------
    reports : mapping of UUID to TaskUpdateRequest
        By task.

    Returns
    -------
    list of Reported or ProblemException
        What :func:`report` would have returned or raised for each.
    """
    if len(reports) > 1:
        await execute(session, _LOCKING, {"tasks": list(reports)})
    moved: dict[UUID, TaskResponse] = {}
    for status in {report.status: None for report in reports.values()}:
        alike = {i: r for i, r in reports.items() if r.status is status}
        views = await _move(session, status, alike, caller, settings, key)
        moved |= {task.id: task for task in views}
    current: dict[UUID, Row[Any]] = {}
    if unmoved := reports.keys() - moved.keys():
        # nothing moved: only now is it worth a read to tell why
        found = await execute(
            session,
            seen(settings.queue_position_max)
            .add_columns(TASK.c.holder_id, TASK.c.claim_key)
            .where(TASK.c.id.in_(unmoved)),
        )
        current = {row.id: row for row in found}
    outcomes: list[Reported | ProblemException] = []
    for task_id, request in reports.items():
        if task_id in moved:
            outcomes.append(Reported(moved[task_id], changed=True))
            continue
        row = current.get(task_id)
        try:
            entitled = row is not None and _entitled(row, request.status, caller)
            if row is None or not (
                entitled or await permits(may_enter, session, caller, row.room_id)
            ):
                raise not_found(task_id)
            stands = _explain(row, entitled, request, key)
            if (
                request.status is TaskStatus.RUNNING
                and row.worker_id is None
                # the broker may deliver twice: a start can be repeated under its key alone
                and not await confirm_internal_start(session, task_id, row.attempt, key)
            ):
                raise _lease_lost(row)
            outcomes.append(Reported(stands, changed=False))
        except ProblemException as exc:
            outcomes.append(exc)
    return outcomes


def _may_become(status: TaskStatus) -> ColumnElement[bool]:
    allowed = in_states(REPORTABLE.get(status, frozenset()))
    if status is not TaskStatus.PENDING:
        return allowed
    started = func.coalesce(TASK.c.started_at, TASK.c.claimed_at)
    return and_(allowed, started == TASK.c.claimed_at)


def _may_report(
    superuser: bool, status: TaskStatus, holder: Any, submitter: Any
) -> ColumnElement[bool]:
    # two of the same user: the columns are of two types
    if superuser:
        return true()
    holds: ColumnElement[bool] = TASK.c.holder_id == holder
    if status is TaskStatus.CANCELLED:
        return or_(holds, TASK.c.created_by_id == submitter)
    return holds


def _entitled(row: Row[Any], status: TaskStatus, caller: Caller) -> bool:
    submitted = status is TaskStatus.CANCELLED and row.created_by_id == caller.id
    return caller.is_superuser or row.holder_id == caller.id or submitted


def _explain(
    row: Row[Any], entitled: bool, request: TaskUpdateRequest, key: str | None
) -> TaskResponse:
    """Return the task if the report repeats the one that won; else raise what it is."""
    task_id, status = row.id, row.status
    current = request.attempt is None or row.attempt == request.attempt
    internal = row.worker_id is None and request.status in DELIVERED
    unstarted = internal and row.status is TaskStatus.CLAIMED
    taken = (request.status is TaskStatus.RUNNING or internal) and (
        key is not None and (row.claim_key not in (None, NO_KEY, key) or unstarted)
    )
    repeated = (
        status == request.status
        and status in REPORTABLE
        and (
            status not in TERMINAL
            or equal_json([row.error, row.result], [request.error, request.result])
        )
    )
    fenced_out = not current or (request.attempt is not None and status not in HELD)
    if not entitled:
        # a zombie is told that its lease is over, and a stranger no more than that
        raise (
            LeaseLost.exception()
            if fenced_out
            else Forbidden.exception(f"task {task_id} is not yours to report on")
        )
    if repeated and current and not taken:
        return read_view(row)
    if fenced_out or taken:
        raise _lease_lost(row)
    raise InvalidTaskTransition.exception(
        f"a {status.value} task can't become {request.status.value}"
        if status != request.status
        else f"task {task_id} is {status.value} already, with another result or error",
        task_status=status.value,
    )


def _lease_lost(row: Row[Any]) -> ProblemException:
    return LeaseLost.exception(
        f"task {row.id} is {row.status.value} in attempt {row.attempt}, and not under this lease",
        task_status=row.status.value,
        attempt=row.attempt,
    )
