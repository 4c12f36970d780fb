"""Jobs: registered by workers, seen by rooms, gone when nobody serves them."""

import json
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
    exists,
    func,
    or_,
    select,
    update,
)

# ON CONFLICT reads the same in PostgreSQL and SQLite, and SQLAlchemy renders this one
# construct for both.
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from zndraw_joblib.exceptions import (
    JobNotFound,
    SchemaConflict,
)
from zndraw_joblib.models import (
    Job,
    Task,
    Worker,
    WorkerJobLink,
    alive_within,
    queued,
    served_to,
)
from zndraw_joblib.names import INTERNAL_ROOM, FullName, split_full_name, visible_rooms
from zndraw_joblib.paging import Listing, Page, paginate
from zndraw_joblib.schemas import JobPolicy, JobResponse, JobSummary, JsonObject


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
    """

    job_id: UUID
    created: bool
    joined: bool


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
        raise JobNotFound.exception(str(exc)) from None
    if name.room not in visible_rooms(room):
        raise not_found(room, full_name)
    return name


def not_found(room: str, full_name: str) -> Exception:
    """Return the problem that says that ``room`` sees no such job."""
    return JobNotFound.exception(f"room {room!r} sees no job {full_name!r}")


def named(name: FullName) -> ColumnElement[bool]:
    """Return the condition that picks a job by its full name."""
    return and_(
        Job.room_id == name.room, Job.category == name.category, Job.name == name.name
    )


#: Finds a live job by what :func:`find` makes of its full name; its schema as text.
SERVED = select(Job.id, cast(Job.schema_, Text).label("schema")).where(
    Job.room_id == bindparam("room"),
    Job.category == bindparam("category"),
    Job.name == bindparam("name"),
    Job.deleted.is_(False),
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
    worker_id: UUID | None,
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
        The fields of :class:`JobPolicy` that the request set; others stay.
    worker_id : UUID or None
        None for an ``@internal`` job.

    Raises
    ------
    ProblemException
        ``schema-conflict``.
    """
    new_id = uuid7()
    fresh = upsert(Job).values(
        id=new_id,
        room_id=name.room,
        category=name.category,
        name=name.name,
        schema_=schema,
        deleted=False,
        **(JobPolicy().model_dump() | policy),
    )
    arrived = await session.scalar(
        fresh.on_conflict_do_update(
            index_elements=[Job.room_id, Job.category, Job.name],
            set_={"schema": fresh.excluded.schema, "deleted": False}
            | {field: fresh.excluded[field] for field in JobPolicy.model_fields},
            where=Job.deleted.is_(True),
        ).returning(Job.id)
    )
    job_id = arrived or await _join(session, name, schema, policy)
    joined = worker_id is not None and await session.scalar(
        upsert(WorkerJobLink)
        .values(worker_id=worker_id, job_id=job_id)
        .on_conflict_do_nothing()
        .returning(WorkerJobLink.job_id)
    )
    return Registration(job_id, arrived is not None, bool(joined))


async def _join(
    session: AsyncSession, name: FullName, schema: JsonObject, policy: dict[str, Any]
) -> UUID:
    # the upsert locked the row: what is read here stands until the commit
    rows = await session.execute(select(Job.id, Job.schema_).where(named(name)))
    job = rows.one()
    if json.dumps(job.schema_, sort_keys=True) != json.dumps(schema, sort_keys=True):
        raise SchemaConflict.exception(f"job {name} exists with another schema")
    if policy:
        await session.execute(update(Job).where(Job.id == job.id).values(**policy))
    return UUID(str(job.id))


async def install(session: AsyncSession, name: FullName, schema: JsonObject) -> None:
    """Write an ``@internal`` job as the server's own code defines it."""
    fresh = upsert(Job).values(
        room_id=name.room,
        category=name.category,
        name=name.name,
        schema_=schema,
        deleted=False,
    )
    await session.execute(
        fresh.on_conflict_do_update(
            index_elements=[Job.room_id, Job.category, Job.name],
            set_={"schema": fresh.excluded.schema, "deleted": False},
        )
    )


