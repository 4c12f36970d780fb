"""What SQLAlchemy lacks: types, SQL that each database writes its own way, and listings."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, TypeVar, cast
from uuid import UUID

import sqlalchemy as sa
from pydantic import AwareDatetime, BaseModel, BeforeValidator, Field, TypeAdapter
from pydantic_core import to_json
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from zndraw_joblib.encoding import MAX_INT, Written, uncollected
from zndraw_joblib.schemas import MAX_PAGE

T = TypeVar("T")
E = TypeVar("E", bound=FunctionElement[Any])

#: An INSERT that may have an ON CONFLICT: that reads the same in PostgreSQL and SQLite, and
#: SQLAlchemy renders this one construct for both.
upsert = postgresql.insert


class UtcDateTime(sa.TypeDecorator[datetime]):
    """A moment; it comes back with its zone from databases that keep none, too."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class JsonText(sa.TypeDecorator[Any]):
    """JSON, kept as text.

    SQLite makes other numbers of bare ones in a column of type JSON, and PostgreSQL has to
    read the whole of one to tell its size.
    """

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        if value is None or isinstance(value, Written):
            return value
        return to_json(value).decode()

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        if value is None:
            return None
        with uncollected():
            return json.loads(value)


def written(standard: str, sqlite: str) -> Callable[[type[E]], type[E]]:
    """Say how a construct is written: ``{0}`` is its first argument, ``{all}`` is all of them."""

    def write(template: str, element: Any, compiler: SQLCompiler, **kw: Any) -> str:
        arguments = [compiler.process(argument, **kw) for argument in element.clauses]
        return template.format(*arguments, all=", ".join(arguments))

    def declare(construct: type[E]) -> type[E]:
        compiles(construct)(lambda *args, **kw: write(standard, *args, **kw))
        compiles(construct, "sqlite")(lambda *args, **kw: write(sqlite, *args, **kw))
        construct.inherit_cache = True
        return construct

    return declare


class now(FunctionElement[datetime]):  # noqa: N801 - reads like the SQL function it is
    """The database's clock, so many seconds from now; negative ones are past.

    Replicas compare their times with each other's rows: only the clock that they
    share can say whether a worker is stale. Renders the statement's start, so that an
    index can serve the comparison.
    """

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, *offset: float | sa.ColumnElement[Any]) -> None:
        super().__init__(
            *(sa.literal(o, sa.Float) if isinstance(o, (int, float)) else o for o in offset)
        )


