"""Every position of the OpenAPI document refuses what can't stand there.

The positions are the document's own: a new field, parameter or header is covered as soon
as it is there, and fails if it takes what it says that it doesn't.
"""

import json
from collections.abc import Iterator
from typing import Any

import documented
import pytest
from conftest import PREFIX
from steps import JOB, offer, problem, stored

pytestmark = pytest.mark.makers("plain")

Schema = dict[str, Any]
Path = tuple[str | int, ...]

ID = "01900000-0000-7000-8000-000000000000"
#: what stands in a path that leads nowhere wrong
VALID = {"room_id": "lab", "job_name": JOB, "provider_name": "lab:files:none"}
#: what a body needs beside its required fields
MORE = {"/rooms/{room_id}/tasks/bulk": {"status": "pending"}}
#: what may not stand in a path, and what is answered to it
IN_PATHS: dict[str, tuple[int, str, list[str]]] = {
    "room_id": (400, "invalid-room-id", ["a@b", "a:b", "%00", "%0A", "lab%0A", "%7F", "r" * 256]),
    "job_name": (404, "job-not-found", ["x", "lab:modifiers:%00", f"{JOB}%0A", "%FF"]),
    "provider_name": (404, "provider-not-found", ["x", "lab:files:%00", "%0A", "%FF"]),
}
NO_IDS = ["x", "%00", ID[:-1], f"{ID}0", "%C3%A9"]
#: what may not stand in a query, by its schema's type
IN_QUERIES = {
    "integer": ["", "-1", "1.5", "x", "%00", "NaN", "9" * 30, "%EF%BC%91"],
    "string": ["%00", "%C3%A9", "%FF", "x" * 501],
}
#: what may not stand in a header
IN_HEADERS = {
    "idempotency-key": [b"", b"k" * 256, b"a\x01b", b"a\x7f", b"\x80"],
    "x-request-hash": [b"", b"x" * 64, b"0" * 63, b"0" * 65, b"\xff" * 64],
    "x-result-status": [b"", b"OK", b"\x01", b"\xff"],
}
#: headers of which what can't be read is ignored (RFC 7240)
IGNORED = {"prefer": [b"", b'"', b"wait=-1", b"wait=\xff", b"wait=" + b"9" * 99, b"=,;="]}
#: what is JSON to many, but can't be stored
POISON = [r'"\u0000"', r'{"\ud800": 1}', "1e400", f"[{2**63}]", "NaN"]
#: one value of each type
VALUES = {
    "null": None,
    "boolean": True,
    "integer": 1,
    "number": 0.5,
    "string": "\x01",
    "array": [],
    "object": {},
}

OPERATIONS = [
    f"{method.upper()} {path.removeprefix(PREFIX)}"
    for path, operations in documented.document()["paths"].items()
    for method in operations
]


