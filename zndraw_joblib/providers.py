"""Providers: data that workers serve on demand, and each read's way there and back.

What the result backend holds of a read, each under a key of its own:

=========  =======================================================================
result     the bytes as uploaded; hosts read them
origin     which provider uploaded them; a result without it is nobody's
inflight   a mark: the request is in flight; hosts set and respect it
requested  whom it went to; what nobody requested is not kept
outcome    for some seconds: that there is a result, or why there is none
=========  =======================================================================
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from uuid import UUID

import anyio
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from zndraw_joblib import exceptions
from zndraw_joblib.database import Listing, Page, execute, paginate, size_of, upsert
from zndraw_joblib.encoding import parse_json
from zndraw_joblib.events import Dispatcher, Emitter, ProviderRequest, providers_channel
from zndraw_joblib.exceptions import Forbidden, ProviderNotFound
from zndraw_joblib.lifecycle import INTERNAL_ROOM, FullName, JsonObject, split_full_name
from zndraw_joblib.models import PROVIDER, seen_from, visible
from zndraw_joblib.results import RETRY_LATER, InFlight, ResultBackend
from zndraw_joblib.schemas import ProviderResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import Caller, RoomAccess, check_length, check_quota, permits

log = logging.getLogger(__name__)

# its owner is told nobody
_VIEW = tuple(column for column in PROVIDER.c if column.key != "user_id")
_NAME = (PROVIDER.c.room_id, PROVIDER.c.category, PROVIDER.c.name)


def _view(row: sa.Row[Any]) -> ProviderResponse:
    full_name = str(FullName(row.room_id, row.category, row.name))
    return ProviderResponse(**row._mapping, full_name=full_name)


def _owned(caller: Caller) -> sa.ColumnElement[bool]:
    return sa.true() if caller.is_superuser else PROVIDER.c.user_id == caller.id


def _named(name: FullName) -> sa.ColumnElement[bool]:
    return sa.and_(*(column == part for column, part in zip(_NAME, name, strict=True)))


def _written(
    name: FullName, fields: dict[str, Any], new_id: UUID, kept_id: Any, over: Any = None
) -> Insert:
    room, category, short = name
    key = {"room_id": room, "category": category, "name": short}
    writing = upsert(PROVIDER).values(id=new_id, **key, **fields)
    replaced = {field: writing.excluded[field] for field in fields}
    return writing.on_conflict_do_update(
        index_elements=_NAME, set_={"id": kept_id, **replaced}, where=over
    )


async def register(
    session: AsyncSession,
    name: FullName,
    schema: JsonObject,
    content_type: str,
    worker_id: UUID | None,
    caller: Caller,
    settings: JobLibSettings,
) -> tuple[ProviderResponse, bool]:
    """Make a provider, or put this one in the place of the caller's earlier one.

    Returns it, and whether it is new.

    A superuser takes over another user's name under a new id: what its former owner
    still uploads is nobody's.

    Raises
    ------
    ProblemException
        ``forbidden`` when the name is another user's, ``invalid-request`` when it is
        too long, ``quota-exceeded``.
    """
    check_length(name)
    fields = {
        "schema": schema,
        "content_type": content_type,
        "user_id": caller.id,
        "worker_id": worker_id,
    }
    new_id = uuid7()
    kept_id = sa.case((PROVIDER.c.user_id == caller.id, PROVIDER.c.id), else_=uuid7())
    writing = _written(name, fields, new_id, kept_id, over=_owned(caller))
    row = (await execute(session, writing.returning(*_VIEW))).one_or_none()
    if row is None:
        raise Forbidden.exception(f"provider {name} belongs to another user")
    created = row.id == new_id
    if created:
        theirs = sa.select(PROVIDER.c.id).where(PROVIDER.c.user_id == caller.id)
        await check_quota(session, theirs, settings.max_providers_per_user, "providers")
    return _view(row), created


async def install(
    session: AsyncSession, name: FullName, schema: JsonObject, content_type: str, user_id: UUID
) -> None:
    """Write an ``@internal`` provider as the server's own code defines it."""
    fields = {"schema": schema, "content_type": content_type, "user_id": user_id}
    await execute(session, _written(name, fields, uuid7(), PROVIDER.c.id))


