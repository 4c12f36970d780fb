"""What clients of 0.1.7 speak is still served: the contract, against the live document."""

import copy
import functools
import json
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from zndraw_joblib import FrozenEvent, events, router, schemas, webhooks

Document = dict[str, Any]

CONTRACT: Document = json.loads((Path(__file__).parent / "data" / "openapi-0.1.7.json").read_text())
OPERATIONS = [
    f"{method} {path}" for path, methods in CONTRACT["paths"].items() for method in methods
]
#: Where an answer may say more than it used to, and why.
WIDENED = {
    # the server's own providers have no worker
    ("providers", "worker_id: null is none of ['string']")
}


def resolve(document: Document, schema: Document) -> Document:
    while ref := schema.get("$ref"):
        schema = document["components"]["schemas"][ref.rpartition("/")[2]]
    return schema


def variants(document: Document, schema: Document) -> dict[str, Document]:
    """Return for each JSON type that the schema admits what it says of it."""
    schema = resolve(document, schema)
    if "anyOf" in schema:
        return {
            kind: inner
            for choice in schema["anyOf"]
            for kind, inner in variants(document, choice).items()
        }
    return {schema.get("type", "any"): schema}


def admits(
    new: Document, new_schema: Document, old: Document, old_schema: Document, at: str
) -> Iterator[str]:
    """Yield what ``old_schema`` admits and ``new_schema`` doesn't.

    Either way round: a request of the old clients has to fit the new schema, and an
    answer of the new server the old one.
    """
    admitted = variants(new, new_schema)
    for kind, schema in variants(old, old_schema).items():
        if "any" in admitted:
            return
        if kind not in admitted:
            yield f"{at}: {kind} is none of {sorted(admitted)}"
        elif kind == "string":
            ours = admitted[kind]
            if ours.get("format") not in (None, schema.get("format")):
                yield f"{at}: only as {ours['format']}"
            if "enum" in ours and not set(schema.get("enum", [at])) <= set(ours["enum"]):
                yield f"{at}: only {ours['enum']}"
        elif kind == "array":
            items = schema.get("items", {}), admitted[kind].get("items", {})
            yield from admits(new, items[1], old, items[0], f"{at}[]")
        elif kind == "object":
            theirs, ours = (schema.get("properties", {}), admitted[kind].get("properties", {}))
            for name in theirs.keys() & ours.keys():
                yield from admits(new, ours[name], old, theirs[name], f"{at}.{name}")


def missing(document: Document, schema: Document, old: Document, at: str) -> Iterator[str]:
    """Yield the fields of a contract's schema that the document's lacks."""
    ours, theirs = variants(document, schema), variants(CONTRACT, old)
    for kind in theirs.keys() & ours.keys():
        if kind == "array":
            items = ours[kind].get("items", {}), theirs[kind].get("items", {})
            yield from missing(document, *items, f"{at}[]")
        known = ours[kind].get("properties", {})
        for name, field in theirs[kind].get("properties", {}).items():
            if name not in known:
                yield f"{at}.{name}: missing"
            else:
                yield from missing(document, known[name], field, f"{at}.{name}")


def required(document: Document, schema: Document) -> set[str]:
    objects = variants(document, schema).get("object", {})
    return set(objects.get("required", ()))


def body(operation: Document) -> Document | None:
    content = operation.get("requestBody", {}).get("content", {})
    return content.get("application/json", {}).get("schema")


