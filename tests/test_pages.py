"""Listings: newest first, by offset, and by a cursor that repeats and misses nothing."""

import base64
import json
from secrets import token_urlsafe
from urllib.parse import quote
from uuid import uuid4

import pytest
from sqlalchemy import event, update
from steps import claim, execute, offer, problem, register, report, submit

from zndraw_joblib.models import Job, ProviderRecord, Task, Worker, now
from zndraw_joblib.schemas import TaskResponse

#: characters that a URI, a header or SQL could trip over
ROOM = "a b'\"?#%25&+é日本>;"
PATH = quote(ROOM, safe="")


async def fill(user, admin, count=7) -> str:
    """Make so many workers, jobs, providers and tasks in a room."""
    worker = await offer(admin, "J0", "@global")
    for n in range(1, count):
        await register(admin, f"J{n}", "@global")
    for n in range(count):
        body = {"category": "files", "name": f"P{n}", "schema": {}}
        answer = await user.put(f"/rooms/{PATH}/providers", json=body)
        assert answer.status_code == 201, answer.text
        await submit(user, "@global:modifiers:J0", PATH)
    return worker


LISTINGS = {
    "/workers": 14,
    f"/rooms/{PATH}/workers": 7,
    f"/rooms/{PATH}/jobs": 7,
    f"/rooms/{PATH}/jobs/@global:modifiers:J0/tasks": 7,
    f"/rooms/{PATH}/tasks": 7,
    f"/rooms/{PATH}/tasks?status=pending": 7,
    f"/rooms/{PATH}/providers": 7,
}


def key(row):
    return row.get("id") or row["full_name"]


async def pages(user, url):
    """Follow the links to the next page, as a client does that knows nothing else."""
    while url:
        answer = await user.get(url)
        assert answer.status_code == 200, answer.text
        yield answer.json()
        link = answer.links.get("next")
        assert link is None or link["rel"] == "next"
        url = link and f"http://host{link['url']}"


@pytest.mark.parametrize("same_moment", [False, True], ids=["spread", "same-moment"])
async def test_every_listing_is_paged(ada, admin, session_maker, same_moment):
    await fill(ada, admin)
    if same_moment:
        tables = (Job, ProviderRecord, Task, Worker)
        await execute(session_maker, *(update(t).values(created_at=now()) for t in tables))
    for url, total in LISTINGS.items():
        everything = (await ada.get(url)).json()
        assert (everything["total"], everything["limit"]) == (total, 50)
        newest_first = [key(row) for row in everything["items"]]
        assert len(set(newest_first)) == total

        with_limit = f"{url}{'&' if '?' in url else '?'}limit="
        walked = [page async for page in pages(ada, f"{with_limit}3")]
        assert [key(row) for page in walked for row in page["items"]] == newest_first
        assert {page["total"] for page in walked} == {total}
        assert all(len(page["items"]) == 3 for page in walked[:-1])

        page = await ada.get(f"{with_limit}2&offset=4")
        assert [key(row) for row in page.json()["items"]] == newest_first[4:6]
        assert (page.json()["limit"], page.json()["offset"]) == (2, 4)
        # a link leads on from any page, and from the last one nowhere
        walked = [page async for page in pages(ada, f"{with_limit}2&offset=4")]
        assert [key(row) for page in walked for row in page["items"]] == newest_first[4:]
        assert [page["offset"] for page in walked] == [4, *[0] * (len(walked) - 1)]
        page = (await ada.get(f"{with_limit}0")).json()
        assert (page["items"], page["total"]) == ([], total)
        page = await ada.get(f"{with_limit}3&offset={2**63 - 1}")
        assert (page.json()["items"], page.json()["total"]) == ([], total)
        assert "link" not in page.headers
        assert len((await ada.get(f"{with_limit}500")).json()["items"]) == total


async def test_tasks_come_newest_first(ada):
    await offer(ada)
    tasks = [await submit(ada) for _ in range(5)]
    page = (await ada.get("/rooms/lab/tasks")).json()
    assert (
        page["items"] == [{**task, "queue_position": n + 1} for n, task in enumerate(tasks)][::-1]
    )


