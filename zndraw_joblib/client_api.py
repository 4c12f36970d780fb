"""Who asks a host, and what counts as its answer.

Only what is recognizably the host's is taken for its verdict: a success that can be read,
or a problem of its own (RFC 9457). All else comes from something in between.
"""

import os
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from ipaddress import ip_address, ip_network
from typing import Any, Protocol
from urllib.request import getproxies, proxy_bypass

import httpx

from zndraw_joblib import exceptions
from zndraw_joblib.exceptions import PROBLEM_JSON, InvalidRequest, Problem

PROBLEMS = "/v1/problems/"
#: What a host says of its own jobs and of providers, with whatever status: it will not pass.
OF_OTHERS = (
    exceptions.InternalJobNotConfigured,
    exceptions.InternalProviderNotConfigured,
    exceptions.ProviderExecutionFailed,
    exceptions.ProviderTimeout,
)
#: What FastAPI answers where there is no such route.
NO_ROUTE = {"detail": "Not Found"}
#: Where programs say whom to trust; the first that is set counts.
TRUST_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR")
# how long an answer may put off the next request
LONGEST_RETRY_AFTER_SECONDS = 60.0
CONNECT_SECONDS = 10.0
# an answer that took less did not wait, whatever its headers say
WAITED_SECONDS = 0.5


class Unreachable(ConnectionError):
    """No answer came that is recognizably the host's; ask again after so many seconds."""

    def __init__(self, message: str, retry_after: float = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SlowDown(Unreachable):
    """The host is there, and asks for fewer requests (429)."""


class LoginRefused(PermissionError):
    """The host does not take this token, or this user and password (401)."""

    retry_after = 0.0


@dataclass
class Answer:
    """What the host answered: a value that was read, or a problem; and after how long."""

    response: Any
    value: Any = None
    problem: dict[str, Any] | None = None
    seconds: float = 0.0

    def is_problem(self, problem: type[Problem]) -> bool:
        """Return whether it is this kind of problem."""
        return (self.problem or {}).get("type") == problem.type_uri()

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self.response.status_code)

    @property
    def reason(self) -> str:
        """What is wrong, in words."""
        return str((self.problem or {}).get("detail", self.problem))[:1000]

    @property
    def waited(self) -> bool:
        """Whether the host waited before it answered."""
        # the clock as well: a host that says so and yet answers at once would be asked
        # without a pause
        return "preference-applied" in self.response.headers and self.seconds > WAITED_SECONDS


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
        ...

    def raise_for_status(self, response: Any) -> None:
        """Raise KeyError, PermissionError or ValueError for a 4xx answer."""


