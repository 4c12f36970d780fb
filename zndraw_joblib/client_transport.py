"""How a worker's process asks its host, and what it repeats."""

import inspect
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import httpx

from zndraw_joblib.client_answers import (
    Answer,
    LoginRefused,
    SlowDown,
    Unreachable,
    has_no_route,
    judge,
)

PREFIX = "/v1/joblib"
FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 5.0
CONNECT_SECONDS = 10.0
# proxies commonly give up on an answer after 30 s, or after 60 s
LONGEST_WAIT_SECONDS = 20
# a client that can't be told to wait longer gives up after 5 s, if it is like httpx
LONGEST_WAIT_OF_OTHERS_SECONDS = 3
# how long a host without the newer routes is taken for an older one
OLDER_SECONDS = 60.0
#: What goes wrong on the way, and what to do about it.
HINTS = {
    "CERTIFICATE_VERIFY_FAILED": "name the file of your own authority in SSL_CERT_FILE",
    "Connection refused": "nothing listens there: is the port right?",
    "actively refused": "nothing listens there: is the port right?",
    "Name or service not known": "there is no host of this name",
    "nodename nor servname": "there is no host of this name",
    "name resolution": "there is no host of this name",
    "getaddrinfo failed": "there is no host of this name",
    "WRONG_VERSION_NUMBER": "that port speaks http, not https",
}


class SafeLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger that never raises: what is only told decides nothing."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Leave message and arguments as they are."""
        return msg, kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log, and swallow what a handler or a closed stream raises."""
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        with suppress(Exception):
            super().log(level, msg, *args, **kwargs)


log = SafeLogger(logging.getLogger(__name__))


class Api(Protocol):
    """What a worker needs to know of its host."""

    @property
    def http(self) -> Any:
        """An ``httpx.Client``, or anything with its methods."""

    @property
    def base_url(self) -> Any:
        """Where the host is."""

    def get_headers(self) -> dict[str, str]:
        """Return the headers that say who asks; asked for with every request."""

    def raise_for_status(self, response: Any) -> None:
        """Raise KeyError, PermissionError or ValueError for a 4xx answer."""


class Limits(NamedTuple):
    """How much a host takes at once; what it is if it doesn't say."""

    max_claim: int = 32
    max_reports: int = 32
    max_batch: int = 1000
    max_heartbeat_tasks: int = 256


def path(*parts: object) -> str:
    """Return a path of the API, its parts percent-encoded."""
    return PREFIX + "".join("/" + quote(str(part), safe="@:") for part in parts)


LIMITS = path("limits")


def prefer(wait: int) -> dict[str, str]:
    """Return the header that asks a host to wait with its answer (RFC 7240)."""
    return {"Prefer": f"wait={wait}"} if wait else {}


