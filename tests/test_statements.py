"""What a request asks of the database, counted: the bench's figures without their noise."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from steps import claim, offer, report, silence, submit
from zndraw_auth import User

pytestmark = pytest.mark.makers("plain")


@contextmanager
def counted(engine: AsyncEngine) -> Iterator[Counter]:
    """Count look-ups of a user, other statements, commits, and connections.

    And statements of other entities: each execution of one makes a copy, whose key in
    the cache of compiled statements is computed anew.
    """
    counts: Counter[str] = Counter()

    def execute(connection, cursor, statement, parameters, context, many):
        users = re.search(r'^SELECT.*FROM "?user"? ', statement, re.DOTALL)
        counts["users" if users else "statements"] += 1

    def commit(connection):
        counts["commits"] += 1

    def checkout(dbapi, record, proxy):
        counts["connections"] += 1

    def of_entity(state):
        if state.is_orm_statement and state.bind_mapper.class_ is not User:
            counts["entities"] += 1

    listeners = {"before_cursor_execute": execute, "commit": commit, "checkout": checkout}
    for name, listener in listeners.items():
        event.listen(engine.sync_engine, name, listener)
    event.listen(Session, "do_orm_execute", of_entity)
    yield counts
    event.remove(Session, "do_orm_execute", of_entity)
    for name, listener in listeners.items():
        event.remove(engine.sync_engine, name, listener)


async def test_few_statements_and_one_commit(app, ada, engine, session_maker):
    # for a sixtieth of it no sign of life is written again
    app.state.joblib_settings.worker_timeout_seconds = 6000
    patient = await offer(ada, "Again", max_attempts=3, retry_delay_seconds=1)
    await submit(ada, "lab:modifiers:Again")
    (tried,) = await claim(ada, patient)
    worker = await offer(ada)
    tasks = [await submit(ada) for _ in range(60)]
    held = await claim(ada, worker, max_tasks=4)
    next_page = (await ada.get("/rooms/lab/tasks")).links["next"]["url"]
    beat = {"tasks": [{"id": t["id"], "attempt": 1, "progress": 0.5} for t in held]}
    bare = {"tasks": [{"id": t["id"], "attempt": 1} for t in held]}
    some = {"tasks": [beat["tasks"][0], *bare["tasks"][1:]]}
    claiming, job = {"worker_id": worker}, "/rooms/lab/tasks/lab:modifiers:Rotate"
    key = {"Idempotency-Key": "k"}
    # what is asked: how many statements, commits and connections it may take
    asked = {
        "submit": (lambda: ada.post(job, json={}), 2, 1, 1),
        "submit, keyed": (lambda: ada.post(job, json={}, headers=key), 2, 1, 1),
        "submit, repeated": (lambda: ada.post(job, json={}, headers=key), 3, 1, 1),
        "claim": (lambda: ada.post("/tasks/claim", json=claiming), 1, 1, 2),
        "claim, keyed": (
            lambda: ada.post("/tasks/claim", json=claiming, headers=key), 2, 1, 2
        ),
        "claim, repeated": (
            lambda: ada.post("/tasks/claim", json=claiming, headers=key), 3, 1, 2
        ),
        "start": (lambda: report(ada, held[0], "running"), 1, 1, 1),
        # the sign of life is written beside, once in a while
        "claim, unheard": (lambda: ada.post("/tasks/claim", json=claiming), 2, 1, 2),
        "claim, keyed, unheard": (
            lambda: ada.post(
                "/tasks/claim", json=claiming, headers={"Idempotency-Key": "u"}
            ),
            2, 1, 2,
        ),
        "progress": (lambda: ada.patch(f"/workers/{worker}", json=beat), 2, 1, 1),
        "progress of some": (lambda: ada.patch(f"/workers/{worker}", json=some), 2, 1, 1),
        "what stands": (lambda: ada.patch(f"/workers/{worker}", json=bare), 1, 1, 1),
        "complete": (lambda: report(ada, held[0], "completed"), 1, 1, 1),
        "fail": (lambda: report(ada, held[1], "failed"), 1, 1, 1),
        "hand back": (lambda: report(ada, held[3], "pending"), 2, 1, 1),
        "fail, tried again": (lambda: report(ada, tried, "failed"), 2, 1, 1),
        "cancel": (lambda: report(ada, tasks[-1], "cancelled"), 1, 1, 1),
        "heartbeat": (lambda: ada.patch(f"/workers/{worker}"), 1, 1, 1),
        "status": (lambda: ada.get(f"/tasks/{tasks[9]['id']}"), 1, 0, 2),
        "list": (lambda: ada.get("/rooms/lab/tasks"), 2, 0, 1),
        "next page": (lambda: ada.get(f"http://host{next_page}"), 1, 0, 1),
        "drain": (lambda: claim(ada, worker, max_tasks=32), 2, 1, 2),
        "drain again": (lambda: claim(ada, worker, max_tasks=32), 2, 1, 2),
        "empty claim": (lambda: ada.post("/tasks/claim", json=claiming), 2, 1, 2),
        "empty claim again": (lambda: ada.post("/tasks/claim", json=claiming), 2, 1, 2),
        "empty claim, unheard": (
            lambda: ada.post("/tasks/claim", json=claiming), 3, 1, 2
        ),
        "empty claim, keyed": (
            lambda: ada.post(
                "/tasks/claim", json=claiming, headers={"Idempotency-Key": "l"}
            ),
            3, 1, 2,
        ),
    }  # fmt: skip
    too_many = {}
    for name, (ask, statements, commits, connections) in asked.items():
        if "unheard" in name:
            await silence(session_maker, worker)
        with counted(engine) as counts:
            answer = await ask()
        assert getattr(answer, "status_code", 200) < 300, (name, answer.text)
        assert counts["users"] == 1
        allowed = Counter(users=1, statements=statements, commits=commits, connections=connections)
        if counts - allowed:
            too_many[name] = counts - allowed
    assert not too_many
