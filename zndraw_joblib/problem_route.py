"""The route class: bounded bodies in, problems out, and what OpenAPI says of both."""

import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from inspect import cleandoc, signature
from operator import attrgetter
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from zndraw_joblib import exceptions
from zndraw_joblib.database import without_values
from zndraw_joblib.delivery import runtime_of
from zndraw_joblib.dependencies import (
    PUBLISHED,
    bounded,
    get_joblib_settings,
    look_up,
    with_context,
)
from zndraw_joblib.encoding import parse_json, take_result
from zndraw_joblib.events import FrozenEvent
from zndraw_joblib.exceptions import (
    PROBLEM_JSON,
    Problem,
    ProblemDetail,
    ProblemException,
    invalid_request,
)
from zndraw_joblib.schemas import TaskUpdateRequest
from zndraw_joblib.telemetry import continuing
from zndraw_joblib.waiting import ADMISSION, Admission

log = logging.getLogger(__name__)

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class _FullNameConvertor(Convertor[str]):
    # Starlette's own `path` stops at a newline, and at a last one it cuts it off
    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


#: ``{name:fullname}`` in a path takes whatever a client sends, slashes included.
register_url_convertor("fullname", _FullNameConvertor())

# What may succeed when it is tried again. SQLSTATE classes: connections, rolled back
# transactions, resources, the operator (PostgreSQL manual, appendix A).
_PASSING_STATES = frozenset({"08", "40", "53", "57"})
# SQLite's primary codes: busy, locked, out of memory, read or write failed, disk full,
# can't open the file.
_PASSING_CODES = frozenset({5, 6, 7, 10, 13, 14})


class BoundedRequest(Request):
    """A request whose body is read up to the limit, and holds only storable JSON.

    A report may have a result, which has a limit of its own.
    """

    _bounded: bytes | None = None
    is_report = False

    async def body(self) -> bytes:
        """Return the body.

        Raises
        ------
        ProblemException
            ``payload-too-large``, before more than the limit is buffered.
        """
        if self._bounded is None:
            settings = await look_up(self, get_joblib_settings)
            limit = self._limit = settings.max_payload_bytes
            if self.is_report:
                limit = max(limit, settings.max_result_bytes)
            self._bounded = await bounded(self.stream(), limit, "a request's body")
        return self._bounded

    async def json(self) -> Any:
        """Return the body, parsed.

        Raises
        ------
        ProblemException
            ``malformed-body``.
        """
        body = await self.body()
        try:
            if len(body) <= self._limit:
                return parse_json(body)
            others, result = take_result(body)
            if len(others) > self._limit:
                raise exceptions.PayloadTooLarge.exception(
                    f"without its result, a report is limited to {self._limit} bytes"
                )
            return {"result": result, **parse_json(others)}
        except ValueError as exc:
            raise exceptions.MalformedBody.exception(
                f"the body is not storable JSON: {exc}"
            ) from None


