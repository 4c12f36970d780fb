"""Reports: what workers and users say becomes of a task."""

from collections.abc import Iterable, Mapping, Sequence
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
    literal,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.types import TypeEngine

from zndraw_joblib import workers
from zndraw_joblib.attempts import (
    NO_KEY,
    back_in_queue,
    confirm_internal_start,
    failed,
    told,
)
from zndraw_joblib.exceptions import (
    Forbidden,
    InvalidTaskTransition,
    JobNotFound,
    LeaseLost,
    ProblemException,
)
from zndraw_joblib.lifecycle import (
    HELD,
    INTERNAL_ROOM,
    REPORTABLE,
    TERMINAL,
    ErrorType,
    TaskStatus,
)
from zndraw_joblib.models import (
    JOB,
    TASK,
    constant,
    execute,
    in_states,
    now,
    rechecked,
    returned,
)
from zndraw_joblib.schemas import (
    TaskResponse,
    TaskUpdateRequest,
)
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import (
    VIEW,
    born_claimed,
    end_of_queue,
    last_errors,
    next_order,
    not_found,
    of_job,
    order_taken,
    position,
    read_changed,
    read_view,
    seen,
)
from zndraw_joblib.workers import Caller, RoomAccess, permits


def _said(what: str, kind: TypeEngine[Any], count: int) -> ColumnElement[Any]:
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
    error = _said("error", TASK.c.error.type, count)
    if status is TaskStatus.FAILED:
        return failed(
            error,
            _said("told", String(), count),
            ErrorType.USER_ERROR,
            bindparam("longest_backoff", type_=Float()),
            # a comparison, since a lone parameter is no condition everywhere
            _said("retryable", Boolean(), count).is_(true()),
        )
    return {
        TASK.c.status: status,
        TASK.c.completed_at: now(),
        TASK.c.available_at: None,
        TASK.c.deadline_at: None,
        TASK.c.error: error,
        TASK.c.error_type: None,
        TASK.c.result: _said("result", TASK.c.result.type, count),
    }


# What an executor says of the attempt that it started.
DELIVERED = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.PENDING})
# Afterwards nothing says whose the task was.
_LEAVING = frozenset({TaskStatus.FAILED, TaskStatus.PENDING})


@lru_cache(maxsize=128)
def _moving(
    status: TaskStatus,
    superuser: bool,
    count: int,
    position_max: int | None,
    keyed: bool,
) -> ReturningUpdate[Any]:
    # built once for each shape
    shown = [workers.unheard(TASK.c.worker_id), *VIEW]
    if status in _LEAVING and position_max is not None:
        order = returned(TASK.c.queue_order)
        place = position(returned(TASK.c.job_id), order, position_max)
        waits = TASK.c.status == constant(TaskStatus.PENDING)
        shown.append(case((waits, place)).label("queue_position"))
    ids = [bindparam(f"task_{n}", type_=TASK.c.id.type) for n in range(count)]
    leased = _said("attempt", TASK.c.attempt.type, count)
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
        .returning(*shown)
    )


def _of_this_delivery(
    status: TaskStatus, leased: ColumnElement[Any]
) -> ColumnElement[bool]:
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
    key: str | None = None,
    *,
    alone: bool = False,
) -> Sequence[Row[Any]]:
    """Move those tasks to the reported state that are the caller's to move.

    One that is ``alone`` tells its place in the queue; of several none sees the others.
    """
    names: dict[str, Any] = {
        "holder": caller.id,
        "submitter": caller.id,
        "key": key,
        "longest_backoff": settings.retry_delay_max_seconds,
        **workers.unheard_since(caller, settings),
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
            f"told_{n}": told(report.error, ErrorType.USER_ERROR),
        }
    most = settings.queue_position_max if alone else None
    moving = _moving(status, caller.is_superuser, count, most, key is not None)
    moved = await execute(session, moving, names)
    return moved.all()


# Tasks and whose they are, by id: two requests that lock in two orders would wait for each
# other. Their workers are not waited for.
_LOCKING = (
    select(TASK.c.worker_id, workers.unheard(TASK.c.worker_id))
    .where(TASK.c.id.in_(bindparam("tasks", expanding=True)))
    .order_by(TASK.c.id)
    .with_for_update(of=TASK)
)


