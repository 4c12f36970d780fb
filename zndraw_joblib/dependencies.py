"""What a host can override, and what the routes know of their app.

There is no session dependency here: sessions are zndraw-auth's ``SessionDep`` and
``get_session_maker``.

FastAPI analyses every dependency anew in each request as soon as anything is overridden.
So a route depends on auth's user and session alone, and on those override points that hosts
give dependencies of their own: :func:`get_room_access`, :func:`verify_writable_room` and
:func:`get_result_backend`. The other ones are looked up by :func:`context_of`. An override
of these is a function, coroutine or not, that takes nothing or the request.
"""

import asyncio
import functools
import hashlib
import inspect
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Annotated, Any
from urllib.parse import quote
from urllib.request import parse_http_list
from uuid import UUID

import anyio
from fastapi import Depends, Header, Query, Request, Response
from pydantic import AfterValidator
from pydantic_core import to_json
from sqlalchemy.ext.asyncio import AsyncSession
from zndraw_auth import User, current_active_user, current_user_scoped_session
from zndraw_auth.db import get_session_maker

from zndraw_joblib import deprecated
from zndraw_joblib.database import Listing, Page
from zndraw_joblib.delivery import ProvidersRemoved, Runtime, SessionMaker, Transports, runtime_of
from zndraw_joblib.events import Emitter, Outbox
from zndraw_joblib.exceptions import Forbidden, InvalidRoomId, PayloadTooLarge, full_path
from zndraw_joblib.lifecycle import TaskStatus, check_printable, check_room
from zndraw_joblib.registry import InternalRegistry
from zndraw_joblib.results import ResultBackend, results_of
from zndraw_joblib.settings import JobLibSettings, settings_of
from zndraw_joblib.waiting import wakeups_of
from zndraw_joblib.workers import READ, Action, Caller, RoomAccess, permits

__getattr__ = functools.partial(deprecated.alias, __name__)

log = logging.getLogger(__name__)

# Longest `Prefer` that is read, in characters.
_MAX_PREFER = 1000
#: Of a large answer, what is sent at once.
CHUNK_BYTES = 64 * 1024

# --- what a host can override ---

# Those that are dependencies of FastAPI are coroutines: it sends plain functions to a
# thread, and the request's session would be held meanwhile.


async def get_joblib_settings(request: Request) -> JobLibSettings:
    """Return ``app.state.joblib_settings``, or the settings of the environment."""
    return settings_of(request.app)


async def get_tsio(request: Request) -> Emitter | None:
    """Return the Socket.IO server ``app.state.tsio``; without one nothing is sent."""
    return getattr(request.app.state, "tsio", None)


async def get_internal_registry(request: Request) -> InternalRegistry | None:
    """Return ``app.state.internal_registry``, as ``register_internal_jobs`` set it."""
    return getattr(request.app.state, "internal_registry", None)


@deprecated.old_cleanup_override
async def get_providers_removed(request: Request) -> ProvidersRemoved | None:
    """Return ``app.state.on_providers_removed``: what hears of providers that went.

    ``await hook(names)`` is called after the commit, with no session open; the sweeper
    takes the same hook as an argument.
    """
    return getattr(request.app.state, "on_providers_removed", None)


async def _open_to_all(session: AsyncSession, caller: Caller, room_id: str, action: Action) -> bool:
    return action.kind != "operate" or caller.is_superuser


async def get_room_access() -> RoomAccess:
    """Return who may do what in a room; a host with private rooms overrides this one.

    The returned ``async (session, caller, room_id, action) -> bool`` is asked by every
    route, those addressed by a task's id included, with an :class:`Action`; without the
    last parameter it is asked all the same. It runs its statements on the session that it
    is given and opens none of its own. The override itself is best a coroutine function:
    FastAPI sends a plain one to a thread, with the session held.
    """
    return _open_to_all


async def get_result_backend(request: Request) -> ResultBackend:
    """Return ``app.state.result_backend``, by default one in memory."""
    return results_of(request.app)


async def verify_writable_room(request: Request) -> str:
    """Return the room of the path if it takes registrations and submissions.

    A host that can lock rooms overrides this.
    """
    return validate_room_id(request.path_params["room_id"])


async def look_up(request: Request, dependency: Any) -> Any:
    """Return what an override point returns, or what the host has put in its place.

    Parameters
    ----------
    request : Request
        Handed on if the function takes an argument.
    dependency : callable
        One of those above.

    Raises
    ------
    TypeError
        When the override asks for more than the request.
    """
    overrides = getattr(request.app, "dependency_overrides", {})
    override = overrides.get(dependency)
    if override is None:
        return await dependency(request)
    takes = len(inspect.signature(override).parameters)
    if takes > 1:
        raise TypeError(f"the override of {dependency.__name__} may take the request, nothing else")
    found = override(request) if takes else override()
    return await found if inspect.isawaitable(found) else found