async def test_a_page_leaves_large_contents_out(app, ada):
    """A page of 10 that may take 10,000 bytes shows rows of up to 1,000 each."""
    app.state.joblib_settings.max_page_bytes = 10_000
    worker = await offer(ada)
    small, large = {"text": "é" * 100}, {"text": "é" * 1000}
    tasks = [await submit(ada, payload=p) for p in (small, large, small, small)]
    await claim(ada, worker, max_tasks=4)
    await report(ada, tasks[2], "running")
    await report(ada, tasks[2], "completed", result=["x" * 1000])
    await report(ada, tasks[3], "failed", error="x" * 3000)
    url = "/rooms/lab/tasks?limit="
    ok, full, completed, failed = (await ada.get(f"{url}10")).json()["items"][::-1]
    assert (ok["payload"], ok["abridged"]) == (small, False)
    assert (full["payload"], full["abridged"]) == ({}, True)
    assert (completed["payload"], completed["result"]) == ({}, None)
    assert (len(failed["error"]), failed["errors"]) == (1000, [])
    # nothing is missing but the contents, and the task itself has them
    for shown in (full, completed, failed):
        whole = (await ada.get(f"/tasks/{shown['id']}")).json()
        assert shown.keys() == whole.keys()
        assert whole["payload"] in (small, large)
        assert not whole["abridged"]
    assert not any(t["abridged"] for t in (await ada.get(f"{url}1")).json()["items"])

    # of tasks that are asked for by their ids, as many are whole as fit together
    app.state.joblib_settings.max_query_bytes = 3_000
    ids = [task["id"] for task in tasks]
    found = (await ada.post("/tasks/query", json={"ids": ids})).json()["tasks"]
    assert [(t["abridged"], bool(t["payload"])) for t in found] == [
        (False, True),
        (False, True),
        (True, False),
        (True, False),
    ]

    for name, title in (("small", "x"), ("large", "x" * 2000)):
        body = {"category": "files", "name": name, "schema": {"title": title}}
        assert (await ada.put("/rooms/lab/providers", json=body)).status_code == 201
    items = (await ada.get("/rooms/lab/providers?limit=10")).json()["items"]
    assert [(p["abridged"], len(str(p["schema"])) > 2) for p in items] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("most", [1, 2, 3, 4, 50])
async def test_a_place_is_exact_up_to_the_maximum(ada, app, most):
    app.state.joblib_settings.queue_position_max = most
    for name in ("A", "B"):
        await offer(ada, name)
    for name in "AABABAB":
        await submit(ada, f"lab:modifiers:{name}")
    await submit(ada, "lab:modifiers:A", priority=1)
    delayed = await submit(ada, "lab:modifiers:B", delay_seconds=60)
    places = [t["queue_position"] for t in (await ada.get("/rooms/lab/tasks")).json()["items"]]
    exact = [4, 1, 3, 5, 2, 4, 1, 3, 2]
    assert places == [min(place, most) for place in exact]
    assert delayed["queue_position"] == min(4, most)


async def test_a_walk_repeats_and_misses_nothing_while_things_change(ada):
    worker = await offer(ada)
    tasks = [await submit(ada) for _ in range(6)]
    seen = []
    async for page in pages(ada, "/rooms/lab/tasks?limit=2"):
        seen += [row["id"] for row in page["items"]]
        # what comes in is newer than all that is still to come
        await submit(ada)
        await claim(ada, worker, max_tasks=2)
    assert seen == [task["id"] for task in tasks][::-1]


async def test_the_filter_goes_along(ada):
    await offer(ada)
    tasks = [await submit(ada) for _ in range(6)]
    for task in tasks[::2]:
        await report(ada, task, "cancelled")
    for status, wanted in (("cancelled", tasks[::2]), ("pending", tasks[1::2])):
        url = f"/rooms/lab/tasks?status={status}&limit=1"
        walked = [row["id"] async for page in pages(ada, url) for row in page["items"]]
        assert walked == [task["id"] for task in wanted][::-1]


def token(*fields) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


