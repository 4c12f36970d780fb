"""What one user sends, whatever its bytes, keeps nobody else waiting.

Each attack goes to a host in a process of its own, while another connection asks
again and again: how long its answers take, and what the process has grown by.
"""

import asyncio
import json
import logging
import random
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from processes import hosting

log = logging.getLogger(__name__)

DELAY = 1.0
GROWTH = 64 * 2**20
MIB = 2**20 - 1000
NOBODYS = "00000000-0000-0000-0000-000000000000"


class Request(NamedTuple):
    """What is sent; ``content`` is taken as it is, anything else is made JSON."""

    method: str
    path: str
    json: Any = None
    content: bytes | None = None
    headers: Any = ()
    answered: int = 422
    #: by how many bytes the host may grow


class Submission(NamedTuple):
    """A job with this schema is registered, and then this payload submitted."""

    schema: dict[str, Any]
    payload: dict[str, Any]
    answered: int = 202


def nested(depth: int, last: Any) -> Any:
    for _ in range(depth):
        last = {"n": last}
    return last


def text(length: int) -> str:
    return "".join(random.Random(0).choices("ab", k=length))


NODE = {"$ref": "#/$defs/node"}
TREE = {"properties": {"n": NODE}, "required": ["n"]}
REBASED = {
    f"x{n}": {"anyOf": [{"properties": {"n": {"$ref": f"#/definitions/x{n + 1}"}}}] * 2}
    for n in range(24)
}


def listed(items: Any, **more: Any) -> dict[str, Any]:
    return {"properties": {"a": {"items": items, **more}}}


SUBMISSIONS = {
    "alternatives that recur": Submission(
        {"$defs": {"node": {"anyOf": [TREE, {**TREE, "type": "object"}]}}, **NODE},
        nested(40, {"m": 1}),
    ),
    "doubling references": Submission(
        {
            "$ref": "#/$defs/a0",
            "$defs": {
                f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2}
                for n in range(40)
            }
            | {"a40": {}},
        },
        {},
    ),
    "a rebased id": Submission(
        {
            "definitions": {f"x{n}": {} for n in range(25)},
            "properties": {
                "a": {
                    "id": "http://x/y",
                    "definitions": REBASED | {"x24": {"not": {"required": ["m"]}}},
                    "properties": {"n": {"$ref": "#/definitions/x0"}},
                }
            },
        },
        {"a": nested(25, {"m": 1})},
    ),
    "a pattern that tracks": Submission(
        listed({"pattern": "^(?:[ab]*a[ab]{200}[^ab])$"}), {"a": [text(900_000)]}
    ),
    "patterns that are large": Submission(
        {"properties": {f"a{n}": {"pattern": "\\p{L}{200}0" + "a" * n} for n in range(100)}},
        {f"a{n}": "é" * 100 for n in range(100)},
    ),
    "patterns of escapes": Submission(
        {"properties": {f"a{n}": {"pattern": "\\s" * 100 + "a" * n} for n in range(100)}},
        {f"a{n}": "x" for n in range(100)},
    ),
    "a thousand subschemas for each key": Submission(
        {"allOf": [{"properties": {f"x{n}": {}}} for n in range(1500)]},
        {f"k{n}": 0 for n in range(70_000)},
    ),
    "a long enum": Submission(
        listed({"enum": list(range(9000))}), {"a": [-1] * 300_000}, 422
    ),
    "an enum of lists": Submission(
        listed({"enum": [[[0] * 1000, n] for n in range(20)]}), {"a": [[[0] * 1000, -1]] * 300}
    ),
    "equal items": Submission(
        listed(True, uniqueItems=True), {"a": [n << 44 for n in range(45_000)]}
    ),
    "objects that are to differ": Submission(
        listed(True, uniqueItems=True), {"a": [{"n": n} for n in range(60_000)]}
    ),
    "a value copied for each alternative": Submission(
        {"anyOf": [{"properties": {"a": {"type": "integer"}}}] * 1000}, {"a": "x" * 900_000}, 422
    ),
    "remainders of the smallest number": Submission(
        listed({"multipleOf": 5e-324}), {"a": [1.7e308] * 100_000}
    ),
    "patterns for names": Submission(
        {"patternProperties": {f"^{n}x": {"type": "null"} for n in range(90)}},
        {f"{n}": 0 for n in range(90_000)},
    ),
    "unevaluated": Submission(
        {"allOf": [{"properties": {f"k{n}": True}} for n in range(1000)], "unevaluatedProperties": False},
        {f"k{n}": 0 for n in range(50_000)},
    ),
    "many small objects": Submission(
        listed({"type": "object"}), {"a": [{}] * 190_000}
    ),
    "long strings in schema and payload": Submission(
        listed({"const": "x" * 60_000}), {"a": ["x" * 60_000 + "y"] * 16}, 422
    ),
}  # fmt: skip

