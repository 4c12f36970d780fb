"""What a host can override, and what the routes ask for.

There is no session dependency here: sessions are zndraw-auth's ``SessionDep`` and
``get_session_maker``.
"""

import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import quote

from fastapi import Depends, Header, Query, Request, Response
from pydantic import AfterValidator
from sqlalchemy.ext.asyncio import AsyncSession
from zndraw_auth import User, current_active_user, current_user_scoped_session
from zndraw_auth.db import SessionDep, get_session_maker

from zndraw_joblib import deprecated
from zndraw_joblib.delivery import (
    ANSWER,
    Exits,
    ProvidersRemoved,
    SessionMaker,
    deliver,
    tell,
)
from zndraw_joblib.deprecated import __getattr__ as __getattr__
from zndraw_joblib.events import Emitter, Outbox
from zndraw_joblib.exceptions import Forbidden, InvalidRequest, InvalidRoomId
from zndraw_joblib.names import check_room
from zndraw_joblib.paging import Cursor, Listing, Page
from zndraw_joblib.registry import InternalRegistry
from zndraw_joblib.results import ResultBackend, results_of
from zndraw_joblib.schemas import MAX_INT, MAX_PAGE, PaginatedResponse, check_printable
from zndraw_joblib.settings import JobLibSettings, settings_of
from zndraw_joblib.wakeups import wakeups_of
from zndraw_joblib.watch import Desk, watch_of
from zndraw_joblib.workers import Caller, RoomAccess

T = TypeVar("T")

# --- what a host can override ---


# All dependencies are coroutines: FastAPI sends plain functions to a thread, and the
# request's session would be held meanwhile.


async def get_joblib_settings(request: Request) -> JobLibSettings:
    """Return ``app.state.joblib_settings``, or the settings of the environment."""
    return settings_of(request.app)


async def get_tsio(request: Request) -> Emitter | None:
    """Return the Socket.IO server ``app.state.tsio``; without one nothing is sent."""
    return getattr(request.app.state, "tsio", None)


async def get_internal_registry(request: Request) -> InternalRegistry | None:
    """Return ``app.state.internal_registry``, as ``register_internal_jobs`` set it."""
    return getattr(request.app.state, "internal_registry", None)


async def _open_to_all(session: AsyncSession, caller: Caller, room_id: str) -> bool:
    return True


async def get_room_access() -> RoomAccess:
    """Return who may enter a room; a host with private rooms overrides this one.

    The returned ``async (session, caller, room_id) -> bool`` is asked by every route,
    those addressed by a task's id included. It runs its statements on the session that
    it is given and opens none of its own. The override itself is best a coroutine
    function: FastAPI sends a plain one to a thread, with the session held.
    """
    return _open_to_all


async def get_result_backend(request: Request) -> ResultBackend:
    """Return ``app.state.result_backend``, by default one in memory."""
    return results_of(request.app)


async def get_internal_providers(request: Request) -> InternalRegistry | None:
    """Return ``app.state.internal_provider_registry``, as the host set it."""
    return getattr(request.app.state, "internal_provider_registry", None)


@deprecated.for_removals
async def get_providers_removed(request: Request) -> ProvidersRemoved | None:
    """Return ``app.state.on_providers_removed``: what hears of providers that went.

    ``await hook(names)`` is called after the commit, with no session open; the sweeper
    takes the same hook as an argument.
    """
    return getattr(request.app.state, "on_providers_removed", None)