OUT_OF_BOUNDS = [
    "limit=-1",
    "limit=501",
    "limit=ten",
    "limit=1.5",
    "limit=",
    "limit=1&limit=-1",
    f"limit={2**64}",
    f"limit={'9' * 5000}",
    "offset=-1",
    f"offset={2**63}",
    f"offset={10**400}",
    "offset=0x10",
    "status=done",
    "status=PENDING",
    "status=",
    "status=%00",
    "cursor=x",
    "cursor=%00",
    "cursor=%ff",
    "cursor=" + "A" * 501,
    "cursor=" + base64.urlsafe_b64encode(b"[" * 300).decode(),
    "cursor=" + token(),
    "cursor=" + token(1, 2, 3),
    "cursor=" + token("2026-01-01T00:00:00", uuid4().hex, 1),
    "cursor=" + token("0001-01-01T00:00:00+23:59", uuid4().hex, 1),
    "cursor=" + token("9999-12-31T23:59:59-23:59", uuid4().hex, 1),
    "cursor=" + token("2026-01-01T00:00:00+00:00", "no id", 1),
    "cursor=" + token("2026-01-01T00:00:00+00:00", uuid4().hex, -1),
    "cursor=" + token("2026-01-01T00:00:00+00:00", uuid4().hex, 2**63),
    "cursor=" + token("2026-01-01T00:00:00+00:00", uuid4().hex, None),
]


async def test_a_page_out_of_bounds_is_refused(ada):
    for query in OUT_OF_BOUNDS:
        answer = await ada.get(f"/rooms/lab/tasks?{query}")
        body = problem(answer, 422, "invalid-request")
        assert body["errors"][0]["pointer"].startswith("/query/"), query


async def test_raw_answers_are_what_the_model_writes(ada):
    """Rows are written without the model: read by it, they say the same again."""
    worker = await offer(ada, max_attempts=2)
    payload = {'é"\\': [1e300, -0.0, 2**60, None, "\u2028🦀"], "": {}}
    for result in (None, 0, False, "null", [], {"a": 2.0}, [[payload]]):
        task = await submit(ada, payload=payload)
        await claim(ada, worker, start=True)
        await report(ada, task, "completed", result=result)
    for error in (None, "", 'é\n"}'):
        task = await submit(ada)
        await claim(ada, worker, start=True)
        await report(ada, task, "failed", error=error, retryable=error is None)
    await report(ada, await submit(ada), "cancelled")
    await submit(ada, delay_seconds=60, priority=3)
    listed = (await ada.get("/rooms/lab/tasks")).json()["items"]
    ids = [task["id"] for task in listed]
    found = (await ada.post("/tasks/query", json={"ids": ids})).json()["tasks"]
    single = [(await ada.get(f"/tasks/{task_id}")).json() for task_id in ids]
    assert listed == found == single
    for task in listed:
        assert TaskResponse.model_validate(task).model_dump(mode="json") == task


@pytest.mark.makers("postgres")
async def test_what_is_left_out_is_not_read(app, ada, engine):
    """Hundred kilobytes each that don't compress take fifteen pages each to read."""
    app.state.joblib_settings.max_page_bytes = 10_000
    app.state.joblib_settings.max_query_bytes = 10_000
    await offer(ada)
    ids = [(await submit(ada, payload={"x": token_urlsafe(75_000)}))["id"] for _ in range(20)]
    run = []

    def note(connection, cursor, statement, parameters, context, many):
        run.append((statement, parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    listed = (await ada.get("/rooms/lab/tasks")).json()["items"]
    found = (await ada.post("/tasks/query", json={"ids": ids})).json()["tasks"]
    event.remove(engine.sync_engine, "before_cursor_execute", note)
    assert all(task["abridged"] and not task["payload"] for task in listed + found)
    reading = [ran for ran in run if "payload" in ran[0]]
    assert len(reading) == 2
    async with engine.connect() as connection:
        for statement, parameters in reading:
            explained = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
            (plan,) = (await connection.exec_driver_sql(explained, parameters)).scalar()
            read = plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
            assert read < 200, plan
