"""What every request passes on its way in, and every failure on its way out."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from zndraw_joblib.delivery import ANSWER, Answer
from zndraw_joblib.exceptions import (
    MalformedBody,
    PayloadTooLarge,
    ProblemException,
    ServiceUnavailable,
    Unauthorized,
    invalid_request,
)
from zndraw_joblib.schemas import parse_json
from zndraw_joblib.settings import settings_of
from zndraw_joblib.telemetry import continuing

log = logging.getLogger(__name__)


class _FullNameConvertor(Convertor[str]):
    # Starlette's own `path` stops at a newline, and at a last one it cuts it off
    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


#: ``{name:fullname}`` in a path takes whatever a client sends, slashes included.
register_url_convertor("fullname", _FullNameConvertor())

# SQLSTATE classes of what may succeed when it is tried again: connections, rolled back
# transactions, resources, the operator (PostgreSQL manual, appendix A)
PASSING = frozenset({"08", "40", "53", "57"})


class BoundedRequest(Request):
    """A request whose body is read up to the limit, and holds only storable JSON."""

    _bounded: bytes | None = None

    async def body(self) -> bytes:
        """Return the body.

        Raises
        ------
        ProblemException
            ``payload-too-large``, before more than the limit is buffered.
        """
        if self._bounded is None:
            limit = settings_of(self.app).max_payload_bytes
            chunks = bytearray()
            async for chunk in self.stream():
                chunks += chunk
                if len(chunks) > limit:
                    raise PayloadTooLarge.exception(
                        f"a request's body is limited to {limit} bytes"
                    )
            self._bounded = bytes(chunks)
        return self._bounded

    async def json(self) -> Any:
        """Return the body, parsed.

        Raises
        ------
        ProblemException
            ``malformed-body``.
        """
        try:
            return parse_json(await self.body())
        except ValueError as exc:
            raise MalformedBody.exception(
                f"the body is not storable JSON: {exc}"
            ) from None


class Door(APIRoute):
    """A route whose failures are all problem+json."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; answer and news leave when its session is closed."""
        answer = scope[ANSWER] = Answer(send)
        try:
            await super().handle(scope, receive, answer.keep)
        except Exception as exc:
            if not answer.begun:
                raise
            # the session's end: its connection was lost meanwhile
            log.warning("a session did not end in order: %r", exc)
        await answer.end()

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                with continuing(request.headers):
                    bounded = BoundedRequest(request.scope, request.receive)
                    response = await handle(bounded)
            except RequestValidationError as exc:
                raise invalid_request(list(exc.errors())) from None
            except HTTPException as exc:
                # FastAPI wraps whatever goes wrong while it reads a body
                if isinstance(exc.__cause__, ProblemException):
                    raise exc.__cause__ from None
                if exc.status_code == 401:
                    raise Unauthorized.exception(
                        headers={"WWW-Authenticate": "Bearer"}
                    ) from None
                raise
            except Exception as exc:
                if _will_pass(exc):
                    raise _unavailable(exc) from exc
                raise
            request.scope[ANSWER].handled = True
            return response

        return guarded


def _will_pass(exc: Exception) -> bool:
    if isinstance(exc, (OperationalError, InterfaceError, PoolTimeoutError, OSError)):
        return True
    # what a driver raises while it connects comes as it is, not from SQLAlchemy
    state = getattr(getattr(exc, "orig", exc), "sqlstate", None) or ""
    return getattr(exc, "connection_invalidated", False) or state[:2] in PASSING


def _unavailable(exc: Exception) -> ProblemException:
    log.warning("database unavailable: %s", exc)
    return ServiceUnavailable.exception(
        "the database can't be reached right now", headers={"Retry-After": "1"}
    )
