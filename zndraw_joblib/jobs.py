"""Jobs: registered by workers, seen by rooms, gone when nobody serves them."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    String,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    exists,
    func,
    or_,
    select,
    true,
    update,
)

# ON CONFLICT reads the same in PostgreSQL and SQLite, and SQLAlchemy renders this one
# construct for both.
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from zndraw_joblib.database import execute, number, scalar
from zndraw_joblib.exceptions import MAX_ERRORS, JobNotFound, NoWorkersAvailable, SchemaConflict
from zndraw_joblib.lifecycle import INTERNAL_ROOM, FullName, split_full_name, visible_rooms
from zndraw_joblib.models import (
    JOB,
    LINK,
    TASK,
    WORKER,
    alive_within,
    held,
    queued,
    seen_from,
    served,
)
from zndraw_joblib.paging import Listing, Page, paginate
from zndraw_joblib.schemas import JobPolicy, JobResponse, JobSummary, JsonObject, equal_json
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.validation import differences
from zndraw_joblib.workers import Caller, check_length, check_quota


class Registration(NamedTuple):
    """A job as it stands after its registration.

    Attributes
    ----------
    job_id : UUID
        The job.
    created : bool
        Whether it is new, or came back.
    joined : bool
        Whether the worker is one of its workers only now.
    policy_kept : bool
        Whether another policy was asked for, and the job's stays.
    """

    job_id: UUID
    created: bool
    joined: bool
    policy_kept: bool


def find(room: str, full_name: str) -> FullName:
    """Split a job's full name, if ``room`` may see such a job at all.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name.
    """
    try:
        name = split_full_name(full_name)
    except ValueError as exc:
        raise JobNotFound.exception(f"job not found: {exc}") from None
    if name.room not in visible_rooms(room):
        raise not_found(room, full_name)
    return name


def not_found(room: str, full_name: str) -> Exception:
    """Return the problem that says that ``room`` sees no such job."""
    return JobNotFound.exception(f"job not found: room {room!r} sees no {full_name!r}")


def named(name: FullName) -> ColumnElement[bool]:
    """Return the condition that picks a job by its full name."""
    return and_(
        JOB.c.room_id == name.room, JOB.c.category == name.category, JOB.c.name == name.name
    )


#: Finds a live job by what :func:`find` makes of its full name; its schema as text.
SERVED = select(JOB.c.id, cast(JOB.c.schema, Text).label("schema")).where(
    JOB.c.room_id == bindparam("room"),
    JOB.c.category == bindparam("category"),
    JOB.c.name == bindparam("name"),
    JOB.c.deleted.is_(False),
)


def found(row: Row[Any] | None, room: str, full_name: str) -> Row[Any]:
    """Return the row if there is one.

    Raises
    ------
    ProblemException
        ``job-not-found``.
    """
    if row is None:
        raise not_found(room, full_name)
    return row


async def register(
    session: AsyncSession,
    name: FullName,
    schema: JsonObject,
    policy: dict[str, Any],
    worker_id: UUID,
    caller: Caller,
    settings: JobLibSettings,
) -> Registration:
    """Make a job, bring it back, or find it there; link the worker to it.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits.
    name : FullName
        The job's name.
    schema : dict
        A JSON Schema, checked before.
    policy : dict
        The fields of :class:`JobPolicy` that the request set; others stay. All of them
        stay while a live worker of another user serves the job, unless the caller is a
        superuser.
    worker_id : UUID
        The caller's.
    caller : Caller
        Who registers.
    settings : JobLibSettings
        The host's.

    Raises
    ------
    ProblemException
        ``schema-conflict``, ``quota-exceeded``, or ``invalid-request`` when the name is
        too long.
    """
    check_length(name)
    new_id = uuid7()
    fresh = upsert(JOB).values(
        id=new_id,
        room_id=name.room,
        category=name.category,
        name=name.name,
        schema=schema,
        deleted=False,
        **(JobPolicy().model_dump() | policy),
    )
    arrived = await scalar(
        session,
        fresh.on_conflict_do_update(
            index_elements=[JOB.c.room_id, JOB.c.category, JOB.c.name],
            set_={"schema": fresh.excluded.schema, "deleted": False}
            | {field: fresh.excluded[field] for field in JobPolicy.model_fields},
            where=JOB.c.deleted.is_(True),
        ).returning(JOB.c.id),
    )
    job_id = arrived or await _same(session, name, schema)
    kept = False
    if policy and arrived is None:
        kept = not await _set_policy(session, job_id, policy, caller, settings)
    joined = await scalar(
        session,
        upsert(LINK)
        .values(worker_id=worker_id, job_id=job_id)
        .on_conflict_do_nothing()
        .returning(LINK.c.job_id),
    )
    if arrived is not None:
        theirs = (
            select(LINK.c.job_id)
            .join(WORKER, WORKER.c.id == LINK.c.worker_id)
            .where(WORKER.c.user_id == caller.id)
            .distinct()
        )
        await check_quota(session, theirs, settings.max_jobs_per_user, "jobs")
    return Registration(job_id, arrived is not None, bool(joined), kept)


async def _same(session: AsyncSession, name: FullName, schema: JsonObject) -> UUID:
    # the upsert locked the row: what is read here stands until the commit
    rows = await execute(session, select(JOB.c.id, JOB.c.schema).where(named(name)))
    job = rows.one()
    if not equal_json(job.schema, schema):
        where = ", ".join(islice(differences(job.schema, schema), MAX_ERRORS))
        raise SchemaConflict.exception(
            f"schema mismatch: job {name} exists with another schema; they differ at {where}"
        )
    return UUID(str(job.id))


async def _set_policy(
    session: AsyncSession,
    job_id: UUID,
    policy: dict[str, Any],
    caller: Caller,
    settings: JobLibSettings,
) -> bool:
    """Set a job's policy where it is the caller's to set; return whether it is so now."""
    others = (
        exists()
        .where(LINK.c.job_id == JOB.c.id, WORKER.c.id == LINK.c.worker_id)
        .where(WORKER.c.user_id != caller.id)
        .where(alive_within(settings.worker_timeout_seconds))
    )
    same = and_(*(JOB.c[field].is_not_distinct_from(policy[field]) for field in policy))
    changed = await scalar(
        session,
        update(JOB)
        .where(JOB.c.id == job_id, true() if caller.is_superuser else or_(same, ~others))
        .values(**policy)
        .returning(JOB.c.id),
    )
    return changed is not None


async def admit(
    session: AsyncSession, name: FullName, caller: Caller, settings: JobLibSettings
) -> None:
    """Refuse tasks of a job, the new ones inserted, that the host takes none of.

    Raises
    ------
    ProblemException
        ``no-workers-available`` when none of the job's workers is alive and
        ``accept_without_workers`` is false; ``quota-exceeded`` when too many
        ``@internal`` tasks of this user are under way.
    """
    if name.room == INTERNAL_ROOM:
        theirs = select(TASK.c.id).where(
            held(), TASK.c.worker_id.is_(None), TASK.c.created_by_id == caller.id
        )
        most = settings.max_internal_tasks_per_user
        await check_quota(session, theirs, most, "@internal tasks")
    elif not settings.accept_without_workers:
        alive = (
            select(LINK.c.job_id)
            .join(WORKER, WORKER.c.id == LINK.c.worker_id)
            .join(JOB, JOB.c.id == LINK.c.job_id)
            .where(named(name), alive_within(settings.worker_timeout_seconds))
            .limit(number(1))
        )
        if await scalar(session, alive) is None:
            raise NoWorkersAvailable.exception(f"no worker of {name} is alive")


async def install(session: AsyncSession, name: FullName, schema: JsonObject) -> None:
    """Write an ``@internal`` job as the server's own code defines it."""
    fresh = upsert(JOB).values(
        room_id=name.room, category=name.category, name=name.name, schema=schema, deleted=False
    )
    await execute(
        session,
        fresh.on_conflict_do_update(
            index_elements=[JOB.c.room_id, JOB.c.category, JOB.c.name],
            set_={"schema": fresh.excluded.schema, "deleted": False},
        ),
    )


