"""Jobs: registered by workers, seen by rooms, gone when nobody serves them."""

from itertools import islice
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import exceptions, lifecycle, models, tasks
from zndraw_joblib.database import Listing, Page, execute, number, paginate, scalar, scalars, upsert
from zndraw_joblib.lifecycle import INTERNAL_ROOM, FullName, JsonObject, WaitingFor
from zndraw_joblib.models import JOB, LINK, TASK, WORKER, held, queued
from zndraw_joblib.schemas import JobPolicy, JobResponse, JobSummary
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.validation import differences
from zndraw_joblib.workers import Caller, check_length, check_quota

FULL_NAME = (JOB.c.room_id, JOB.c.category, JOB.c.name)
LIVE = JOB.c.deleted.is_(False)
_DELETED = JOB.c.deleted.is_(True)


class Target(NamedTuple):
    """A live job; its schema as JSON text."""

    id: UUID
    name: FullName
    schema: str
    # what keeps all of its tasks waiting
    obstacle: WaitingFor | None

    @property
    def internal(self) -> bool:
        """Whether the server runs its tasks itself."""
        return self.name.room == INTERNAL_ROOM


def not_found(room: str, full_name: str) -> Exception:
    """Return the problem that says that ``room`` sees no such job."""
    return exceptions.JobNotFound.exception(f"job not found: room {room!r} sees no {full_name!r}")


def find_name(room: str, full_name: str) -> FullName:
    """Return the parts of a name that ``room`` may see.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name.
    """
    try:
        name = lifecycle.split_full_name(full_name)
    except ValueError as exc:
        raise exceptions.JobNotFound.exception(f"job not found: {exc}") from None
    if name.room not in lifecycle.visible_rooms(room):
        raise not_found(room, full_name)
    return name


def named(name: FullName) -> sa.ColumnElement[bool]:
    """Return the condition for the job of that name, which may be deleted."""
    return sa.and_(*(column == part for column, part in zip(FULL_NAME, name, strict=True)))


_TARGET = sa.select(
    JOB.c.id, sa.cast(JOB.c.schema, sa.Text).label("schema"), tasks.obstacle().label("obstacle")
).where(
    JOB.c.room_id == sa.bindparam("room"),
    JOB.c.category == sa.bindparam("category"),
    JOB.c.name == sa.bindparam("name"),
    LIVE,
)


async def require(
    session: AsyncSession, room: str, full_name: str, settings: JobLibSettings
) -> Target:
    """Return a job that can be submitted to from ``room``.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name.
    """
    name = find_name(room, full_name)
    values = name._asdict() | tasks.limits(settings)
    row = (await execute(session, _TARGET, values)).one_or_none()
    if row is None:
        raise not_found(room, full_name)
    return Target(row.id, name, row.schema, row.obstacle)


class Registration(NamedTuple):
    """A job as it stands after its registration."""

    job_id: UUID
    # it is new, or came back
    created: bool
    # the worker is one of its workers only now
    joined: bool
    # another policy was asked for, and the job's stays
    policy_kept: bool
    # it has another schema, and these workers serve it no more; None if it stayed
    replaced: list[UUID] | None


async def register(
    session: AsyncSession,
    name: FullName,
    schema: JsonObject,
    policy: dict[str, Any],
    worker_id: UUID,
    caller: Caller,
    settings: JobLibSettings,
    *,
    replace: bool = False,
) -> Registration:
    """Make a job, bring it back, or find it there; link the worker, the caller's, to it.

    Of the policy, the fields that are given are set, and others stay. All of them stay
    while a live worker of another user serves the job, unless the caller is a superuser.
    With ``replace``, another schema takes the place of the job's, unless such a worker
    serves it, and workers that may have the old one are unlinked.

    Raises
    ------
    ProblemException
        ``schema-conflict``, ``quota-exceeded``, ``service-unavailable`` when one of these
        workers is about to go, or ``invalid-request`` when the name is too long.
    """
    check_length(name)
    writing = _written(name, schema, JobPolicy().model_dump() | policy, over=_DELETED)
    job_id = await scalar(session, writing.returning(JOB.c.id))
    created, kept, replaced = job_id is not None, False, None
    if not created:
        # the upsert locked the row: what is read here stands until the commit
        job = (await execute(session, sa.select(JOB.c.id, JOB.c.schema).where(named(name)))).one()
        job_id = job.id
        if differing := list(islice(differences(job.schema, schema), exceptions.MAX_ERRORS)):
            await _check_holders(session, job_id, name, differing, caller, settings, replace)
            replaced = await _replace(session, job_id, schema, worker_id)
        kept = bool(policy) and not await _set_policy(session, job_id, policy, caller, settings)
    linking = upsert(LINK).values(worker_id=worker_id, job_id=job_id).on_conflict_do_nothing()
    joined = await scalar(session, linking.returning(LINK.c.job_id))
    if created:
        theirs = _links().where(WORKER.c.user_id == caller.id).distinct()
        await check_quota(session, theirs, settings.max_jobs_per_user, "jobs")
    return Registration(job_id, created, bool(joined), kept, replaced)


