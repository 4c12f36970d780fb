"""What passes between a worker and its host: requests, asked again, and Socket.IO events."""

import inspect
import itertools
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable
from functools import cached_property
from importlib.util import find_spec
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, Field

from zndraw_joblib.client_api import (
    CONNECT_SECONDS,
    NO_ROUTE,
    Answer,
    Api,
    HostApi,
    LoginRefused,
    SlowDown,
    Unreachable,
    json_of,
    judge,
)
from zndraw_joblib.telemetry import SafeLogger

PREFIX = "/v1/joblib"
FIRST_DELAY_SECONDS = 0.25
LONGEST_DELAY_SECONDS = 5.0
# proxies commonly give up on an answer after 30 s, or after 60 s
LONGEST_WAIT_SECONDS = 20
# a client that can't be given a timeout gives up after 5 s, if it is like httpx
LONGEST_WAIT_OF_OTHERS_SECONDS = 3
# how long a host without limits is taken for one that is older than they are
OLDER_SECONDS = 60.0
# in characters: a shorter one is part of many words
SHORTEST_SECRET = 4
SOCKET_CLOSE_SECONDS = 2.0
LONGEST_SOCKET_PAUSE_SECONDS = 300.0
#: What goes wrong on the way, as a pattern, and what to do about it.
HINTS = {
    "CERTIFICATE_VERIFY_FAILED": "name the file of your own authority in SSL_CERT_FILE",
    "(Connection|actively) refused": "nothing listens there: is the port right?",
    "Name or service not known|nodename nor servname|name resolution|getaddrinfo failed": (
        "there is no host of this name"
    ),
    "WRONG_VERSION_NUMBER": "that port speaks http, not https",
}

T = TypeVar("T")

log = SafeLogger(logging.getLogger(__name__))


class Limits(BaseModel):
    """How much a host takes at once."""

    max_claim: int = Field(default=32, ge=1)
    max_reports: int = Field(default=32, ge=1)
    max_batch: int = Field(default=1000, ge=1)
    max_page: int = Field(default=500, ge=1)
    max_heartbeat_tasks: int = Field(default=256, ge=1)
    max_payload_bytes: int = 1024 * 1024
    worker_timeout_seconds: float = math.inf


#: Of a host that is older than limits and batches.
ONE_AT_A_TIME = Limits(max_claim=1, max_reports=1, max_batch=1, max_page=1)


def path(*parts: object) -> str:
    """Return a path of the API, its parts percent-encoded."""
    return PREFIX + "".join("/" + quote(str(part), safe="@:") for part in parts)


