"""Tables, constraints, indexes, and the predicates that statements are made of.

Every constraint and index has a name of its own, whatever convention the host's metadata
has: ``uq_``, ``ck_`` or ``ix_`` with the table and what it is about; foreign keys as
PostgreSQL would name them. A change to a column, a constraint or an index is a change to
``docs/migrations/versions`` too.
"""

from datetime import datetime
from typing import Any, cast
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.schema import conv
from uuid_utils.compat import uuid7
from zndraw_auth import Base

from zndraw_joblib.database import JsonText, UtcDateTime, now
from zndraw_joblib.lifecycle import HELD, FullName, TaskStatus, WorkerState, visible_rooms


def constant(status: TaskStatus) -> sa.ColumnElement[TaskStatus]:
    """Return ``status`` as a literal in the SQL text.

    A partial index serves a query only if the query's own text implies the index's
    condition; a bound parameter can't.
    """
    return sa.literal_column(f"'{status.name}'", TASK.c.status.type)


def _check(name: str, condition: str) -> sa.CheckConstraint:
    # whatever convention the metadata has
    return sa.CheckConstraint(condition, name=conv(name))


def _deleted_with(column: str, name: str) -> sa.ForeignKey:
    return sa.ForeignKey(column, name=name, ondelete="CASCADE")


