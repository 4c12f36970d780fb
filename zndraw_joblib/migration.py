"""From the tables of 0.1.7 to those of 0.2, and back: for a host's Alembic revision.

It knows both by heart and nothing of :mod:`zndraw_joblib.models`, which move on. Alembic
itself is the host's: the functions are handed ``alembic.op``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import conv
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

_STATUS = sa.Enum(
    "PENDING", "CLAIMED", "RUNNING", "COMPLETED", "FAILED", "CANCELLED", name="taskstatus"
)
_TIME = sa.DateTime(timezone=True)
_JOBS = sa.table(
    "job",
    sa.column("id", sa.Uuid),
    sa.column("room_id", sa.String),
    sa.column("category", sa.String),
    sa.column("name", sa.String),
    sa.column("created_at", _TIME),
    sa.column("max_attempts", sa.Integer),
    sa.column("retry_delay_seconds", sa.Float),
)
_WORKERS = sa.table(
    "worker",
    sa.column("id", sa.Uuid),
    sa.column("user_id", sa.String),
    sa.column("last_heartbeat", _TIME),
    sa.column("created_at", _TIME),
    sa.column("state", sa.String),
)
_PROVIDERS = sa.table("provider", sa.column("created_at", _TIME), sa.column("worker_id", sa.Uuid))
_TASKS = sa.table(
    "task",
    sa.column("id", sa.Uuid),
    sa.column("job_id", sa.Uuid),
    sa.column("job_name", sa.String),
    sa.column("worker_id", sa.Uuid),
    sa.column("holder_id", sa.Uuid),
    sa.column("status", _STATUS),
    sa.column("priority", sa.Integer),
    sa.column("queue_order", sa.BigInteger),
    sa.column("attempt", sa.Integer),
    sa.column("failed_attempts", sa.Integer),
    sa.column("max_attempts", sa.Integer),
    sa.column("created_at", _TIME),
    sa.column("queued_at", _TIME),
    sa.column("claimed_at", _TIME),
    sa.column("started_at", _TIME),
    sa.column("completed_at", _TIME),
    sa.column("deadline_at", _TIME),
    sa.column("error", sa.Text),
    sa.column("error_type", sa.String),
    sa.column("dispatches", sa.Integer),
    sa.column("batch_index", sa.Integer),
    sa.column("revision", sa.Integer),
    sa.column("payload_checked", sa.Boolean),
)

#: New columns, and whether they may be null once they are filled.
_COLUMNS: dict[str, list[tuple[str, Any, bool]]] = {
    "job": [
        ("max_attempts", sa.Integer(), False),
        ("retry_delay_seconds", sa.Float(), False),
        ("timeout_seconds", sa.Float(), True),
        ("start_timeout_seconds", sa.Float(), True),
    ],
    "worker": [("state", sa.String(16), False)],
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
    ],
}

#: What no task of 0.1.7 has another value of.
_TASK_DEFAULTS = {
    "priority": 0,
    "max_attempts": 1,
    "batch_index": 0,
    "dispatches": 1,
    "revision": 1,
    "payload_checked": False,
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
        "ck_task_deadline_at": ("status IN ('CLAIMED', 'RUNNING') OR deadline_at IS NULL"),
    },
}

#: Indexes of 0.1.7 that have other columns now, or are gone.
_OLD_INDEXES = {
    "job": {f"ix_job_{c}": [c] for c in ("category", "deleted", "name", "room_id")}
    | {"ix_job_created_at": ["created_at"]},
    "worker": {"ix_worker_created_at": ["created_at"]},
    "provider": {f"ix_provider_{c}": [c] for c in ("category", "created_at", "name", "room_id")},
    "task": {
        f"ix_task_{c}": [c] for c in ("created_by_id", "job_id", "room_id", "status", "worker_id")
    }
    | {"ix_task_job_status_created": ["job_id", "status", "created_at"]},
}

_INDEXES: dict[str, dict[str, tuple[list[str], str | None]]] = {
    "job": {"ix_job_deleted": (["deleted", "id"], None)},
    "worker": {"ix_worker_created_at": (["created_at", "id"], None)},
    "worker_job_link": {"ix_worker_job_link_job_id": (["job_id"], None)},
    "provider": {"ix_provider_created_at": (["created_at", "id"], None)},
    "task": {
        "ix_task_queue": (
            ["job_id", "queue_order", "id"],
            "status = 'PENDING' AND available_at IS NULL",
        ),
        "ix_task_delayed": (["job_id", "available_at"], "available_at IS NOT NULL"),
        "ix_task_pending_of": (
            ["created_by_id", "job_id", "queue_order"],
            "status = 'PENDING' AND created_by_id IS NOT NULL",
        ),
        "ix_task_held": (["worker_id"], "status IN ('CLAIMED', 'RUNNING')"),
        "ix_task_deadline": (["deadline_at"], "deadline_at IS NOT NULL"),
        "ix_task_completed": (["status", "completed_at"], "completed_at IS NOT NULL"),
        "uq_task_idempotency_key": (
            ["created_by_id", "job_id", "room_id", "idempotency_key", "batch_index"],
            "idempotency_key IS NOT NULL",
        ),
        "ix_task_room": (["room_id", "created_at", "id"], None),
        "ix_task_room_status": (["room_id", "status", "created_at", "id"], None),
        "ix_task_job_room": (["job_id", "room_id", "created_at", "id"], None),
    },
}


class _stored(FunctionElement[Any]):  # noqa: N801
    """A time as SQLAlchemy writes it; SQLite compares times as text."""

    type = _TIME
    inherit_cache = True


@compiles(_stored)
def _standard_stored(element: _stored, compiler: SQLCompiler, **kw: Any) -> str:
    return compiler.process(element.clauses, **kw)


@compiles(_stored, "sqlite")
def _sqlite_stored(element: _stored, compiler: SQLCompiler, **kw: Any) -> str:
    # CURRENT_TIMESTAMP has no fraction, and others may have written a zone
    time = compiler.process(element.clauses, **kw)
    return (
        f"CASE WHEN {time} LIKE '____-__-__ __:__:__.______' THEN {time}"
        f" ELSE strftime('%Y-%m-%d %H:%M:%f000', {time}) END"
    )


class _cascading(FunctionElement[int]):  # noqa: N801
    """Whether a table that is dropped to be made anew takes others' rows along."""

    type = sa.Integer()
    inherit_cache = True


