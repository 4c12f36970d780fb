"""A database of 0.1.7, brought to the tables of today with Alembic, and back."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from itertools import cycle, product
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import conftest
import host
import pages
import pytest
import sqlalchemy as sa
import steps
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from fastapi import FastAPI
from fastapi_users_db_sqlalchemy.generics import GUID
from makers import SessionMaker
from migrations.versions import joblib_0_2
from processes import fresh_database
from sqlalchemy.ext.asyncio import AsyncEngine
from zndraw_auth import Base, create_engine_for_url

from zndraw_joblib.models import ProviderRecord

pytestmark = pytest.mark.makers("plain", "postgres")

DOCS = Path(host.__file__).parent
REVISION = Path(joblib_0_2.__file__).read_text()
OLD_TABLES = Path(__file__).parent / "data"
TASKS = 10_000
START = datetime(2025, 12, 1, 12, 0, 0, 123456, UTC)
STATES = ("PENDING", "CLAIMED", "RUNNING", "COMPLETED", "FAILED", "CANCELLED")
OURS = ("job", "worker", "worker_job_link", "provider", "task")

moment, status = sa.DateTime(timezone=True), sa.Enum(*STATES, name="taskstatus")


def table(name: str, /, **columns: Any) -> sa.TableClause:
    return sa.table(name, *(sa.column(*column) for column in columns.items()))


named = {"id": sa.Uuid, "room_id": sa.String, "category": sa.String, "name": sa.String,
         "schema": sa.JSON, "created_at": moment}  # fmt: skip
#: the tables of 0.1.7, as far as their rows go
OLD = {
    "user": table("user", id=GUID, email=sa.String, hashed_password=sa.String,
                  is_active=sa.Boolean, is_superuser=sa.Boolean, is_verified=sa.Boolean),
    "job": table("job", **named, deleted=sa.Boolean),
    "worker": table("worker", id=sa.Uuid, user_id=GUID, last_heartbeat=moment,
                    created_at=moment),
    "worker_job_link": table("worker_job_link", worker_id=sa.Uuid, job_id=sa.Uuid),
    "provider": table("provider", **named, content_type=sa.String, user_id=GUID,
                      worker_id=sa.Uuid),
    "task": table("task", id=sa.Uuid, job_id=sa.Uuid, worker_id=sa.Uuid,
                  room_id=sa.String, created_by_id=GUID, payload=sa.JSON, status=status,
                  created_at=moment, started_at=moment, completed_at=moment,
                  error=sa.Text),
}  # fmt: skip

Rows = dict[str, list[dict[str, Any]]]


def old_rows(count: int) -> Rows:
    """Return what 0.1.7 may have left, tidy and untidy: tasks in every shape."""
    users = [conftest.user_row(name) for name in ("ann", "ben")]
    ann, ben = (user["id"] for user in users)
    jobs = [
        {"id": uuid4(), "room_id": room, "category": "modifiers", "name": name,
         "schema": {}, "deleted": deleted, "created_at": START}
        for room, name, deleted in (
            ("lab", "Rotate", False), ("@global", "Scale", False),
            ("@internal", "Wrap", False), ("lab", "Gone", True),
        )
    ]  # fmt: skip
    workers = [
        {"id": uuid4(), "user_id": ann, "last_heartbeat": START, "created_at": START}
        for _ in range(2)
    ]
    links = [
        {"worker_id": worker["id"], "job_id": job["id"]}
        for worker, job in product(workers, jobs[:2])
    ]
    providers = [
        {"id": uuid4(), "room_id": "lab", "category": "files", "name": "Disk",
         "schema": {}, "created_at": START, "content_type": "text/plain",
         "user_id": ann, "worker_id": workers[0]["id"]}
    ]  # fmt: skip
    # whatever can be together: a worker or none, a time or none
    shapes = cycle(product(STATES, jobs, (workers[1]["id"], None), *[(True, False)] * 2))
    tasks = []
    for n, (state, job, worker, started, ended) in zip(range(count), shapes, strict=False):
        # two share each moment, and not in the order of their ids
        created = START + timedelta(seconds=n // 2)
        failed = state == "FAILED"
        tasks.append(
            {"id": uuid4(), "job_id": job["id"], "worker_id": worker, "room_id": "lab",
             "created_by_id": ben if n % 3 else None, "payload": {"n": n},
             "status": state, "created_at": created,
             "started_at": created + timedelta(seconds=1) if started else None,
             "completed_at": created + timedelta(seconds=2) if ended else None,
             "error": "Worker disconnected" if failed and n % 2 else None}
        )  # fmt: skip
    return {"user": users, "job": jobs, "worker": workers, "worker_job_link": links,
            "provider": providers, "task": tasks}  # fmt: skip


def make_old(connection: sa.Connection, rows: Rows) -> None:
    kind = connection.dialect.name
    ddl = (OLD_TABLES / f"tables-0.1.7-{kind}.sql").read_text()
    for statement in filter(str.strip, ddl.split(";")):
        connection.execute(sa.text(statement))
    for name, old in OLD.items():
        connection.execute(sa.insert(old), rows[name])
    if kind == "sqlite":
        # as its own default writes it
        connection.execute(sa.text("UPDATE job SET created_at = CURRENT_TIMESTAMP"))


def read_old(connection: sa.Connection) -> Rows:
    utc = {"created_at", "started_at", "completed_at", "last_heartbeat"}
    return {
        name: [
            {k: v.replace(tzinfo=UTC) if v and k in utc else v for k, v in row.items()}
            for row in connection.execute(sa.select(old)).mappings()
        ]
        for name, old in OLD.items()
    }


def told(thing: Any, *hidden: str) -> Any:
    """Return a thing that the inspector tells of, so that it can be compared."""
    if isinstance(thing, dict):
        return sorted((k, told(v, *hidden)) for k, v in thing.items() if k not in hidden)
    if isinstance(thing, list):
        return [told(part, *hidden) for part in thing]
    # clauses, types, names and nothing
    return " ".join(str(thing).split())


def shape(connection: sa.Connection, *hidden: str) -> Any:
    """Return what the database says of our tables, names and all, in one order."""
    look = sa.inspect(connection)
    return {
        t: {
            "columns": sorted(
                (c["name"], str(c["type"]), c["nullable"], c["default"])
                for c in look.get_columns(t)
            ),
            # columns, uniqueness and conditions with the names
            "indexes": sorted(told(look.get_indexes(t))),
            "unique": sorted(told(look.get_unique_constraints(t))),
            "checks": sorted(told(look.get_check_constraints(t))),
            "keys": sorted(told(look.get_foreign_keys(t), *hidden)),
            "primary": told(look.get_pk_constraint(t)),
        }
        for t in OURS
    }


def shape_but_for_keys_names(connection: sa.Connection) -> Any:
    """Return the same without the names that 0.1.7 has on PostgreSQL alone."""
    return shape(connection, "name")


def names_of_keys(connection: sa.Connection) -> list[tuple[str, str | None]]:
    """Return how the foreign keys are named, and how they should be."""
    look = sa.inspect(connection)
    return [
        (f"{t}_{key['constrained_columns'][0]}_fkey", key["name"])
        for t in OURS
        for key in look.get_foreign_keys(t)
    ]


def differences(connection: sa.Connection) -> Any:
    context = MigrationContext.configure(
        connection, opts={"compare_type": True, "compare_server_default": True}
    )
    return compare_metadata(context, Base.metadata)


async def alembic(
    engine: AsyncEngine, monkeypatch: Any, verb: str, target: str, directory: Path = DOCS
) -> None:
    url = engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("DATABASE_URL", url)
    config = Config(directory / "alembic.ini")
    await asyncio.to_thread(getattr(command, verb), config, target)


@pytest.fixture
def database_url(maker: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if maker == "postgres":
        return request.getfixturevalue("postgres_url")
    return f"sqlite+aiosqlite:///{tmp_path / 'of-0.1.7.sqlite'}"


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Rows:
    return old_rows(getattr(request, "param", TASKS))


@pytest.fixture
async def engine(maker: str, database_url: str, rows: Rows) -> AsyncIterator[AsyncEngine]:
    """Yield the engine of a database of 0.1.7."""
    async with AsyncExitStack() as stack:
        if maker == "postgres":
            fresh = fresh_database(database_url, "of_0_1_7")
            database_url = await stack.enter_async_context(fresh)
        engine = create_engine_for_url(database_url)
        stack.push_async_callback(engine.dispose)
        async with engine.begin() as connection:
            await connection.run_sync(make_old, rows)
        yield engine


async def look(engine: AsyncEngine, reading: Callable[[sa.Connection], Any]) -> Any:
    async with engine.connect() as connection:
        return await connection.run_sync(reading)


def by_id(rows: Iterable[dict[str, Any]]) -> dict[UUID, dict[str, Any]]:
    return {row["id"]: row for row in rows}


def mended(task: dict[str, Any], internal: UUID) -> dict[str, Any]:
    """Return what becomes of a task, as docs/upgrade.md says; None is the upgrade's."""
    held = task["status"] in ("CLAIMED", "RUNNING")
    since = task["started_at"] or task["created_at"]
    if task["status"] == "PENDING":
        return task | {"worker_id": None, "started_at": None, "completed_at": None}
    if held and task["worker_id"] is None and task["job_id"] != internal:
        return task | {"status": "FAILED", "error": "Worker disconnected",
                       "completed_at": None, "started_at": task["started_at"]
                       if task["status"] == "CLAIMED" else since}  # fmt: skip
    if held:
        started = since if task["status"] == "RUNNING" else task["started_at"]
        return task | {"completed_at": None, "started_at": started}
    return task | {"completed_at": task["completed_at"] or since}


