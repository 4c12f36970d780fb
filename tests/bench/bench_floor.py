"""The floor: for each operation the one ideal statement, on a table made for it.

The paths, the user dependencies and the sessions are those of the real routes, and the
answers have as many fields. There is nothing else: no rules, no rights, no events.
"""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel
from pydantic_core import to_json
from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    String,
    Table,
    Uuid,
    bindparam,
    insert,
    literal_column,
    select,
    update,
)
from uuid_utils.compat import uuid7
from zndraw_auth import Base, User, current_active_user, current_user_scoped_session
from zndraw_auth.db import SessionDep

from zndraw_joblib.database import now, number
from zndraw_joblib.dependencies import Sessions

moments = ("created_at", "started_at", "completed_at", "claimed_at", "available_at")
texts = ("error", "error_type", "errors", "progress_message")
tasks = Table(
    "floor_task",
    Base.metadata,
    Column("id", Uuid, primary_key=True),
    Column("job_name", String),
    Column("room_id", String),
    Column("status", String),
    *(Column(name, DateTime(timezone=True)) for name in moments),
    *(Column(name, String) for name in texts),
    Column("worker_id", Uuid),
    Column("created_by_id", Uuid),
    Column("payload", JSON),
    Column("result", JSON),
    Column("queue_position", Integer),
    Column("attempt", Integer, default=0),
    Column("max_attempts", Integer, default=1),
    Column("priority", Integer, default=0),
    Column("progress", Float),
)
WAITING = tasks.c.status == literal_column("'pending'")
Index(
    "ix_floor_task_queue",
    tasks.c.created_at,
    tasks.c.id,
    postgresql_where=WAITING,
    sqlite_where=WAITING,
)
Index("ix_floor_task_room", tasks.c.room_id, tasks.c.created_at, tasks.c.id)
workers = Table(
    "floor_worker",
    Base.metadata,
    Column("id", Uuid, primary_key=True),
    Column("last_heartbeat", DateTime(timezone=True)),
    *(Column(name, String) for name in ("state", "desired_state", "cancelled", "lost")),
)

SUBMIT = (
    insert(tasks).values(status="pending", created_at=now(), available_at=now()).returning(*tasks.c)
)
TAKEN = {"worker_id": bindparam("worker"), "attempt": tasks.c.attempt + 1, "claimed_at": now()}
CLAIM, START = (
    update(tasks)
    .where(
        tasks.c.id
        == select(tasks.c.id)
        .where(WAITING)
        .order_by(tasks.c.created_at, tasks.c.id)
        .limit(number(1))
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    .values(taken)
    .returning(*tasks.c)
    for taken in (
        {"status": "claimed", **TAKEN},
        {"status": "running", "started_at": now(), **TAKEN},
    )
)
MOVE = {
    state: update(tasks)
    .where(tasks.c.id == bindparam("task"), tasks.c.status == literal_column(f"'{old}'"))
    .values({"status": state, moment: now()})
    .returning(*tasks.c)
    for state, old, moment in (
        ("running", "claimed", "started_at"),
        ("completed", "running", "completed_at"),
    )
}
READ = select(tasks).where(tasks.c.id == bindparam("task"))
LIST = (
    select(tasks)
    .where(tasks.c.room_id == bindparam("room"))
    .order_by(tasks.c.created_at.desc(), tasks.c.id.desc())
    .limit(number(50))
)
BEAT = (
    update(workers)
    .where(workers.c.id == bindparam("worker"))
    .values(last_heartbeat=now())
    .returning(*workers.c)
)

router = APIRouter(prefix="/floor")
CurrentUser = Annotated[User, Depends(current_active_user)]
WaitingUser = Annotated[User, Depends(current_user_scoped_session)]


class Submission(BaseModel):
    payload: dict[str, Any]


class Claim(BaseModel):
    worker_id: UUID
    start: bool = False


class Report(BaseModel):
    status: str


def answer(row: Any, status: int = 200) -> Response:
    return Response(to_json(row and row._asdict()), status, media_type="application/json")


@router.post("/workers")
async def create_worker(user: CurrentUser, session: SessionDep) -> Response:
    made = insert(workers).values(state="active", desired_state="active", cancelled="[]", lost="[]")
    row = (await session.execute(made.returning(workers.c.id), {"id": uuid7()})).one()
    await session.commit()
    return answer(row, 201)


@router.patch("/workers/{worker_id}")
async def heartbeat(worker_id: UUID, user: CurrentUser, session: SessionDep) -> Response:
    row = (await session.execute(BEAT, {"worker": worker_id})).one()
    await session.commit()
    return answer(row)


@router.post("/rooms/{room_id}/tasks/{job_name:path}")
async def submit(
    room_id: str, job_name: str, body: Submission, user: CurrentUser, session: SessionDep
) -> Response:
    values = {
        "id": uuid7(),
        "job_name": job_name,
        "room_id": room_id,
        "payload": body.payload,
        "created_by_id": user.id,
        "queue_position": 1,
    }
    row = (await session.execute(SUBMIT, values)).one()
    await session.commit()
    return answer(row, 202)


@router.post("/tasks/claim")
async def claim(body: Claim, user: WaitingUser, session_maker: Sessions) -> Response:
    async with session_maker() as session:
        claim = START if body.start else CLAIM
        claimed = await session.execute(claim, {"worker": body.worker_id})
        row = claimed.one_or_none()
        await session.commit()
    return Response(to_json({"task": row and row._asdict()}), media_type="application/json")


@router.get("/tasks/{task_id}")
async def read(task_id: UUID, user: WaitingUser, session_maker: Sessions) -> Response:
    async with session_maker() as session:
        row = (await session.execute(READ, {"task": task_id})).one()
    return answer(row)


@router.patch("/tasks/{task_id}")
async def report(task_id: UUID, body: Report, user: CurrentUser, session: SessionDep) -> Response:
    row = (await session.execute(MOVE[body.status], {"task": task_id})).one()
    await session.commit()
    return answer(row)


@router.get("/rooms/{room_id}/tasks")
async def list_tasks(
    room_id: str, user: CurrentUser, session: SessionDep, limit: Annotated[int, Query()] = 50
) -> Response:
    rows = (await session.execute(LIST, {"room": room_id})).all()
    listed = {"items": [row._asdict() for row in rows], "total": 0, "limit": limit}
    return Response(to_json(listed), media_type="application/json")