# --- what the routes ask for ---

Sessions = Annotated[SessionMaker, Depends(get_session_maker)]
Access = Annotated[RoomAccess, Depends(get_room_access)]
Writable = Annotated[Any, Depends(verify_writable_room)]
Results = Annotated[ResultBackend, Depends(get_result_backend)]
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255),
    AfterValidator(lambda key: key and check_printable(key)),
]


@dataclass(frozen=True)
class Context:
    """What a route knows beside its parameters: who asks, and the app.

    Attributes
    ----------
    request : Request
        The request.
    caller : Caller
        Who asks.
    runtime : Runtime
        What the app remembers.
    transports : Transports
        What carries changes out of the process.
    outbox : Outbox
        What leaves with the commit.
    """

    request: Request
    caller: Caller
    runtime: Runtime
    transports: Transports
    outbox: Outbox = field(default_factory=Outbox)

    @property
    def settings(self) -> JobLibSettings:
        """The host's settings."""
        return self.transports.settings

    async def commit(self, session: AsyncSession) -> None:
        """Commit, and publish what is in the outbox.

        Who hangs up meanwhile takes neither back.
        """

        async def commit_and_publish() -> None:
            await session.commit()
            self.publish()

        committing = asyncio.create_task(commit_and_publish())
        try:
            await asyncio.shield(committing)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await asyncio.wait([committing])
            raise

    def publish(self) -> None:
        """Let what is in the outbox leave, where nothing was to be committed."""
        published = self.runtime.delivery.publish(self.outbox, self.transports)
        self.request.scope[PUBLISHED] = published

    def preferred_wait(self, longest: float) -> float | None:
        """Return how long the client would wait, in seconds; None if it doesn't say."""
        return preferred_wait(self.request.headers.getlist("prefer"), longest)


#: Where a request's scope holds the future of what it published.
PUBLISHED = "zndraw_joblib.published"


#: FastAPI asks auth for the user; :func:`with_context` makes the context of it.
RequestContext = Annotated[Context, Depends(current_active_user)]
#: For routes that wait: no session is held after the user was looked up.
WaitingContext = Annotated[Context, Depends(current_user_scoped_session)]


async def context_of(
    request: Request, user: User, session_maker: SessionMaker | None = None
) -> Context:
    """Return the context of a request.

    Parameters
    ----------
    request : Request
        The request.
    user : User
        Who asks.
    session_maker : callable, optional
        For what may go to the broker: it opens the session that fails what can't leave.
    """
    transports = Transports(
        await look_up(request, get_joblib_settings),
        await look_up(request, get_tsio),
        await look_up(request, get_internal_registry),
        session_maker,
        await look_up(request, get_providers_removed),
        wakeups_of(request.app),
        getattr(request.app.state, "on_task_log", None),
    )
    runtime = runtime_of(request.app)
    if not runtime.began:
        runtime.began = True
        log.warning(
            "the lifespan of this app did not run, nor did what starts in it, as the sweeper:"
            " no server runs that of a mounted app (docs/prefix.md)"
        )
    return Context(request, Caller(user.id, user.is_superuser), runtime, transports)