async def read(session: AsyncSession, room: str, full_name: str) -> ProviderResponse:
    """Return a provider that ``room`` sees.

    Raises
    ------
    ProblemException
        ``provider-not-found``, also for a malformed name.
    """
    try:
        name = split_full_name(full_name)
    except ValueError as exc:
        raise ProviderNotFound.exception(f"provider not found: {exc}") from None
    seen = sa.select(*_VIEW).where(_named(name), visible(PROVIDER))
    row = (await execute(session, seen, seen_from(room))).one_or_none()
    if row is None:
        raise ProviderNotFound.exception(f"provider not found: room {room!r} sees no {name}")
    return _view(row)


@lru_cache(maxsize=1)
def _listed() -> sa.Select[Any]:
    schema = PROVIDER.c.schema
    fits = size_of(schema) <= sa.bindparam("largest", type_=sa.BigInteger())
    shown = [
        sa.case((fits, schema), else_=sa.literal({}, schema.type)).label("schema")
        if column is schema
        else column
        for column in _VIEW
    ]
    return sa.select(*shown, (~fits).label("abridged")).where(visible(PROVIDER))


async def list_visible(
    session: AsyncSession, room: str, page: Page, settings: JobLibSettings
) -> tuple[list[ProviderResponse], Listing]:
    """Return a page of the providers that ``room`` sees."""
    largest = settings.max_page_bytes // max(page.limit, 1)
    values = seen_from(room) | {"largest": largest}
    listing = await paginate(session, _listed(), PROVIDER, page, values)
    return [_view(row) for row in listing.rows], listing


async def owned(
    session: AsyncSession, provider_id: UUID, caller: Caller, may_enter: RoomAccess
) -> ProviderResponse:
    """Return a provider that the caller may serve.

    Raises
    ------
    ProblemException
        ``provider-not-found``, also where its room is closed to the caller;
        ``forbidden`` for another user's.
    """
    found = await execute(
        session,
        sa.select(*_VIEW, _owned(caller).label("owned")).where(PROVIDER.c.id == provider_id),
    )
    row = found.one_or_none()
    if row is None or not await permits(may_enter, session, caller, row.room_id):
        raise ProviderNotFound.exception(f"provider {provider_id} not found")
    if not row.owned:
        raise Forbidden.exception(f"provider {provider_id} belongs to another user")
    return _view(row)


async def remove(
    session: AsyncSession, provider_id: UUID, caller: Caller, may_enter: RoomAccess
) -> FullName:
    """Delete a provider and return its name.

    Raises
    ------
    ProblemException
        ``provider-not-found``, also where its room is closed to the caller;
        ``forbidden`` for another user's and the server's.
    """
    provider = await owned(session, provider_id, caller, may_enter)
    if provider.room_id == INTERNAL_ROOM:
        raise Forbidden.exception("the server's own providers stay")
    removing = sa.delete(PROVIDER).where(PROVIDER.c.id == provider_id, _owned(caller))
    row = (await execute(session, removing.returning(*_NAME))).one_or_none()
    if row is None:
        raise ProviderNotFound.exception(f"provider {provider_id} not found")
    return FullName(*row)


# --- a read, and its answer ---

# Outcomes; what follows `_FAILED` is the problem.
_ANSWERED = b"+"
_FAILED = b"-"
# As long as the readers that wait need to be told.
_OUTCOME_SECONDS = 5
#: Of what a provider says went wrong, in bytes.
MAX_FAILURE = 64 * 1024