async def _lock(
    session: AsyncSession,
    task_ids: Iterable[UUID],
    caller: Caller,
    settings: JobLibSettings,
) -> set[UUID]:
    """Lock tasks, and return the caller's workers at them that were not heard just now."""
    locked = await execute(
        session,
        _LOCKING,
        {"tasks": list(task_ids), **workers.unheard_since(caller, settings)},
    )
    return {row.worker_id for row in locked if row.unheard}


class Reported(NamedTuple):
    """A task after a report, and whether this report changed it."""

    task: TaskResponse
    changed: bool


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
    if request.status in _LEAVING:
        await workers.keep_alive_at(session, task_id, caller, settings)
    moved = await _move(
        session, request.status, {task_id: request}, caller, settings, key, alone=True
    )
    changed = await read_changed(session, moved, settings)
    if changed:
        alive = [row.worker_id for row in moved if row.unheard]
        reported = Reported(changed[0], changed=True)
    else:
        # nothing moved: only now is it worth a read to tell why
        entitled = _entitled(caller, request.status)
        row = await _find(session, task_id, entitled, caller, may_enter, settings)
        alive = [row.worker_id] if row.unheard else []
        standing = _explain(row, row.entitled, request, key)
        if (
            request.status is TaskStatus.RUNNING
            and row.worker_id is None
            # the broker may deliver twice: a start can be repeated under its key alone
            and not await confirm_internal_start(session, task_id, row.attempt, key)
        ):
            raise _lease_lost(row)
        reported = Reported(standing, changed=False)
    if alive:
        await workers.keep_alive(session, alive)
    return reported


async def report_many(
    session: AsyncSession,
    reports: Mapping[UUID, TaskUpdateRequest],
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
) -> list[Reported | ProblemException]:
    """Move each task to the state that is reported of it, if it is the caller's to move.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits.
    reports : mapping of UUID to TaskUpdateRequest
        By task.
    caller : Caller
        As for :func:`report`.
    may_enter : RoomAccess
        To whom else it is told that there are such tasks.
    settings : JobLibSettings
        The host's.

    Returns
    -------
    list of Reported or ProblemException
        What :func:`report` would have returned or raised for each.
    """
    unheard = await _lock(session, reports, caller, settings)
    moved: dict[UUID, TaskResponse] = {}
    for status in {report.status: None for report in reports.values()}:
        alike = {i: r for i, r in reports.items() if r.status is status}
        rows = await _move(session, status, alike, caller, settings)
        views = await read_changed(session, rows, settings)
        moved |= {task.id: task for task in views}
    if unheard:
        await workers.keep_alive(session, unheard)
    standing: dict[UUID, Row[Any]] = {}
    if unmoved := reports.keys() - moved.keys():
        # after the writes, so that it is what stands, on any database
        found = await execute(
            session,
            seen(settings.queue_position_max)
            .add_columns(
                _entitled(caller, TaskStatus.COMPLETED).label("entitled"),
                _entitled(caller, TaskStatus.CANCELLED).label("entitled_to_cancel"),
                TASK.c.claim_key,
            )
            .where(TASK.c.id.in_(unmoved)),
        )
        standing = {row.id: row for row in found}
    outcomes: list[Reported | ProblemException] = []
    for task_id, request in reports.items():
        if task_id in moved:
            outcomes.append(Reported(moved[task_id], changed=True))
            continue
        cancel = request.status is TaskStatus.CANCELLED
        try:
            row = standing.get(task_id)
            entitled = row and (row.entitled_to_cancel if cancel else row.entitled)
            if row is None or not (
                entitled or await permits(may_enter, session, caller, row.room_id)
            ):
                raise not_found(task_id)
            stands = _explain(row, bool(entitled), request, None)
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


def _entitled(caller: Caller, status: TaskStatus) -> ColumnElement[bool]:
    return _may_report(caller.is_superuser, status, caller.id, caller.id)