def _written(
    name: FullName, schema: JsonObject, policy: dict[str, Any], over: Any = None
) -> Insert:
    fields = {"schema": schema, "deleted": False, **policy}
    writing = upsert(JOB).values(
        room_id=name.room, category=name.category, name=name.name, **fields
    )
    return writing.on_conflict_do_update(
        index_elements=FULL_NAME, set_={f: writing.excluded[f] for f in fields}, where=over
    )


def _links() -> sa.Select[tuple[UUID]]:
    return sa.select(LINK.c.job_id).join(WORKER, WORKER.c.id == LINK.c.worker_id)


async def _check_holders(
    session: AsyncSession,
    job_id: UUID,
    name: FullName,
    differing: list[str],
    caller: Caller,
    settings: JobLibSettings,
    replace: bool,
) -> None:
    """Refuse another schema, unless it replaces one that the caller alone serves."""
    holding = sa.select(WORKER.c.id, WORKER.c.name, WORKER.c.user_id).join(
        LINK, LINK.c.worker_id == WORKER.c.id
    )
    holding = holding.where(LINK.c.job_id == job_id, models.ALIVE)
    found = await execute(session, holding, tasks.limits(settings))
    holders = sorted(found.all(), key=lambda worker: worker.user_id == caller.id)
    alone = all(worker.user_id == caller.id for worker in holders)
    if replace and alone:
        return
    shown = [
        f"{worker.name or worker.id} ({'yours' if worker.user_id == caller.id else 'not yours'})"
        for worker in holders[: exceptions.MAX_ERRORS]
    ]
    raise exceptions.SchemaConflict.exception(
        f"schema mismatch: job {name} exists with another schema;"
        f" they differ at {', '.join(differing)};"
        f" it is served by {', '.join(shown) or 'no live worker'}"
        + (": registered with replace, this one takes its place" if alone else "")
    )


async def _replace(
    session: AsyncSession, job_id: UUID, schema: JsonObject, worker_id: UUID
) -> list[UUID]:
    """Set a job's schema; return the workers that may have the old one, now unlinked."""
    await execute(session, sa.update(JOB).where(JOB.c.id == job_id).values(schema=schema))
    others = sa.select(LINK.c.worker_id).where(
        LINK.c.job_id == job_id, LINK.c.worker_id != worker_id
    )
    # a worker that goes locked its links, and waits for the job
    free = others.with_for_update(skip_locked=True)
    unlinking = sa.delete(LINK).where(LINK.c.job_id == job_id, LINK.c.worker_id.in_(free))
    unlinked = await scalars(session, unlinking.returning(LINK.c.worker_id))
    if await scalar(session, others.limit(number(1))) is not None:
        raise exceptions.ServiceUnavailable.exception(
            "a worker of the job is about to go: try again", headers={"Retry-After": "1"}
        )
    return unlinked


async def _set_policy(
    session: AsyncSession,
    job_id: UUID,
    policy: dict[str, Any],
    caller: Caller,
    settings: JobLibSettings,
) -> bool:
    """Set a job's policy where it is the caller's to set; return whether it is so now."""
    others = _links().where(LINK.c.job_id == JOB.c.id, WORKER.c.user_id != caller.id, models.ALIVE)
    same = sa.and_(*(JOB.c[field].is_not_distinct_from(policy[field]) for field in policy))
    allowed = sa.true() if caller.is_superuser else sa.or_(same, ~others.exists())
    setting = sa.update(JOB).where(JOB.c.id == job_id, allowed).values(**policy)
    setting = setting.returning(JOB.c.id)
    return await scalar(session, setting, tasks.limits(settings)) is not None


async def install(session: AsyncSession, name: FullName, schema: JsonObject) -> None:
    """Write an ``@internal`` job as the server's own code defines it."""
    await execute(session, _written(name, schema, {}))


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
        theirs = sa.select(TASK.c.id).where(
            held(), TASK.c.worker_id.is_(None), TASK.c.created_by_id == caller.id
        )
        most = settings.max_internal_tasks_per_user
        await check_quota(session, theirs, most, "@internal tasks")
    elif not settings.accept_without_workers:
        links = _links().join(JOB, JOB.c.id == LINK.c.job_id).where(named(name), models.ALIVE)
        if await scalar(session, links.limit(number(1)), tasks.limits(settings)) is None:
            raise exceptions.NoWorkersAvailable.exception(f"no worker of {name} is alive")


def _first(column: Any, waiting: sa.ColumnElement[bool]) -> sa.ColumnElement[Any]:
    # not EXISTS: where many tasks wait for other jobs, PostgreSQL would look for one of
    # this job by reading the whole table
    first = sa.select(sa.func.min(column)).where(TASK.c.job_id == JOB.c.id, waiting)
    return first.correlate(JOB).scalar_subquery()