class Transport:
    """Requests to one host, repeated as long as there is hope.

    ``patience`` is for how many seconds a request is repeated; ``startup_retries`` how
    often, as long as the host never answered: a wrong address is likelier then than a
    restart.
    """

    def __init__(self, api: Api, patience: float = 120.0, startup_retries: int = 5) -> None:
        self.api = api
        self.patience = patience
        #: whether the host ever answered
        self.reached = False
        self._startup_retries = startup_retries
        self._limits = ONE_AT_A_TIME
        self._limits_until = self._warned_at = -math.inf
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

    def limits(self, retries: int = 0) -> Limits:
        """Return how much the host takes at once: a single thing, until it says otherwise."""
        if time.monotonic() > self._limits_until:
            seconds = OLDER_SECONDS
            try:
                read = Limits.model_validate
                limits = self.ask("get", path("limits"), read, optional=True, retries=retries)
                if limits is not None:
                    self._limits, seconds = limits, math.inf
            except (OSError, LookupError, ValueError) as exc:
                # the request that is limited finds out whether the host is there
                log.debug("the host's limits are not known: %s", exc)
                seconds = FIRST_DELAY_SECONDS
            self._limits_until = time.monotonic() + seconds
        return self._limits

    def exchange(
        self,
        method: str,
        path: str,
        *,
        read: Callable[[Any], Any] | None = None,
        headers: dict[str, str] | None = None,
        wait: int | None = None,
        timeout: float | None = None,
        optional: bool = False,
        **content: Any,
    ) -> Answer:
        """Send one request and return the host's answer.

        Parameters
        ----------
        read : callable, optional
            Given the JSON of a success; what it returns is the answer's ``value``. If it
            raises, the answer is not the host's. Without it, a success has no content.
        wait : int, optional
            Seconds that the host is asked to wait with its answer (RFC 7240).
        timeout : float, optional
            Seconds that the answer may take, without ``wait``; by default the client's own.
        optional : bool
            Whether older hosts have no such route; the ``value`` is None then.

        Raises
        ------
        Unreachable, LoginRefused, ValueError, RuntimeError
            When no answer of the host's came; when it does not know who asks; when such a
            request can never be sent; in a fork of the process that made the client.
        """
        headers = (headers or {}) | ({"Prefer": f"wait={wait}"} if wait else {})
        timeout = timeout if wait is None else wait + CONNECT_SECONDS
        if timeout is not None and self.can_wait:
            limits = httpx.Timeout(min(timeout, CONNECT_SECONDS), read=timeout)
            content["extensions"] = {"timeout": limits.as_dict()}
        url = str(self.api.base_url).rstrip("/") + path
        asked = time.monotonic()
        response = self._ask(method, url, headers, content)
        if response.status_code == 401:
            # the token may have expired: its owner is asked for a new one
            response = self._ask(method, url, headers, content)
        if optional and response.status_code == 404 and json_of(response) == NO_ROUTE:
            answer = Answer(response)
        else:
            answer = judge(response, read, url)
        answer.seconds = time.monotonic() - asked
        self.reached = True
        return answer

    def send(
        self,
        method: str,
        path: str,
        *,
        retries: float = math.inf,
        patience: float | None = None,
        stop: threading.Event | None = None,
        **options: Any,
    ) -> Answer:
        """Send a request until the host answers, with exponential backoff.

        It must bear being repeated: its answer may have been lost on the way. It isn't
        any more after ``retries``, ``patience`` seconds, or when ``stop`` is set.

        Raises
        ------
        Unreachable, LoginRefused, ValueError, RuntimeError
            As `exchange` did last.
        """
        stop = stop or threading.Event()
        patience = self.patience if patience is None else patience
        since = 0.0
        for attempt in itertools.count():
            try:
                answer = self.exchange(method, path, **options)
                if self._warned_at > since > 0:
                    log.warning("host back after %.0f s", time.monotonic() - since)
                    self._warned_at = -math.inf
                return answer
            except (Unreachable, LoginRefused) as exc:
                if isinstance(exc, LoginRefused) and not self.reached:
                    # never taken yet: a typing error is likelier than a restart
                    raise
                if attempt == 0:
                    # not before: a request that waits may fail late
                    since = time.monotonic()
                away = time.monotonic() - since
                most = retries if self.reached else min(retries, self._startup_retries)
                if attempt >= most or away >= patience or away + exc.retry_after > patience:
                    raise
                # once more when time is up
                pause = max(min(backoff(attempt), patience - away), exc.retry_after)
                if away > patience / 10 and not isinstance(exc, SlowDown):
                    self._warn(exc, away, patience)
                if stop.wait(pause):
                    raise
        raise AssertionError

    def value(self, answer: Answer) -> Any:
        """Return what was read; raise KeyError, PermissionError, ValueError for a problem."""
        if answer.problem is not None:
            self.api.raise_for_status(answer.response)
            raise ValueError(answer.reason)
        return answer.value

    def ask(self, method: str, path: str, read: Callable[[Any], T], **options: Any) -> T:
        """Send a request as `send` does, and return what was read; raise for a problem."""
        value: T = self.value(self.send(method, path, read=read, **options))
        return value

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

    def _ask(self, method: str, url: str, headers: dict[str, str], content: dict[str, Any]) -> Any:
        send, who = getattr(self._own_client(), method), {}
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

    def _warn(self, exc: Exception, away: float, patience: float) -> None:
        # once, however many requests find it so
        if time.monotonic() - self._warned_at > self.patience:
            self._warned_at = time.monotonic()
            log.warning("host away for %.0f s, giving up at %.0f s: %s", away, patience, exc)


def backoff(attempt: int) -> float:
    """Return how many seconds to pause after a failure; half of it is drawn."""
    delay = min(FIRST_DELAY_SECONDS * 2.0 ** min(attempt, 10), LONGEST_DELAY_SECONDS)
    return delay * random.uniform(0.5, 1)


def _explain(exc: Exception, secret: dict[str, str]) -> str:
    """Return what went wrong, without what must not be read in a log."""
    text = str(exc) or type(exc).__name__
    if isinstance(exc, httpx.LocalProtocolError):
        # which quotes the header, escaped
        text = "a header holds what HTTP can't carry"
    for value in secret.values():
        for word in value.split():
            if len(word) >= SHORTEST_SECRET:
                text = text.replace(word, "***")
    hints = [hint for sign, hint in HINTS.items() if re.search(sign, text)]
    return "; ".join([text, *hints[:1]])