class Transport:
    """Requests to one host, repeated as long as there is hope.

    Parameters
    ----------
    api : Api
        The host, and who asks.
    patience : float
        Seconds after which a request that was to be repeated is given up.
    startup_retries : int
        How often a request is repeated as long as the host never answered: a wrong
        address is likelier then than a restart.
    """

    def __init__(self, api: Api, patience: float = 120.0, startup_retries: int = 5) -> None:
        self.api = api
        self.patience = patience
        self.startup_retries = startup_retries
        #: whether the host ever answered
        self.reached = False
        self._limits: Limits | None = None
        self._older_until = -math.inf
        self._warned_at = self._away_warned_at = -math.inf
        self._pid = os.getpid()
        self._http: Any = None

    @cached_property
    def can_wait(self) -> bool:
        """Whether the client can be told how long an answer may take."""
        # httpx takes the timeout as a request extension too, and clients that are not
        # like httpx show by their signature that they know nothing of it
        return "extensions" in inspect.signature(self.api.http.post).parameters

    @property
    def longest_wait(self) -> int:
        """Seconds that the host may be asked to wait with its answer."""
        return LONGEST_WAIT_SECONDS if self.can_wait else LONGEST_WAIT_OF_OTHERS_SECONDS

    @property
    def limits(self) -> Limits:
        """How much the host takes at once; asked for when it is first needed."""
        if self._limits is None:
            with suppress(ConnectionError, PermissionError):
                answer = self.exchange("get", LIMITS, read=_read_limits, optional=True)
                self._limits = answer.value
        return self._limits or Limits()

    def exchange(
        self,
        method: str,
        path: str,
        *,
        read: Callable[[Any], Any] | None = None,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
        optional: bool = False,
        **content: Any,
    ) -> Answer:
        """Send one request and return the host's answer.

        Parameters
        ----------
        method : str
            In lower case.
        path : str
            What follows the host's base URL.
        read : callable, optional
            Given the JSON of a success; what it returns is the answer's ``value``. An
            answer for which it raises is not the host's. Without it, a success has no
            content.
        headers : dict, optional
            Beside those that say who asks.
        timeout : float, optional
            Seconds that the answer may take; by default the client's own.
        optional : bool
            Whether older hosts have no such route; see `Answer.no_route`.
        **content
            ``json=`` or ``content=``.

        Raises
        ------
        Unreachable
            When there is no answer of the host's, or it says that it is not well.
        LoginRefused
            When the host does not know who asks.
        ValueError
            When such a request can never be sent.
        RuntimeError
            When the client was made in another process, of which this is a fork.
        """
        if optional and self._host_is_older:
            return Answer(None, problem={})
        http = self._own_client()
        if timeout is not None and self.can_wait:
            limits = httpx.Timeout(min(timeout, CONNECT_SECONDS), read=timeout)
            content["extensions"] = {"timeout": limits.as_dict()}
        url = str(self.api.base_url).rstrip("/") + path
        for attempt in (0, 1):
            response = self._ask(getattr(http, method), url, headers or {}, content)
            if response.status_code != 401 or attempt:
                break
            # the token may have expired: its owner is asked for a new one, once
        if optional and has_no_route(response) and self._lacks(path):
            answer = Answer(response, problem={})
        else:
            answer = judge(response, read, url)
        self.reached = True
        return answer

    def send(
        self,
        method: str,
        path: str,
        *,
        retries: float | None = None,
        patience: float | None = None,
        stop: threading.Event | None = None,
        **options: Any,
    ) -> Answer:
        """Send a request until the host answers, with exponential backoff.

        Parameters
        ----------
        method, path, **options
            As for `exchange`. The request must bear being repeated: its answer may
            have been lost on the way.
        retries : float, optional
            How often it is repeated at most.
        patience : float, optional
            Seconds after the first failure in which it is repeated; by default those
            of this transport.
        stop : threading.Event, optional
            Set: it is not repeated any more.

        Raises
        ------
        Unreachable, LoginRefused
            When there is no other answer after ``retries``, ``patience`` or ``stop``.
        ValueError, RuntimeError
            As for `exchange`.
        """
        stop = stop or threading.Event()
        attempt = 0
        since = 0.0
        while True:
            try:
                return self.exchange(method, path, **options)
            except (Unreachable, LoginRefused) as exc:
                if isinstance(exc, LoginRefused) and not self.reached:
                    # never taken yet: a typing error is likelier than a restart
                    raise
                if attempt == 0:
                    # not before: a request that waits may fail late
                    since = time.monotonic()
                most = math.inf if self.reached else self.startup_retries
                if attempt >= (most if retries is None else retries):
                    raise
                self._warn(exc, since)
                pause = max(backoff(attempt), getattr(exc, "retry_after", 0.0))
                give_up = since + (self.patience if patience is None else patience)
                if time.monotonic() + pause > give_up or stop.wait(pause):
                    raise
                attempt += 1

    def value(self, answer: Answer) -> Any:
        """Return what was read from an answer.

        Raises
        ------
        KeyError, PermissionError, ValueError
            When the answer is a problem.
        """
        if answer.problem is not None:
            self.api.raise_for_status(answer.response)
            raise ValueError(answer.reason)
        return answer.value

    @property
    def _host_is_older(self) -> bool:
        return time.monotonic() < self._older_until

    def _lacks(self, asked: str) -> bool:
        """Return whether the host itself has no such route.

        A gateway whose host is away may say the same. A host that has the newer routes
        tells its limits; one that doesn't is asked again after a while.
        """
        if asked == LIMITS:
            self._older_until = time.monotonic() + OLDER_SECONDS
        elif self._limits is None:
            _ = self.limits
        return self._host_is_older

    def _own_client(self) -> Any:
        """Return the client, if it is this process's own.

        What was open at a fork is the parent's: over one connection, each would read
        the other's answers.
        """
        http = self.api.http
        if os.getpid() != self._pid and http is self._http:
            raise RuntimeError(
                "this process is a fork of the one that connected to the host: make a"
                " client of its own in each process"
            )
        self._http, self._pid = http, os.getpid()
        return http

    def _ask(self, send: Any, url: str, headers: dict[str, str], content: dict[str, Any]) -> Any:
        who: dict[str, str] = {}
        try:
            who = self.api.get_headers()
            return send(url, headers={**who, **headers}, **content)
        except (KeyError, RuntimeError, Unreachable, LoginRefused):
            raise
        except PermissionError as exc:
            raise LoginRefused(str(exc)) from None
        except (
            TypeError, ValueError, httpx.InvalidURL, httpx.UnsupportedProtocol,
            httpx.LocalProtocolError,
        ) as exc:  # fmt: skip
            # it can never be sent: no reason to ask again
            raise ValueError(f"{url} can't be asked: {_explain(exc, who)}") from None
        except Exception as exc:
            # which exceptions say so depends on the client that the host chose
            raise Unreachable(f"no answer of {url}: {_explain(exc, who)}") from None

    def _warn(self, exc: Exception, since: float) -> None:
        """Say that the host is away; once, however many requests find it so."""
        now = time.monotonic()
        if now - self._warned_at > self.patience:
            self._warned_at = now
            log.warning("%s; trying again", exc)
        late = now - since > self.patience / 10 and not isinstance(exc, SlowDown)
        if late and now - self._away_warned_at > self.patience:
            self._away_warned_at = now
            told = "host away for %.0f s, giving up at %.0f s: %s"
            log.warning(told, now - since, self.patience, exc)


def backoff(attempt: int) -> float:
    """Return how many seconds to pause after a failure; half of it is drawn."""
    delay = min(FIRST_DELAY_SECONDS * 2.0 ** min(attempt, 10), LONGEST_DELAY_SECONDS)
    return delay * random.uniform(0.5, 1)


def _read_limits(told: dict[str, Any]) -> Limits:
    known = {k: told[k] for k in Limits._fields if isinstance(told.get(k), int)}
    return Limits(**{k: max(1, n) for k, n in known.items()})


def _explain(exc: Exception, secret: dict[str, str]) -> str:
    """Return what went wrong, without what must not be read in a log."""
    text = str(exc) or type(exc).__name__
    for value in secret.values():
        for word in value.split():
            text = text.replace(word, "***")
    hints = [hint for sign, hint in HINTS.items() if sign in text]
    return "; ".join([text, *hints[:1]])
