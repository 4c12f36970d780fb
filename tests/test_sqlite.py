"""SQLite as the example host sets it."""

import sqlite3
from contextlib import closing
from pathlib import Path

import host
from processes import ready, starting
from sqlalchemy import NullPool, text


async def test_processes_may_start_together_on_an_empty_file(tmp_path: Path):
    async with starting(tmp_path, name="one") as one, starting(tmp_path, name="two") as two:
        for process in (one, two):
            # its administrator can log in
            await ready(process)
            assert "zndraw_joblib.doctor" not in process.written()
    with closing(sqlite3.connect(tmp_path / "host.db")) as connection:
        # the administrator, and whom @internal tasks report as
        assert connection.execute("SELECT count(*) FROM user").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_connections_wait_for_no_disk_and_are_kept(tmp_path: Path):
    engine = host.open_database(f"sqlite+aiosqlite:///{tmp_path / 'host.db'}")
    async with engine.connect() as connection:
        normal = 1
        assert await connection.scalar(text("PRAGMA synchronous")) == normal
    assert not isinstance(engine.pool, NullPool)
    await engine.dispose()