async def delete_idle(session: AsyncSession, chosen: ColumnElement[bool]) -> list[FullName]:
    """Soft-delete those of the chosen jobs that nobody serves and no task waits for.

    Returns
    -------
    list of FullName
        The jobs that went.
    """
    # Locked first, all of them, and judged by a second statement: only that one sees
    # the links and tasks of whoever held the rows until now, and that the other of two
    # workers that go at once took its link with it.
    locked = (
        await execute(
            session,
            select(JOB.c.id)
            .where(chosen, JOB.c.deleted.is_(False), JOB.c.room_id != INTERNAL_ROOM)
            .order_by(JOB.c.id)
            .with_for_update(),
        )
    ).scalars()
    deleted = await execute(
        session,
        update(JOB)
        .where(JOB.c.id.in_(locked.all()), ~wanted())
        .values(deleted=True)
        .returning(JOB.c.room_id, JOB.c.category, JOB.c.name),
    )
    return [FullName(*row) for row in deleted]


def idle() -> Select[tuple[UUID]]:
    """Return the jobs that nobody serves and no task waits for."""
    live = JOB.c.deleted.is_(False)
    return select(JOB.c.id).where(live, JOB.c.room_id != INTERNAL_ROOM, ~wanted())


def deleted(after: UUID) -> Select[tuple[UUID]]:
    """Return the deleted jobs behind one, in the order of their ids."""
    behind = select(JOB.c.id).where(JOB.c.deleted.is_(True), JOB.c.id > after)
    return behind.order_by(JOB.c.id)


