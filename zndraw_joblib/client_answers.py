"""What counts as an answer of the host's.

Only what is recognizably the host's is taken for its verdict: a success that can be read,
or a problem of its own (RFC 9457). All else comes from something in between.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from zndraw_joblib.exceptions import PROBLEM_JSON, InternalJobNotConfigured, InvalidRequest, Problem

# how long an answer may put off the next request
LONGEST_RETRY_AFTER_SECONDS = 60.0
# an answer that took less did not wait, whatever its headers say
WAITED_SECONDS = 0.5
#: What FastAPI answers where there is no such route.
NO_ROUTE = {404: "Not Found", 405: "Method Not Allowed"}
PROBLEMS = "/v1/problems/"


class Unreachable(ConnectionError):
    """No answer came that is recognizably the host's.

    Attributes
    ----------
    retry_after : float
        Seconds after which to ask again, at the earliest.
    """

    def __init__(self, message: str, retry_after: float = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SlowDown(Unreachable):
    """The host is there, and asks for fewer requests (429)."""


class LoginRefused(PermissionError):
    """The host does not take this token, or this user and password (401)."""


@dataclass(frozen=True)
class Answer:
    """What the host answered.

    Attributes
    ----------
    response : httpx.Response
        As it came.
    value : object
        What was read from it, if it is a success.
    problem : dict or None
        The problem, if it is one.
    """

    response: Any
    value: Any = None
    problem: dict[str, Any] | None = None

    def is_problem(self, problem: type[Problem]) -> bool:
        """Return whether it is this kind of problem."""
        return (self.problem or {}).get("type") == problem.type_uri()

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self.response.status_code)

    @property
    def no_route(self) -> bool:
        """Whether the host, an older one, has no such route."""
        return self.problem == {}

    @property
    def reason(self) -> str:
        """What is wrong, in words."""
        return str((self.problem or {}).get("detail", self.problem))[:1000]


def has_waited(answer: Answer, asked: float) -> bool:
    """Return whether the host waited before it gave this answer.

    Parameters
    ----------
    answer : Answer
        The answer.
    asked : float
        When it was asked for, in the seconds of `time.monotonic`.
    """
    # the clock as well: a host that says so and yet answers at once would be asked
    # without a pause
    return (
        "preference-applied" in answer.response.headers
        and time.monotonic() - asked > WAITED_SECONDS
    )


def judge(response: Any, read: Callable[[Any], Any] | None, url: str) -> Answer:
    """Return what an answer says, if it is the host's own.

    Raises
    ------
    Unreachable, LoginRefused
        When it isn't, or does not say that the request was judged.
    """
    status = int(response.status_code)
    body = json_of(response)
    if 200 <= status < 300:
        try:
            if read is not None:
                return Answer(response, read(body))
            if status == 204:
                return Answer(response)
            raise ValueError(f"{status} instead of 204")
        except Exception as exc:
            why = f"{type(exc).__name__}: {exc}"[:200]
            raise Unreachable(
                f"{url}: what came can't be read as the host's answer ({why})"
            ) from None
    if status == 401 and isinstance(body, dict):
        raise LoginRefused(f"{url}: the host refuses this login (401)")
    if status == 429:
        raise SlowDown(f"{url}: asks for fewer requests (429)", _retry_after(response))
    if isinstance(body, dict):
        if status == 422 and isinstance(body.get("detail"), list):
            # FastAPI's own, of a host that has not registered the handler
            return Answer(response, problem={**body, "type": InvalidRequest.type_uri()})
        if is_verdict(response, body):
            return Answer(response, problem=body)
    if 300 <= status < 400:
        told = f"leads elsewhere ({status}), to {response.headers.get('location')}:"
        told += " connect to the address that the host has there"
    else:
        told = f"answered {status}, which isn't an answer of a host of zndraw-joblib"
        if isinstance(body, dict) and "type" in body:
            told = f"answered {status}: {body.get('detail')}"
    raise Unreachable(f"{url} {told}", _retry_after(response))


def is_verdict(response: Any, body: dict[str, Any]) -> bool:
    """Return whether this is a problem of the host's, and not one that will pass."""
    kind = str(body.get("type"))
    return (
        response.headers.get("content-type", "").startswith(PROBLEM_JSON)
        and kind.startswith(PROBLEMS)
        and body.get("status") == response.status_code
        and (response.status_code < 500 or kind == InternalJobNotConfigured.type_uri())
    )


def has_no_route(response: Any) -> bool:
    said = NO_ROUTE.get(int(response.status_code))
    return said is not None and json_of(response) == {"detail": said}


def json_of(response: Any) -> Any:
    """Return the JSON of an answer, or None if it is no JSON."""
    if "json" not in response.headers.get("content-type", ""):
        return None
    try:
        return response.json()
    except ValueError:
        return None


def _retry_after(response: Any) -> float:
    given = response.headers.get("retry-after", "")
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(given).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS)
