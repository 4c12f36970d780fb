"""Workers: who they are, whether they live, and what goes when they go."""

import inspect
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Float,
    Row,
    Select,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate

from zndraw_joblib.database import execute, now, number, scalar
from zndraw_joblib.exceptions import Forbidden, InvalidRequest, QuotaExceeded, WorkerNotFound
from zndraw_joblib.lifecycle import FullName, WorkerState
from zndraw_joblib.models import JOB, LINK, PROVIDER, TASK, WORKER, alive_within, seen_from, served
from zndraw_joblib.paging import Listing, Page, paginate
from zndraw_joblib.settings import JobLibSettings

# Ids that one statement names: PostgreSQL takes 32,767 parameters at most.
CHUNK = 1000


@dataclass(frozen=True)
class Caller:
    """The user behind a request.

    Plain values, read once: a committed session would load an entity's again.
    """

    id: UUID
    is_superuser: bool


class Action(NamedTuple):
    """What a user is about to do in a room.

    Parameters
    ----------
    kind : {"read", "submit", "register"}
        To retry a task is to submit it. Who withdraws something, or reports on a task,
        does so as its owner.
    category : str or None
        Of the job or provider; None to read.
    """

    kind: Literal["read", "submit", "register"]
    category: str | None = None


READ = Action("read")

#: ``await access(session, caller, room_id, action)``: whether a user may do that there.
#: One without the last parameter is asked the same for every action.
RoomAccess = Callable[..., Awaitable[bool]]


async def permits(
    access: RoomAccess, session: AsyncSession, caller: Caller, room_id: str, action: Action = READ
) -> bool:
    """Ask the host whether a user may do something in a room."""
    if len(inspect.signature(access).parameters) == 3:
        return await access(session, caller, room_id)
    return await access(session, caller, room_id, action)


@dataclass
class Removed:
    """What went with removed workers.

    Attributes
    ----------
    worker_ids : sequence of UUID
        The workers.
    job_ids : set of UUID
        The jobs that they served.
    job_rooms : set of str
        The rooms of these jobs.
    providers : list of FullName
        The providers that they served.
    """

    worker_ids: Sequence[UUID] = ()
    job_ids: set[UUID] = field(default_factory=set)
    job_rooms: set[str] = field(default_factory=set)
    providers: list[FullName] = field(default_factory=list)


async def create(session: AsyncSession, user_id: UUID, settings: JobLibSettings) -> Row[Any]:
    """Insert a worker of ``user_id``.

    Raises
    ------
    ProblemException
        ``quota-exceeded`` when the user has too many.
    """
    most = settings.max_workers_per_user
    theirs = (
        select(literal_column("1"))
        .where(WORKER.c.user_id == user_id)
        .limit(number(most))
        .subquery()
    )
    few = select(func.count()).select_from(theirs).scalar_subquery() < number(most)
    created = await execute(
        session,
        insert(WORKER)
        .from_select(["user_id"], select(literal(user_id, WORKER.c.user_id.type)).where(few))
        .returning(WORKER.c.id, WORKER.c.last_heartbeat, WORKER.c.state),
    )
    row = created.one_or_none()
    if row is None:
        raise QuotaExceeded.exception(
            f"workers are limited to {most} for each user",
            # those that are lost go by then
            headers={"Retry-After": f"{settings.worker_timeout_seconds:.0f}"},
        )
    return row


_THEIRS = WORKER.c.user_id == bindparam("owner")
TOUCHING = (
    update(WORKER)
    .where(
        WORKER.c.id == bindparam("touched"), or_(_THEIRS, bindparam("commands", type_=Boolean()))
    )
    .values(
        # a superuser's word is no heartbeat of another's worker
        last_heartbeat=case((_THEIRS, now()), else_=WORKER.c.last_heartbeat),
        state=func.coalesce(bindparam("new_state", type_=WORKER.c.state.type), WORKER.c.state),
    )
    .returning(WORKER.c.id, WORKER.c.last_heartbeat, WORKER.c.state)
)