@compiles(_cascading)
def _standard_cascading(element: _cascading, compiler: SQLCompiler, **kw: Any) -> str:
    return "0"


@compiles(_cascading, "sqlite")
def _sqlite_cascading(element: _cascading, compiler: SQLCompiler, **kw: Any) -> str:
    return "(SELECT foreign_keys FROM pragma_foreign_keys)"


def _counts(connection: sa.Connection) -> dict[str, int]:
    tables = ("job", "worker", "worker_job_link", "task")
    counting = (sa.select(sa.func.count()).select_from(sa.table(t)) for t in tables)
    return {t: connection.execute(c).scalar_one() for t, c in zip(tables, counting, strict=True)}


@contextmanager
def _keeping_all_rows(connection: sa.Connection) -> Iterator[None]:
    if connection.scalar(sa.select(_cascading())):
        raise RuntimeError(
            "SQLite would delete rows along with the tables that are made anew:"
            " run PRAGMA foreign_keys = OFF before the migration's transaction"
        )
    before = _counts(connection)
    yield
    after = _counts(connection)
    if before != after:
        raise RuntimeError(f"rows were lost: {before} became {after}")


def _foreign_key(connection: sa.Connection, column: str) -> str:
    # as the database named it: a host may have had a convention of its own
    for key in sa.inspect(connection).get_foreign_keys("task"):
        if key["constrained_columns"] == [column] and key["name"]:
            return str(key["name"])
    return f"task_{column}_fkey"


def _batch(op: Any, table: str) -> Any:
    # gives names to the foreign keys that SQLite has without
    convention = {"fk": "%(table_name)s_%(column_0_name)s_fkey"}
    return op.batch_alter_table(table, naming_convention=convention)