def with_context(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Give a handler the context of its request where FastAPI has the user.

    As a dependency it would have auth's beneath it, and FastAPI analyse them twice. The
    context of a handler that takes ``session_maker`` has it too.
    """
    signature = inspect.signature(handler)

    @functools.wraps(handler)
    async def endpoint(request: Request, context: User, **parameters: Any) -> Any:
        session_maker = parameters.get("session_maker")
        return await handler(await context_of(request, context, session_maker), **parameters)

    request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY, annotation=Request)
    parameters = [*signature.parameters.values(), request]
    endpoint.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return endpoint


def validate_room_id(room_id: str) -> str:
    """Return the room of the path.

    Raises
    ------
    ProblemException
        ``invalid-room-id``.
    """
    try:
        return check_room(room_id)
    except ValueError as exc:
        raise InvalidRoomId.exception(f"room id {exc}") from None


async def enter(
    session: AsyncSession,
    caller: Caller,
    room_id: str,
    may_enter: RoomAccess,
    action: Action = READ,
) -> None:
    """Return if the caller may do something in a room.

    Raises
    ------
    ProblemException
        ``invalid-room-id``, ``forbidden``.
    """
    validate_room_id(room_id)
    if not await permits(may_enter, session, caller, room_id, action):
        refusal = "is not open to you" if action is READ else f"does not let you {action.kind}"
        raise Forbidden.exception(f"room {room_id!r} {refusal}")


async def check_writable(request: Request, room_id: str) -> None:
    """Ask a host's ``verify_writable_room`` about a room that isn't in the path.

    One that takes more than ``room_id`` and ``request`` can't be asked here; what
    ``get_room_access`` returns is asked in any case.
    """
    overrides = getattr(request.app, "dependency_overrides", {})
    verify = overrides.get(verify_writable_room)
    if verify is None:
        return
    known = {"room_id": room_id, "request": request}
    takes = inspect.signature(verify).parameters
    if takes.keys() <= known.keys():
        answer = verify(**{name: known[name] for name in takes})
        if inspect.isawaitable(answer):
            await answer


class TaskPage(Page):
    """Which part of a listing of tasks is asked for."""

    status: TaskStatus | None = None


Paging = Annotated[Page, Query()]
TaskPaging = Annotated[TaskPage, Query()]


def written(items: Iterable[Any]) -> bytes:
    """Return models, or what is JSON already, as one array."""
    each = (item if isinstance(item, bytes) else to_json(item) for item in items)
    return b"[%b]" % b",".join(each)


def json_response(
    content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return models, what JSON is made of, or what is JSON already, as the answer."""
    body = content if isinstance(content, bytes) else to_json(content)
    return Response(body, status_code, headers, "application/json")


def location_of_task(request: Request, task_id: UUID) -> str:
    """Return the path of a task, beneath whatever these routes are served."""
    above, routes, _ = full_path(request).partition("/v1/joblib/")
    return quote(f"{above}{routes}tasks/{task_id}")


def page_response(request: Request, page: Page, listing: Listing, items: Iterable[Any]) -> Response:
    """Return a page of a listing, with a link to the next one (RFC 8288)."""
    headers = {}
    if listing.next is not None:
        url = request.url.remove_query_params("offset").include_query_params(
            cursor=listing.next.encode()
        )
        headers["Link"] = f'<{quote(full_path(request))}?{url.query}>; rel="next"'
    counts = {"total": listing.total, "limit": page.limit, "offset": page.offset}
    body = b'{"items":%b,%b' % (written(items), to_json(counts)[1:])
    return json_response(body, headers=headers)


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    """Yield a large answer in parts: a server buffers each whole, for who is slow to take it."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


# --- what stands in a request ---


async def bounded(body: AsyncIterator[bytes], limit: int, what: str) -> bytes:
    """Read a body up to its limit.

    Raises
    ------
    ProblemException
        ``payload-too-large``, before more than ``limit`` bytes are buffered.
    """
    # one growing block: chunks that are joined would need their size twice
    data = BytesIO()
    async for chunk in body:
        if data.tell() + len(chunk) > limit:
            raise PayloadTooLarge.exception(f"{what} is limited to {limit} bytes")
        data.write(chunk)
    return data.getvalue()


def request_hash(params: Mapping[str, Any]) -> str:
    """Return the SHA-256 hex of query parameters as JSON, keys sorted, no spaces."""
    encoded = json.dumps(params, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(encoded.encode()).hexdigest()


def query_params(items: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return query parameters as one object: a name given repeatedly gets a list."""
    params: dict[str, list[str]] = {}
    for name, value in items:
        params.setdefault(name, []).append(value)
    return {name: values if len(values) > 1 else values[0] for name, values in params.items()}


def preferred_wait(preferences: list[str], longest: float) -> float | None:
    """Return the ``wait`` of ``Prefer`` headers (RFC 7240, section 4.3).

    Parameters
    ----------
    preferences : list of str
        The values of all ``Prefer`` headers.
    longest : float
        What more is cut to, in seconds.

    Returns
    -------
    float or None
        Seconds; None when there is no ``wait`` that can be read.
    """
    header = ", ".join(preferences)
    if len(header) > _MAX_PREFER:
        return None
    for preference in parse_http_list(header):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            # the first one counts, readable or not
            digits = value.strip()
            if len(digits) > 1 and digits[0] == digits[-1] == '"':
                digits = digits[1:-1]
            readable = digits.isascii() and digits.isdigit() and len(digits) <= 18
            return min(float(digits), longest) if readable else None
    return None


def wait_headers(wait: float | None) -> dict[str, str]:
    """Return the headers that say which ``Prefer: wait`` was applied."""
    headers = {"Vary": "Prefer"}
    if wait is not None:
        headers["Preference-Applied"] = f"wait={wait:g}"
    return headers