async def touch(
    session: AsyncSession,
    worker_id: UUID,
    caller: Caller,
    statement: ReturningUpdate[Any] = TOUCHING,
    *,
    state: WorkerState | None = None,
    **names: Any,
) -> Row[Any]:
    """Record a heartbeat; the worker's row stays locked until the commit.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits.
    worker_id : UUID
        The worker.
    caller : Caller
        Its owner; a superuser may set the state of another's.
    statement : ReturningUpdate
        :data:`TOUCHING`, with what else it is to return.
    state : WorkerState, optional
        What the worker is to be from now on.
    **names : Any
        Parameters of the statement.

    Raises
    ------
    ProblemException
        ``worker-not-found``, or ``forbidden`` for another user's worker.
    """
    row = await _touch(session, worker_id, caller, statement, state, **names)
    if row is None:
        await _explain(session, worker_id)
        raise Forbidden.exception(f"worker {worker_id} belongs to another user")
    return row


async def _touch(
    session: AsyncSession,
    worker_id: UUID,
    caller: Caller,
    statement: ReturningUpdate[Any] = TOUCHING,
    state: WorkerState | None = None,
    **names: Any,
) -> Row[Any] | None:
    touched = await execute(
        session,
        statement,
        {
            "touched": worker_id,
            "owner": caller.id,
            "commands": caller.is_superuser and state is not None,
            "new_state": state and state.value,
            **names,
        },
    )
    return touched.one_or_none()


def checked(row: Row[Any] | None, worker_id: UUID, caller: Caller) -> Row[Any]:
    """Return a worker's row, which has its ``user_id``, if it is the caller's.

    Raises
    ------
    ProblemException
        ``worker-not-found``, or ``forbidden`` for another user's worker.
    """
    if row is None:
        raise WorkerNotFound.exception(f"worker {worker_id} not found")
    if row.user_id != caller.id:
        raise Forbidden.exception(f"worker {worker_id} belongs to another user")
    return row


async def mine(
    session: AsyncSession, worker_id: UUID | None, caller: Caller, settings: JobLibSettings
) -> UUID:
    """Return a worker to register with: the caller's, alive as of now, or a new one.

    Raises
    ------
    ProblemException
        ``worker-not-found``, also for another user's; ``quota-exceeded``.
    """
    if worker_id is None:
        made: UUID = (await create(session, caller.id, settings)).id
        return made
    if await _touch(session, worker_id, caller) is None:
        raise WorkerNotFound.exception(f"worker {worker_id} not found among yours")
    return worker_id


def check_length(name: FullName) -> None:
    """Refuse a full name that is too long for an index.

    Raises
    ------
    ProblemException
        ``invalid-request``.
    """
    try:
        name.bounded()
    except ValueError as exc:
        raise InvalidRequest.exception(
            f"room, category and name {exc}", errors=[{"pointer": "/body/name", "detail": str(exc)}]
        ) from None


async def check_quota(session: AsyncSession, rows: Select[Any], most: int, what: str) -> None:
    """Count what a user has, the new one included.

    Raises
    ------
    ProblemException
        ``quota-exceeded`` when there is more than ``most``.
    """
    some = rows.limit(number(most + 1)).subquery()
    counted = (await execute(session, select(func.count()).select_from(some))).scalars()
    if counted.one() > most:
        raise QuotaExceeded.exception(
            f"{what} are limited to {most} for each user", headers={"Retry-After": "60"}
        )


def fresh(settings: JobLibSettings) -> float:
    """Return the seconds after a sign of life in which no other one is written.

    Parameters
    ----------
    settings : JobLibSettings
        The host's: it is a sixtieth of ``worker_timeout_seconds``.
    """
    return settings.worker_timeout_seconds / 60


def silent() -> ColumnElement[bool]:
    """Return whether a worker is the caller's and was not heard just now.

    The parameters are those of :func:`unheard_since`.
    """
    long_ago = now(bindparam("since", type_=Float()))
    return and_(WORKER.c.user_id == bindparam("owner"), WORKER.c.last_heartbeat < long_ago)


