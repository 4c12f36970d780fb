"""Providers: data that a connected worker serves on demand."""

from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from zndraw_joblib.database import Listing, Page, execute, paginate, size_of, upsert
from zndraw_joblib.exceptions import Forbidden, ProviderNotFound
from zndraw_joblib.lifecycle import INTERNAL_ROOM, FullName, JsonObject, split_full_name
from zndraw_joblib.models import PROVIDER, seen_from, visible
from zndraw_joblib.schemas import ProviderResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import Caller, RoomAccess, check_length, check_quota, permits

_VIEW = (
    PROVIDER.c.id,
    PROVIDER.c.room_id,
    PROVIDER.c.category,
    PROVIDER.c.name,
    PROVIDER.c.schema,
    PROVIDER.c.content_type,
    PROVIDER.c.worker_id,
    PROVIDER.c.created_at,
)
_NAME = (PROVIDER.c.room_id, PROVIDER.c.category, PROVIDER.c.name)


class Registered(NamedTuple):
    """A provider, and whether it is new."""

    provider: ProviderResponse
    created: bool


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
) -> Registered:
    """Make a provider, or put this one in the place of the caller's earlier one.

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
    return Registered(_view(row), created)


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