async def delete_idle(
    session: AsyncSession, chosen: ColumnElement[bool]
) -> list[FullName]:
    """Soft-delete those of the chosen jobs that nobody serves and no task waits for.

    Returns
    -------
    list of FullName
        The jobs that went.
    """
    # Locked first, all of them, and judged by a second statement: only that one sees
    # the links and tasks of whoever held the rows until now, and that the other of two
    # workers that go at once took its link with it.
    locked = await session.scalars(
        select(Job.id)
        .where(chosen, Job.deleted.is_(False), Job.room_id != INTERNAL_ROOM)
        .order_by(Job.id)
        .with_for_update()
    )
    deleted = await session.execute(
        update(Job)
        .where(Job.id.in_(locked.all()), ~wanted())
        .values(deleted=True)
        .returning(Job.room_id, Job.category, Job.name)
    )
    return [FullName(*row) for row in deleted]


def wanted() -> ColumnElement[bool]:
    """Return the condition under which a job is served, or a task waits for it."""
    return or_(
        exists().where(WorkerJobLink.job_id == Job.id),
        _first(Task.queue_order, queued()).is_not(None),
        _first(Task.available_at, Task.available_at.is_not(None)).is_not(None),
    )


def _first(column: Any, waiting: ColumnElement[bool]) -> ColumnElement[Any]:
    # not EXISTS: where many tasks wait for other jobs, PostgreSQL would look for one of
    # this job by reading the whole table
    first = select(func.min(column)).where(Task.job_id == Job.id, waiting)
    return first.correlate(Job).scalar_subquery()


def _view(worker_timeout: float) -> Select[Any]:
    links = (
        select(func.aggregate_strings(cast(WorkerJobLink.worker_id, String), ","))
        .where(WorkerJobLink.job_id == Job.id)
        .scalar_subquery()
    )
    alive = (
        select(func.count())
        .select_from(WorkerJobLink)
        .join(Worker, Worker.id == WorkerJobLink.worker_id)
        .where(WorkerJobLink.job_id == Job.id, alive_within(worker_timeout))
        .scalar_subquery()
    )
    return select(
        Job.id,
        Job.room_id,
        Job.category,
        Job.name,
        Job.schema_,
        Job.created_at,
        Job.max_attempts,
        Job.retry_delay_seconds,
        Job.timeout_seconds,
        Job.start_timeout_seconds,
        links.label("workers"),
        alive.label("workers_alive"),
    )


def _fields(row: Row[Any]) -> dict[str, Any]:
    workers = [UUID(worker) for worker in (row.workers or "").split(",") if worker]
    full_name = str(FullName(row.room_id, row.category, row.name))
    return {**row._mapping, "workers": sorted(workers), "full_name": full_name}


async def read(
    session: AsyncSession,
    job_id: UUID,
    worker_timeout: float,
    worker_id: UUID | None = None,
) -> JobResponse:
    """Return a job; ``worker_id`` is the one that registered it just now."""
    rows = await session.execute(_view(worker_timeout).where(Job.id == job_id))
    return JobResponse(**_fields(rows.one()), worker_id=worker_id)


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
    rows = await session.execute(
        _view(worker_timeout).where(named(name), Job.deleted.is_(False))
    )
    return JobResponse(**_fields(found(rows.one_or_none(), room, full_name)))


async def list_visible(
    session: AsyncSession, room: str, page: Page, worker_timeout: float
) -> tuple[list[JobSummary], Listing]:
    """Return a page of the jobs that ``room`` sees."""
    statement = _view(worker_timeout).where(served_to(room))
    listing = await paginate(session, statement, Job, page)
    return [JobSummary(**_fields(row)) for row in listing.rows], listing