async def work(app: FastAPI, rows: Rows, maker: SessionMaker) -> set[UUID]:
    """Let users go on where 0.1.7 left them; return the tasks that they moved."""
    ann, ben = [await conftest.log_in(app, user) for user in rows["user"]]
    tasks = rows["task"]
    old_worker = rows["worker"][1]["id"]
    in_turn = sorted(
        (t for t in tasks if t["status"] == "PENDING"), key=lambda t: (t["created_at"], t["id"])
    )
    served = [job["id"] for job in rows["job"][:2]]
    waiting = [t for t in in_turn if t["job_id"] in served]
    claimed = await steps.claim(ann, str(old_worker), max_tasks=8)
    assert [UUID(t["id"]) for t in claimed] == [t["id"] for t in waiting[:8]]
    assert claimed[0]["job_name"] in (steps.JOB, "@global:modifiers:Scale")
    assert (await steps.report(ann, claimed[0], "running")).status_code == 200
    assert (await steps.report(ann, claimed[0], "completed")).status_code == 200

    # behind all of his own that waited before, and beside the one after them
    new = await steps.submit(ben, steps.JOB)
    before = [t for t in waiting[8:] if t["job_id"] == served[0]]
    last = max(n for n, t in enumerate(before, 1) if t["created_by_id"])
    assert new["queue_position"] - last in (1, 2)

    def one(status: str, job: int = 0, **fields: Any) -> dict[str, Any]:
        return next(
            t
            for t in tasks
            if t["status"] == status
            and t["job_id"] == rows["job"][job]["id"]
            and t["created_by_id"]
            and fields.items() <= t.items()
        )

    ended = one("COMPLETED", 3)
    shown = await steps.read(ben, ended)
    assert shown["job_name"] == "lab:modifiers:Gone"
    assert (shown["status"], shown["payload"]) == ("completed", ended["payload"])
    assert datetime.fromisoformat(shown["created_at"]) == ended["created_at"]

    failed = one("FAILED")
    assert (await ben.post(f"/tasks/{failed['id']}/retry")).status_code == 202
    held = one("RUNNING", worker_id=old_worker)
    assert (await steps.report(ann, held, "completed")).status_code == 200
    held_too = one("CLAIMED", worker_id=old_worker)
    assert (await steps.report(ben, held_too, "cancelled")).status_code == 200

    # 0.1.7 knows no task of a worker that is gone, and no provider without a worker
    worker = await steps.offer(ann, "Short")
    await steps.submit(ben, "lab:modifiers:Short")
    (short,) = await steps.claim(ann, worker)
    assert (await steps.report(ann, short, "running")).status_code == 200
    assert (await steps.report(ann, short, "completed")).status_code == 200
    assert (await ann.delete(f"/workers/{worker}")).status_code == 204
    assert (await steps.read(ben, short))["worker_id"] == worker
    await steps.execute(
        maker,
        sa.insert(ProviderRecord).values(
            room_id="@internal", category="files", name="Own", schema_={}, user_id=ann.id
        ),
    )
    moved = {UUID(task["id"]) for task in (*claimed, new, short)}
    return moved | {failed["id"], held["id"], held_too["id"]}


