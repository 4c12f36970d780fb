"""The tables of zndraw-joblib 0.1.7 become those of 0.2, and back: docs/upgrade.md.

It knows both by heart and imports nothing of the package, which moves on.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.schema import conv

revision = "joblib_0_2"
# in a host with a history of its own: the revision that came last
down_revision = None

_TIME = sa.DateTime(timezone=True)

#: New columns, and whether they may be null once they are filled.
_COLUMNS: dict[str, list[tuple[str, Any, bool]]] = {
    "job": [
        ("max_attempts", sa.Integer(), False),
        ("retry_delay_seconds", sa.Float(), False),
        ("timeout_seconds", sa.Float(), True),
        ("start_timeout_seconds", sa.Float(), True),
        ("max_interruptions", sa.Integer(), False),
        ("expected_seconds", sa.Float(), True),
        ("paused", sa.Boolean(), False),
    ],
    "worker": [
        ("state", sa.String(16), False),
        ("name", sa.String(), True),
        ("info", sa.Text(), True),
        ("stuck", sa.Integer(), True),
    ],
    "provider": [],
    "task": [
        ("job_name", sa.String(), False),
        ("holder_id", sa.Uuid(), True),
        ("priority", sa.Integer(), False),
        ("queue_order", sa.BigInteger(), False),
        ("attempt", sa.Integer(), False),
        ("failed_attempts", sa.Integer(), False),
        ("max_attempts", sa.Integer(), False),
        ("queued_at", _TIME, False),
        ("available_at", _TIME, True),
        ("claimed_at", _TIME, True),
        ("deadline_at", _TIME, True),
        ("error_type", sa.String(32), True),
        ("errors", sa.Text(), True),
        ("result", sa.Text(), True),
        ("progress", sa.Float(), True),
        ("progress_message", sa.String(), True),
        ("idempotency_key", sa.String(), True),
        ("request_digest", sa.String(64), True),
        ("batch_index", sa.Integer(), False),
        ("claim_key", sa.String(), True),
        ("dispatches", sa.Integer(), False),
        ("traceparent", sa.String(55), True),
        ("revision", sa.Integer(), False),
        ("payload_checked", sa.Boolean(), False),
        ("interruptions", sa.Integer(), False),
        ("ended_by_id", sa.Uuid(), True),
        ("reason", sa.String(), True),
        ("retried_by_id", sa.Uuid(), True),
        ("checkpoint", sa.Text(), True),
    ],
}

_CHECKS = {
    "job": {"ck_job_max_attempts": "max_attempts >= 1"},
    "task": {
        "ck_task_completed_at": (
            "(status IN ('COMPLETED', 'FAILED', 'CANCELLED')) = (completed_at IS NOT NULL)"
        ),
        "ck_task_started_at": "status <> 'RUNNING' OR started_at IS NOT NULL",
        "ck_task_worker_id": "status <> 'PENDING' OR worker_id IS NULL",
        "ck_task_available_at": "status = 'PENDING' OR available_at IS NULL",
        "ck_task_deadline_at": "status IN ('CLAIMED', 'RUNNING') OR deadline_at IS NULL",
    },
}

#: Indexes of 0.1.7 that have other columns now, or are gone.
_OLD_INDEXES = """
INDEX ix_job_category ON job (category)
INDEX ix_job_created_at ON job (created_at)
INDEX ix_job_deleted ON job (deleted)
INDEX ix_job_name ON job (name)
INDEX ix_job_room_id ON job (room_id)
INDEX ix_worker_created_at ON worker (created_at)
INDEX ix_provider_category ON provider (category)
INDEX ix_provider_created_at ON provider (created_at)
INDEX ix_provider_name ON provider (name)
INDEX ix_provider_room_id ON provider (room_id)
INDEX ix_task_created_by_id ON task (created_by_id)
INDEX ix_task_job_id ON task (job_id)
INDEX ix_task_job_status_created ON task (job_id, status, created_at)
INDEX ix_task_room_id ON task (room_id)
INDEX ix_task_status ON task (status)
INDEX ix_task_worker_id ON task (worker_id)
"""

_INDEXES = """
INDEX ix_job_deleted ON job (deleted, id)
INDEX ix_job_paused ON job (paused, id)
INDEX ix_worker_created_at ON worker (created_at, id)
INDEX ix_worker_job_link_job_id ON worker_job_link (job_id)
INDEX ix_provider_created_at ON provider (created_at, id)
INDEX ix_task_queue ON task (job_id, queue_order, id)
    WHERE status = 'PENDING' AND available_at IS NULL
INDEX ix_task_delayed ON task (job_id, available_at) WHERE available_at IS NOT NULL
INDEX ix_task_pending_of ON task (created_by_id, job_id, queue_order)
    WHERE status = 'PENDING' AND created_by_id IS NOT NULL
INDEX ix_task_held ON task (worker_id) WHERE status IN ('CLAIMED', 'RUNNING')
INDEX ix_task_deadline ON task (deadline_at) WHERE deadline_at IS NOT NULL
INDEX ix_task_completed ON task (status, completed_at) WHERE completed_at IS NOT NULL
UNIQUE INDEX uq_task_idempotency_key
    ON task (created_by_id, job_id, room_id, idempotency_key, batch_index)
    WHERE idempotency_key IS NOT NULL