#: Whether a job is served, or has tasks that have not ended.
WANTED = sa.or_(
    sa.exists().where(LINK.c.job_id == JOB.c.id),
    JOB.c.id.in_(sa.select(TASK.c.job_id).where(held())),
    _first(TASK.c.queue_order, queued()).is_not(None),
    _first(TASK.c.available_at, TASK.c.available_at.is_not(None)).is_not(None),
)
_OF_WORKERS = sa.and_(LIVE, JOB.c.room_id != INTERNAL_ROOM)
#: The jobs that nobody serves and that have no tasks to end.
IDLE = sa.select(JOB.c.id).where(_OF_WORKERS, ~WANTED)


async def delete_idle(session: AsyncSession, chosen: sa.ColumnElement[bool]) -> list[FullName]:
    """Soft-delete, and return, the chosen jobs that nobody serves and that have no tasks to end."""
    # Locked first, all of them, and judged by a second statement: only that one sees
    # the links and tasks of whoever held the rows until now, and that the other of two
    # workers that go at once took its link with it.
    locking = sa.select(JOB.c.id).where(chosen, _OF_WORKERS).order_by(JOB.c.id).with_for_update()
    locked = await scalars(session, locking)
    deleting = sa.update(JOB).where(JOB.c.id.in_(locked), ~WANTED).values(deleted=True)
    return [FullName(*row) for row in await execute(session, deleting.returning(*FULL_NAME))]


_TASKLESS = (_DELETED, ~sa.exists().where(TASK.c.job_id == JOB.c.id))


async def taskless(
    session: AsyncSession, after: UUID, count: int
) -> tuple[sa.Select[tuple[UUID]], UUID | None]:
    """Return which of the next ``count`` deleted jobs, by id, have no tasks.

    With the last of those that were looked at; None when there are fewer.
    """
    behind = sa.select(JOB.c.id).where(JOB.c.id > after)
    deleted = behind.where(_DELETED).order_by(JOB.c.id)
    last = await scalar(session, deleted.limit(number(1)).offset(number(count - 1)))
    up_to = sa.true() if last is None else JOB.c.id <= last
    return behind.where(up_to, *_TASKLESS), last


async def purge(session: AsyncSession, chosen: sa.Select[tuple[UUID]]) -> int:
    """Delete the chosen jobs for good if they have no tasks; return how many there were."""
    # judged again once they are locked: a retry may have come in between
    locked = await scalars(session, chosen)
    purging = sa.delete(JOB).where(JOB.c.id.in_(locked), *_TASKLESS)
    return len(await scalars(session, purging.returning(JOB.c.id)))


_ALIVE = _links().where(LINK.c.job_id == JOB.c.id, models.ALIVE)
#: A column of a job.
WORKERS_ALIVE = _ALIVE.with_only_columns(sa.func.count()).scalar_subquery().label("workers_alive")


def _view(*schema: sa.ColumnElement[Any]) -> sa.Select[Any]:
    workers = sa.select(sa.func.aggregate_strings(sa.cast(LINK.c.worker_id, sa.String), ","))
    return sa.select(
        JOB.c.id,
        *FULL_NAME,
        *schema,
        JOB.c.created_at,
        JOB.c.paused,
        *(JOB.c[field] for field in JobPolicy.model_fields),
        workers.where(LINK.c.job_id == JOB.c.id).scalar_subquery().label("workers"),
        WORKERS_ALIVE,
    )


def _fields(row: sa.Row[Any]) -> dict[str, Any]:
    workers = [UUID(worker) for worker in (row.workers or "").split(",") if worker]
    full_name = str(FullName(row.room_id, row.category, row.name))
    return {**row._mapping, "workers": sorted(workers), "full_name": full_name}


_SHOWN = _view(JOB.c.schema)


async def read(
    session: AsyncSession, job_id: UUID, settings: JobLibSettings, **registered: Any
) -> JobResponse:
    """Return a job, with what is told of its registration just now."""
    rows = await execute(session, _SHOWN.where(JOB.c.id == job_id), tasks.limits(settings))
    return JobResponse(**_fields(rows.one()), **registered)


async def read_named(
    session: AsyncSession, room: str, full_name: str, settings: JobLibSettings
) -> JobResponse:
    """Return a job that ``room`` sees.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name.
    """
    view = _SHOWN.where(named(find_name(room, full_name)), LIVE)
    row = (await execute(session, view, tasks.limits(settings))).one_or_none()
    if row is None:
        raise not_found(room, full_name)
    return JobResponse(**_fields(row))


_LISTED = _view().where(models.SERVED)


async def list_visible(
    session: AsyncSession, room: str, page: Page, settings: JobLibSettings
) -> tuple[list[JobSummary], Listing]:
    """Return a page of the jobs that ``room`` sees."""
    values = models.seen_from(room) | tasks.limits(settings)
    listing = await paginate(session, _LISTED, JOB, page, values)
    return [JobSummary(**_fields(row)) for row in listing.rows], listing