async def test_there_work_and_back(
    engine: AsyncEngine,
    rows: Rows,
    app: FastAPI,
    session_maker: SessionMaker,
    monkeypatch: pytest.MonkeyPatch,
):
    before = await look(engine, shape_but_for_keys_names)
    kept = await look(engine, read_old)
    await alembic(engine, monkeypatch, "upgrade", "head")
    assert await look(engine, differences) == []

    moved = await work(app, rows, session_maker)
    await alembic(engine, monkeypatch, "downgrade", "base")
    assert await look(engine, shape_but_for_keys_names) == before
    assert all(name == to_be for to_be, name in await look(engine, names_of_keys))
    after = await look(engine, read_old)
    for name in ("user", "worker_job_link", "provider"):
        assert after[name] == kept[name]
    jobs, workers = by_id(after["job"]), by_id(after["worker"])
    assert {**jobs, **by_id(kept["job"])} == jobs
    # one was heard again
    assert workers.keys() == by_id(kept["worker"]).keys()
    tasks = by_id(after["task"])
    assert tasks.keys() >= by_id(kept["task"]).keys() | moved
    for old in kept["task"]:
        now = tasks[old["id"]]
        if old["id"] in moved:
            lasting = ("job_id", "room_id", "created_by_id", "payload", "created_at")
            assert [now[k] for k in lasting] == [old[k] for k in lasting]
            continue
        expected = mended(old, rows["job"][2]["id"])
        if expected["status"] == "FAILED" and expected["completed_at"] is None:
            assert now["completed_at"] > START
            expected["completed_at"] = now["completed_at"]
        assert now == expected