INDEX ix_task_room ON task (room_id, created_at, id)
INDEX ix_task_room_status ON task (room_id, status, created_at, id)
INDEX ix_task_job_room ON task (job_id, room_id, created_at, id)
"""


def _is_sqlite() -> bool:
    return op.get_bind().dialect.name == "sqlite"


def _stored(time: Any) -> Any:
    """Return a time as SQLAlchemy writes it: SQLite compares times as text."""
    if not _is_sqlite():
        return time
    # CURRENT_TIMESTAMP has no fraction, and others may have written a zone
    whole = sa.type_coerce(time, sa.String).like("____-__-__ __:__:__.______")
    return sa.case((whole, time), else_=sa.func.strftime("%Y-%m-%d %H:%M:%f000", time))


def _count_rows() -> dict[str, Any]:
    tables = ("job", "worker", "worker_job_link", "task")
    counting = sa.select(sa.func.count())
    return {t: op.get_bind().scalar(counting.select_from(sa.table(t))) for t in tables}


@contextmanager
def _keeping_all_rows() -> Iterator[None]:
    if _is_sqlite() and op.get_bind().scalar(sa.text("PRAGMA foreign_keys")):
        raise RuntimeError(
            "SQLite would delete rows along with the tables that are made anew:"
            " run PRAGMA foreign_keys = OFF before the migration's transaction"
        )
    before = _count_rows()
    yield
    after = _count_rows()
    if before != after:
        raise RuntimeError(f"rows were lost: {before} became {after}")


def _create_log() -> None:
    task = sa.ForeignKey("task.id", name=conv("task_log_task_id_fkey"), ondelete="CASCADE")
    op.create_table(
        "task_log",
        sa.Column("task_id", sa.Uuid(), task, primary_key=True),
        sa.Column("attempt", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("first", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.Column("begin_byte", sa.BigInteger(), nullable=False),
        sa.Column("end_byte", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
    )


def _create_indexes(indexes: str) -> None:
    for index in re.findall(r"^\S.*(?:\n .*)*", indexes, re.MULTILINE):
        op.execute(f"CREATE {' '.join(index.split())}")


def _drop_indexes(indexes: str) -> None:
    for name in re.findall(r"INDEX (\w+)", indexes):
        op.drop_index(name)


def upgrade() -> None:
    """Keep every row; docs/upgrade.md says what becomes of each."""
    with _keeping_all_rows():
        _drop_indexes(_OLD_INDEXES)
        for table, columns in _COLUMNS.items():
            for column, kind, _ in columns:
                op.add_column(table, sa.Column(column, kind, nullable=True))
        _fill()
        _constrain(new=True)
        _create_indexes(_INDEXES)
        _create_log()


def downgrade() -> None:
    """Keep every row that 0.1.7 has a place for."""
    with _keeping_all_rows():
        op.drop_table("task_log")
        _drop_indexes(_INDEXES)
        _forget()
        _constrain(new=False)
        _create_indexes(_OLD_INDEXES)


def _tables() -> tuple[sa.Table, ...]:
    metadata = sa.MetaData()
    names = ("job", "worker", "provider", "task")
    return tuple(
        sa.Table(name, metadata, autoload_with=op.get_bind(), resolve_fks=False) for name in names
    )


def _fill() -> None:
    job, worker, provider, task = _tables()
    op.execute(
        sa.update(job).values(
            created_at=_stored(job.c.created_at),
            max_attempts=1,
            retry_delay_seconds=0.0,
            max_interruptions=10,
            paused=sa.false(),
        )
    )
    op.execute(
        sa.update(worker).values(
            created_at=_stored(worker.c.created_at),
            last_heartbeat=_stored(worker.c.last_heartbeat),
            state="active",
        )
    )
    op.execute(sa.update(provider).values(created_at=_stored(provider.c.created_at)))
    before = _before(job, worker, task)
    filling = sa.update(task).where(task.c.id == before.c.id)
    op.execute(filling.values(_filled(task.c, before.c)))


def _before(job: sa.Table, worker: sa.Table, task: sa.Table) -> sa.Subquery:
    """Return of each task what its job, its worker and the others say of it."""
    old = sa.alias(task, "old").c
    # SQLite has users' ids with dashes, and all others without
    owner = sa.func.replace(sa.cast(worker.c.user_id, sa.String), "-", "")
    return (
        sa.select(
            old.id,
            # small numbers: ahead of whatever will be submitted, and in their old order
            sa.func.row_number().over(order_by=(old.created_at, old.id)).label("place"),
            (job.c.room_id + ":" + job.c.category + ":" + job.c.name).label("name"),
            sa.func.coalesce(job.c.room_id == "@internal", sa.false()).label("internal"),
            sa.cast(owner, sa.Uuid).label("owner"),
        )
        .outerjoin(job, job.c.id == old.job_id)
        .outerjoin(worker, worker.c.id == old.worker_id)
        .subquery("before")
    )


def _filled(task: Any, before: Any) -> dict[str, Any]:
    """Return the values of a task's columns."""

    def is_(*states: str) -> sa.ColumnElement[bool]:
        return sa.and_(task.status.in_(states))

    pending, held = is_("PENDING"), is_("CLAIMED", "RUNNING")
    created, started = _stored(task.created_at), _stored(task.started_at)
    lost = held & before.owner.is_(None) & ~before.internal
    failed = lost | is_("FAILED")
    untouched = pending | (is_("CANCELLED") & task.worker_id.is_(None))
    since = sa.func.coalesce(started, created)
    return {
        "job_name": sa.func.coalesce(before.name, "@global:unknown:unknown"),
        "worker_id": sa.case((~pending, task.worker_id)),
        "holder_id": sa.case((~pending, before.owner)),
        "status": sa.case((lost, sa.literal("FAILED", task.status.type)), else_=task.status),
        "priority": 0,
        "queue_order": before.place,
        "attempt": sa.case((untouched, 0), else_=1),
        "failed_attempts": sa.case((failed, 1), else_=0),
        "max_attempts": 1,
        "created_at": created,
        "queued_at": created,
        "claimed_at": sa.case((is_("CLAIMED"), since), (~pending, started)),
        "started_at": sa.case((is_("RUNNING"), since), (~pending, started)),
        "completed_at": sa.case(
            (lost, _stored(sa.func.current_timestamp())),
            (pending | held, sa.null()),
            else_=sa.func.coalesce(_stored(task.completed_at), since),
        ),
        # the first sweep hands it to the broker again, which starts it once
        "deadline_at": sa.case((is_("CLAIMED") & before.internal & ~lost, created)),
        "error": sa.case(
            (lost, sa.func.coalesce(task.error, "Worker disconnected")), else_=task.error
        ),
        "error_type": sa.case(
            (lost | (failed & (task.error == "Worker disconnected")), "worker_lost"),
            (failed & (task.error == "Internal task timed out"), "timeout"),
            (failed, "user_error"),
        ),
        "batch_index": 0,
        "dispatches": 1,
        "revision": 1,
        "payload_checked": sa.false(),
        "interruptions": 0,
    }