def unheard(worker_id: Any) -> ColumnElement[bool]:
    """Return the column ``unheard``: :func:`silent`, of the worker with that id.

    A statement that returns it needs :func:`keep_alive` after it where it is true.
    """
    one = select(silent()).where(WORKER.c.id == worker_id)
    return one.scalar_subquery().label("unheard")


def unheard_since(caller: Caller, settings: JobLibSettings) -> dict[str, Any]:
    """Return the parameters of :func:`silent`."""
    return {"owner": caller.id, "since": -fresh(settings)}


def due_after(settings: JobLibSettings) -> dict[str, Any]:
    """Return the parameter of :func:`heartbeat_due`.

    A heartbeat is due a sixtieth of ``worker_timeout_seconds`` after the last one.
    """
    return {"due_after": -settings.worker_timeout_seconds / 60}


def heartbeat_due(worker_id: Any) -> ColumnElement[bool]:
    """Return the column ``heartbeat_due`` of the worker with that id.

    A statement that returns it needs :func:`keep_alive` after it where it is true.
    """
    late = WORKER.c.last_heartbeat < now(bindparam("due_after", type_=Float()))
    one = select(late).where(WORKER.c.id == worker_id)
    return one.scalar_subquery().label("heartbeat_due")


_KEEPING_ALIVE = (
    update(WORKER)
    .where(
        WORKER.c.id.in_(
            select(WORKER.c.id)
            .where(WORKER.c.id.in_(bindparam("workers", expanding=True)))
            .order_by(WORKER.c.id)
            .with_for_update(skip_locked=True)
        )
    )
    .values({WORKER.c.last_heartbeat: now()})
)


async def keep_alive(session: AsyncSession, worker_ids: Collection[UUID]) -> None:
    """Record a heartbeat of many workers; what is in use is left to the next one."""
    ids = list(worker_ids)
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        await execute(session, _KEEPING_ALIVE, {"workers": chunk})


async def keep_alive_at(
    session: AsyncSession, task_id: UUID, caller: Caller, settings: JobLibSettings
) -> None:
    """Record that the caller's worker at a task is alive, if it was not heard just now."""
    await execute(session, _AT_TASK, {"task": task_id, **unheard_since(caller, settings)})


def _heard(*which: ColumnElement[bool]) -> Update:
    free = select(WORKER.c.id).where(*which).order_by(WORKER.c.id).with_for_update(skip_locked=True)
    return update(WORKER).where(WORKER.c.id.in_(free)).values({WORKER.c.last_heartbeat: now()})


_AT_TASK = _heard(
    WORKER.c.id == select(TASK.c.worker_id).where(TASK.c.id == bindparam("task")).scalar_subquery(),
    silent(),
)


def _may_command(caller: Caller) -> ColumnElement[bool]:
    return true() if caller.is_superuser else WORKER.c.user_id == caller.id


async def _explain(session: AsyncSession, worker_id: UUID) -> None:
    known = await scalar(session, select(WORKER.c.id).where(WORKER.c.id == worker_id))
    if known is None:
        raise WorkerNotFound.exception(f"worker {worker_id} not found")


async def retire(session: AsyncSession, worker_id: UUID, caller: Caller) -> Removed:
    """Remove one worker at its owner's or a superuser's word.

    Raises
    ------
    ProblemException
        ``worker-not-found``, or ``forbidden`` for another user's worker.
    """
    one = select(WORKER.c.id).where(WORKER.c.id == worker_id, _may_command(caller))
    worker_ids = await lock(session, one.with_for_update())
    if not worker_ids:
        await _explain(session, worker_id)
        raise Forbidden.exception(f"worker {worker_id} belongs to another user")
    return await remove(session, worker_ids)


async def lock(session: AsyncSession, chosen: Select[tuple[UUID]]) -> Sequence[UUID]:
    """Lock the chosen workers until the commit, and return their ids.

    Until then no claim, heartbeat or registration of theirs can commit, on any database:
    it is a write. Chosen ``FOR UPDATE``, they are chosen as they are then: a heartbeat
    that came first wins.
    """
    locked = (
        await execute(
            session,
            update(WORKER)
            .where(WORKER.c.id.in_(chosen))
            .values(state=WORKER.c.state)
            .returning(WORKER.c.id),
        )
    ).scalars()
    return locked.all()