@pytest.mark.parametrize("rows", [192], indirect=True)
async def test_it_becomes_what_a_new_database_is(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
):
    await alembic(engine, monkeypatch, "upgrade", "head")
    upgraded = await look(engine, shape)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    assert upgraded == await look(engine, shape)
    names = [
        dict(thing)["name"]
        for table in upgraded.values()
        for kind in ("indexes", "unique", "checks")
        for thing in table[kind]
    ]
    assert len(names) > 20
    assert [n for n in names if not re.match(r"(ix|uq|ck)_", n)] == []


HOST_ENV = """
import asyncio
import os
from zndraw_auth import create_engine_for_url

async def main():
    engine = create_engine_for_url(os.environ["DATABASE_URL"])
    async with engine.begin() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()

asyncio.run(main())
"""
HOST_BEFORE = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "host_1", None


def upgrade():
    # the host's own table, whose rows hang on ours
    job = sa.ForeignKey("job.id", name="favourite_job_id_fkey", ondelete="CASCADE")
    op.create_table("favourite", sa.Column("job_id", sa.Uuid(), job, primary_key=True))
    op.execute("INSERT INTO favourite SELECT id FROM job")


def downgrade():
    op.drop_table("favourite")
"""
HOST_AFTER = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "host_2", "joblib_0_2"


def upgrade():
    op.add_column("favourite", sa.Column("note", sa.String()))


def downgrade():
    with op.batch_alter_table("favourite") as batch:
        batch.drop_column("note")
"""


@pytest.mark.parametrize("rows", [192], indirect=True)
async def test_it_stands_in_a_history_of_the_hosts(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    directory = tmp_path / "host"
    versions = directory / "migrations" / "versions"
    versions.mkdir(parents=True)
    shutil.copy(DOCS / "alembic.ini", directory)
    # as the page shows them
    shown = [b.code for b in pages.blocks(DOCS / "upgrade.md", "python")]
    (env,) = (code for code in shown if "alembic" in code)
    first, its = "down_revision = None", 'down_revision = "host_1"'
    assert first in REVISION
    (versions / "joblib_0_2.py").write_text(REVISION.replace(first, its))
    (directory / "migrations" / "env.py").write_text(env + HOST_ENV)
    (versions / "host_1.py").write_text(HOST_BEFORE)
    (versions / "host_2.py").write_text(HOST_AFTER)

    def favourites(connection: sa.Connection) -> Any:
        look = sa.inspect(connection)
        ids = connection.scalars(
            sa.select(sa.column("job_id", sa.Uuid)).select_from(sa.table("favourite"))
        )
        revision = MigrationContext.configure(connection).get_current_revision()
        return revision, set(ids), told(look.get_foreign_keys("favourite"))

    async def go(verb: str, target: str) -> None:
        await alembic(engine, monkeypatch, verb, target, directory)

    await go("upgrade", "host_1")
    before = await look(engine, shape_but_for_keys_names)
    revision, ids, keys = await look(engine, favourites)
    assert (revision, len(ids)) == ("host_1", 4)
    for _ in range(2):
        await go("upgrade", "head")
        assert await look(engine, favourites) == ("host_2", ids, keys)
        upgraded = await look(engine, shape)
        await go("downgrade", "host_1")
        assert await look(engine, favourites) == ("host_1", ids, keys)
        assert await look(engine, shape_but_for_keys_names) == before
    await go("upgrade", "joblib_0_2")
    assert await look(engine, shape) == upgraded
    assert (await look(engine, favourites))[0] == "joblib_0_2"


@pytest.mark.parametrize("rows", [192], indirect=True)
async def test_all_of_it_or_nothing(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    async with engine.begin() as connection:
        # in the way of one of the last steps
        await connection.execute(sa.text("CREATE INDEX ix_task_job_room ON job (name)"))
    before = await look(engine, shape), await look(engine, read_old)
    with pytest.raises(sa.exc.DBAPIError, match="ix_task_job_room"):
        await alembic(engine, monkeypatch, "upgrade", "head")
    assert (await look(engine, shape), await look(engine, read_old)) == before


@pytest.mark.makers("plain")
@pytest.mark.parametrize("rows", [192], indirect=True)
async def test_enforced_foreign_keys_are_refused(engine: AsyncEngine):
    def migrate(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        context = MigrationContext.configure(connection)
        refused = pytest.raises(RuntimeError, match="PRAGMA foreign_keys = OFF")
        with Operations.context(context), refused:
            joblib_0_2.upgrade()

    before = await look(engine, shape)
    await look(engine, migrate)
    assert await look(engine, shape) == before