def _forget() -> None:
    _, worker, provider, task = _tables()
    # the server's own: 0.1.7 has none, and the host writes them again
    op.execute(sa.delete(provider).where(provider.c.worker_id.is_(None)))
    there = sa.exists().where(worker.c.id == task.c.worker_id)
    op.execute(sa.update(task).where(task.c.worker_id.is_not(None), ~there).values(worker_id=None))


def _constrain(*, new: bool) -> None:
    """Change what the columns are constrained to; on SQLite each table is made anew."""
    for table, columns in _COLUMNS.items():
        with _batch(table) as batch:
            for name, condition in _CHECKS.get(table, {}).items():
                if new:
                    batch.create_check_constraint(conv(name), sa.text(condition))
                else:
                    batch.drop_constraint(conv(name), type_="check")
            for column, kind, nullable in columns:
                if not new:
                    batch.drop_column(column)
                elif not nullable:
                    batch.alter_column(column, existing_type=kind, nullable=False)
            if table == "task":
                _constrain_tasks(batch, new=new)
                continue
            now = None if new else sa.func.now()
            batch.alter_column("created_at", existing_type=_TIME, server_default=now)
            if table in ("job", "provider"):
                old_name, new_name = f"unique_{table}", f"uq_{table}_full_name"
                batch.drop_constraint(old_name if new else new_name, type_="unique")
                full_name = ["room_id", "category", "name"]
                batch.create_unique_constraint(new_name if new else old_name, full_name)
            if table == "provider":
                batch.alter_column("worker_id", existing_type=sa.Uuid(), nullable=new)
    if new:
        with _batch("worker_job_link") as batch:
            # it is so already; but SQLite makes the table anew, and names its keys
            batch.alter_column("job_id", existing_type=sa.Uuid(), nullable=False)


def _batch(table: str) -> Any:
    # gives names to the foreign keys that SQLite has without
    convention = {"fk": "%(table_name)s_%(column_0_name)s_fkey"}
    return op.batch_alter_table(table, naming_convention=convention)


def _constrain_tasks(batch: Any, *, new: bool) -> None:
    batch.alter_column(
        "payload",
        existing_type=sa.JSON() if new else sa.Text(),
        existing_nullable=False,
        type_=sa.Text() if new else sa.JSON(),
        postgresql_using="payload::text" if new else "payload::json",
    )
    named = {}
    for key in sa.inspect(op.get_bind()).get_foreign_keys("task"):
        # as the database named it: a host may have had a convention of its own
        named[key["constrained_columns"][0]] = key["name"]
    targets = {"worker_id": "worker", "created_by_id": "user"}
    for column in targets if new else ("created_by_id",):
        name = named.get(column) or f"task_{column}_fkey"
        batch.drop_constraint(name, type_="foreignkey")
    for column in ("created_by_id",) if new else targets:
        batch.create_foreign_key(
            f"task_{column}_fkey",
            targets[column],
            [column],
            ["id"],
            ondelete="SET NULL" if new else None,
        )