def _explain(
    row: Row[Any], entitled: bool, request: TaskUpdateRequest, key: str | None
) -> TaskResponse:
    task_id = row.id
    current = request.attempt is None or row.attempt == request.attempt
    internal = row.worker_id is None and request.status in DELIVERED
    unstarted = internal and row.status is TaskStatus.CLAIMED
    taken = (request.status is TaskStatus.RUNNING or internal) and (
        key is not None and (row.claim_key not in (None, NO_KEY, key) or unstarted)
    )
    repeated = row.status == request.status and request.status in REPORTABLE
    fenced_out = not current or (request.attempt is not None and row.status not in HELD)
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
        f"a {row.status.value} task can't become {request.status.value}",
        task_status=row.status.value,
    )


def _lease_lost(row: Row[Any]) -> ProblemException:
    return LeaseLost.exception(
        f"task {row.id} is {row.status.value} in attempt {row.attempt}, "
        "and not under this lease",
        task_status=row.status.value,
        attempt=row.attempt,
    )


async def _find(
    session: AsyncSession,
    task_id: UUID,
    entitled: ColumnElement[bool],
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
) -> Row[Any]:
    found = await execute(
        session,
        seen(settings.queue_position_max)
        .add_columns(
            entitled.label("entitled"),
            TASK.c.claim_key,
            workers.unheard(TASK.c.worker_id),
        )
        .where(TASK.c.id == task_id),
        workers.unheard_since(caller, settings),
    )
    row = found.one_or_none()
    if row is None or not (
        row.entitled or await permits(may_enter, session, caller, row.room_id)
    ):
        raise not_found(task_id)
    return row


async def retry(
    session: AsyncSession,
    task_id: UUID,
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
) -> TaskResponse:
    """Set a terminal task going again, with all its attempts before it.

    Raises
    ------
    ProblemException
        ``task-not-found``, ``forbidden``, ``invalid-task-transition``, or
        ``job-not-found`` when its job is gone.
    """
    task = await _find(
        session, task_id, _may_retry(caller), caller, may_enter, settings
    )
    if not task.entitled:
        raise Forbidden.exception(f"task {task_id} is not yours to retry")
    # locked, so that no soft-deletion of the job comes in between; where nothing is
    # locked, what was read here may be over by the time of the write
    found = await execute(
        session,
        select(JOB.c.room_id)
        .join(TASK, TASK.c.job_id == JOB.c.id)
        .where(TASK.c.id == task_id)
        .with_for_update(read=True, key_share=True, of=JOB),
    )
    internal = found.scalar_one() == INTERNAL_ROOM
    seconds = settings.internal_redispatch_seconds
    reborn = born_claimed(seconds) if internal else {}
    least = literal(next_order(), TASK.c.queue_order.type)
    raised = await execute(
        session,
        update(TASK)
        .where(
            TASK.c.id == task_id, in_states(TERMINAL), of_job(JOB.c.deleted).is_(False)
        )
        .values(
            {
                **back_in_queue(),
                TASK.c.queue_order: end_of_queue(least, TASK.c.priority),
                TASK.c.queued_at: now(),
                TASK.c.failed_attempts: 0,
                TASK.c.completed_at: None,
                TASK.c.result: None,
                # or each retry would make it longer
                TASK.c.errors: case(
                    (
                        TASK.c.attempt == task.attempt,
                        "\n".join(last_errors(task)) or None,
                    ),
                    else_=TASK.c.errors,
                ),
                **reborn,
            }
        )
        .returning(TASK.c.queue_order, *VIEW),
    )
    rows = raised.all()
    again = await read_changed(session, rows, settings)
    if again:
        order_taken(rows[0].queue_order, task.priority)
        return again[0]
    if await session.scalar(select(of_job(JOB.c.deleted)).where(TASK.c.id == task_id)):
        raise JobNotFound.exception("job not found: the task's job is gone")
    raise InvalidTaskTransition.exception("only a terminal task can be tried again")


def _may_retry(caller: Caller) -> ColumnElement[bool]:
    return true() if caller.is_superuser else TASK.c.created_by_id == caller.id