class HostApi:
    """A host, and a user of it: by a token, or by a name and a password.

    HTTP and Socket.IO have one address, one token, one trust and one proxy.

    Raises
    ------
    ValueError
        When the address can't be one, when neither a token nor a user with a password
        is given, or when the environment's proxy or certificates are no good.
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
        self.base_url = _check_url(base_url)
        authority = next((name for name in TRUST_VARIABLES if os.getenv(name)), None)
        # what checks the host's certificate, if the environment says whom to trust
        self._trust = None if authority is None else _trust(authority)
        self._authority = os.environ.get(authority or "")
        self._proxy = proxy_for(httpx.URL(self.base_url))
        self._credentials = None if user is None else {"username": user, "password": password}
        self._token = token
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        try:
            self._http = httpx.Client(
                timeout=CONNECT_SECONDS,
                event_hooks={"response": [self._forget_refused_token]},
                # both were read from the environment, for Socket.IO as well
                trust_env=False,
                verify=self._trust or True,
                proxy=self._proxy,
            )
        except (ValueError, ImportError, httpx.InvalidURL) as exc:
            names = [name for name in os.environ if name.lower().endswith("_proxy")]
            raise ValueError(
                f"the proxy of the environment ({', '.join(names)}) can't be used: {exc}"
            ) from None

    @property
    def http(self) -> httpx.Client:
        """The client; in a fork of the process another one than in its parent."""
        if os.getpid() != self._pid:
            self._open()
        return self._http

    def socket_client(self) -> Any:
        """Return a Socket.IO client that trusts whom HTTP trusts, by the same proxy."""
        session = import_module("requests").session()
        session.trust_env = False
        options: dict[str, Any] = {}
        if self._trust is not None:
            session.verify = self._authority
            options["sslopt"] = {"context": self._trust}
        if self._proxy is not None:
            session.proxies = {"http": self._proxy, "https": self._proxy}
        # else the library would look at the environment by itself
        options["http_no_proxy"] = ["*"] if self._proxy is None else ["-"]
        return import_module("socketio").Client(
            # signals are for the program to handle
            handle_sigint=False,
            http_session=session,
            websocket_extra_options=options,
        )

    def get_headers(self) -> dict[str, str]:
        """Return the ``Authorization`` header, after logging in if need be."""
        return {"Authorization": f"Bearer {self.token()}"}

    def token(self) -> str:
        """Return a token that the host has not refused yet.

        Raises
        ------
        PermissionError
            When the host refuses user and password.
        ConnectionError
            When it can't be reached.
        ValueError
            When the token can't be one.
        """
        http = self.http
        with self._lock:
            if self._token is None:
                self._token = self._log_in(http)
            token = self._token
        # the token itself is in no message
        if not re.fullmatch("[!-~]+", token):
            raise ValueError(
                "the token has a blank, a line break or another character that no token has,"
                " or nothing at all: read from a file, it has to be stripped"
            )
        return token

    def raise_for_status(self, response: Any) -> None:
        """Raise KeyError (404), PermissionError (401, 403), ValueError, ConnectionError (5xx)."""
        status = response.status_code
        if status < 400:
            return
        problem = json_of(response)
        detail = f"answered {status}"
        if isinstance(problem, dict):
            detail = str(problem.get("detail") or problem.get("title"))
        kinds = {401: PermissionError, 403: PermissionError, 404: KeyError}
        raise kinds.get(status, ValueError if status < 500 else ConnectionError)(detail)

    def close(self) -> None:
        """Close the connections to the host."""
        self._http.close()

    def _log_in(self, http: httpx.Client) -> str:
        url = f"{self.base_url}/auth/jwt/login"
        response = http.post(url, data=self._credentials)
        if response.status_code in (400, 401, 403, 422) and json_of(response):
            raise LoginRefused(
                f"{self.base_url} refuses this user and password: the user is to be the"
                " address that was registered there"
            )
        return str(judge(response, lambda body: body["access_token"], url).value)

    def _forget_refused_token(self, response: httpx.Response) -> None:
        if response.status_code != 401 or self._credentials is None:
            return
        with self._lock:
            # another thread may have logged in since this request was sent
            if response.request.headers.get("Authorization") == f"Bearer {self._token}":
                self._token = None


def _trust(variable: str) -> ssl.SSLContext:
    place = os.environ[variable]
    try:
        if os.path.isdir(place):
            return ssl.create_default_context(capath=place)
        return ssl.create_default_context(cafile=place)
    except OSError as exc:
        raise ValueError(f"{variable}={place}: {exc}") from None


def _check_url(given: str) -> str:
    try:
        url = httpx.URL(given.strip())
    except httpx.InvalidURL as exc:
        raise ValueError(f"{given!r} is not an address: {exc}") from None
    if url.userinfo:
        raise ValueError("credentials don't belong into the address: give user and password")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(
            f"{given!r} is not the address of a host: it has to begin with http:// or"
            " https://, as http://127.0.0.1:8000 does"
        )
    return str(url.copy_with(query=None, fragment=None)).rstrip("/")


def proxy_for(url: httpx.URL) -> str | None:
    """Return the proxy by which the environment wants this address reached, if any."""
    proxies = getproxies()
    for entry in proxies.get("no", "").split(","):
        try:
            if ip_address(url.host) in ip_network(entry.strip(" []"), strict=False):
                return None
        except ValueError:
            # a name, for which the standard library looks
            continue
    if proxy_bypass(url.host):
        return None
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def judge(response: Any, read: Callable[[Any], Any] | None, url: str) -> Answer:
    """Return what an answer says; raise Unreachable or LoginRefused if it isn't the host's."""
    status = int(response.status_code)
    body = json_of(response)
    if 200 <= status < 300:
        try:
            if read is None and status != 204:
                raise ValueError(f"{status} instead of 204")
            return Answer(response, None if read is None else read(body))
        except Exception as exc:
            why = f"{type(exc).__name__}: {exc}"[:200]
            raise Unreachable(
                f"{url}: what came can't be read as the host's answer ({why})"
            ) from None
    if status == 401 and isinstance(body, dict):
        raise LoginRefused(
            f"{url}: the host refuses this login (401): the token may have expired; connect"
            " with another one, or with user and password, by which it is renewed"
        )
    if status == 429:
        raise SlowDown(f"{url}: asks for fewer requests (429)", _retry_after(response))
    if isinstance(body, dict):
        if status == 422 and isinstance(body.get("detail"), list):
            # FastAPI's own, of a host that has not registered the handler
            return Answer(response, problem={**body, "type": InvalidRequest.type_uri()})
        if _is_verdict(response, body):
            return Answer(response, problem=body)
    if 300 <= status < 400:
        what = f"leads elsewhere ({status}), to {response.headers.get('location')}:"
        what += " connect to the address that the host has there"
    elif isinstance(body, dict) and "type" in body:
        what = f"answered {status}: {body.get('detail')}"
    else:
        what = f"answered {status}, which isn't an answer of a host of zndraw-joblib"
    raise Unreachable(f"{url} {what}", _retry_after(response))


def _is_verdict(response: Any, body: dict[str, Any]) -> bool:
    """Return whether this is a problem of the host's, and not one that will pass."""
    kind = str(body.get("type"))
    return (
        response.headers.get("content-type", "").startswith(PROBLEM_JSON)
        and kind.startswith(PROBLEMS)
        and body.get("status") == response.status_code
        and (response.status_code < 500 or any(kind == p.type_uri() for p in OF_OTHERS))
    )


def json_of(response: Any) -> Any:
    """Return the JSON of an answer, or None if it is no JSON."""
    if "json" not in response.headers.get("content-type", ""):
        return None
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _retry_after(response: Any) -> float:
    """Return for how many seconds to wait, told as a number or a date (RFC 9110, 10.2.3)."""
    given = response.headers.get("retry-after", "")
    try:
        seconds = float(given)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(given).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    # one that is no number either
    return min(seconds, LONGEST_RETRY_AFTER_SECONDS) if seconds > 0 else 0.0