def upgrade(op: Any) -> None:
    """Bring the tables of 0.1.7, and what is in them, to those of 0.2.

    Parameters
    ----------
    op : module
        ``alembic.op``, in a host's revision; on SQLite with foreign keys not enforced.

    Raises
    ------
    RuntimeError
        When SQLite enforces foreign keys, before anything is changed.
    """
    connection = op.get_context().connection
    with _keeping_all_rows(connection):
        for table, indexes in _OLD_INDEXES.items():
            for name in indexes:
                op.drop_index(name, table_name=table)
        for table, columns in _COLUMNS.items():
            for column, kind, _ in columns:
                op.add_column(table, sa.Column(column, kind, nullable=True))
        _fill(connection)
        _tighten(op)
        for table, new in _INDEXES.items():
            for name, (indexed, where) in new.items():
                condition = None if where is None else sa.text(where)
                op.create_index(
                    name,
                    table,
                    indexed,
                    unique=name.startswith("uq_"),
                    postgresql_where=condition,
                    sqlite_where=condition,
                )


def _fill(connection: sa.Connection) -> None:
    connection.execute(
        sa.update(_JOBS).values(
            created_at=_stored(_JOBS.c.created_at), max_attempts=1, retry_delay_seconds=0.0
        )
    )
    connection.execute(
        sa.update(_WORKERS).values(
            created_at=_stored(_WORKERS.c.created_at),
            last_heartbeat=_stored(_WORKERS.c.last_heartbeat),
            state="active",
        )
    )
    connection.execute(sa.update(_PROVIDERS).values(created_at=_stored(_PROVIDERS.c.created_at)))
    _fill_tasks(connection)


def _fill_tasks(connection: sa.Connection) -> None:
    task, old = _TASKS.c, sa.alias(_TASKS, "old")
    # SQLite has users' ids with dashes, and all others without
    owner = sa.func.replace(sa.cast(_WORKERS.c.user_id, sa.String), "-", "")
    seen = sa.select(
        old.c.id,
        # small numbers: ahead of whatever will be submitted, and in their old order
        sa.func.row_number().over(order_by=(old.c.created_at, old.c.id)).label("place"),
        (_JOBS.c.room_id + ":" + _JOBS.c.category + ":" + _JOBS.c.name).label("name"),
        sa.func.coalesce(_JOBS.c.room_id == "@internal", sa.false()).label("internal"),
        sa.cast(owner, sa.Uuid).label("owner"),
    ).select_from(
        old.outerjoin(_JOBS, _JOBS.c.id == old.c.job_id).outerjoin(
            _WORKERS, _WORKERS.c.id == old.c.worker_id
        )
    ).subquery("seen")  # fmt: skip

    def is_(*states: str) -> sa.ColumnElement[bool]:
        return task.status.in_([sa.literal(state, _STATUS) for state in states])

    pending, held = is_("PENDING"), is_("CLAIMED", "RUNNING")
    created, started = _stored(task.created_at), _stored(task.started_at)
    lost = sa.and_(held, seen.c.owner.is_(None), sa.not_(seen.c.internal))
    failed = sa.or_(lost, is_("FAILED"))
    untouched = sa.or_(pending, sa.and_(is_("CANCELLED"), task.worker_id.is_(None)))
    connection.execute(
        sa.update(_TASKS)
        .where(task.id == seen.c.id)
        .values(
            **_TASK_DEFAULTS,
            job_name=sa.func.coalesce(seen.c.name, "@global:unknown:unknown"),
            worker_id=sa.case((~pending, task.worker_id)),
            holder_id=sa.case((~pending, seen.c.owner)),
            status=sa.case((lost, sa.literal("FAILED", _STATUS)), else_=task.status),
            queue_order=seen.c.place,
            attempt=sa.case((untouched, 0), else_=1),
            failed_attempts=sa.case((failed, 1), else_=0),
            **dict.fromkeys(("created_at", "queued_at"), created),
            claimed_at=sa.case(
                (is_("CLAIMED"), sa.func.coalesce(started, created)), (~pending, started)
            ),
            started_at=sa.case(
                (is_("RUNNING"), sa.func.coalesce(started, created)), (~pending, started)
            ),
            completed_at=sa.case(
                (lost, _stored(sa.func.current_timestamp())),
                (pending | held, sa.null()),
                else_=sa.func.coalesce(_stored(task.completed_at), started, created),
            ),
            # the first sweep hands it to the broker again, which starts it once
            deadline_at=sa.case((is_("CLAIMED") & seen.c.internal & ~lost, created)),
            error=sa.case(
                (lost, sa.func.coalesce(task.error, "Worker disconnected")), else_=task.error
            ),
            error_type=sa.case(
                (lost | (failed & (task.error == "Worker disconnected")), "worker_lost"),
                (failed & (task.error == "Internal task timed out"), "timeout"),
                (failed, "user_error"),
            ),
        )
    )