class Job(Base):
    """A named extension that workers serve, in one room or in all of them."""

    __tablename__ = "job"
    __table_args__ = (
        sa.UniqueConstraint("room_id", "category", "name", name="uq_job_full_name"),
        _check("ck_job_max_attempts", "max_attempts >= 1"),
        # of the live ones the sweeper deletes some, of the deleted ones it purges some
        sa.Index("ix_job_deleted", "deleted", "id"),
        # those that a claim leaves out
        sa.Index("ix_job_paused", "paused", "id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    room_id: Mapped[str]
    category: Mapped[str]
    name: Mapped[str]
    schema_: Mapped[dict[str, Any]] = mapped_column("schema", sa.JSON, default=dict)
    deleted: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    max_attempts: Mapped[int] = mapped_column(default=1)
    retry_delay_seconds: Mapped[float] = mapped_column(default=0.0)
    timeout_seconds: Mapped[float | None]
    start_timeout_seconds: Mapped[float | None]
    max_interruptions: Mapped[int] = mapped_column(default=10)
    expected_seconds: Mapped[float | None]
    paused: Mapped[bool] = mapped_column(default=False)

    @property
    def full_name(self) -> str:
        """Return ``room:category:name``."""
        return str(FullName(self.room_id, self.category, self.name))


class Worker(Base):
    """A process that claims tasks; its owner is the user who made it."""

    __tablename__ = "worker"
    __table_args__ = (
        sa.Index("ix_worker_last_heartbeat", "last_heartbeat"),
        sa.Index("ix_worker_user_id", "user_id"),
        sa.Index("ix_worker_created_at", "created_at", "id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    user_id: Mapped[UUID] = mapped_column(_deleted_with("user.id", "worker_user_id_fkey"))
    last_heartbeat: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    state: Mapped[str] = mapped_column(sa.String(16), default=WorkerState.ACTIVE.value)
    name: Mapped[str | None]
    info: Mapped[Any | None] = mapped_column(JsonText)
    #: as it says itself
    stuck: Mapped[int | None]


class WorkerJobLink(Base):
    """A worker serves a job."""

    __tablename__ = "worker_job_link"
    __table_args__ = (sa.Index("ix_worker_job_link_job_id", "job_id"),)

    worker_id: Mapped[UUID] = mapped_column(
        _deleted_with("worker.id", "worker_job_link_worker_id_fkey"), primary_key=True
    )
    job_id: Mapped[UUID] = mapped_column(
        _deleted_with("job.id", "worker_job_link_job_id_fkey"), primary_key=True
    )


class ProviderRecord(Base):
    """A source of data that a connected worker, or the server itself, serves."""

    __tablename__ = "provider"
    __table_args__ = (
        sa.UniqueConstraint("room_id", "category", "name", name="uq_provider_full_name"),
        sa.Index("ix_provider_user_id", "user_id"),
        sa.Index("ix_provider_worker_id", "worker_id"),
        sa.Index("ix_provider_created_at", "created_at", "id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    room_id: Mapped[str]
    category: Mapped[str]
    name: Mapped[str]
    schema_: Mapped[dict[str, Any]] = mapped_column("schema", sa.JSON, default=dict)
    content_type: Mapped[str] = mapped_column(default="application/json")
    user_id: Mapped[UUID] = mapped_column(_deleted_with("user.id", "provider_user_id_fkey"))
    worker_id: Mapped[UUID | None] = mapped_column(
        _deleted_with("worker.id", "provider_worker_id_fkey")
    )
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())

    @property
    def full_name(self) -> str:
        """Return ``room:category:name``."""
        return str(FullName(self.room_id, self.category, self.name))


class Task(Base):
    """One submission of a job.

    Attributes
    ----------
    job_name : str
        The job's full name, which never changes: told without a look at the job.
    worker_id : UUID or None
        The worker of the current or last attempt; no foreign key, since it is told
        after the worker is gone.
    holder_id : UUID or None
        The user of that worker: the one who may report.
    queue_order : int
        Place in the job's queue, lower is claimed first: see ``submissions.new_place``.
    failed_attempts : int
        Counts towards ``max_attempts``; unlike ``attempt`` it leaves out what was
        handed back.
    queued_at : datetime
        Since when it waits in its queue: between jobs, the one whose first task has
        waited longest is claimed from.
    available_at : datetime or None
        Until when a delayed task or a retry waits; null when it waits for no time.
    deadline_at : datetime or None
        When the sweeper ends this attempt.
    batch_index : int
        Which of its batch it is: as many ids earlier is that of the first.
    claim_key : str or None
        The ``Idempotency-Key`` of the claim, or of the start that was reported.
    dispatches : int
        How many messages were sent to the broker for this ``@internal`` attempt.
    errors : str or None
        JSON, a line for each failed attempt.
    traceparent : str or None
        The trace of the submission (W3C Trace Context).
    revision : int
        Grows with every change: whoever holds a larger one knows better. Each UPDATE
        raises it by itself.
    payload_checked : bool
        Whether the host compared the payload with the job's schema.
    ended_by_id : UUID or None
        The user who cancelled it; no foreign key, or each user who is deleted would be
        looked for in all tasks.
    reason : str or None
        Why it was cancelled.
    retried_by_id : UUID or None
        The user who last set it going again; no foreign key either.
    checkpoint : object
        Where the next attempt goes on.
    """

    __tablename__ = "task"
    __table_args__ = (
        _check(
            "ck_task_completed_at",
            "(status IN ('COMPLETED', 'FAILED', 'CANCELLED')) = (completed_at IS NOT NULL)",
        ),
        _check("ck_task_started_at", "status <> 'RUNNING' OR started_at IS NOT NULL"),
        _check("ck_task_worker_id", "status <> 'PENDING' OR worker_id IS NULL"),
        _check("ck_task_available_at", "status = 'PENDING' OR available_at IS NULL"),
        _check("ck_task_deadline_at", "status IN ('CLAIMED', 'RUNNING') OR deadline_at IS NULL"),
        # the listings, newest first
        sa.Index("ix_task_room", "room_id", "created_at", "id"),
        sa.Index("ix_task_room_status", "room_id", "status", "created_at", "id"),
        sa.Index("ix_task_job_room", "job_id", "room_id", "created_at", "id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    job_id: Mapped[UUID] = mapped_column(sa.ForeignKey("job.id", name="task_job_id_fkey"))
    job_name: Mapped[str]
    worker_id: Mapped[UUID | None]
    holder_id: Mapped[UUID | None]
    room_id: Mapped[str]
    created_by_id: Mapped[UUID | None] = mapped_column(
        sa.ForeignKey("user.id", name="task_created_by_id_fkey", ondelete="SET NULL")
    )
    payload: Mapped[dict[str, Any]] = mapped_column(JsonText)
    status: Mapped[TaskStatus] = mapped_column(
        sa.Enum(TaskStatus, name="taskstatus"), default=TaskStatus.PENDING
    )
    priority: Mapped[int] = mapped_column(default=0)
    queue_order: Mapped[int] = mapped_column(sa.BigInteger)
    attempt: Mapped[int] = mapped_column(default=0)
    failed_attempts: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int] = mapped_column(default=1)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    queued_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now())
    available_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    claimed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    completed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deadline_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    error: Mapped[str | None] = mapped_column(sa.Text)
    error_type: Mapped[str | None] = mapped_column(sa.String(32))
    errors: Mapped[str | None] = mapped_column(sa.Text)
    result: Mapped[Any | None] = mapped_column(JsonText)
    progress: Mapped[float | None]
    progress_message: Mapped[str | None]
    idempotency_key: Mapped[str | None]
    request_digest: Mapped[str | None] = mapped_column(sa.String(64))
    batch_index: Mapped[int] = mapped_column(default=0)
    claim_key: Mapped[str | None]
    dispatches: Mapped[int] = mapped_column(default=1)
    traceparent: Mapped[str | None] = mapped_column(sa.String(55))
    revision: Mapped[int] = mapped_column(
        default=1, onupdate=sa.literal_column("task.revision + 1", sa.Integer)
    )
    payload_checked: Mapped[bool] = mapped_column(default=True)
    interruptions: Mapped[int] = mapped_column(default=0)
    ended_by_id: Mapped[UUID | None]
    reason: Mapped[str | None]
    retried_by_id: Mapped[UUID | None]
    checkpoint: Mapped[Any | None] = mapped_column(JsonText)


class TaskLog(Base):
    """Lines of a task's log that came together.

    Attributes
    ----------
    first : int
        The number of the first of them in this attempt, as its worker counts.
    last_number : int
        The number of the last of them in all attempts.
    begin_byte, end_byte : int
        From where to where they reach in all that was logged.
    text : str
        The lines.
    """

    __tablename__ = "task_log"

    task_id: Mapped[UUID] = mapped_column(
        _deleted_with("task.id", "task_log_task_id_fkey"), primary_key=True
    )
    attempt: Mapped[int] = mapped_column(primary_key=True)
    first: Mapped[int] = mapped_column(primary_key=True)
    last_number: Mapped[int]
    begin_byte: Mapped[int] = mapped_column(sa.BigInteger)
    end_byte: Mapped[int] = mapped_column(sa.BigInteger)
    text: Mapped[str] = mapped_column(sa.Text)


# What statements are made of. Of the classes, each execution would pass the ORM, which
# looks for copies to bring up to date, and there are none.
JOB, WORKER, LINK, PROVIDER, TASK, LOG = (
    cast(sa.Table, table.__table__)
    for table in (Job, Worker, WorkerJobLink, ProviderRecord, Task, TaskLog)
)
#: The others, in a statement about a task.
ahead = TASK.alias()


def seen_from(room: str) -> dict[str, Any]:
    """Return the parameters of :func:`visible` and :data:`SERVED`: whose view it is."""
    return {"rooms": visible_rooms(room)}


def visible(entry: sa.Table) -> sa.ColumnElement[bool]:
    """Return the condition under which a room sees a job or a provider."""
    return entry.c.room_id.in_(sa.bindparam("rooms", expanding=True))


#: Whether a job can be submitted to from a room.
SERVED = sa.and_(visible(JOB), JOB.c.deleted.is_(False))
#: Whether nothing of a job is given to workers.
PAUSED = JOB.c.paused.is_(True)
#: Whether a worker counts as alive; ``silence`` is a parameter of :func:`tasks.limits`.
ALIVE = WORKER.c.last_heartbeat >= now(sa.bindparam("silence", type_=sa.Float()))


def queued(task: Any = TASK.c) -> sa.ColumnElement[bool]:
    """Return the condition under which a task waits for a worker, and for no time."""
    return sa.and_(task.status == constant(TaskStatus.PENDING), task.available_at.is_(None))


def due(task: Any = TASK.c) -> sa.ColumnElement[bool]:
    """Return the condition under which a delayed task's time has come."""
    return sa.and_(task.available_at <= now())


def held(task: Any = TASK.c) -> sa.ColumnElement[bool]:
    """Return the condition under which a task is in somebody's hands."""
    return sa.and_(task.status.in_(map(constant, sorted(HELD))))


def of_job(column: Any) -> sa.ColumnElement[Any]:
    """Return a column of the task's job, inside a statement about tasks."""
    return sa.select(column).where(JOB.c.id == TASK.c.job_id).correlate(TASK).scalar_subquery()


def rechecked(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """Return ``condition`` in words that imply the condition of no partial index.

    For an UPDATE of rows that a subquery found and locked. With statistics from when
    few rows were like that, PostgreSQL would take them from the index, and run the
    subquery for each of them.
    """
    return sa.case((condition, sa.true()), else_=sa.false())


def in_states(states: frozenset[TaskStatus]) -> sa.ColumnElement[bool]:
    """Return the condition under which a task is in one of ``states``."""
    return TASK.c.status.in_(map(constant, sorted(states)))


def _index(name: str, columns: str, where: sa.ColumnElement[bool], **kw: Any) -> None:
    named = (TASK.c[column] for column in columns.split())
    sa.Index(name, *named, postgresql_where=where, sqlite_where=where, **kw)


# the claim, and a task's place in its queue
_index("ix_task_queue", "job_id queue_order id", queued())
# delayed tasks whose time has come
_index("ix_task_delayed", "job_id available_at", TASK.c.available_at.is_not(None))
# what of a user's waits, and where in a queue; what no claim says keeps claims from it,
# since PostgreSQL takes an index that was empty once for one that costs nothing
_index(
    "ix_task_pending_of",
    "created_by_id job_id queue_order",
    sa.and_(TASK.c.status == constant(TaskStatus.PENDING), TASK.c.created_by_id.is_not(None)),
)
# what a worker holds
_index("ix_task_held", "worker_id", held())
# attempts for the sweeper to end
_index("ix_task_deadline", "deadline_at", TASK.c.deadline_at.is_not(None))
# ended tasks, for the purge
_index("ix_task_completed", "status completed_at", TASK.c.completed_at.is_not(None))
# one task, or one batch of them, for one Idempotency-Key
_index(
    "uq_task_idempotency_key",
    "created_by_id job_id room_id idempotency_key batch_index",
    TASK.c.idempotency_key.is_not(None),
    unique=True,
)

__all__ = ["Job", "ProviderRecord", "Task", "TaskLog", "TaskStatus", "Worker", "WorkerJobLink"]
