"""Workers: who they are, whether they live, and what goes when they go."""

import inspect
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate

from zndraw_joblib import exceptions
from zndraw_joblib.database import execute, now, number, scalar, scalars
from zndraw_joblib.lifecycle import SPECIAL_ROOMS, FullName, WorkerState
from zndraw_joblib.models import ALIVE, JOB, LINK, PROVIDER, WORKER
from zndraw_joblib.schemas import WorkerDescription
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
    kind : {"read", "submit", "register", "operate"}
        To retry a task is to submit it. Who withdraws something, or reports on a task,
        does so as its owner. To operate is to pause jobs, and to cancel, retry and delete
        what others submitted.
    category : str or None
        Of the job or provider; None to read and to operate.
    """

    kind: Literal["read", "submit", "register", "operate"]
    category: str | None = None


READ, OPERATE = Action("read"), Action("operate")

#: ``await access(session, caller, room_id, action)``: whether a user may do that there.
#: One without the last parameter is asked the same for every action; there, and in rooms
#: that are everybody's, superusers alone operate.
RoomAccess = Callable[..., Awaitable[bool]]


async def permits(
    access: RoomAccess, session: AsyncSession, caller: Caller, room_id: str, action: Action = READ
) -> bool:
    """Ask the host whether a user may do something in a room."""
    knows_actions = len(inspect.signature(access).parameters) > 3
    host_decides = knows_actions and room_id not in SPECIAL_ROOMS
    if action.kind == "operate" and not (caller.is_superuser or host_decides):
        return False
    if not knows_actions:
        return await access(session, caller, room_id)
    return await access(session, caller, room_id, action)


@dataclass
class Removed:
    """What went with workers, or with a user who was expelled.

    Attributes
    ----------
    unlinked : set of UUID
        The workers that served a job.
    job_ids : set of UUID
        The jobs that they served.
    job_rooms : set of str
        The rooms of these jobs.
    providers : list of FullName
        The providers that they served.
    """

    unlinked: set[UUID] = field(default_factory=set)
    job_ids: set[UUID] = field(default_factory=set)
    job_rooms: set[str] = field(default_factory=set)
    providers: list[FullName] = field(default_factory=list)


async def create(
    session: AsyncSession,
    user_id: UUID,
    settings: JobLibSettings,
    description: WorkerDescription | None = None,
) -> sa.Row[Any]:
    """Insert a worker of ``user_id``.

    Raises
    ------
    ProblemException
        ``quota-exceeded`` when the user has too many.
    """
    inserting = sa.insert(WORKER).values(user_id=user_id, **_described(description))
    created = await execute(
        session, inserting.returning(WORKER.c.id, WORKER.c.last_heartbeat, WORKER.c.state)
    )
    theirs = sa.select(WORKER.c.id).where(WORKER.c.user_id == user_id)
    await check_quota(session, theirs, settings.max_workers_per_user, "workers")
    return created.one()


def _described(description: WorkerDescription | None) -> dict[str, Any]:
    """Return what is given of a worker's columns."""
    return {} if description is None else description.model_dump(exclude_none=True)