def by_shape(document: Document) -> dict[str, Document]:
    """Return the operations by method and path, the parameters' names left out."""
    return {
        f"{method} {re.sub('{[^}]*}', '{}', path)}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def check_request(new: Document, ours: Document, theirs: Document) -> Iterator[str]:
    known = {(p["in"], p["name"].lower()): p for p in ours.get("parameters", [])}
    asked = {(p["in"], p["name"].lower()): p for p in theirs.get("parameters", [])}
    for key, parameter in asked.items():
        if key[0] == "path":
            continue
        if key not in known:
            yield f"parameter {key}: missing"
            continue
        schema = known[key]["schema"]
        if key[0] == "header":
            # one header is a list of one
            schema = variants(new, schema).get("array", {}).get("items", schema)
        # and no parameter can be null
        kinds = variants(CONTRACT, parameter["schema"]).items()
        sent = {"anyOf": [inner for kind, inner in kinds if kind != "null"]}
        yield from admits(new, schema, CONTRACT, sent, str(key))
    for key, parameter in known.items():
        is_new = key[0] != "path" and not asked.get(key, {}).get("required")
        if is_new and parameter.get("required"):
            yield f"parameter {key}: required now"
    given, taken = body(theirs), body(ours)
    if given is None or taken is None:
        if given is not None or ours.get("requestBody", {}).get("required"):
            yield "the body: not taken, or required now"
        return
    yield from missing(new, taken, given, "body")
    yield from admits(new, taken, CONTRACT, given, "body")
    for name in required(new, taken) - required(CONTRACT, given):
        yield f"body.{name}: required now"


def check_answers(new: Document, ours: Document, theirs: Document) -> Iterator[str]:
    for status, promised in theirs["responses"].items():
        if status not in ours["responses"]:
            yield f"answer {status}: missing"
            continue
        if not status.startswith("2"):
            continue
        for media, content in promised.get("content", {}).items():
            given = ours["responses"][status].get("content", {}).get(media)
            if given is None:
                yield f"answer {status} as {media}: missing"
                continue
            schemas = given["schema"], content["schema"]
            yield from missing(new, *schemas, status)
            yield from admits(CONTRACT, schemas[1], new, schemas[0], status)
            for name in required(CONTRACT, schemas[1]) - required(new, schemas[0]):
                yield f"{status}.{name}: not promised any more"


@pytest.fixture(scope="module")
def served() -> Document:
    app = FastAPI()
    app.include_router(router)
    app.webhooks.include_router(webhooks)
    return app.openapi()


def broken_promises(operation: str, served: Document) -> list[str]:
    shape = re.sub("{[^}]*}", "{}", operation)
    ours, theirs = by_shape(served).get(shape), by_shape(CONTRACT)[shape]
    if ours is None:
        return [f"{operation}: not served"]
    broken = [*check_request(served, ours, theirs), *check_answers(served, ours, theirs)]
    return [
        promise
        for promise in broken
        if not any(where in operation and promise.endswith(w) for where, w in WIDENED)
    ]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_served(operation: str, served: Document):
    assert not broken_promises(operation, served)


TASK = ("components", "schemas", "TaskResponse", "properties")
REGISTRATION = ("components", "schemas", "JobRegisterRequest")
TASKS = ("paths", "/v1/joblib/rooms/{room_id}/tasks", "get")


@pytest.mark.parametrize(
    ("operation", "path", "change"),
    [
        ("get /v1/joblib/tasks/{task_id}", TASK, lambda o: o.pop("payload")),
        ("post /v1/joblib/tasks/claim", TASK, lambda o: o.update(created_at={"type": "number"})),
        (
            "put /v1/joblib/rooms/{room_id}/jobs",
            REGISTRATION,
            lambda o: o["required"].append("worker_id"),
        ),
        ("get /v1/joblib/rooms/{room_id}/tasks", TASKS, lambda o: o["parameters"].pop()),
        ("get /v1/joblib/rooms/{room_id}/tasks", TASKS, lambda o: o.update(responses={})),
    ],
)
def test_a_broken_promise_is_told(
    operation: str, path: tuple[str, ...], change: Callable[[Document], Any]
):
    document = copy.deepcopy(CONTRACT)
    assert not broken_promises(operation, document)
    change(functools.reduce(operator.getitem, path, document))
    assert broken_promises(operation, document)


def test_operations_have_short_names(served: Document):
    operations = [o for methods in served["paths"].values() for o in methods.values()]
    operations += [o for methods in served["webhooks"].values() for o in methods.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert {"claim_tasks", "submit_task", "task_status_event"} <= set(names)
    assert not [name for name in names if "v1" in name]


def test_events_are_webhooks(served: Document):
    ours = {event for event in FrozenEvent.__subclasses__() if event.__module__ == events.__name__}
    assert served["webhooks"].keys() == {event.event_name for event in ours}
    for event in ours:
        schema = body(served["webhooks"][event.event_name]["post"])
        properties = resolve(served, schema)["properties"] if event.model_fields else {}
        assert properties.keys() == event.model_fields.keys()


def test_requests_have_examples_that_are_taken(served: Document):
    operations = [o for methods in served["paths"].values() for o in methods.values()]
    bodies = [schema for o in operations if (schema := body(o))]
    for schema in bodies:
        described = variants(served, schema)["object"]
        (example,) = described["examples"]
        taken = getattr(schemas, described["title"]).model_validate(example)
        assert taken.model_fields_set
    assert len(bodies) > 10
