"""Bad input is 4xx problem+json, stores nothing, and spoils nothing for others.

Every text, number, JSON and header position of the routes, and what may not stand there.
What is accepted has to come back as it went in, wherever it is shown.
"""

import json
import math
from collections.abc import AsyncIterator
from itertools import product
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from conftest import User
from hypothesis import given
from hypothesis import strategies as st
from makers import SessionMaker
from steps import JOB, claim, offer, problem, read, register, report, stored, submit

from zndraw_joblib.encoding import parse_json
from zndraw_joblib.exceptions import PROBLEM_JSON

# what matters here is what a database takes, and not how sessions are made
pytestmark = pytest.mark.makers("plain", "postgres")
#: what is refused before any database sees it
NO_DATABASE = pytest.mark.makers("plain")

JSON = {"Content-Type": "application/json"}
ID = "01900000-0000-7000-8000-000000000000"
DEEP = 100_000

#: what JSON parsers let through more often than not, and databases don't
POISON = {
    "NUL": r'"\u0000"',
    "NUL in a key": r'{"a\u0000b": 1}',
    "NUL, raw": '"\x00"',
    "NUL, deep down": r'[[{"a": [{"b": "\u0000"}]}]]',
    "high surrogate": r'"\ud800"',
    "low surrogate": r'"\udfff"',
    "surrogates the wrong way round": r'"\udc00\ud800"',
    "surrogate in a key": r'{"\ud800": 1}',
    "NaN": "NaN",
    "Infinity": "Infinity",
    "minus Infinity": "[-Infinity]",
    "more than a double": "1e400",
    "less than a double": "[-1e+0400]",
    "more than a double, in digits": "1" + "0" * 400 + ".5",
    "more than a double, in both": "1" * 300 + "e99",
    "more than a double, with a sign": '{"a": 1E+400}',
    "more than a double, after a backslash": r'["\\", 1e400]',
    "more than a double, after a quote": r'["\"", 1e400, "\\\""]',
    "2**63": str(2**63),
    "-2**63 - 1": str(-(2**63) - 1),
    "401 digits": "1" + "0" * 400,
    "5000 digits": "9" * 5000,
    "deep list": "[" * DEEP + "]" * DEEP,
    "deep object": '{"a":' * DEEP + "1" + "}" * DEEP,
    "cut short": '{"a": [1, 2',
    "single quotes": "{'a': 1}",
    "comment": "1 // one",
    "trailing comma": "[1,]",
    "two values": "1 2",
    "latin-1": '"\xe9"'.encode("latin-1"),
    "overlong slash": b'"\xc0\xaf"',
    "surrogate in UTF-8": b'"\xed\xa0\x80"',
}


class Scene:
    """A job with a worker that holds one task, and one task that waits."""

    def __init__(self, user: User, session_maker: SessionMaker) -> None:
        self.user = user
        self.session_maker = session_maker

    async def set_up(self) -> None:
        self.worker = await offer(self.user)
        await submit(self.user)
        (self.held,) = await claim(self.user, self.worker)
        await report(self.user, self.held, "running")
        self.waiting = await submit(self.user)
        await self.go_on()

    async def look(self) -> Any:
        listings = [
            await self.user.get(f"/rooms/lab/{noun}")
            for noun in ("jobs", "tasks", "workers", "providers")
        ]
        assert {listing.status_code for listing in listings} == {200}
        held = await read(self.user, self.held)
        return await stored(self.session_maker), held, [a.json() for a in listings]

    async def go_on(self) -> None:
        """Take it for granted that something was stored."""
        self.before = await self.look()

    async def refuses(self, answer: httpx.Response, *statuses: int) -> Any:
        """Nothing was stored, and whoever looks sees what there was."""
        what = f"{answer.request.method} {answer.request.url}: {answer.text[:500]}"
        assert answer.status_code in statuses, what
        assert answer.headers["content-type"] == PROBLEM_JSON
        body = answer.json()
        assert body["status"] == answer.status_code
        assert body["type"].startswith("/v1/problems/")
        assert len(answer.content) < 10_000
        assert await stored(self.session_maker) == self.before[0]
        return body


