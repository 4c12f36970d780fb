"""Listings, newest first: by offset, or by a cursor that repeats and misses nothing."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Table,
    Text,
    cast,
    func,
    literal,
    select,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib.models import execute, number
from zndraw_joblib.schemas import MAX_INT


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

    rows: Sequence[Row[Any]]
    total: int
    next: Cursor | None


def size_of(*columns: Any) -> ColumnElement[int]:
    """Return how many characters columns take together, as text."""
    sizes = (func.coalesce(func.length(cast(c, Text)), number(0)) for c in columns)
    return sum(sizes, start=number(0))


async def paginate(
    session: AsyncSession,
    statement: Select[Any],
    table: Table,
    page: Page,
    complete: Callable[[Select[Any]], Select[Any]] = lambda chosen: chosen,
) -> Listing:
    """Run one page of ``statement``, whose rows carry ``created_at`` and ``id``.

    Counts only without a cursor: counting is the one cost that grows with the table.
    What ``complete`` adds to the chosen rows, it adds to those of the page alone.
    """
    newest_first = statement.order_by(table.c.created_at.desc(), table.c.id.desc())
    if page.cursor is not None:
        total = page.cursor.total
        newest_first = newest_first.where(
            tuple_(table.c.created_at, table.c.id)
            < tuple_(
                literal(page.cursor.created_at, table.c.created_at.type),
                literal(page.cursor.id, table.c.id.type),
            )
        )
    else:
        counted = statement.with_only_columns(table.c.id, maintain_column_froms=True)
        counting = select(func.count()).select_from(counted.subquery())
        total = ((await execute(session, counting)).scalars()).one()
        newest_first = newest_first.offset(page.offset)
    if page.limit == 0:
        return Listing([], total, None)
    chosen = newest_first.limit(number(page.limit + 1))
    rows = (await execute(session, complete(chosen))).all()
    shown = rows[: page.limit]
    more = len(rows) > page.limit
    last = Cursor(shown[-1].created_at, shown[-1].id, total) if more else None
    return Listing(shown, total, last)
