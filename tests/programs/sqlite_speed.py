"""What SQLite does in a second, as it comes and as it should be set: ``nox -s sqlite``."""

import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, Pool
from zndraw_auth import Base, User

from zndraw_joblib.models import Worker

SECONDS = 2.0
WAYS = {
    "as it comes": (),
    "WAL": ("PRAGMA journal_mode=WAL",),
    "WAL, synchronous=NORMAL": ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL"),
}


def by_the_driver(path: Path, pragmas: Iterable[str]) -> float:
    """Return how many rows a second it inserts, one in each transaction."""
    connection = sqlite3.connect(path)
    for pragma in pragmas:
        connection.execute(pragma)
    connection.execute("CREATE TABLE row (id TEXT PRIMARY KEY, text TEXT)")
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + SECONDS:
        connection.execute("INSERT INTO row VALUES (?, ?)", (str(uuid4()), "x" * 200))
        connection.commit()
        count += 1
    rate = count / (time.perf_counter() - began)
    connection.close()
    return rate


async def through_sessions(path: Path, pragmas: Iterable[str], pool: type[Pool]) -> float:
    """Return the same of rows that this package has, through a session for each."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", poolclass=pool)

    @event.listens_for(engine.sync_engine, "connect")
    def set_pragmas(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(pragma)
        cursor.close()

    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    maker = async_sessionmaker(engine)
    owner = uuid4()
    async with maker() as session:
        session.add(User(id=owner, email="ada@example.org", hashed_password="!"))
        await session.commit()
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + SECONDS:
        async with maker() as session:
            session.add(Worker(user_id=owner))
            await session.commit()
        count += 1
    rate = count / (time.perf_counter() - began)
    await engine.dispose()
    return rate


def main() -> None:
    print(f"{'inserts a second':28}{'driver':>10}{'session':>10}{'no pool':>10}")
    for way, pragmas in WAYS.items():
        # of this directory: /tmp may be in memory
        with tempfile.TemporaryDirectory(dir=".") as directory:
            rates = [by_the_driver(Path(directory) / "driver.db", pragmas)]
            for pool in (AsyncAdaptedQueuePool, NullPool):
                path = Path(directory) / f"{pool.__name__}.db"
                rates.append(asyncio.run(through_sessions(path, pragmas, pool)))
        print(f"{way:28}" + "".join(f"{rate:10.0f}" for rate in rates))


if __name__ == "__main__":
    main()
