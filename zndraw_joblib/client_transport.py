"""How a worker's process talks to its host: requests that outlive a restart."""

import inspect
import logging
import math
import random
import threading
import time
from functools import cached_property
from typing import Any, NoReturn, Protocol
from urllib.parse import quote

import httpx

from zndraw_joblib.exceptions import InternalJobNotConfigured, Problem

log = logging.getLogger(__name__)

PREFIX = "/v1/joblib"
FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 5.0
CONNECT_SECONDS = 10.0
# proxies commonly give up on an answer after 30 s, or after 60 s
LONGEST_WAIT_SECONDS = 20
# a client that can't be told to wait longer gives up after 5 s, if it is like httpx
LONGEST_WAIT_OF_OTHERS_SECONDS = 3
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class Unreachable(ConnectionError):
    """No answer came, or one that says to ask again later."""


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


def path(*parts: object) -> str:
    """Return a path of the API, its parts percent-encoded."""
    return PREFIX + "".join("/" + quote(str(part), safe="@:") for part in parts)


def is_problem(response: Any, problem: type[Problem]) -> bool:
    """Return whether an answer is this kind of problem."""
    if response.status_code != problem.status:
        return False
    try:
        return bool(response.json()["type"] == problem.type_uri())
    except (ValueError, KeyError, TypeError):
        return False


class Transport:
    """Requests to one host, repeated as long as there is hope.

    Parameters
    ----------
    api : Api
        The host, and who asks.
    patience : float
        Seconds after which a request that was to be repeated is given up.
    """

    def __init__(self, api: Api, patience: float) -> None:
        self.api = api
        self.patience = patience
        #: whether the host ever answered
        self.reached = False

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

    def exchange(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
        **content: Any,
    ) -> Any:
        """Send one request and return its answer, whatever its status.

        Parameters
        ----------
        method : str
            In lower case.
        path : str
            What follows the host's base URL.
        headers : dict, optional
            Beside those that say who asks.
        timeout : float, optional
            Seconds that the answer may take; by default the client's own.
        **content
            ``json=`` or ``content=``.

        Raises
        ------
        Unreachable
            When there is no answer, or it says that the host is not well.
        """
        if timeout is not None and self.can_wait:
            limits = httpx.Timeout(min(timeout, CONNECT_SECONDS), read=timeout)
            content["extensions"] = {"timeout": limits.as_dict()}
        url = str(self.api.base_url).rstrip("/") + path
        send = getattr(self.api.http, method)

        def ask() -> Any:
            who = self.api.get_headers()
            return send(url, headers={**who, **(headers or {})}, **content)

        try:
            response = ask()
            if response.status_code == 401:
                # the token may have expired: its owner is asked for a new one, once
                response = ask()
        except (TypeError, ValueError, KeyError, PermissionError, RuntimeError):
            # a mistake, a refusal or a client that is closed: no reason to ask again
            raise
        except Exception as exc:
            # which exceptions say so depends on the client that the host chose
            raise Unreachable(f"{method} {url}: {exc or type(exc).__name__}") from exc
        if _is_transient(response):
            raise Unreachable(f"{method} {url}: answered {response.status_code}")
        self.reached = True
        return response

    def send(
        self,
        method: str,
        path: str,
        *,
        retries: float = math.inf,
        patience: float | None = None,
        stop: threading.Event | None = None,
        **options: Any,
    ) -> Any:
        """Send a request until it is answered, with exponential backoff.

        Parameters
        ----------
        method, path, **options
            As for `exchange`. The request must bear being repeated: its answer may
            have been lost on the way.
        retries : float
            How often it is repeated at most.
        patience : float, optional
            Seconds after the first failure in which it is repeated; by default those
            of this transport.
        stop : threading.Event, optional
            Set: it is not repeated any more.

        Raises
        ------
        Unreachable
            When there is still no answer after ``retries``, ``patience`` or ``stop``.
        """
        stop = stop or threading.Event()
        attempt = 0
        while True:
            try:
                return self.exchange(method, path, **options)
            except Unreachable as exc:
                if attempt == 0:
                    # not before: a request that waits may fail late
                    give_up = time.monotonic() + (
                        self.patience if patience is None else patience
                    )
                    log.warning("%s", exc)
                if attempt >= retries or time.monotonic() > give_up:
                    raise
                if stop.wait(backoff(attempt)):
                    raise
                attempt += 1


def backoff(attempt: int) -> float:
    """Return how many seconds to pause after a failure; half of it is drawn."""
    delay = min(FIRST_DELAY_SECONDS * 2.0 ** min(attempt, 10), LONGEST_DELAY_SECONDS)
    return delay * random.uniform(0.5, 1)


def _is_transient(response: Any) -> bool:
    if response.status_code == 404:
        # the host tells in JSON what it doesn't find; a proxy whose host is away doesn't
        return "json" not in response.headers.get("content-type", "")
    return response.status_code in TRANSIENT and not is_problem(
        response, InternalJobNotConfigured
    )


class HostApi:
    """A host, and a user of it: by a token, or by a name and a password.

    Parameters
    ----------
    base_url : str
        Where the host is.
    token : str, optional
        A bearer token.
    user, password : str, optional
        Used to log in, and to log in again when the token has expired.

    Raises
    ------
    ValueError
        When neither a token nor a user with a password is given.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        user: str | None = None,
        password: str | None = None,
    ) -> None:
        if token is None and (user is None or password is None):
            raise ValueError("give a token, or a user and a password")
        self.base_url = base_url.rstrip("/")
        self.http = httpx.Client(
            timeout=CONNECT_SECONDS,
            event_hooks={"response": [self._forget_refused_token]},
        )
        self._credentials = (
            None if user is None else {"username": user, "password": password}
        )
        self._token = token
        self._lock = threading.RLock()

    def get_headers(self) -> dict[str, str]:
        """Return the ``Authorization`` header, after logging in if need be.

        Raises
        ------
        PermissionError
            When the host refuses user and password.
        """
        return {"Authorization": f"Bearer {self.token()}"}

    def token(self) -> str:
        """Return a token that the host has not refused yet.

        Raises
        ------
        PermissionError
            When the host refuses user and password.
        """
        with self._lock:
            if self._token is None:
                self._token = self._log_in()
            return self._token

    def raise_for_status(self, response: Any) -> None:
        """Raise what a failed request means.

        Raises
        ------
        KeyError
            404.
        PermissionError
            401 and 403.
        ValueError
            Other 4xx.
        ConnectionError
            5xx.
        """
        if response.status_code >= 400:
            _raise(response)

    def close(self) -> None:
        """Close the connections to the host."""
        self.http.close()

    def _log_in(self) -> str:
        response = self.http.post(
            f"{self.base_url}/auth/jwt/login", data=self._credentials
        )
        if response.status_code in (400, 401, 403, 422):
            raise PermissionError(f"{self.base_url} refuses this user and password")
        response.raise_for_status()
        return str(response.json()["access_token"])

    def _forget_refused_token(self, response: httpx.Response) -> None:
        if response.status_code != 401 or self._credentials is None:
            return
        with self._lock:
            # another thread may have logged in since this request was sent
            if response.request.headers.get("Authorization") == f"Bearer {self._token}":
                self._token = None


def _raise(response: Any) -> NoReturn:
    status = response.status_code
    try:
        problem = response.json()
        detail = str(problem.get("detail") or problem.get("title"))
    except (ValueError, AttributeError):
        detail = f"answered {status}"
    if status == 404:
        raise KeyError(detail)
    if status in (401, 403):
        raise PermissionError(detail)
    if status < 500:
        raise ValueError(detail)
    raise ConnectionError(detail)