JOB = "lab:modifiers:Attacked"
TASKS = f"/rooms/lab/tasks/{JOB}"
JOBS = "/rooms/lab/jobs"
NEW = {"category": "modifiers", "name": "New", "schema": {}}
WAIT = "/tasks/01900000-0000-7000-8000-000000000000"


def schema(value: Any, answered: int = 422) -> Request:
    name = f"S{zlib.crc32(json.dumps(value).encode())}"
    body = {**NEW, "name": name, "schema": value}
    return Request("PUT", JOBS, body, answered=answered)


def body(content: bytes | str, answered: int = 400, path: str = TASKS) -> Request:
    content = content if isinstance(content, bytes) else content.encode()
    headers = {"Content-Type": "application/json"}
    return Request("POST", path, None, content, headers, answered)


REQUESTS = {
    **{
        f"Prefer: {name}": Request("GET", WAIT, headers={"Prefer": value}, answered=404)
        for name, value in {
            "blanks": "wait=" + " " * 16_000 + "x x",
            "a name and blanks": "a" + " " * 16_000 + "x",
            "open quotes": '"' + "\\a" * 8000,
            "quotes": 'x="' + "\\a" * 8000 + '" y',
            "commas": "wait=1" + "," * 16_000,
            "many": ",".join(["wait=x;a=b"] * 2000),
            "digits": "wait=" + "9" * 16_000,
        }.items()
    },
    "If-None-Match": Request(
        "GET", JOBS, headers={"If-None-Match": '"a", ' * 3000 + '"a"'}, answered=200
    ),
    "traceparent": Request(
        "GET", JOBS, headers={"traceparent": "00-" + "a-" * 8000, "tracestate": "a=b," * 3000 + "a=b"}, answered=200
    ),
    "Idempotency-Key": Request(
        "POST", TASKS, {}, headers={"Idempotency-Key": "k" * 16_000}
    ),
    "Authorization": Request(
        "GET", JOBS, headers={"Authorization": "Bearer " + "a." * 8000}, answered=401
    ),
    "Content-Type": Request(
        "POST", TASKS, content=b"{}", headers={"Content-Type": "application/" + "x;" * 8000 + '="' }
    ),
    "multipart": Request(
        "POST", TASKS, content=b"--a\r\n" * 100_000, headers={"Content-Type": "multipart/form-data; boundary=a"}
    ),
    "a form": Request(
        "POST", TASKS, content=b"a=b&" * 250_000, headers={"Content-Type": "application/x-www-form-urlencoded"}
    ),
    **{
        f"a large result of {what}": Request(
            "PATCH", f"/tasks/{NOBODYS}", content=b'{"status":"completed","result":%b}' % result,
            headers={"Content-Type": "application/json"}, answered=answered,
        )
        for what, result, answered in (
            ("lists", b"[" + b"[]," * (5 * MIB) + b"[]]", 404),
            ("numbers", b"[" + b"0," * (7 * MIB) + b"0]", 404),
            ("keys", b'{"":0' + b',"":0' * (3 * MIB) + b"}", 404),
            ("quotes", b'["' + b'\\"' * (7 * MIB) + b'"]', 404),
            ("open lists", b"[" * (15 * MIB), 400),
        )
    },
    "deep lists": body("[" * MIB),
    "deep objects": body('{"a":' * (MIB // 5)),
    "digits": body('{"payload": {"a": ' + "1" * MIB + "}}"),
    "digits of a fraction": body('{"payload": {"a": 0.' + "1" * MIB + "}}", 202),
    "a fraction's exponent": body('{"payload": {"a": [' + ",".join(["1e400"] * 100_000) + "]}}"),
    "large integers": body('{"payload": {"a": [' + ",".join([str(2**63 - 1)] * 45_000) + "]}}", 202),
    "letters of an exponent": body('{"payload": {"a": "' + "e" * (MIB - 100) + '"}}', 202),
    "large numbers": body('{"payload": {"a": [0' + ",1e200" * 170_000 + "]}}", 202),
    "strings beside a large number": body('{"payload": {"a": [1e200' + ',""' * 340_000 + "]}}", 202),
    "suspicious numbers": body('{"payload": {"a": [1e100' + ",0" * 500_000 + "]}}", 202),
    "suspicious lists": body('{"payload": {"a": [1e100' + ",[]" * 150_000 + "]}}", 202),
    "suspicious keys": body('{"payload": {"a":1e100' + "".join(f',"{n}":0' for n in range(80_000)) + "}}", 202),
    "escapes": body('{"payload": {"a": "' + "\\u00e9" * 170_000 + '"}}', 202),
    "many keys": body(json.dumps({"payload": {f"{n}": 0 for n in range(80_000)}}), 202),
    "many unknown fields": body(json.dumps({f"{n}": 0 for n in range(80_000)}), 202),
    "the same key": body('{"payload": {' + ",".join(['"a": 0'] * 120_000) + "}}", 202),
    "lists alone": body('{"payload": {"a": [[]' + ",[]" * 340_000 + "]}}"),
    "lists in an unknown field": body('{"payload": {}, "x": [[]' + ",[]" * 340_000 + "]}"),
    "lists of lists": body('{"payload": {"a": [' + ",".join(["[" * 150 + "]" * 150] * 3400) + "]}}"),
    "a thousand priorities": body(json.dumps({"tasks": [{"priority": n - 500} for n in range(1000)]}), 202, f"/rooms/lab/batches/{JOB}"),
    "a payload that is a list": body('{"payload": [' + "0," * 500_000 + "0]}", 422),
    "many errors": body('{"tasks": [' + "0," * 500_000 + "0]}", 422, f"/rooms/lab/batches/{JOB}"),
    "many errors each": body('{"tasks": [' + ",".join(['{"payload":0,"priority":"x"}'] * 999) + "]}", 422, f"/rooms/lab/batches/{JOB}"),
    "a thousand tasks": body('{"tasks": [' + ",".join(['{"payload":{"a":[' + "0," * 400 + "0]}}"] * 1000) + "]}", 202, f"/rooms/lab/batches/{JOB}"),
    "many ids": body('{"ids": [' + '"x",' * 200_000 + '"x"]}', 422, "/tasks/query"),
    "wrong ids": body(json.dumps({"ids": ["x" * 2000] * 500}), 422, "/tasks/query"),
    "a long id": Request("GET", "/tasks/" + "x" * 60_000),
    "many reports": Request("PATCH", "/tasks", {"reports": [0] * 300_000}),
    "wrong reports": Request("PATCH", "/tasks", {"reports": [{"id": "x", "status": "y", "error": 0, "attempt": "z"}] * 32}),
    "a long name": Request("PUT", JOBS, {**NEW, "name": "n" * MIB}),
    "a long category": Request("PUT", JOBS, {**NEW, "category": "n" * MIB}),
    "a long room": Request("GET", f"/rooms/{'r' * 60_000}/jobs", answered=400),
    "a long job": Request("GET", f"{JOBS}/{'a:' * 30_000}", answered=404),
    "a long media type": Request("PUT", "/rooms/lab/providers", {**NEW, "category": "files", "content_type": "a/b" + ";a=b" * 200_000}),
    "blanks in a media type": Request("PUT", "/rooms/lab/providers", {**NEW, "category": "files", "content_type": "a/b" + " " * MIB}),
    "a long message": Request("PATCH", "/tasks", {"reports": [{"id": WAIT[7:], "status": "failed", "error": "e" * 900_000}]}),
    "query parameters": Request("GET", "/rooms/lab/providers/lab:files:X?" + "a=b&" * 15_000, answered=404),
    "query parameters of a list": Request("GET", f"{JOBS}?" + "limit=1&" * 7_000, answered=200),
    "wrong query parameters": Request("GET", f"{JOBS}?limit=" + "x" * 60_000),
    "digits in the query": Request("GET", f"{JOBS}?offset=" + "9" * 60_000),
    "a long cursor": Request("GET", f"{JOBS}?cursor=" + "A" * 60_000),
    "a schema of a MiB": schema({"title": "x" * (MIB - 100)}),
    "ten thousand definitions": schema({"$defs": {f"a{n}": {} for n in range(50_000)}}),
    "patterns that are not": schema({"anyOf": [{"pattern": "("}] * 3000}),
    "bounded patterns": schema({"anyOf": [{"pattern": "(a{1,9}){1,9}" * 40}] * 100}, 201),
    "a chain of references": schema({"$defs": {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(1900)} | {"a1900": {}}}, 201),
    "a long reference": schema({"$ref": "#/" + "a/" * 30_000}),
    "anchors": schema({"$defs": {f"a{n}": {"$anchor": f"a{n}", "$dynamicAnchor": f"a{n}", "$dynamicRef": f"#a{n}"} for n in range(700)}}, 201),
    "ids": schema({"$defs": {f"a{n}": {"$id": f"http://x/{n}"} for n in range(1500)}}),
    "wrong types": schema({"properties": {f"a{n}": {"type": "no"} for n in range(2000)}}),
    "many wrong types": schema({"type": ["string"] * 6000}),
    "draft-07, nested and wrong": schema({"$schema": "http://json-schema.org/draft-07/schema#", **nested(60, {"type": "no"}), "items": [{"items": [{"items": [{"type": 5}] * 30}] * 30}] * 3}),
    "required twice": schema({"required": [f"a{n}" for n in range(6000)] + ["a0"]}),
}  # fmt: skip


#: on a busy machine an attack may last
KEEPING = {"ZNDRAW_JOBLIB_WORKER_TIMEOUT_SECONDS": "600"}


class Bystander:
    """Another connection: how long the host computed while one request waited."""

    def __init__(self, client: httpx.AsyncClient, pid: int) -> None:
        self.client = client
        self.process = psutil.Process(pid)

    def computed(self) -> float:
        """Return the seconds that the host has computed: others' load is not its."""
        times = self.process.cpu_times()
        return times.user + times.system

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Set ``longest``, in seconds, and ``grown``, in bytes."""

        async def ask() -> None:
            while not over:
                began = self.computed()
                answer = await self.client.get("/rooms/other/jobs")
                assert answer.status_code == 200
                self.longest = max(self.longest, self.computed() - began)
                self.grown = max(self.grown, self.process.memory_info().rss - before)

        over = False
        self.longest, self.grown = 0.0, 0
        before = self.process.memory_info().rss
        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.01)
        try:
            yield
        finally:
            # its last request may be the one that waits
            over = True
            await asking

    def notices(self) -> bool:
        return self.longest > DELAY or self.grown > GROWTH

    def only_waits(self) -> bool:
        return self.longest > DELAY and self.grown <= GROWTH

    def told(self) -> str:
        return f"{self.longest:.2f} s, {self.grown >> 20} MiB"


async def send(client: httpx.AsyncClient, asked: Request) -> httpx.Response:
    content, headers = asked.content, dict(asked.headers)
    if asked.json is not None:
        content = json.dumps(asked.json, separators=(",", ":")).encode()
        headers["Content-Type"] = "application/json"
    return await client.request(asked.method, asked.path, content=content, headers=headers)


async def test_nobody_waits_for_what_another_sends(tmp_path: Path):
    """An attack is refused or taken as any other request; nobody else notices it."""
    attacks = dict(REQUESTS)
    for n, (name, sent) in enumerate(SUBMISSIONS.items()):
        job = {**NEW, "name": f"J{n}", "schema": sent.schema}
        attacks[f"schema of {name}"] = Request("PUT", JOBS, job, answered=201)
        path, payload = (f"/rooms/lab/tasks/lab:modifiers:J{n}", {"payload": sent.payload})
        attacks[name] = Request("POST", path, payload, answered=sent.answered)
    noticed: list[str] = []
    async with hosting(tmp_path, **KEEPING) as host, host.client() as ada, host.client() as bob:
        bystander = Bystander(bob, host.process.popen.pid)
        await ada.put(JOBS, json={**NEW, "name": "Attacked"})
        for name, asked in attacks.items():
            answers: list[httpx.Response] = []
            # a busy machine adds to what is measured: the least of three counts
            while not answers or (len(answers) < 3 and bystander.only_waits()):
                async with bystander.watching():
                    answers.append(await send(ada, asked))
            answer = answers[0]
            told = f"{name}: {answer.status_code}, {len(answer.content)} bytes, {bystander.told()}"
            log.info(told)
            if (
                bystander.notices()
                or answer.status_code != asked.answered
                or (answer.is_error and len(answer.content) > 10_000)
            ):
                noticed.append(f"{told}: {answer.text[:300]}")
    assert not noticed, "\n".join(noticed)


PAIRS = '{"payload":{"a":[[]' + ",[1,2]" * 170_000 + "]}}"
SENT = {"Content-Type": "application/json"}


async def test_nobody_waits_for_many_large_tasks(tmp_path: Path):
    """What names many tasks at once is answered in a size that nobody notices."""
    noticed: list[str] = []
    async with hosting(tmp_path, **KEEPING) as host, host.client() as ada, host.client() as bob:
        bystander = Bystander(bob, host.process.popen.pid)
        job = (await ada.put(JOBS, json={**NEW, "name": "Attacked"})).json()
        worker = job["worker_id"]
        for _ in range(12):
            submitted = await ada.post(TASKS, content=PAIRS, headers=SENT)
            assert submitted.status_code == 202, submitted.text
        listed = (await ada.get("/rooms/lab/tasks?limit=500")).json()["items"]
        query = {"ids": [task["id"] for task in listed]}
        claim = {"worker_id": worker, "max_tasks": 32, "start": True}
        held: list[Any] = []
        told: dict[str, Any] = {"tasks": []}
        for name, asked in {
            "a query": Request("POST", "/tasks/query", query, answered=200),
            "a claim": Request("POST", "/tasks/claim", claim, answered=200),
            "the next claim": Request("POST", "/tasks/claim", claim, answered=200),
            "a heartbeat": Request("PATCH", f"/workers/{worker}", told, answered=200),
            "a lost worker": Request("DELETE", f"/workers/{worker}", answered=204),
        }.items():
            if name == "a heartbeat":
                told["tasks"] = [{"id": task["id"], "attempt": 1, "progress": 0.5} for task in held]
            async with bystander.watching():
                answer = await send(ada, asked)
            assert answer.status_code == asked.answered, answer.text[:300]
            if name == "a query":
                tasks = answer.json()["tasks"]
                assert len(tasks) == 12
                assert 1 <= sum(not task["abridged"] for task in tasks) <= 2
            if asked.path == "/tasks/claim":
                # a part of them, and all that it brings is whole
                tasks = answer.json()["tasks"]
                assert 1 <= len(tasks) <= 2
                assert all(len(task["payload"]["a"]) == 170_001 for task in tasks)
                held += tasks
            if bystander.notices():
                noticed.append(f"{name}: {bystander.told()}")
    assert not noticed, "\n".join(noticed)