@compiles(now)
def _standard_now(element: now, compiler: SQLCompiler, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    # without an offset nothing but the clock: a parameter would keep the planner from
    # seeing that hardly a row is due
    later = f" + make_interval(secs => {seconds})" if seconds else ""
    return f"(statement_timestamp(){later})"


@compiles(now, "sqlite")
def _sqlite_now(element: now, compiler: SQLCompiler, **kw: Any) -> str:
    seconds = compiler.process(element.clauses, **kw)
    later = f", ({seconds}) || ' seconds'" if seconds else ""
    # '000': as many digits as DateTime writes, since SQLite compares times as text
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now'{later})"


@written("extract(epoch FROM {1} - {0})", sqlite="((julianday({1}) - julianday({0})) * 86400.0)")
class seconds_between(FunctionElement[float]):  # noqa: N801
    """The seconds from one moment to a later one."""

    type = sa.Float()


@written(
    "CAST(extract(epoch FROM statement_timestamp()) * 1000000 AS BIGINT)",
    # '%f' is the second with its milliseconds, '%s' all seconds before
    sqlite=(
        "(strftime('%s', 'now') * 1000000"
        " + CAST(substr(strftime('%f', 'now'), 4) AS INTEGER) * 1000)"
    ),
)
class microseconds(FunctionElement[int]):  # noqa: N801
    """The database's clock as a number, since 1970."""

    type = sa.BigInteger()


@written("random()", sqlite="(0.5 + random() / 18446744073709551616.0)")
class noise(FunctionElement[float]):  # noqa: N801
    """A random number between 0 and 1, drawn for each row."""

    type = sa.Float()


@written("greatest({all})", sqlite="max({all})")
class greatest(FunctionElement[int]):  # noqa: N801
    """The largest of several numbers, none of which may be null."""

    type = sa.BigInteger()


# SQLite has octet_length from 3.43 on
@written("octet_length({0})", sqlite="length(CAST({0} AS BLOB))")
class octets(FunctionElement[int]):  # noqa: N801
    """How many bytes a text takes; told without reading it, where the database can."""

    type = sa.Integer()


@written("json_array_elements(CAST({0} AS JSON))", sqlite="json_each({0})")
class elements(FunctionElement[str]):  # noqa: N801
    """The members of a JSON list, given as text: rows of one column, ``value``."""

    type = sa.Text()


# SQLite has ->> from 3.38 on
@written("({0} ->> {1})", sqlite="json_extract({0}, '$.' || {1})")
class member(FunctionElement[str]):  # noqa: N801
    """A member of a JSON object, by its name, as text."""

    type = sa.Text()


class one_of(FunctionElement[Any]):  # noqa: N801
    """Whether a column is one of what a subquery reads.

    The subquery is read once: it may lock what it finds. It has no type, or SQLite would
    be asked for ``(column IN (...)) = 1``, for which it knows no index.

    Parameters
    ----------
    column : ColumnElement
        What is looked for.
    lateral : Select
        The subquery where there is LATERAL.
    correlated : Select
        The subquery where there is none.
    """

    inherit_cache = True

    def __init__(
        self, column: sa.ColumnElement[Any], *, lateral: sa.Select[Any], correlated: sa.Select[Any]
    ) -> None:
        super().__init__(column, lateral.scalar_subquery(), correlated.scalar_subquery())


@compiles(one_of)
def _standard_one_of(element: one_of, compiler: SQLCompiler, **kw: Any) -> str:
    column, lateral, _ = element.clauses
    chosen = compiler.process(lateral, **kw)
    return f"{compiler.process(column, **kw)} = ANY (ARRAY{chosen})"


@compiles(one_of, "sqlite")
def _sqlite_one_of(element: one_of, compiler: SQLCompiler, **kw: Any) -> str:
    column, _, correlated = element.clauses
    return f"{compiler.process(column, **kw)} IN {compiler.process(correlated, **kw)}"


def number(value: int) -> sa.ColumnElement[int]:
    """Return ``value`` as a literal in the SQL text, for LIMIT and OFFSET.

    A planner that meets a parameter there guesses a tenth of the table.
    """
    return sa.literal_column(str(int(value)), sa.Integer)


def returned(column: sa.Column[T]) -> sa.ColumnElement[T]:
    """Return a column for a subquery of a RETURNING clause.

    On SQLite SQLAlchemy leaves the tables' names away there, in subqueries too.
    """
    return sa.literal_column(f"{column.table.name}.{column.name}", column.type)


async def execute(
    session: AsyncSession, statement: sa.Executable, values: Any = None
) -> sa.CursorResult[Any]:
    """Run a statement on any kind of session; an error shows no values.

    SQLModel's sessions warn of their own ``execute``, and of all that goes through it.
    """
    options = {"prebuffer_rows": True}
    try:
        ran = await session.run_sync(Session.execute, statement, values, execution_options=options)
    except StatementError as exc:
        raise without_values(exc) from None
    return cast(sa.CursorResult[Any], ran)


async def scalar(session: AsyncSession, statement: sa.Executable, values: Any = None) -> Any:
    """Return the first value of what a statement brings, None if there is none."""
    return (await execute(session, statement, values)).scalar()


async def scalars(session: AsyncSession, statement: sa.Executable, values: Any = None) -> list[Any]:
    """Return the first column of what a statement brings."""
    return list((await execute(session, statement, values)).scalars())


def without_values(exc: Exception) -> Exception:
    """Return an exception whose text and causes show nothing that a client sent.

    SQLAlchemy prints a statement's parameters, and drivers what they could not take.
    """
    if isinstance(exc, StatementError):
        state = getattr(exc.orig, "sqlstate", None)
        # SQLite's first line names tables and columns
        known = isinstance(exc, DBAPIError) and not state
        text = str(exc.orig).partition("\n")[0] if known else state or ""
        exc.args = (f"{type(exc.orig).__name__} {text}",)
        exc.hide_parameters = True
        exc.__cause__ = None
        exc.__suppress_context__ = True
    return exc


# --- listings, newest first: by offset, or by a cursor that repeats and misses nothing ---

# of a cursor, in characters
MAX_TOKEN = 500


_PARTS = TypeAdapter(tuple[AwareDatetime, UUID, Annotated[int, Field(ge=0, le=MAX_INT)]])


@dataclass(frozen=True)
class Cursor:
    """The last row of a page, and what the first page counted."""

    created_at: datetime
    id: UUID
    total: int

    def encode(self) -> str:
        """Return the cursor as one opaque token for a URL."""
        parts = _PARTS.dump_json((self.created_at, self.id, self.total))
        return base64.urlsafe_b64encode(parts).decode()

    @classmethod
    def decode(cls, token: str) -> "Cursor | None":
        """Read a token back; an empty one is none.

        Raises
        ------
        ValueError
            When it is none of ours.
        """
        if not token:
            return None
        try:
            parts = _PARTS.validate_json(base64.urlsafe_b64decode(token[:MAX_TOKEN]))
            created_at, row_id, total = parts
            return cls(created_at.astimezone(UTC), row_id, total)
        except (ValueError, OverflowError):
            raise ValueError("not a cursor of this listing") from None


Token = Annotated[str, Field(max_length=MAX_TOKEN)] | None


class Page(BaseModel):
    """Which part of a listing is asked for."""

    limit: Annotated[int, Field(ge=0, le=MAX_PAGE)] = 50
    offset: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    cursor: Annotated[
        Cursor | None, BeforeValidator(Cursor.decode, json_schema_input_type=Token)
    ] = Field(None, description='From `Link: rel="next"`.')


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
    statement : Select
        Built once for each shape, as ``complete`` is: what is made of them is kept.
    table : Table
        Of ``created_at`` and ``id``.
    values : mapping
        Of the statement's parameters.
    complete : callable, optional
        What it adds to the chosen rows, it adds to those of the page alone.
    """
    cursor = page.cursor
    rows: Sequence[Any] = []
    if page.limit:
        asked = _page(statement, table, page.limit, cursor is not None, complete)
        start: dict[str, Any] = {"offset": page.offset}
        if cursor:
            start = {"last_moment": cursor.created_at, "last_id": cursor.id}
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