class ProblemRoute(APIRoute):
    """A route whose handler gets a context, and whose failures are all problem+json.

    Its answers are sent when the session is closed: FastAPI ends a request's dependencies
    after its answer was sent, and a client that reads slowly would hold the session, under
    a lock-wrapped maker everybody.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        # an app that includes a router may make its routes anew, of what they have become
        body = signature(endpoint).parameters.get("body")
        self._takes_report = body is not None and body.annotation is TaskUpdateRequest
        self._waits = PREFER in (options.get("openapi_extra") or {}).get("parameters", ())
        if "request" not in signature(endpoint).parameters:
            endpoint = with_context(endpoint)
        super().__init__(path, endpoint, **options)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; return when what it published has left."""
        begun = False
        kept: list[Message] = []

        async def send_kept() -> None:
            messages = kept.copy()
            kept.clear()
            for message in messages:
                await send(message)

        async def keep(message: Message) -> None:
            nonlocal begun
            begun = True
            kept.append(message)
            if message.get("more_body"):
                # what streams holds no session
                await send_kept()

        try:
            await super().handle(scope, receive, keep)
        except Exception as exc:
            without_values(exc)
            if not begun:
                raise
            # the session's end: its connection was lost meanwhile
            log.warning("a session did not end in order: %r", exc)
        try:
            await send_kept()
        except OSError:
            log.debug("who asked has hung up")
        published = scope.get(PUBLISHED)
        if published is not None:
            await published

    def get_route_handler(self) -> Handler:
        """Wrap FastAPI's handler."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                bounded = BoundedRequest(request.scope, request.receive)
                bounded.is_report = self._takes_report
                with continuing(request.headers):
                    if self._waits and "prefer" in request.headers:
                        if self.body_field is not None:
                            # who sends a body slowly holds nobody up
                            await bounded.body()
                        return await _admitted(bounded, handle)
                    return await handle(bounded)
            except RequestValidationError as exc:
                raise invalid_request(list(exc.errors())) from None
            except HTTPException as exc:
                # FastAPI wraps whatever goes wrong while it reads a body
                if isinstance(exc.__cause__, ProblemException):
                    raise exc.__cause__ from None
                if exc.status_code == 401:
                    raise exceptions.Unauthorized.exception(
                        headers={"WWW-Authenticate": "Bearer"}
                    ) from None
                raise
            except Exception as exc:
                if will_pass(exc):
                    log.warning("database unavailable: %s", without_values(exc))
                    raise exceptions.ServiceUnavailable.exception(
                        "the database can't be reached right now", headers={"Retry-After": "1"}
                    ) from None
                if isinstance(exc, StatementError):
                    raise without_values(exc) from None
                raise

        return guarded


async def _admitted(request: BoundedRequest, handle: Handler) -> Response:
    """Handle a request that may wait, when few enough of them are at work."""
    admission = Admission(runtime_of(request.app).subscriptions.at_work)
    request.scope[ADMISSION] = admission
    try:
        # who hung up meanwhile claims nothing: nobody would learn what
        if not await admission.enter() or await request.is_disconnected():
            raise exceptions.ServerBusy.exception(headers={"Retry-After": "5"})
        return await handle(request)
    finally:
        admission.leave()


def will_pass(exc: Exception) -> bool:
    """Tell whether the same request may succeed when it is sent again."""
    if isinstance(exc, PoolTimeoutError):
        return True
    if isinstance(exc, OSError):
        # what a driver raises while it connects; a host's own files are another matter
        return _raised_below_sqlalchemy(exc)
    driver = getattr(exc, "orig", exc)
    code = getattr(driver, "sqlite_errorcode", None)
    state = getattr(driver, "sqlstate", None) or ""
    return (
        getattr(exc, "connection_invalidated", False)
        or state[:2] in _PASSING_STATES
        or (code is not None and code & 0xFF in _PASSING_CODES)
    )


def _raised_below_sqlalchemy(exc: Exception) -> bool:
    traceback = exc.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        if module.startswith("sqlalchemy."):
            return True
        traceback = traceback.tb_next
    return False


# --- what OpenAPI says ---

#: What every route may answer.
EVERYWHERE: tuple[type[Problem], ...] = (
    exceptions.Unauthorized,
    exceptions.InvalidRequest,
    exceptions.ServiceUnavailable,
)
ROOM = (exceptions.InvalidRoomId, exceptions.Forbidden)
BODY = (exceptions.MalformedBody, exceptions.PayloadTooLarge)
JOB = (*ROOM, exceptions.JobNotFound)
WORKER = (exceptions.WorkerNotFound, exceptions.Forbidden)
TASK = (exceptions.TaskNotFound, exceptions.Forbidden, exceptions.InvalidTaskTransition)
PROVIDER = (exceptions.ProviderNotFound, exceptions.Forbidden)
WAITING = (exceptions.QuotaExceeded, exceptions.ServerBusy)
#: Bytes of whatever media type.
BYTES = {"*/*": {"schema": {"type": "string", "format": "binary"}}}
PREFER = {
    "name": "prefer",
    "in": "header",
    "description": "`wait=N` waits up to N seconds (RFC 7240).",
    "schema": {"type": "string"},
}

Responses = dict[int | str, dict[str, Any]]


def _problems(kinds: Sequence[type[Problem]], handed_on: bool) -> Responses:
    by_status: defaultdict[int, list[type[Problem]]] = defaultdict(list)
    for kind in dict.fromkeys((*EVERYWHERE, *kinds)):
        by_status[kind.status].append(kind)
    responses: Responses = {}
    for status, alike in sorted(by_status.items()):
        types = {} if handed_on else {"enum": [kind.type_uri() for kind in alike]}
        responses[status] = {
            "description": " ".join(cleandoc(str(kind.__doc__)) for kind in alike),
            "content": _problem(status={"const": status}, type=types),
        }
    if handed_on:
        as_it_was = {"description": "As it was handed on.", "content": _problem()}
        responses |= {"4XX": as_it_was, "5XX": as_it_was}
    return responses


def _problem(**members: dict[str, Any]) -> dict[str, Any]:
    # In place, and not by reference: a host may well have a ProblemDetail of its own,
    # and then FastAPI renames both.
    schema = ProblemDetail.model_json_schema()
    for name, constraint in members.items():
        schema["properties"][name] |= constraint
    return {PROBLEM_JSON: {"schema": schema}}


def answers(
    model: Any,
    *kinds: type[Problem],
    status: int = 200,
    or_200: str = "",
    waits: bool = False,
    handed_on: bool = False,
    parameters: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return what a route's decorator is to know of its answers.

    Parameters
    ----------
    model : type or None
        What is answered, if anything; ``bytes`` of whatever media type.
    *kinds : type of Problem
        What else may be answered, beside :data:`EVERYWHERE`.
    status : int
        The status of the answer.
    or_200 : str
        When it may also be 200.
    waits : bool
        Whether the route takes ``Prefer: wait``.
    handed_on : bool
        Whether the route also hands on problems of others, of whatever status and type.
    parameters : sequence of dict
        What the route reads beside the parameters in its signature, for OpenAPI.
    """
    responses = _problems([*kinds, *(WAITING if waits else ())], handed_on)
    if model is bytes:
        responses[status] = {"content": BYTES}
    if or_200:
        responses[200] = {"model": model, "description": or_200}
    known: dict[str, Any] = {"status_code": status, "responses": responses}
    if model is None:
        known["response_class"] = Response
    elif model is not bytes:
        known["response_model"] = model
    if waits or parameters:
        known["openapi_extra"] = {"parameters": [*parameters, *([PREFER] if waits else [])]}
    return known


def new_router() -> APIRouter:
    """Return a router for some of the package's routes."""
    return APIRouter(
        prefix="/v1/joblib",
        tags=["joblib"],
        route_class=ProblemRoute,
        # what generated clients call them
        generate_unique_id_function=attrgetter("name"),
    )


def _event_webhooks() -> APIRouter:
    router = APIRouter(tags=["joblib"], generate_unique_id_function=attrgetter("name"))
    for event in FrozenEvent.__subclasses__():
        # a host may have events of its own
        if event.__module__ == FrozenEvent.__module__:

            async def hear(data: Any) -> None: ...

            hear.__annotations__["data"] = event
            router.add_api_route(
                event.event_name,
                hear,
                methods=["POST"],
                name=event.event_name,
                description=event.__doc__,
                status_code=204,
                responses={"default": {"description": "Socket.IO takes no answer."}},
            )
    return router


#: What goes over Socket.IO, as webhooks of OpenAPI: ``app.webhooks.include_router(webhooks)``.
webhooks = _event_webhooks()