@pytest.fixture
async def scene(ada: User, session_maker: SessionMaker) -> AsyncIterator[Scene]:
    scene = Scene(ada, session_maker)
    await scene.set_up()
    yield scene
    assert await scene.look() == scene.before
    # and nobody's claims and heartbeats are spoilt
    (claimed,) = await claim(ada, scene.worker)
    assert claimed["id"] == scene.waiting["id"]
    beat = {"tasks": [{"id": claimed["id"], "attempt": 1, "progress": 0.5}]}
    assert (await ada.patch(f"/workers/{scene.worker}", json=beat)).status_code == 200


#: where JSON goes, `$` being what is to be refused
JSON_POSITIONS = {
    "payload": ("POST", f"/rooms/lab/tasks/{JOB}", '{"payload": {"a": $}}'),
    "unknown field": ("POST", f"/rooms/lab/tasks/{JOB}", '{"payload": {}, "x": $}'),
    "whole body": ("POST", f"/rooms/lab/tasks/{JOB}", "$"),
    "schema": (
        "PUT",
        "/rooms/lab/jobs",
        '{"category": "modifiers", "name": "New", "schema": {"default": $}}',
    ),
    "provider's schema": (
        "PUT",
        "/rooms/lab/providers",
        '{"category": "files", "name": "New", "schema": {"default": $}}',
    ),
    "result": ("PATCH", "/tasks/HELD", '{"status": "completed", "result": $}'),
    "error": ("PATCH", "/tasks/HELD", '{"status": "failed", "error": $}'),
    "heartbeat": ("PATCH", "/workers/WORKER", '{"tasks": [], "x": $}'),
    "claim": ("POST", "/tasks/claim", '{"worker_id": "WORKER", "x": $}'),
}


@pytest.mark.parametrize("position", JSON_POSITIONS)
async def test_poison(ada, scene, position):
    method, path, template = (
        part.replace("HELD", scene.held["id"]).replace("WORKER", scene.worker)
        for part in JSON_POSITIONS[position]
    )
    for name, value in POISON.items():
        poison = value if isinstance(value, bytes) else value.encode()
        body = template.encode().replace(b"$", poison)
        answer = await ada.request(method, path, content=body, headers=JSON)
        told = await scene.refuses(answer, 400)
        assert told["type"] == "/v1/problems/malformed-body", name


@pytest.mark.parametrize(
    "payload",
    [
        {"a": "\U0001f300 旋 \u202e\ufeff\uffff \x01\x7f\x85 \\u0000 \\ud800"},
        {"": {"": ""}, "a.b": 1, "$ref": "#", "__proto__": None, "%00": "'; --"},
        {"n": [2**63 - 1, -(2**63), 1e308, 5e-324, -0.0, 0.1, 1e16, 12345678901234567]},
        {"deep": json.loads("[" * 100 + "]" * 100)},
        {"long": "x" * 500_000},
        {"wide": {f"k{n}": n for n in range(10_000)}},
    ],
    ids=lambda payload: next(iter(payload)) or "odd keys",
)
async def test_what_is_accepted_comes_back_as_it_went_in(ada, events, payload):
    # a schema is limited to 64 KiB, a payload is not
    schema = {"default": payload} if len(json.dumps(payload)) < 60_000 else {}
    worker = await offer(ada, schema=schema)
    job = (await ada.get(f"/rooms/lab/jobs/{JOB}")).json()
    assert job["schema"] == schema
    task = await submit(ada, payload=payload)
    assert task["payload"] == payload
    (listed,) = (await ada.get("/rooms/lab/tasks")).json()["items"]
    (claimed,) = await claim(ada, worker)
    assert claimed["payload"] == payload
    # a listing carries no megabytes
    assert listed["abridged"] or listed["payload"] == payload
    await report(ada, task, "running")
    text = json.dumps(payload, ensure_ascii=False)[:60_000]
    assert (await report(ada, task, "failed", error=text)).json()["error"] == text
    assert (await ada.post(f"/tasks/{task['id']}/retry")).json()["error"] == text
    assert events[-2].data["error"] == text
    await claim(ada, worker)
    await report(ada, task, "running")
    done = await report(ada, task, "completed", result=payload)
    assert done.json()["result"] == (await read(ada, task))["result"] == payload