def _tighten(op: Any) -> None:
    connection = op.get_context().connection
    for table, columns in _COLUMNS.items():
        with _batch(op, table) as batch:
            for column, kind, nullable in columns:
                if not nullable:
                    batch.alter_column(column, existing_type=kind, nullable=False)
            if table != "task":
                batch.alter_column("created_at", existing_type=_TIME, server_default=None)
            if table in ("job", "provider"):
                full_name = ["room_id", "category", "name"]
                batch.drop_constraint(f"unique_{table}", type_="unique")
                batch.create_unique_constraint(f"uq_{table}_full_name", full_name)
            if table == "provider":
                batch.alter_column("worker_id", existing_type=sa.Uuid(), nullable=True)
            for name, condition in _CHECKS.get(table, {}).items():
                batch.create_check_constraint(conv(name), sa.text(condition))
            if table == "task":
                batch.alter_column(
                    "payload",
                    existing_type=sa.JSON(),
                    existing_nullable=False,
                    type_=sa.Text(),
                    postgresql_using="payload::text",
                )
                for column in ("worker_id", "created_by_id"):
                    batch.drop_constraint(_foreign_key(connection, column), type_="foreignkey")
                batch.create_foreign_key(
                    "task_created_by_id_fkey",
                    "user",
                    ["created_by_id"],
                    ["id"],
                    ondelete="SET NULL",
                )
    with _batch(op, "worker_job_link") as batch:
        # it is so already; but SQLite makes the table anew, and names its keys
        batch.alter_column("job_id", existing_type=sa.Uuid(), nullable=False)


def downgrade(op: Any) -> None:
    """Bring the tables of 0.2, and what 0.1.7 can keep of them, back.

    Parameters
    ----------
    op : module
        ``alembic.op``, in a host's revision; on SQLite with foreign keys not enforced.

    Raises
    ------
    RuntimeError
        When SQLite enforces foreign keys, before anything is changed.
    """
    connection = op.get_context().connection
    with _keeping_all_rows(connection):
        for table, new in _INDEXES.items():
            for name in new:
                op.drop_index(name, table_name=table)
        _forget(connection)
        _loosen(op)
        for table, old in _OLD_INDEXES.items():
            for name, indexed in old.items():
                op.create_index(name, table, indexed)


def _forget(connection: sa.Connection) -> None:
    # the server's own: 0.1.7 has none, and the host writes them again
    connection.execute(sa.delete(_PROVIDERS).where(_PROVIDERS.c.worker_id.is_(None)))
    there = sa.exists().where(_WORKERS.c.id == _TASKS.c.worker_id)
    connection.execute(
        sa.update(_TASKS).where(_TASKS.c.worker_id.is_not(None), ~there).values(worker_id=None)
    )


def _loosen(op: Any) -> None:
    connection = op.get_context().connection
    for table, columns in _COLUMNS.items():
        with _batch(op, table) as batch:
            for name in _CHECKS.get(table, {}):
                batch.drop_constraint(conv(name), type_="check")
            for column, _, _ in columns:
                batch.drop_column(column)
            if table != "task":
                batch.alter_column("created_at", existing_type=_TIME, server_default=sa.func.now())
            if table in ("job", "provider"):
                full_name = ["room_id", "category", "name"]
                batch.drop_constraint(f"uq_{table}_full_name", type_="unique")
                batch.create_unique_constraint(f"unique_{table}", full_name)
            if table == "provider":
                batch.alter_column("worker_id", existing_type=sa.Uuid(), nullable=False)
            if table == "task":
                batch.alter_column(
                    "payload",
                    existing_type=sa.Text(),
                    existing_nullable=False,
                    type_=sa.JSON(),
                    postgresql_using="payload::json",
                )
                batch.drop_constraint(_foreign_key(connection, "created_by_id"), type_="foreignkey")
                for column, target in (("worker_id", "worker"), ("created_by_id", "user")):
                    batch.create_foreign_key(f"task_{column}_fkey", target, [column], ["id"])