@dataclass(frozen=True)
class Read:
    """What is to be read from a provider, and where answers wait."""

    provider: ProviderResponse
    # the hash of the parameters
    digest: str
    results: ResultBackend
    settings: JobLibSettings
    in_flight: InFlight

    def key(self, kind: str) -> str:
        """Return the result backend's key of one part of what is held of the read."""
        return f"provider-{kind}:{self.provider.full_name}:{self.digest}"

    @property
    def outcome_key(self) -> str:
        """The key of the outcome: of another provider's, nobody here is woken."""
        return f"provider-outcome:{self.provider.id}:{self.digest}"

    @property
    def origin(self) -> bytes:
        """Whose a result is: bytes of one content type are not answered as another."""
        return f"{self.provider.id} {self.provider.content_type}".encode()

    @property
    def recipient(self) -> str:
        """Whom a request goes to: another worker may take the provider over."""
        return f"{self.provider.id} {self.provider.worker_id}"


async def cached(read: Read) -> bytes | None:
    """Return a result that this very provider uploaded; without its origin it is nobody's."""
    data = await read.results.get(read.key("result"))
    if data is None or await read.results.get(read.key("origin")) != read.origin:
        return None
    return data


async def fetch(read: Read, send: Callable[[], Awaitable[None]], seconds: float) -> bytes:
    """Request an answer, unless it is requested already, and return it when it comes.

    Parameters
    ----------
    read : Read
        What is read.
    send : coroutine function
        Sends the request to its provider.
    seconds : float
        Longest wait.

    Raises
    ------
    ProblemException
        ``provider-timeout``, or what the provider says went wrong.
    """
    deadline = anyio.current_time() + seconds
    while True:
        await read.in_flight.send(_request(read, send))
        outcome: bytes | None = None
        while outcome is None and (left := deadline - anyio.current_time()) > 0:
            # in turns: what is not told is found
            turn = min(left, read.settings.recheck_seconds)
            outcome = await read.results.wait_for_key(read.outcome_key, turn)
            if outcome is not None and outcome.startswith(_FAILED):
                read.in_flight.remove(read.provider.id, read.digest)
                raise _failure(outcome.removeprefix(_FAILED))
            data = await cached(read)
            if data is not None:
                read.in_flight.remove(read.provider.id, read.digest)
                return data
        if outcome is None:
            raise exceptions.ProviderTimeout.exception(
                f"provider {read.provider.full_name} did not answer within {seconds:g} s",
                headers=RETRY_LATER,
            )
        # the result has gone already
        await read.results.delete(read.outcome_key)


async def _request(read: Read, send: Callable[[], Awaitable[None]]) -> None:
    """Send a request to its provider, unless it is in flight.

    If it can't be sent, all who wait for its outcome are told.
    """
    settings = read.settings
    if not await _mark(read):
        return
    if await cached(read) is not None:
        # answered since the reader looked
        await _settle(read, _ANSWERED)
        return
    sent = False
    problem = exceptions.ServiceUnavailable.create("the request can't be sent to its provider")
    ttl, most = settings.provider_inflight_ttl_seconds, settings.max_requests_per_provider
    try:
        if not read.in_flight.add(read.provider.id, read.digest, ttl, most):
            problem = exceptions.ServerBusy.create("too many requests wait for this provider")
            return
        with anyio.fail_after(settings.dispatch_timeout_seconds):
            await send()
        sent = True
    except Exception:
        log.exception("request for %s did not leave", read.provider.full_name)
    finally:
        if not sent:
            outcome = _FAILED + problem.model_dump_json().encode()
            # also when this reader is cancelled: others wait for it
            patience = settings.dispatch_timeout_seconds
            with anyio.move_on_after(patience, shield=True), suppress(Exception):
                await _settle(read, outcome)


async def _mark(read: Read) -> bool:
    """Mark a request as in flight to this provider; tell whether it was not."""
    results, settings = read.results, read.settings
    ttl = settings.provider_inflight_ttl_seconds
    mark = read.key("inflight")
    if not await results.acquire_inflight(mark, ttl):
        if await results.get(read.key("requested")) in (None, read.recipient.encode()):
            return False
        # it went to a worker that has gone since: one reader takes it over
        if not await results.acquire_inflight(f"{mark}:{read.recipient}", ttl):
            return False
    # that of an earlier request; first, since others begin to wait for this one's
    await results.delete(read.outcome_key)
    # longer than the mark: an answer may be late, and is welcome
    late = ttl + settings.provider_result_ttl_seconds
    await results.store(read.key("requested"), read.recipient.encode(), late)
    return True