NO_NAMES = [
    "",
    "n" * 256,
    "a:b",
    "a\nb",
    "a\tb",
    "a\x00b",
    "a\x7f",
    "\x85",
    "\ud800",
    None,
    1,
    ["a"],
    {"a": 1},
]


@given(
    st.text('"\\e019.[{,'),
    st.from_regex(r"-?(0|[1-9][0-9]{0,22})(\.[0-9]{1,22})?([eE][+-]?[0-9]{1,4})?", fullmatch=True),
)
def test_a_number_is_taken_if_it_can_be_kept(beside: str, number: str):
    """Whatever stands in a string beside it."""
    body = json.dumps([beside, "#"]).replace('"#"', number)
    kept = [beside, json.loads(number)]
    if -(2**63) <= kept[1] < 2**63 if isinstance(kept[1], int) else math.isfinite(kept[1]):
        assert parse_json(body.encode()) == kept
    else:
        with pytest.raises(ValueError, match="limited to"):
            parse_json(body.encode())


async def test_no_names(ada, scene):
    for noun, field, name in product(("jobs", "providers"), ("name", "category"), NO_NAMES):
        body = {"category": "modifiers", "name": "New", "schema": {}, field: name}
        answer = await ada.put(f"/rooms/lab/{noun}", content=json.dumps(body), headers=JSON)
        await scene.refuses(answer, 400, 422)


NO_ROOMS = ["a@b", "@", "@lab", "@global ", "a:b", ":", "a%00", "%0A", "r" * 256, "%7F"]


async def test_no_rooms(ada, admin, scene):
    """Each of them in one place, and one of them in each place."""
    worker = {"category": "modifiers", "name": "New", "schema": {}}
    places = [
        ("GET", "jobs", None),
        ("GET", f"jobs/{JOB}", None),
        ("GET", f"jobs/{JOB}/tasks", None),
        ("GET", "tasks", None),
        ("GET", "workers", None),
        ("GET", "providers", None),
        ("GET", f"providers/{JOB}/info", None),
        ("GET", f"providers/{JOB}", None),
        ("PUT", "jobs", worker),
        ("PUT", "providers", worker),
        ("POST", f"tasks/{JOB}", {}),
    ]
    asked = [*product([ada, admin], NO_ROOMS, places[-3:-2]), *product([ada], ["@lab"], places)]
    for user, room, (method, path, body) in asked:
        answer = await user.request(method, f"/rooms/{room}/{path}", json=body)
        problem(answer, 400, "invalid-room-id")
    assert await scene.look() == scene.before


async def test_no_full_names(ada, scene):
    for name in ("lab:modifiers:%00", "lab:%00:Rotate", "%00:modifiers:Rotate", "%ff%fe", "%"):
        for path in ("jobs/$", "jobs/$/tasks", "providers/$", "providers/$/info"):
            url = f"/rooms/lab/{path.replace('$', name)}"
            await scene.refuses(await ada.get(url), 404)
        await scene.refuses(await ada.post(f"/rooms/lab/tasks/{name}", json={}), 404)


async def test_no_ids(ada, scene):
    for bad in ("x", "1", "%00", ID[:-1], ID + "0", "é", "-1"):
        for method, path in (
            ("GET", "/tasks/"),
            ("PATCH", "/tasks/"),
            ("PATCH", "/workers/"),
            ("DELETE", "/workers/"),
            ("DELETE", "/providers/"),
        ):
            body = {"status": "running"} if path == "/tasks/" else {}
            answer = await ada.request(method, path + quote(bad, "%"), json=body)
            await scene.refuses(answer, 422)
        await scene.refuses(await ada.post("/tasks/claim", json={"worker_id": bad}), 422)
        await scene.refuses(await register(ada, "New", worker_id=bad), 422)