class Socket:
    """A worker's Socket.IO; without a client, nothing.

    With ``api``, the connection is the worker's own, and opened when it is first needed;
    else it is that of ``tsio``, whose earlier handlers are still called.
    """

    def __init__(self, tsio: Any = None, api: HostApi | None = None) -> None:
        self.tsio = tsio
        self.reason = "it was made without a Socket.IO client"
        self._api = api
        self._handlers: dict[str, Callable[..., Any]] = {}
        self._closed = threading.Event()
        self._tried = threading.Event()
        self._opening: threading.Thread | None = None

    @property
    def connected(self) -> bool:
        """Whether events can come; what doesn't say so is taken for connected."""
        return self.tsio is not None and bool(getattr(self.tsio, "connected", True))

    def on(self, event: str, handler: Callable[..., None]) -> None:
        """Call ``handler`` at every such event, before what was called until now."""
        # python-socketio keeps one handler an event
        earlier = getattr(self.tsio, "handlers", {}).get("/", {}).get(event)

        def both(*args: Any) -> Any:
            try:
                handler(*args)
            except Exception:
                log.exception("could not handle %s", event)
            return None if earlier is None else earlier(*args)

        self._handlers[event] = both
        if self.tsio is not None:
            self.tsio.on(event, both)

    def emit(self, event: str, data: dict[str, str], *, wait: bool = False) -> None:
        """Emit an event if that is possible now; ``wait`` until the host has handled it."""
        if self.tsio is None:
            return
        try:
            if wait and hasattr(self.tsio, "call") and self.connected:
                self.tsio.call(event, data, timeout=CONNECT_SECONDS)
            else:
                self.tsio.emit(event, data)
        except Exception as exc:
            # rooms are joined at every connect
            log.debug("could not emit %s: %s", event, exc)

    def open(self) -> None:
        """Begin to connect, in a thread, if the connection is the worker's own."""
        if self._api is None or self._opening is not None:
            return
        if find_spec("websocket") and find_spec("requests"):
            # not before: who only submits does not wait for what is imported here
            self.tsio = self._api.socket_client()
            for event, handler in self._handlers.items():
                self.tsio.on(event, handler)
            self._opening = threading.Thread(
                target=self._connect, args=[self._api], name="zndraw-socket", daemon=True
            )
            self._opening.start()
        else:
            self.reason = "pip install 'zndraw-joblib[worker]' brings it"

    def settle(self) -> None:
        """Wait until the first try to connect is over, whatever came of it."""
        if self._opening is not None:
            self._tried.wait(CONNECT_SECONDS)

    def close(self) -> None:
        """Disconnect, and connect no more; close ``api``."""
        self._closed.set()
        if self._opening is not None and self.tsio is not None:
            self._opening.join(SOCKET_CLOSE_SECONDS)
            # without WebSocket its last request waits for the server's next word
            closing = threading.Thread(target=self.tsio.shutdown, daemon=True)
            closing.start()
            closing.join(SOCKET_CLOSE_SECONDS)
        if self._api is not None:
            self._api.close()

    def _connect(self, api: HostApi) -> None:
        tsio, pause = self.tsio, 1.0
        # as it is sent: what is decoded, a WebSocket's first line would break at
        base = httpx.URL(api.base_url).raw_path.decode().strip("/")
        while not self._closed.is_set():
            try:
                tsio.connect(
                    api.base_url,
                    # a function: when it reconnects, the token may be another one
                    auth=lambda: {"token": api.token()},
                    socketio_path=f"{base}/socket.io".lstrip("/"),
                    wait_timeout=CONNECT_SECONDS,
                )
            except Exception as exc:
                self.reason = str(exc) or type(exc).__name__
                level = logging.DEBUG if self._tried.is_set() else logging.WARNING
                log.log(level, "no Socket.IO, tasks are claimed without it: %s", self.reason)
                self._tried.set()
                self._closed.wait(pause)
                pause = min(2 * pause, LONGEST_SOCKET_PAUSE_SECONDS)
                continue
            self._tried.set()
            if self._closed.is_set():
                tsio.shutdown()
            # from here on the client reconnects by itself
            return
