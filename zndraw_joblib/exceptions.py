"""Problem details (RFC 9457): one class a problem, its docstring the default detail."""

import re
import traceback
from collections.abc import Iterator, Mapping
from inspect import cleandoc
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

PROBLEM_JSON = "application/problem+json"
#: Errors of one request that a problem lists.
MAX_ERRORS = 10
#: Characters of a problem's ``detail``, which may repeat what was sent.
MAX_DETAIL = 2000

# of an error's text, and of a group's exceptions
MAX_ERROR = 64 * 1024
MAX_LEAVES = 10
# in characters, of which a log has some
MAX_TRACEBACK = 16 * 1024


class ProblemDetail(BaseModel):
    """The body of an error answer, as RFC 9457 defines it."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str | None = None
    instance: str | None = None


class ProblemException(Exception):
    """A problem on its way to the client.

    Parameters
    ----------
    problem : ProblemDetail
        What the client is told.
    headers : mapping of str to str, optional
        Headers of the answer, ``Retry-After`` for example.
    """

    def __init__(self, problem: ProblemDetail, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(problem.detail or problem.title)
        self.problem = problem
        self.headers = dict(headers or {})


class ProviderTimeoutError(TimeoutError):
    """Raised on the client's side: the provider did not answer in time."""


class Problem:
    """Base of the problem classes; never instantiated, only named."""

    title: ClassVar[str]
    status: ClassVar[int]
    client_error: ClassVar[type[Exception]] = ValueError
    #: Names of the headers that it may carry.
    headers: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def problem_id(cls) -> str:
        """Return the kebab-case name that ends the type URI."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()

    @classmethod
    def type_uri(cls) -> str:
        """Return the URI reference that identifies this kind of problem."""
        return f"/v1/problems/{cls.problem_id()}"

    @classmethod
    def create(
        cls, detail: str | None = None, instance: str | None = None, **members: Any
    ) -> ProblemDetail:
        """Return the problem's body; ``members`` are RFC 9457 extension members."""
        return ProblemDetail(
            type=cls.type_uri(),
            title=cls.title,
            status=cls.status,
            detail=shortened(detail or cleandoc(cls.__doc__ or cls.title), MAX_DETAIL),
            instance=instance,
            **members,
        )

    @classmethod
    def exception(
        cls,
        detail: str | None = None,
        instance: str | None = None,
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> ProblemException:
        """Return the problem as an exception to raise."""
        return ProblemException(cls.create(detail, instance, **members), headers)

    @classmethod
    def raise_for_client(cls, problem: ProblemDetail) -> NoReturn:
        """Raise ``problem`` as the Python error that a worker's program expects."""
        raise cls.client_error(problem.detail or problem.title)


class _BadRequest(Problem):
    title = "Bad Request"
    status = 400


class _NotFound(Problem):
    title = "Not Found"
    status = 404
    client_error = KeyError


class _Conflict(Problem):
    title = "Conflict"
    status = 409


class _Unprocessable(Problem):
    title = "Unprocessable Content"
    status = 422


class _Unavailable(Problem):
    title = "Service Unavailable"
    status = 503


class MalformedBody(_BadRequest):
    """The body is not JSON that can be stored and sent back."""


class InvalidCategory(_BadRequest):
    """The category is not one that this server allows."""


class InvalidRoomId(_BadRequest):
    """A room id is neither empty nor holds '@', ':' or control characters."""


class ProviderExecutionFailed(_BadRequest):
    """The provider could not serve this request."""


class Unauthorized(Problem):
    """The request carries no valid token of an active user."""

    title = "Unauthorized"
    status = 401
    headers = ("WWW-Authenticate",)
    client_error = PermissionError


class Forbidden(Problem):
    """This user may not do this."""

    title = "Forbidden"
    status = 403
    client_error = PermissionError


class JobNotFound(_NotFound):
    """Job not found: there is none of this name in this room."""


class NoWorkersAvailable(_Conflict):
    """None of the job's workers is alive, and this host takes no tasks for later."""


class WorkerNotFound(_NotFound):
    """Worker not found."""


class TaskNotFound(_NotFound):
    """Task not found."""


class ResultNotFound(_NotFound):
    """The task has no result: it has not been completed."""


class ProviderNotFound(_NotFound):
    """Provider not found: there is none of this name in this room."""


class SchemaConflict(_Conflict):
    """Schema mismatch: the job exists with another schema."""


class InvalidTaskTransition(_Conflict):
    """The task's state does not allow this change."""


class LeaseLost(_Conflict):
    """The task is no longer held under this attempt."""


class PayloadTooLarge(Problem):
    """The body is larger than this server takes."""

    title = "Content Too Large"
    status = 413


class InvalidRequest(_Unprocessable):
    """The request does not have the documented shape; `errors` says where."""


class InvalidSchema(_Unprocessable):
    """The schema is not a JSON Schema."""


class PayloadMismatch(_Unprocessable):
    """The payload does not fit the job's schema; `errors` says where."""


class IdempotencyKeyReused(_Unprocessable):
    """This Idempotency-Key was used for another request."""


class QuotaExceeded(Problem):
    """This user has reached a limit of this server."""

    title = "Too Many Requests"
    status = 429
    headers = ("Retry-After",)


class InternalJobNotConfigured(_Unavailable):
    """This server runs no executor for the internal job."""


class InternalProviderNotConfigured(_Unavailable):
    """This server runs no executor for the internal provider."""


class ServiceUnavailable(_Unavailable):
    """A service that this server needs can't be reached right now."""

    headers = ("Retry-After",)
    client_error = ConnectionError


class ServerBusy(_Unavailable):
    """This server takes no more requests that wait, from anybody, right now."""

    headers = ("Retry-After",)
    client_error = ConnectionError


class ProviderTimeout(Problem):
    """The provider did not answer in time."""

    title = "Gateway Timeout"
    status = 504
    headers = ("Retry-After",)
    client_error = ProviderTimeoutError


def shortened(text: str, most: int = 300) -> str:
    """Return the beginning of what a client sent, fit for a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def json_pointer(path: list[Any] | tuple[Any, ...]) -> str:
    """Return ``path`` as a JSON pointer (RFC 6901)."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)


def invalid_request(errors: list[Any]) -> ProblemException:
    """Turn FastAPI's validation errors into one problem.

    What was sent is left out of the answer: it may be unfit to be sent back.

    Parameters
    ----------
    errors : list of dict
        As ``RequestValidationError.errors()`` returns them.
    """
    listed = [
        {
            "pointer": shortened(json_pointer(e["loc"])),
            "detail": shortened(e["msg"]),
            "type": e["type"],
        }
        for e in errors[:MAX_ERRORS]
    ]
    where = "; ".join(f"{e['pointer']}: {e['detail']}" for e in listed[:3])
    return InvalidRequest.exception(detail=where, errors=listed)


def full_path(request: "Request") -> str:
    """Return the path that was asked for, with what the app is told to be beneath."""
    # a proxy may have cut it off
    root, path = request.scope.get("root_path", ""), request.scope["path"]
    beneath = path == root or path.startswith(f"{root.rstrip('/')}/")
    return path if beneath else f"{root.rstrip('/')}{path}"


async def problem_exception_handler(request: "Request", exc: Exception) -> "Response":
    """Answer with problem+json; the host registers it for ``ProblemException``.

    It also takes FastAPI's ``RequestValidationError``, for hosts that want
    problem+json from their own routes too.
    """
    # here, not at the top: a worker's process needs the classes but no web server
    from fastapi.exceptions import RequestValidationError
    from starlette.responses import Response

    if isinstance(exc, RequestValidationError):
        exc = invalid_request(list(exc.errors()))
    if not isinstance(exc, ProblemException):
        raise exc
    problem = exc.problem
    if problem.instance is None:
        problem = problem.model_copy(update={"instance": shortened(full_path(request))})
    return Response(
        problem.model_dump_json(exclude_none=True),
        status_code=problem.status,
        headers=exc.headers,
        media_type=PROBLEM_JSON,
    )


def describe(exc: BaseException) -> str:
    """Return an exception as the last lines of its traceback, and of a group each one's.

    At most ``MAX_ERROR`` characters, of what JSON and databases can hold.
    """
    text = "".join(traceback.format_exception_only(exc)).strip()
    group = isinstance(exc, BaseExceptionGroup)
    leaves = islice(_leaves(exc), MAX_LEAVES) if group else ()
    return storable("\n".join([text, *map(describe, leaves)]))


def traceback_of(exc: BaseException) -> str:
    """Return the traceback of an exception, of a long one the first part and the last."""
    text = "".join(traceback.format_exception(exc))
    if (beyond := len(text) - MAX_TRACEBACK) > 0:
        half = MAX_TRACEBACK // 2
        text = f"{text[:half]}\n... {beyond} characters left out ...\n{text[-half:]}"
    return text


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc


def storable(text: str) -> str:
    """Return ``text`` cut and cleaned of what JSON or a database can't hold."""
    text = text.replace("\0", "\ufffd")[:MAX_ERROR]
    return text.encode("utf-8", "replace").decode()