NO_TIMES = [-1, -1e-300, 1e300, 1e10, 2**63 - 1, "1", "NaN", "inf", True, [], {}]
NO_COUNTS = [-1, 1.5, 2**31, 2**53, 2**63 - 1, "1", True, [], {}, "\uff11"]


@NO_DATABASE
async def test_no_registrations(ada, scene):
    for field, values in (
        ("max_attempts", [*NO_COUNTS, 0, 101, None]),
        ("retry_delay_seconds", [*NO_TIMES, None]),
        ("timeout_seconds", NO_TIMES),
        ("start_timeout_seconds", NO_TIMES),
        ("schema", [None, [], "x", 1, True, {"type": "no"}, {"$ref": "file:///x"}]),
        ("schema", [{"properties": {"a": {"pattern": "("}}}, {"$schema": "x:y"}]),
        ("worker_id", [1, "x", [], {}, ID + ID]),
    ):
        for name, value in product(("New", "Rotate"), values):
            await scene.refuses(await register(ada, name, **{field: value}), 422)


@NO_DATABASE
async def test_no_submissions(ada, scene):
    for field, values in (
        ("payload", [None, [], "x", 1, True]),
        ("priority", [*NO_COUNTS[1:], 1001, -1001, None]),
        ("delay_seconds", [*NO_TIMES, None]),
    ):
        for value in values:
            answer = await ada.post(f"/rooms/lab/tasks/{JOB}", json={field: value})
            await scene.refuses(answer, 422)


@NO_DATABASE
async def test_no_reports(ada, scene):
    for field, values in (
        ("status", ["done", "", "RUNNING", None, 1, [], {}]),
        ("error", [1, [], {}, "x" * (64 * 1024 + 1)]),
        ("attempt", NO_COUNTS),
        ("retryable", [None, "true", 1, []]),
    ):
        for value in values:
            body = {"status": "failed", field: value}
            answer = await ada.patch(f"/tasks/{scene.held['id']}", json=body)
            await scene.refuses(answer, 422)
    answer = await ada.patch(f"/tasks/{scene.held['id']}", json={})
    await scene.refuses(answer, 422)


@NO_DATABASE
async def test_no_claims_and_heartbeats(ada, scene):
    for value in [*NO_COUNTS, 0, 33, None]:
        body = {"worker_id": scene.worker, "max_tasks": value}
        await scene.refuses(await ada.post("/tasks/claim", json=body), 422)
    said = {"id": scene.held["id"], "attempt": 1}
    for told in (
        {"tasks": [{**said, "progress": value}]}
        for value in (-0.1, 1.1, 1e308, "NaN", "0.5", True, [])
    ):
        answer = await ada.patch(f"/workers/{scene.worker}", json=told)
        await scene.refuses(answer, 422)
    for told in (
        {"tasks": [{**said, "message": "m" * 1001}]},
        {"tasks": [{**said, "message": "a\nb"}]},
        {"tasks": [{**said, "message": 1}]},
        {"tasks": [{"id": "x", "attempt": 1}]},
        {"tasks": [{"id": scene.held["id"]}]},
        {"tasks": [said] * 1001},
        {"tasks": said},
        {"tasks": None},
        {"state": "gone"},
        {"state": 1},
    ):
        answer = await ada.patch(f"/workers/{scene.worker}", json=told)
        await scene.refuses(answer, 422)


@NO_DATABASE
async def test_no_idempotency_keys(ada, scene):
    for key in (b"", b"k" * 256, b"a\tb", b"a\x01b", b"a\x7fb", b"\x80", b"\x85"):
        headers = [(b"idempotency-key", key)]
        for path, body in (
            (f"/rooms/lab/tasks/{JOB}", {}),
            ("/tasks/claim", {"worker_id": scene.worker}),
        ):
            answer = await ada.post(path, json=body, headers=headers)
            await scene.refuses(answer, 422)