def taskless(job_ids: Sequence[UUID]) -> Select[tuple[UUID]]:
    """Return which of some jobs are deleted and have no tasks."""
    return select(JOB.c.id).where(
        JOB.c.id.in_(job_ids), JOB.c.deleted.is_(True), ~exists().where(TASK.c.job_id == JOB.c.id)
    )


async def purge(session: AsyncSession, chosen: Select[tuple[UUID]]) -> int:
    """Delete the chosen jobs for good; return how many there were."""
    # judged again once they are locked: a retry may have come in between
    locked = ((await execute(session, chosen)).scalars()).all()
    purged = (
        await execute(
            session, delete(JOB).where(JOB.c.id.in_(taskless(locked))).returning(JOB.c.id)
        )
    ).scalars()
    return len(purged.all())


def wanted() -> ColumnElement[bool]:
    """Return the condition under which a job is served, or a task waits for it."""
    return or_(
        exists().where(LINK.c.job_id == JOB.c.id),
        _first(TASK.c.queue_order, queued()).is_not(None),
        _first(TASK.c.available_at, TASK.c.available_at.is_not(None)).is_not(None),
    )


def _first(column: Any, waiting: ColumnElement[bool]) -> ColumnElement[Any]:
    # not EXISTS: where many tasks wait for other jobs, PostgreSQL would look for one of
    # this job by reading the whole table
    first = select(func.min(column)).where(TASK.c.job_id == JOB.c.id, waiting)
    return first.correlate(JOB).scalar_subquery()


def _view(worker_timeout: float, *schema: ColumnElement[Any]) -> Select[Any]:
    links = (
        select(func.aggregate_strings(cast(LINK.c.worker_id, String), ","))
        .where(LINK.c.job_id == JOB.c.id)
        .scalar_subquery()
    )
    alive = (
        select(func.count())
        .select_from(LINK)
        .join(WORKER, WORKER.c.id == LINK.c.worker_id)
        .where(LINK.c.job_id == JOB.c.id, alive_within(worker_timeout))
        .scalar_subquery()
    )
    return select(
        JOB.c.id,
        JOB.c.room_id,
        JOB.c.category,
        JOB.c.name,
        *schema,
        JOB.c.created_at,
        JOB.c.max_attempts,
        JOB.c.retry_delay_seconds,
        JOB.c.timeout_seconds,
        JOB.c.start_timeout_seconds,
        links.label("workers"),
        alive.label("workers_alive"),
    )


def _fields(row: Row[Any]) -> dict[str, Any]:
    workers = [UUID(worker) for worker in (row.workers or "").split(",") if worker]
    full_name = str(FullName(row.room_id, row.category, row.name))
    return {**row._mapping, "workers": sorted(workers), "full_name": full_name}


async def read(
    session: AsyncSession, job_id: UUID, worker_timeout: float, **registered: Any
) -> JobResponse:
    """Return a job, with what is told of its registration just now."""
    rows = await execute(session, _view(worker_timeout, JOB.c.schema).where(JOB.c.id == job_id))
    return JobResponse(**_fields(rows.one()), **registered)


async def read_named(
    session: AsyncSession, room: str, full_name: str, worker_timeout: float
) -> JobResponse:
    """Return a job that ``room`` sees.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name.
    """
    name = find(room, full_name)
    rows = await execute(
        session, _view(worker_timeout, JOB.c.schema).where(named(name), JOB.c.deleted.is_(False))
    )
    return JobResponse(**_fields(found(rows.one_or_none(), room, full_name)))


@lru_cache(maxsize=8)
def _listed(worker_timeout: float) -> Select[Any]:
    return _view(worker_timeout).where(served())


async def list_visible(
    session: AsyncSession, room: str, page: Page, worker_timeout: float
) -> tuple[list[JobSummary], Listing]:
    """Return a page of the jobs that ``room`` sees."""
    statement = _listed(worker_timeout)
    listing = await paginate(session, statement, JOB, page, seen_from(room))
    return [JobSummary(**_fields(row)) for row in listing.rows], listing
