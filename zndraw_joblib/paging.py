"""Listings, newest first: by offset, or by a cursor that repeats and misses nothing."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib.database import execute, number, octets
from zndraw_joblib.lifecycle import MAX_INT


@dataclass(frozen=True)
class Cursor:
    """The last row of a page, and what the first page counted."""

    created_at: datetime
    id: UUID
    total: int

    def encode(self) -> str:
        """Return the cursor as one opaque token for a URL."""
        fields = [self.created_at.isoformat(), self.id.hex, self.total]
        return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()

    @classmethod
    def decode(cls, token: str) -> "Cursor":
        """Read a token back.

        Raises
        ------
        ValueError
            When it is none of ours.
        """
        try:
            moment, row_id, total = json.loads(base64.urlsafe_b64decode(token))
            created_at = datetime.fromisoformat(moment)
            if created_at.tzinfo is None or not 0 <= total <= MAX_INT:
                raise ValueError(token)
            return cls(created_at.astimezone(UTC), UUID(row_id), int(total))
        except (ValueError, TypeError, AttributeError, OverflowError):
            raise ValueError("not a cursor of this listing") from None


@dataclass(frozen=True)
class Page:
    """Which part of a listing is asked for."""

    limit: int
    offset: int
    cursor: Cursor | None = None


@dataclass(frozen=True)
class Listing:
    """One page of rows.

    Attributes
    ----------
    rows : sequence of Row
        At most ``limit`` of them.
    total : int
        All rows, as counted by the first page.
    next : Cursor or None
        Where the next page begins.
    """

    rows: Sequence[Any]
    total: int
    next: Cursor | None


def size_of(*columns: Any) -> sa.ColumnElement[int]:
    """Return how many bytes columns take together, as text."""
    sizes = (sa.func.coalesce(octets(sa.cast(c, sa.Text)), number(0)) for c in columns)
    return sum(sizes, start=number(0))


Completion = Callable[[sa.Select[Any]], sa.Select[Any]]


@lru_cache(maxsize=64)
def _counting(statement: sa.Select[Any], table: sa.Table) -> sa.Select[tuple[int]]:
    counted = statement.with_only_columns(table.c.id, maintain_column_froms=True)
    return sa.select(sa.func.count()).select_from(counted.subquery())


@lru_cache(maxsize=256)
def _page(
    statement: sa.Select[Any],
    table: sa.Table,
    limit: int,
    continued: bool,
    complete: Completion | None,
) -> sa.Select[Any]:
    # built once for each shape: to build a statement takes longer than to run it
    newest_first = statement.order_by(table.c.created_at.desc(), table.c.id.desc())
    if continued:
        newest_first = newest_first.where(
            sa.tuple_(table.c.created_at, table.c.id)
            < sa.tuple_(
                sa.bindparam("last_moment", type_=table.c.created_at.type),
                sa.bindparam("last_id", type_=table.c.id.type),
            )
        )
    else:
        newest_first = newest_first.offset(sa.bindparam("offset", type_=sa.BigInteger()))
    chosen = newest_first.limit(number(limit + 1))
    return complete(chosen) if complete else chosen


async def paginate(
    session: AsyncSession,
    statement: sa.Select[Any],
    table: sa.Table,
    page: Page,
    values: Mapping[str, Any],
    complete: Completion | None = None,
) -> Listing:
    """Run one page of ``statement``, whose rows carry ``created_at`` and ``id``.

    Counts only without a cursor, and where more than this page is there: counting is the
    one cost that grows with the table.

    Parameters
    ----------
    session : AsyncSession
        Nothing is written.
    statement : Select
        Built once for each shape, as ``complete`` is: what is made of them is kept.
    table : Table
        Of ``created_at`` and ``id``.
    page : Page
        Which part is asked for.
    values : mapping
        Of the statement's parameters.
    complete : callable, optional
        What it adds to the chosen rows, it adds to those of the page alone.
    """
    cursor = page.cursor
    rows: Sequence[Any] = []
    if page.limit:
        asked = _page(statement, table, page.limit, cursor is not None, complete)
        start = (
            {"last_moment": cursor.created_at, "last_id": cursor.id}
            if cursor
            else {"offset": page.offset}
        )
        rows = (await execute(session, asked, {**values, **start})).all()
    shown = rows[: page.limit]
    more = len(rows) > page.limit
    if cursor:
        total = cursor.total
    elif page.limit and not more and (shown or not page.offset):
        total = page.offset + len(shown)
    else:
        counting = _counting(statement, table)
        total = (await execute(session, counting, dict(values))).scalars().one()
    last = Cursor(shown[-1].created_at, shown[-1].id, total) if more else None
    return Listing(shown, total, last)