@NO_DATABASE
async def test_no_bodies(ada, scene):
    for content, headers, status in (
        (b"", JSON, 422),
        (b"null", JSON, 422),
        (b"[]", JSON, 422),
        (b'"x"', JSON, 422),
        (b"{}", {"Content-Type": "text/plain"}, 422),
        (b"payload=1", {"Content-Type": "application/x-www-form-urlencoded"}, 422),
        ("{}".encode("utf-16"), JSON, 400),
        (b"\xef\xbb\xbf{}", JSON, 400),
    ):
        for method, path in (
            ("POST", f"/rooms/lab/tasks/{JOB}"),
            ("PUT", "/rooms/lab/jobs"),
            ("PATCH", f"/tasks/{scene.held['id']}"),
            ("POST", "/tasks/claim"),
        ):
            answer = await ada.request(method, path, content=content, headers=headers)
            await scene.refuses(answer, status)


@NO_DATABASE
@pytest.mark.parametrize("length_is_said", [True, False])
async def test_a_body_above_the_limit_is_not_read_to_its_end(app, ada, scene, length_is_said):
    app.state.joblib_settings.max_payload_bytes = 1000
    read_by_the_host = 0

    async def endless():
        nonlocal read_by_the_host
        yield b'{"payload": {"a": "'
        while read_by_the_host < 1_000_000:
            read_by_the_host += 500
            yield b"x" * 500

    content = b" " * 1001 if length_is_said else endless()
    answer = await ada.post(f"/rooms/lab/tasks/{JOB}", content=content, headers=JSON)
    body = await scene.refuses(answer, 413)
    assert body["type"] == "/v1/problems/payload-too-large"
    fits = b'{"payload": {"a": "' + b"x" * 977 + b'"}}'
    answer = await ada.post(f"/rooms/lab/tasks/{JOB}", content=fits, headers=JSON)
    assert (len(fits), answer.status_code) == (999, 202)
    await report(ada, answer.json(), "cancelled")
    await scene.go_on()


@NO_DATABASE
async def test_a_schema_cannot_make_a_payload_cost_for_ever(ada, scene):
    """Each of them doubles what is to be looked at, over and over."""

    def chain(keyword):
        step = {f"a{n}": {keyword: [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)}
        return {"$defs": {**step, "a60": {"type": "object"}}, "$ref": "#/$defs/a0"}

    node = {"properties": {"a": {"$ref": "#/$defs/n"}}}
    for schema in (
        *map(chain, ("allOf", "anyOf", "oneOf")),
        {"$defs": {"n": {"allOf": [node, node]}}, "$ref": "#/$defs/n"},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
    ):
        answer = await register(ada, "New", schema=schema)
        if answer.status_code == 422:
            continue
        nested = json.loads('{"a":' * 150 + "1" + "}" * 150)
        task = await ada.post("/rooms/lab/tasks/lab:modifiers:New", json={"payload": nested})
        assert task.status_code in (202, 422)
        if task.status_code == 202:
            await report(ada, task.json(), "cancelled")
        await ada.delete(f"/workers/{answer.json()['worker_id']}")
    await scene.go_on()


async def test_what_went_wrong_does_not_come_back(ada, scene):
    """An answer neither repeats what was sent nor grows with it."""
    long = "x" * 200_000
    for answer in (
        await register(ada, "New", schema={"type": long}),
        await register(ada, long),
        await register(ada, "New", category=long),
        await ada.post(f"/rooms/lab/tasks/{JOB}", json={"priority": long}),
        await ada.post("/tasks/claim", json={"worker_id": long}),
        await ada.get(f"/rooms/lab/tasks?status={long[:10_000]}"),
        await ada.get(f"/rooms/lab/tasks?limit={long[:10_000]}"),
    ):
        await scene.refuses(answer, 400, 422)
    schema = {"properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    worker = await offer(ada, "Strict", schema=schema)
    for payload in ({"a": long}, {long: 1}, {f"k{n}": n for n in range(5000)}):
        answer = await ada.post("/rooms/lab/tasks/lab:modifiers:Strict", json={"payload": payload})
        assert len(answer.content) < 10_000
        problem(answer, 422, "payload-mismatch")
    await ada.delete(f"/workers/{worker}")
    await scene.go_on()