_THEIRS = WORKER.c.user_id == sa.bindparam("owner")
TOUCHING = (
    sa.update(WORKER)
    .where(
        WORKER.c.id == sa.bindparam("touched"),
        sa.or_(_THEIRS, sa.bindparam("commands", type_=sa.Boolean())),
    )
    .values(
        # a superuser's word is no heartbeat of another's worker
        last_heartbeat=sa.case((_THEIRS, now()), else_=WORKER.c.last_heartbeat),
        state=sa.func.coalesce(
            sa.bindparam("new_state", type_=WORKER.c.state.type), WORKER.c.state
        ),
        stuck=sa.func.coalesce(
            sa.bindparam("now_stuck", type_=WORKER.c.stuck.type), WORKER.c.stuck
        ),
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
    stuck: int | None = None,
    **names: Any,
) -> sa.Row[Any]:
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
    stuck : int, optional
        How many of its hands are stuck.
    **names : Any
        Parameters of the statement.

    Raises
    ------
    ProblemException
        ``worker-not-found``, or ``forbidden`` for another user's worker.
    """
    values = {
        "touched": worker_id,
        "owner": caller.id,
        "commands": caller.is_superuser and state is not None,
        "new_state": state and state.value,
        "now_stuck": stuck,
        **names,
    }
    row = (await execute(session, statement, values)).one_or_none()
    if row is None:
        raise await refusal(session, worker_id)
    return row


def not_found(worker_id: UUID) -> Exception:
    """Return the problem that says that there is no such worker."""
    return exceptions.WorkerNotFound.exception(f"worker {worker_id} not found")


def forbidden(worker_id: UUID) -> Exception:
    """Return the problem that says that a worker is not the caller's."""
    return exceptions.Forbidden.exception(f"worker {worker_id} belongs to another user")


async def refusal(session: AsyncSession, worker_id: UUID) -> Exception:
    """Return why a worker was not the caller's to change."""
    known = await scalar(session, sa.select(WORKER.c.id).where(WORKER.c.id == worker_id))
    return not_found(worker_id) if known is None else forbidden(worker_id)


def checked(row: sa.Row[Any] | None, worker_id: UUID, caller: Caller) -> sa.Row[Any]:
    """Return a worker's row, which has its ``user_id``, if it is the caller's."""
    if row is None:
        raise not_found(worker_id)
    if row.user_id != caller.id:
        raise forbidden(worker_id)
    return row


async def mine(
    session: AsyncSession,
    worker_id: UUID | None,
    caller: Caller,
    settings: JobLibSettings,
    description: WorkerDescription | None = None,
) -> UUID:
    """Return a worker to register with: the caller's, alive as of now, or a new one.

    Raises
    ------
    ProblemException
        ``worker-not-found``, also for another user's; ``quota-exceeded``.
    """
    if worker_id is None:
        made: UUID = (await create(session, caller.id, settings, description)).id
        return made
    try:
        await touch(session, worker_id, caller)
    except exceptions.ProblemException:
        raise not_found(worker_id) from None
    if described := _described(description):
        describing = sa.update(WORKER).where(WORKER.c.id == worker_id)
        await execute(session, describing.values(described))
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
        raise exceptions.InvalidRequest.exception(
            f"room, category and name {exc}", errors=[{"pointer": "/body/name", "detail": str(exc)}]
        ) from None


async def check_quota(
    session: AsyncSession, rows: sa.Select[Any], most: int, what: str, retry_after: int = 60
) -> None:
    """Count what a user has, the new one included.

    Raises
    ------
    ProblemException
        ``quota-exceeded`` when there is more than ``most``; its ``Retry-After`` is in seconds.
    """
    some = rows.limit(number(most + 1)).subquery()
    if await scalar(session, sa.select(sa.func.count()).select_from(some)) > most:
        raise exceptions.QuotaExceeded.exception(
            f"{what} are limited to {most} for each user", headers={"Retry-After": str(retry_after)}
        )


def due_after(settings: JobLibSettings) -> dict[str, Any]:
    """Return the parameter of :func:`heartbeat_due`.

    A heartbeat is due a sixtieth of ``worker_timeout_seconds`` after the last one.
    """
    return {"due_after": -settings.worker_timeout_seconds / 60}


def heartbeat_due(worker_id: Any) -> sa.ColumnElement[bool]:
    """Return the column ``heartbeat_due`` of the worker with that id.

    A statement that returns it needs :func:`keep_alive` after it where it is true.
    """
    late = WORKER.c.last_heartbeat < now(sa.bindparam("due_after", type_=sa.Float()))
    one = sa.select(late).where(WORKER.c.id == worker_id)
    return one.scalar_subquery().label("heartbeat_due")


_KEEPING_ALIVE = (
    sa.update(WORKER)
    .where(
        WORKER.c.id.in_(
            sa.select(WORKER.c.id)
            .where(WORKER.c.id.in_(sa.bindparam("workers", expanding=True)))
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


def commanded(worker_id: UUID, caller: Caller) -> sa.Select[tuple[UUID]]:
    """Return a worker, if the caller is its owner or a superuser."""
    theirs = sa.true() if caller.is_superuser else WORKER.c.user_id == caller.id
    return sa.select(WORKER.c.id).where(WORKER.c.id == worker_id, theirs).with_for_update()


def stale(settings: JobLibSettings) -> sa.Select[tuple[UUID]]:
    """Return the workers without a heartbeat for ``worker_timeout_seconds``."""
    return sa.select(WORKER.c.id).where(~ALIVE).params(silence=-settings.worker_timeout_seconds)


async def lock(session: AsyncSession, chosen: sa.Select[tuple[UUID]]) -> Sequence[sa.Row[Any]]:
    """Lock the chosen workers until the commit, and return who they are.

    Until then no claim, heartbeat or registration of theirs can commit, on any database:
    it is a write. Chosen ``FOR UPDATE``, they are chosen as they are then: a heartbeat
    that came first wins.
    """
    locking = sa.update(WORKER).where(WORKER.c.id.in_(chosen)).values(state=WORKER.c.state)
    known = (WORKER.c.id, WORKER.c.name, WORKER.c.info, WORKER.c.last_heartbeat)
    return (await execute(session, locking.returning(*known))).all()


async def remove(session: AsyncSession, worker_ids: Collection[UUID]) -> Removed:
    """Remove workers that are locked, with their links and providers.

    Their tasks are left to :func:`zndraw_joblib.attempts.lose`.
    """
    removed = await _withdraw(
        session, LINK.c.worker_id.in_(worker_ids), PROVIDER.c.worker_id.in_(worker_ids)
    )
    await execute(session, sa.delete(WORKER).where(WORKER.c.id.in_(worker_ids)))
    return removed


async def expel(session: AsyncSession, user_id: UUID, room_id: str) -> Removed:
    """Unlink a user's workers, which stay, from a room's jobs; withdraw their providers there."""
    theirs = sa.select(WORKER.c.id).where(WORKER.c.user_id == user_id)
    here = sa.select(JOB.c.id).where(JOB.c.room_id == room_id)
    return await _withdraw(
        session,
        sa.and_(LINK.c.worker_id.in_(theirs), LINK.c.job_id.in_(here)),
        sa.and_(PROVIDER.c.user_id == user_id, PROVIDER.c.room_id == room_id),
    )


async def _withdraw(
    session: AsyncSession, links: sa.ColumnElement[bool], providers: sa.ColumnElement[bool]
) -> Removed:
    room = sa.select(JOB.c.room_id).where(JOB.c.id == LINK.c.job_id).correlate(LINK)
    unlinking = sa.delete(LINK).where(links)
    unlinked = await execute(
        session,
        unlinking.returning(LINK.c.worker_id, LINK.c.job_id, room.scalar_subquery().label("room")),
    )
    names = (PROVIDER.c.room_id, PROVIDER.c.category, PROVIDER.c.name)
    withdrawn = await execute(session, sa.delete(PROVIDER).where(providers).returning(*names))
    removed = Removed(providers=[FullName(*row) for row in withdrawn])
    for worker_id, job_id, room_id in unlinked:
        removed.unlinked.add(worker_id)
        removed.job_ids.add(job_id)
        removed.job_rooms.add(room_id)
    return removed


async def correct_moments(session: AsyncSession) -> int:
    """Take a heartbeat of the future for one of now; return how many there were.

    They were written before the database's clock was set back.
    """
    correcting = (
        sa.update(WORKER).where(WORKER.c.last_heartbeat > now(1)).values(last_heartbeat=now())
    )
    return len(await scalars(session, correcting.returning(WORKER.c.id)))