async def remove(session: AsyncSession, worker_ids: Sequence[UUID]) -> Removed:
    """Remove workers that are locked, with their links and providers.

    Their tasks are left to :func:`zndraw_joblib.attempts.lose`.
    """
    if not worker_ids:
        return Removed()
    room = select(JOB.c.room_id).where(JOB.c.id == LINK.c.job_id).correlate(LINK)
    links = await execute(
        session,
        delete(LINK)
        .where(LINK.c.worker_id.in_(worker_ids))
        .returning(LINK.c.job_id, room.scalar_subquery().label("room_id")),
    )
    served = links.all()
    providers = await execute(
        session,
        delete(PROVIDER)
        .where(PROVIDER.c.worker_id.in_(worker_ids))
        .returning(PROVIDER.c.room_id, PROVIDER.c.category, PROVIDER.c.name),
    )
    withdrawn = [FullName(*row) for row in providers]
    await execute(session, delete(WORKER).where(WORKER.c.id.in_(worker_ids)))
    return Removed(
        worker_ids, {row.job_id for row in served}, {row.room_id for row in served}, withdrawn
    )


async def expel(session: AsyncSession, user_id: UUID, room_id: str) -> Removed:
    """Unlink a user's workers from a room's jobs, and withdraw their providers there.

    Returns
    -------
    Removed
        Its ``worker_ids`` are those that were unlinked: they stay.
    """
    theirs = select(WORKER.c.id).where(WORKER.c.user_id == user_id)
    here = select(JOB.c.id).where(JOB.c.room_id == room_id)
    links = await execute(
        session,
        delete(LINK)
        .where(LINK.c.worker_id.in_(theirs), LINK.c.job_id.in_(here))
        .returning(LINK.c.worker_id, LINK.c.job_id),
    )
    unlinked = links.all()
    providers = await execute(
        session,
        delete(PROVIDER)
        .where(PROVIDER.c.user_id == user_id, PROVIDER.c.room_id == room_id)
        .returning(PROVIDER.c.room_id, PROVIDER.c.category, PROVIDER.c.name),
    )
    return Removed(
        list({link.worker_id for link in unlinked}),
        {link.job_id for link in unlinked},
        {room_id} if unlinked else set(),
        [FullName(*row) for row in providers],
    )


async def correct_moments(session: AsyncSession) -> int:
    """Take a heartbeat of the future for one of now; return how many there were.

    They were written before the database's clock was set back.
    """
    corrected = (
        await execute(
            session,
            update(WORKER)
            .where(WORKER.c.last_heartbeat > now(1))
            .values(last_heartbeat=now())
            .returning(WORKER.c.id),
        )
    ).scalars()
    return len(corrected.all())


@lru_cache(maxsize=8)
def _summaries(worker_timeout: float) -> Select[Any]:
    job_count = (
        select(func.count())
        .select_from(LINK)
        .where(LINK.c.worker_id == WORKER.c.id)
        .scalar_subquery()
    )
    return select(
        WORKER.c.id,
        WORKER.c.last_heartbeat,
        WORKER.c.state,
        WORKER.c.created_at,
        job_count.label("job_count"),
        alive_within(worker_timeout).label("alive"),
    )


async def list_all(session: AsyncSession, page: Page, settings: JobLibSettings) -> Listing:
    """Return a page of all workers."""
    statement = _summaries(settings.worker_timeout_seconds)
    return await paginate(session, statement, WORKER, page, {})


@lru_cache(maxsize=8)
def _serving(worker_timeout: float) -> Select[Any]:
    serving = select(LINK.c.worker_id).join(JOB, JOB.c.id == LINK.c.job_id).where(served())
    return _summaries(worker_timeout).where(WORKER.c.id.in_(serving))


async def list_serving(
    session: AsyncSession, room: str, page: Page, settings: JobLibSettings
) -> Listing:
    """Return a page of the workers of the jobs that ``room`` sees."""
    statement = _serving(settings.worker_timeout_seconds)
    return await paginate(session, statement, WORKER, page, seen_from(room))
