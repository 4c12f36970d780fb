"""Alembic's environment of the example host: the database that ``host.py`` uses."""

import asyncio
import os

import zndraw_auth as auth
from alembic import context
from sqlalchemy import Connection

import zndraw_joblib.models  # noqa: F401 - puts the tables on the metadata


def migrate(connection: Connection) -> None:
    """Run what ``alembic`` was asked for, all of it or nothing."""
    if connection.dialect.name == "sqlite":
        # tables are made anew, and dropping the old ones must take no rows along
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        # the driver would begin later, after the first changes
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    context.configure(
        connection=connection,
        target_metadata=auth.Base.metadata,
        render_as_batch=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def main() -> None:
    """Open the database, migrate and commit."""
    engine = auth.create_engine_for_url(
        os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///zndraw-joblib.db")
    )
    async with engine.begin() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


asyncio.run(main())
