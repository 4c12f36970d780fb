"""What the OpenAPI document says of answers beyond their models."""

from collections import defaultdict
from inspect import cleandoc
from typing import Any

from zndraw_joblib.exceptions import (
    PROBLEM_JSON,
    Forbidden,
    InvalidRequest,
    InvalidRoomId,
    MalformedBody,
    PayloadTooLarge,
    Problem,
    ProblemDetail,
    QuotaExceeded,
    ServerBusy,
    ServiceUnavailable,
    Unauthorized,
)

#: What every route may answer.
EVERYWHERE: tuple[type[Problem], ...] = (
    Unauthorized,
    InvalidRequest,
    ServiceUnavailable,
)

_STRING = {"type": "string"}
_SECONDS = {"type": "integer", "minimum": 0}
_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Link": ("With `rel=next`: the page that follows, if any (RFC 8288).", _STRING),
    "Location": ("Where the task is read.", _STRING),
    "Preference-Applied": ("The `wait` that was applied (RFC 7240).", _STRING),
    "Retry-After": ("Seconds after which to ask again.", _SECONDS),
    "WWW-Authenticate": ("`Bearer`.", _STRING),
}

PREFIX = "/v1/joblib"

Responses = dict[int | str, dict[str, Any]]


def problems(*kinds: type[Problem], handed_on: bool = False) -> Responses:
    """Return the ``responses=`` of a route that may answer with these problems.

    Parameters
    ----------
    *kinds : type of Problem
        Those beside :data:`EVERYWHERE`.
    handed_on : bool
        The route also hands on problems of others, of whatever status and type.
    """
    by_status: defaultdict[int, list[type[Problem]]] = defaultdict(list)
    for kind in dict.fromkeys(EVERYWHERE + kinds):
        by_status[kind.status].append(kind)
    responses: Responses = {}
    for status, alike in sorted(by_status.items()):
        types = {} if handed_on else {"enum": [kind.type_uri() for kind in alike]}
        responses |= answer(
            status,
            *(header for kind in alike for header in kind.headers),
            description=" ".join(cleandoc(str(kind.__doc__)) for kind in alike),
            content=_problem(status={"const": status}, type=types),
        )
    if handed_on:
        told = {"description": "As it was handed on.", "content": _problem()}
        responses |= {"4XX": told, "5XX": told}
    return responses


def _problem(**members: dict[str, Any]) -> dict[str, Any]:
    # In place, and not by reference: a host may well have a ProblemDetail of its own,
    # and then FastAPI renames both.
    schema = ProblemDetail.model_json_schema()
    for name, constraint in members.items():
        schema["properties"][name] |= constraint
    return {PROBLEM_JSON: {"schema": schema}}


def answer(status: int, *names: str, **members: Any) -> Responses:
    """Return the ``responses=`` of a route whose answer is more than its model.

    Parameters
    ----------
    status : int
        That of the answer.
    *names : str
        The headers that it may carry.
    **members : Any
        Of the OpenAPI response object, ``links`` for example; ``model`` too.
    """
    if names:
        members["headers"] = {
            name: {"description": told, "schema": schema}
            for name, (told, schema) in _HEADERS.items()
            if name in names
        }
    return {status: members}


def link(
    operation: str, body: dict[str, str] | None = None, /, **parameters: str
) -> dict[str, Any]:
    """Return a link from an answer to what can be asked next.

    Parameters
    ----------
    operation : str
        Method and path, as ``"get /tasks/{task_id}"``.
    body : dict, optional
        Members of the request's body, each with the JSON pointer of its value in the
        answer's body.
    **parameters : str
        Parameters of the request, likewise.
    """
    method, _, path = operation.partition(" ")
    escaped = f"{PREFIX}{path}".replace("~", "~0").replace("/", "~1")
    link: dict[str, Any] = {"operationRef": f"#/paths/{escaped}/{method}"}
    for key, pointers in (("parameters", parameters), ("requestBody", body)):
        if pointers:
            link[key] = {n: f"$response.body#{p}" for n, p in pointers.items()}
    return link


ROOM = (InvalidRoomId, Forbidden)
BODY = (MalformedBody, PayloadTooLarge)
WAITING = (QuotaExceeded, ServerBusy)
#: Bytes of whatever media type.
ANYTHING = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
ANY_QUERY = {
    "name": "params",
    "in": "query",
    "description": "Whatever the provider's schema asks for, each under its own name.",
    "style": "form",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": True},
}
PREFER = {
    "name": "prefer",
    "in": "header",
    "description": "`wait=N` waits up to N seconds (RFC 7240).",
    "schema": _STRING,
}
#: The ``openapi_extra=`` of a route that waits.
WAITS: dict[str, Any] = {"parameters": [PREFER]}
PAGE = answer(200, "Link")

_ROOM_AND_JOB = {"room_id": "/room_id", "job_name": "/full_name"}
_ROOM_AND_PROVIDER = {"room_id": "/room_id", "provider_name": "/full_name"}

WORKER_LINKS = {
    "heartbeat": link("patch /workers/{worker_id}", worker_id="/id"),
    "claim": link("post /tasks/claim", {"worker_id": "/id"}),
    "offer": link("put /rooms/{room_id}/jobs", {"worker_id": "/id"}),
    "leave": link("delete /workers/{worker_id}", worker_id="/id"),
}
JOB_LINKS = {
    "submit": link("post /rooms/{room_id}/tasks/{job_name}", **_ROOM_AND_JOB),
    "read": link("get /rooms/{room_id}/jobs/{job_name}", **_ROOM_AND_JOB),
    "tasks": link("get /rooms/{room_id}/jobs/{job_name}/tasks", **_ROOM_AND_JOB),
    "heartbeat": link("patch /workers/{worker_id}", worker_id="/worker_id"),
    "claim": link("post /tasks/claim", {"worker_id": "/worker_id"}),
}
TASK_LINKS = {
    "read": link("get /tasks/{task_id}", task_id="/id"),
    "report": link("patch /tasks/{task_id}", task_id="/id"),
    "retry": link("post /tasks/{task_id}/retry", task_id="/id"),
}
CLAIM_LINKS = {
    "report": link(
        "patch /tasks/{task_id}", {"attempt": "/task/attempt"}, task_id="/task/id"
    ),
}
PROVIDER_LINKS = {
    "info": link(
        "get /rooms/{room_id}/providers/{provider_name}/info", **_ROOM_AND_PROVIDER
    ),
    "read": link(
        "get /rooms/{room_id}/providers/{provider_name}", **_ROOM_AND_PROVIDER
    ),
    "answer": link("post /providers/{provider_id}/results", provider_id="/id"),
    "withdraw": link("delete /providers/{provider_id}", provider_id="/id"),
}