async def _is_requested(read: Read) -> bool:
    """Tell whether this provider was sent such a request, by this host or by others."""
    recipient = await read.results.get(read.key("requested"))
    if recipient is not None:
        return recipient.split()[0] == str(read.provider.id).encode()
    mark = read.key("inflight")
    if not await read.results.acquire_inflight(mark, 1):
        # a host that asked by itself
        return True
    await read.results.release_inflight(mark)
    return False


async def _settle(read: Read, outcome: bytes) -> None:
    """End a request: those who wait are told, and the next reader asks again."""
    read.in_flight.remove(read.provider.id, read.digest)
    await read.results.store(read.outcome_key, outcome, _OUTCOME_SECONDS)
    await read.results.delete(read.key("requested"))
    await read.results.release_inflight(read.key("inflight"))
    await read.results.notify_key(read.outcome_key)


def sender(
    provider: ProviderResponse,
    params: dict[str, Any],
    digest: str,
    tsio: Emitter | None,
    registry: Dispatcher | None,
) -> Callable[[], Awaitable[None]]:
    """Return what sends a request: Socket.IO to a worker, the broker to the server's own.

    Raises
    ------
    ProblemException
        ``internal-provider-not-configured``.
    """
    name = provider.full_name
    event = ProviderRequest.from_dict_params(request_id=digest, provider_name=name, params=params)
    if provider.room_id != INTERNAL_ROOM:
        return partial(_emit, tsio, event, providers_channel(name))
    if registry is None or name not in registry:
        raise exceptions.InternalProviderNotConfigured.exception()
    message = {"provider_id": str(provider.id), "request_id": digest, "params": event.params}
    return partial(registry.send, name, subject=provider, **message)


async def _emit(tsio: Emitter | None, event: ProviderRequest, room: str) -> None:
    if tsio is None:
        raise RuntimeError("the host has no Socket.IO server")
    await tsio.emit(event.event_name, event.model_dump(mode="json"), room=room)


def _failure(body: bytes) -> exceptions.ProblemException:
    """Return the problem that a provider uploaded, made whole where it is none."""
    problem = exceptions.ProviderExecutionFailed.create()
    try:
        uploaded = parse_json(body)
        if not isinstance(uploaded, dict):
            raise ValueError("not a problem")
        problem = exceptions.ProblemDetail.model_validate({**problem.model_dump(), **uploaded})
    except ValueError:
        problem.detail = body.decode(errors="replace") or problem.detail
    if not 400 <= problem.status <= 599:
        problem.status = exceptions.ProviderExecutionFailed.status
    return exceptions.ProblemException(problem, RETRY_LATER if problem.status == 503 else None)


async def accept(read: Read, data: bytes, failed: bool) -> bool:
    """Give an upload to the readers that wait; keep it, unless it is a failure.

    What nobody asked for is dropped: it would take the place of others' results.

    Returns
    -------
    bool
        Whether there is a result to be read.
    """
    if not await _is_requested(read):
        log.debug("%s was not asked for", read.key("result"))
        return False
    if failed:
        await _settle(read, _FAILED + data)
        return False
    results, ttl = read.results, read.settings.provider_result_ttl_seconds
    # First whose it is, and again: a former provider's late upload, between the two, is
    # not this one's.
    await results.store(read.key("origin"), read.origin, ttl + 60)
    await results.store(read.key("result"), data, ttl)
    await results.store(read.key("origin"), read.origin, ttl + 60)
    await _settle(read, _ANSWERED)
    # hosts that wait for it themselves
    await results.notify_key(read.key("result"))
    return True