def request_hash(params: Mapping[str, Any]) -> str:
    """Return the SHA-256 hex of query parameters as JSON, keys sorted, no spaces."""
    encoded = json.dumps(params, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(encoded.encode()).hexdigest()


def query_params(items: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return query parameters as one object: a name given repeatedly gets a list."""
    params: dict[str, Any] = {}
    for name, value in items:
        if name not in params:
            params[name] = value
        elif isinstance(params[name], list):
            params[name].append(value)
        else:
            params[name] = [params[name], value]
    return params


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


async def verify_writable_room(room_id: str) -> str:
    """Return the room of the path if it takes registrations and submissions.

    A host that can lock rooms overrides this.
    """
    return validate_room_id(room_id)


# --- what the routes ask for ---

Settings = Annotated[JobLibSettings, Depends(get_joblib_settings)]
Registry = Annotated[InternalRegistry | None, Depends(get_internal_registry)]
InternalProviders = Annotated[InternalRegistry | None, Depends(get_internal_providers)]
Results = Annotated[ResultBackend, Depends(get_result_backend)]
Tsio = Annotated[Emitter | None, Depends(get_tsio)]
Access = Annotated[RoomAccess, Depends(get_room_access)]
Sessions = Annotated[SessionMaker, Depends(get_session_maker)]


async def _caller(user: Annotated[User, Depends(current_active_user)]) -> Caller:
    return Caller(user.id, user.is_superuser)


async def _waiting_caller(
    user: Annotated[User, Depends(current_user_scoped_session)],
) -> Caller:
    return Caller(user.id, user.is_superuser)


CurrentCaller = Annotated[Caller, Depends(_caller)]
# for routes that wait: it holds no session after the look-up
WaitingCaller = Annotated[Caller, Depends(_waiting_caller)]


# An outbox is delivered when the request's session is closed, and not at all when the
# handler raised.


def _left_in(request: Request, deliver: Callable[[Outbox], Awaitable[None]]) -> Outbox:
    box = Outbox()
    request.scope[ANSWER].news = partial(deliver, box)
    return box


async def outbox(
    request: Request,
    session_maker: Sessions,
    settings: Settings,
    registry: Registry,
    tsio: Tsio,
) -> Outbox:
    """Return the outbox of a request that may have something for the broker."""
    wakeups = wakeups_of(request.app)
    exits = Exits(session_maker, settings, tsio, registry, wakeups=wakeups)
    return _left_in(request, partial(deliver, exits=exits))


async def news(request: Request, settings: Settings, tsio: Tsio) -> Outbox:
    """Return the outbox of a request that has events alone to send."""
    wakeups = wakeups_of(request.app)
    sending = partial(tell, settings=settings, tsio=tsio, wakeups=wakeups)
    return _left_in(request, sending)


async def farewell(
    request: Request,
    session_maker: Sessions,
    settings: Settings,
    tsio: Tsio,
    removed: Annotated[ProvidersRemoved | None, Depends(get_providers_removed)],
) -> Outbox:
    """Return the outbox of a request that removes providers."""
    wakeups = wakeups_of(request.app)
    exits = Exits(session_maker, settings, tsio, None, removed, wakeups)
    return _left_in(request, partial(deliver, exits=exits))


OutboxDep = Annotated[Outbox, Depends(outbox)]
FarewellDep = Annotated[Outbox, Depends(farewell)]
NewsDep = Annotated[Outbox, Depends(news)]


async def enter(
    session: AsyncSession, caller: Caller, room_id: str, may_enter: RoomAccess
) -> str:
    """Return the room of the path if the caller may enter it.

    Raises
    ------
    ProblemException
        ``invalid-room-id``, ``forbidden``.
    """
    validate_room_id(room_id)
    if not await may_enter(session, caller, room_id):
        raise Forbidden.exception(f"room {room_id!r} is not open to you")
    return room_id


# What a route asks for comes as one: FastAPI walks through all that a dependency stands on
# each time it is asked for, known or not, and each costs a request about a hundredth.


class Visit(NamedTuple):
    """A caller in a room that is open to them."""

    room: str
    caller: Caller
    session: AsyncSession


class Change(NamedTuple):
    """A caller who changes something, and the outbox of what is to be told of it."""

    caller: Caller
    session: AsyncSession
    settings: JobLibSettings
    outbox: Outbox


class Offer(NamedTuple):
    """A caller who changes something in a room that is open to them."""

    room: str
    caller: Caller
    session: AsyncSession
    settings: JobLibSettings
    outbox: Outbox


class Submission(NamedTuple):
    """A caller who has something done in a room that is open to them."""

    room: str
    caller: Caller
    session: AsyncSession
    settings: JobLibSettings
    outbox: Outbox
    registry: InternalRegistry | None


CurrentUser = Annotated[User, Depends(current_active_user)]


async def _reading(
    room_id: str, user: CurrentUser, session: SessionDep, may_enter: Access
) -> Visit:
    caller = Caller(user.id, user.is_superuser)
    return Visit(await enter(session, caller, room_id, may_enter), caller, session)


async def _changing(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    settings: Settings,
    tsio: Tsio,
) -> Change:
    outbox = await news(request, settings, tsio)
    return Change(Caller(user.id, user.is_superuser), session, settings, outbox)


async def _offering(
    request: Request,
    room_id: str,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    _: Annotated[Any, Depends(verify_writable_room)],
    settings: Settings,
    tsio: Tsio,
) -> Offer:
    visit = await _reading(room_id, user, session, may_enter)
    return Offer(*visit, settings, await news(request, settings, tsio))


async def _submitting(
    request: Request,
    room_id: str,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    _: Annotated[Any, Depends(verify_writable_room)],
    session_maker: Sessions,
    settings: Settings,
    registry: Registry,
    tsio: Tsio,
) -> Submission:
    visit = await _reading(room_id, user, session, may_enter)
    box = await outbox(request, session_maker, settings, registry, tsio)
    return Submission(*visit, settings, box, registry)


Reading = Annotated[Visit, Depends(_reading)]
Changing = Annotated[Change, Depends(_changing)]
Offering = Annotated[Offer, Depends(_offering)]
Submitting = Annotated[Submission, Depends(_submitting)]


class Pager:
    """The page that a listing is asked for, and how it is shown."""

    def __init__(self, page: Page, request: Request, response: Response) -> None:
        self.page = page
        self._url = request.url
        self._path = quote(request.scope["path"])
        self._response = response

    def show(self, listing: Listing, items: list[T]) -> PaginatedResponse[T]:
        """Return the page, with a link to the next one (RFC 8288)."""
        if listing.next is not None:
            url = self._url.remove_query_params("offset").include_query_params(
                cursor=listing.next.encode()
            )
            self._response.headers["Link"] = f'<{self._path}?{url.query}>; rel="next"'
        return PaginatedResponse(
            items=items,
            total=listing.total,
            limit=self.page.limit,
            offset=self.page.offset,
        )


async def _pager(
    request: Request,
    response: Response,
    limit: Annotated[int, Query(ge=0, le=MAX_PAGE)] = 50,
    offset: Annotated[int, Query(ge=0, le=MAX_INT)] = 0,
    cursor: Annotated[
        str | None, Query(description='From `Link: rel="next"`.', max_length=500)
    ] = None,
) -> Pager:
    try:
        last = Cursor.decode(cursor) if cursor else None
    except ValueError as exc:
        raise InvalidRequest.exception(
            errors=[{"pointer": "/query/cursor", "detail": str(exc)}]
        ) from None
    return Pager(Page(limit, offset, last), request, response)


PagerDep = Annotated[Pager, Depends(_pager)]


IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255),
    AfterValidator(lambda key: key and check_printable(key)),
]

_QUOTED = r'"(?:[^"\\]|\\.)*"'
# an open quote runs to the end: to look for its end again and again takes minutes
_ITEM = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.?)*(?:"|$))+')
_PREFERENCE = re.compile(
    rf'\s*(?P<name>[^\s=;"]+)\s*(?:=\s*(?P<value>{_QUOTED}|[^\s;"]*)\s*)?(?:;.*)?'
)


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
    for item in _ITEM.findall(", ".join(preferences)):
        preference = _PREFERENCE.fullmatch(item)
        if preference and preference["name"].lower() == "wait":
            # the first one counts, readable or not
            seconds = (preference["value"] or "").strip('"')
            if not re.fullmatch("[0-9]{1,18}", seconds):
                return None
            return min(float(seconds), longest)
    return None


async def _desk(
    request: Request,
    user: Annotated[User, Depends(current_user_scoped_session)],
    session_maker: Sessions,
    settings: Settings,
) -> Desk:
    # read from the headers, not asked for: nothing that stands there is refused
    preferences = request.headers.getlist("prefer")
    return Desk(
        watch_of(request.app),
        Caller(user.id, user.is_superuser),
        session_maker,
        settings,
        wakeups_of(request.app),
        request.receive,
        preferred_wait(preferences, settings.long_poll_max_wait_seconds),
    )


WaitingDesk = Annotated[Desk, Depends(_desk)]


class Hatch(NamedTuple):
    """A desk, and the outbox of what is handed out there."""

    desk: Desk
    outbox: Outbox


async def _hatch(
    request: Request,
    user: Annotated[User, Depends(current_user_scoped_session)],
    session_maker: Sessions,
    settings: Settings,
    tsio: Tsio,
) -> Hatch:
    # one for both: what they stand on is walked through once
    desk = await _desk(request, user, session_maker, settings)
    return Hatch(desk, await news(request, settings, tsio))


WorkHatch = Annotated[Hatch, Depends(_hatch)]
