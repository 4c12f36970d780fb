"""The bare floor: one statement in plain SQL for each operation, and its row as JSON.

What stands before it is the host's: the same user, the same session. Nothing is taken
from this package: no models, no types, no validation. Ids and documents are text, so that
neither the driver nor the answer has to make anything of them.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic_core import to_json
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from uuid_utils import uuid7
from zndraw_auth import User, current_active_user, current_user_scoped_session
from zndraw_auth.db import SessionDep, get_session_maker

COLUMNS = (
    "id, job_name, room_id, status, created_at, started_at, completed_at, claimed_at,"
    " worker_id, created_by_id, payload, error, result, attempt, priority, progress"
)
TABLES = (
    """CREATE TABLE IF NOT EXISTS bare_task (
        id VARCHAR(36) PRIMARY KEY, job_name VARCHAR(255), room_id VARCHAR(255),
        status VARCHAR(16), created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
        started_at TIMESTAMP, completed_at TIMESTAMP, claimed_at TIMESTAMP,
        worker_id VARCHAR(36), created_by_id VARCHAR(36), payload TEXT, error TEXT,
        result TEXT, attempt INTEGER DEFAULT 0, priority INTEGER DEFAULT 0,
        progress FLOAT)""",
    """CREATE INDEX IF NOT EXISTS ix_bare_task_queue ON bare_task (id)
        WHERE status = 'pending'""",
    "CREATE INDEX IF NOT EXISTS ix_bare_task_room ON bare_task (room_id, created_at, id)",
    """CREATE TABLE IF NOT EXISTS bare_worker (
        id VARCHAR(36) PRIMARY KEY, last_heartbeat TIMESTAMP)""",
)
SUBMIT = text(
    "INSERT INTO bare_task (id, job_name, room_id, status, created_by_id, payload)"
    " VALUES (:id, :job_name, :room_id, 'pending', :created_by_id, :payload)"
    f" RETURNING {COLUMNS}"
)
READ = text(f"SELECT {COLUMNS} FROM bare_task WHERE id = :task")
LIST = text(
    f"SELECT {COLUMNS} FROM bare_task WHERE room_id = :room"
    " ORDER BY created_at DESC, id DESC LIMIT 50"
)
WORKER = text("INSERT INTO bare_worker (id) VALUES (:id) RETURNING id, last_heartbeat")
BEAT = text(
    "UPDATE bare_worker SET last_heartbeat = CURRENT_TIMESTAMP WHERE id = :worker"
    " RETURNING id, last_heartbeat"
)
MOVE = {
    status: text(
        f"UPDATE bare_task SET status = '{status}', {moment} = CURRENT_TIMESTAMP"
        f" WHERE id = :task AND status = '{before}' RETURNING {COLUMNS}"
    )
    for status, before, moment in (
        ("running", "claimed", "started_at"),
        ("completed", "running", "completed_at"),
    )
}


def claiming(locks: bool) -> dict[bool, TextClause]:
    """Return the statements for a claim, and for one that starts."""
    skipping = "FOR UPDATE SKIP LOCKED" if locks else ""
    return {
        start: text(
            f"UPDATE bare_task SET status = '{status}', worker_id = :worker,"
            f" attempt = attempt + 1, claimed_at = CURRENT_TIMESTAMP {more}"
            " WHERE id = (SELECT id FROM bare_task WHERE status = 'pending'"
            f" ORDER BY id LIMIT 1 {skipping}) RETURNING {COLUMNS}"
        )
        for start, status, more in (
            (False, "claimed", ""),
            (True, "running", ", started_at = CURRENT_TIMESTAMP"),
        )
    }


CLAIM = {locks: claiming(locks) for locks in (True, False)}

router = APIRouter(prefix="/bare")
CurrentUser = Annotated[User, Depends(current_active_user)]
WaitingUser = Annotated[User, Depends(current_user_scoped_session)]
Maker = Annotated[async_sessionmaker[AsyncSession], Depends(get_session_maker)]


def answer(shown: Any, status: int = 200) -> Response:
    return Response(to_json(shown), status, media_type="application/json")


@router.post("/workers")
async def create_worker(user: CurrentUser, session: SessionDep) -> Response:
    row = (await session.execute(WORKER, {"id": str(uuid7())})).one()
    await session.commit()
    return answer(row._asdict(), 201)


@router.patch("/workers/{worker_id}")
async def heartbeat(worker_id: str, user: CurrentUser, session: SessionDep) -> Response:
    row = (await session.execute(BEAT, {"worker": worker_id})).one()
    await session.commit()
    return answer(row._asdict())


@router.post("/rooms/{room_id}/tasks/{job_name:path}")
async def submit(
    request: Request, room_id: str, job_name: str, user: CurrentUser, session: SessionDep
) -> Response:
    body = await request.json()
    values = {
        "id": str(uuid7()),
        "job_name": job_name,
        "room_id": room_id,
        "created_by_id": str(user.id),
        "payload": to_json(body["payload"]).decode(),
    }
    row = (await session.execute(SUBMIT, values)).one()
    await session.commit()
    return answer(row._asdict(), 202)


@router.post("/tasks/claim")
async def claim(request: Request, user: WaitingUser, session_maker: Maker) -> Response:
    body = await request.json()
    async with session_maker() as session:
        locks = session.get_bind().dialect.name == "postgresql"
        statement = CLAIM[locks][body.get("start", False)]
        claimed = await session.execute(statement, {"worker": body["worker_id"]})
        row = claimed.one_or_none()
        await session.commit()
    return answer({"task": row and row._asdict()})


@router.get("/tasks/{task_id}")
async def read(task_id: str, user: WaitingUser, session_maker: Maker) -> Response:
    async with session_maker() as session:
        row = (await session.execute(READ, {"task": task_id})).one()
    return answer(row._asdict())


@router.patch("/tasks/{task_id}")
async def report(
    request: Request, task_id: str, user: CurrentUser, session: SessionDep
) -> Response:
    body = await request.json()
    row = (await session.execute(MOVE[body["status"]], {"task": task_id})).one()
    await session.commit()
    return answer(row._asdict())


@router.get("/rooms/{room_id}/tasks")
async def list_tasks(room_id: str, user: CurrentUser, session: SessionDep) -> Response:
    rows = (await session.execute(LIST, {"room": room_id})).all()
    return answer({"items": [row._asdict() for row in rows]})