def choices(schema: Schema) -> list[Schema]:
    """Return the schemas of which a value has to fit one."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return choices(documented.document()["components"]["schemas"][name])
    if "anyOf" in schema:
        return [choice for some in schema["anyOf"] for choice in choices(some)]
    return [schema]


def fields(schema: Schema, at: Path = ()) -> Iterator[tuple[Path, Schema]]:
    """Yield the positions of a body."""
    if at:
        yield at, schema
    for choice in choices(schema):
        for name, field in choice.get("properties", {}).items():
            yield from fields(field, (*at, name))
        if "items" in choice:
            yield from fields(choice["items"], (*at, 0))


def sample(schema: Schema) -> Any:
    """Return a value that fits."""
    schema = choices(schema)[0]
    match schema:
        case {"enum": [first, *_]}:
            return first
        case {"format": "uuid"}:
            return ID
        case {"type": "object"}:
            required = schema.get("required", ())
            known = schema.get("properties", {})
            return {name: sample(known[name]) for name in required}
        case {"type": "array"}:
            return [sample(schema["items"])]
    values = {"string": "modifiers", "integer": 1, "number": 1, "boolean": True}
    return values.get(schema.get("type"))


def with_value(schema: Schema, at: Path, value: Any) -> Any:
    """Return a body that fits but for ``value``."""
    if not at:
        return value
    schema = next(c for c in choices(schema) if c.keys() & {"properties", "items"})
    if isinstance(at[0], int):
        return [with_value(schema["items"], at[1:], value)]
    field = schema["properties"][at[0]]
    return sample(schema) | {at[0]: with_value(field, at[1:], value)}


def misfits(schema: Schema) -> Iterator[Any]:
    """Yield values that a schema excludes."""
    allowed = choices(schema)
    types = {choice.get("type", "any") for choice in allowed}
    if "any" in types:
        return
    if "number" in types:
        types.add("integer")
    yield from (value for kind, value in VALUES.items() if kind not in types)
    for choice in allowed:
        if "enum" in choice or choice.get("format") == "uuid":
            yield from ("", "x", "\x01")
        if "pattern" in choice:
            yield from ("\x01", "a\n", "\x7f")
        if choice.get("minLength"):
            yield ""
        if "maxLength" in choice:
            yield "x" * (choice["maxLength"] + 1)
        for bound, beyond in (("minimum", -1), ("maximum", 1)):
            if bound in choice:
                yield choice[bound] + beyond
        if "maxItems" in choice:
            yield [sample(choice["items"])] * (choice["maxItems"] + 1)
        if choice.get("type") in ("integer", "number"):
            yield from ("1", "", 2**63 - 1)


class Requests:
    """Requests of one operation, right but for one position."""

    def __init__(self, user: Any, operation: str) -> None:
        self.user = user
        self.method, _, self.path = operation.partition(" ")
        described = documented.document()["paths"][f"{PREFIX}{self.path}"]
        self.described = described[self.method.lower()]
        content = self.described.get("requestBody", {}).get("content", {})
        self.body = content.get("application/json", {}).get("schema")

    def parameters(self, where: str) -> Iterator[tuple[str, Schema]]:
        for parameter in self.described.get("parameters", ()):
            if parameter["in"] == where:
                yield parameter["name"], parameter["schema"]

    async def send(self, name: str = "", value: str = "", **request: Any) -> Any:
        parts = {n: VALID.get(n, ID) for n, _ in self.parameters("path")}
        path = self.path.format(**(parts | {name: value} if name else parts))
        if self.body and "content" not in request:
            request["json"] = sample(self.body) | MORE.get(self.path, {})
        required = {"x-request-hash": "0" * 64} if "results" in path else {}
        headers = [*required.items(), *request.pop("headers", {}).items()]
        return await self.user.request(self.method, path, headers=dict(headers), **request)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_what_cannot_stand_there_is_refused(ada, session_maker, operation):
    await offer(ada)
    before = await stored(session_maker)
    requests = Requests(ada, operation)
    for name, schema in requests.parameters("path"):
        status, kind, values = IN_PATHS.get(name, (422, "invalid-request", NO_IDS))
        assert name in IN_PATHS or schema["format"] == "uuid", "say what can't be there"
        for value in values:
            problem(await requests.send(name, value), status, kind)
    for name, schema in requests.parameters("query"):
        kind = choices(schema)[0]["type"]
        # of a provider's own parameters, nothing is known
        for value in IN_QUERIES[kind] if kind != "object" else ():
            refused = await requests.send(params=f"{name}={value}")
            at_fault(refused, f"/query/{name}")
    for name, _ in requests.parameters("header"):
        for value in IGNORED.get(name, ()):
            answer = await requests.send(headers={name: value})
            assert answer.status_code not in (400, 422) or answer.is_server_error, value
        for value in IN_HEADERS[name] if name not in IGNORED else ():
            refused = await requests.send(headers={name: value})
            at_fault(refused, f"/header/{name}")
    for at, schema in fields(requests.body) if requests.body else ():
        for value in misfits(schema):
            content = json.dumps(with_value(requests.body, at, value))
            refused = await requests.send(content=content, headers=JSON)
            at_fault(refused, "/".join(["/body", *map(str, at)]))
        for value in POISON:
            content = json.dumps(with_value(requests.body, at, "$")).replace('"$"', value)
            refused = await requests.send(content=content, headers=JSON)
            problem(refused, 400, "malformed-body")
    assert await stored(session_maker) == before


JSON = {"content-type": "application/json"}


def at_fault(answer: Any, pointer: str) -> None:
    told = problem(answer, 422, "invalid-request")
    pointers = [error["pointer"] for error in told["errors"]]
    assert any(p.startswith(pointer) for p in pointers), (pointer, pointers)
