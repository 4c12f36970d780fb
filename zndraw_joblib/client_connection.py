"""The connections to a host: HTTP and Socket.IO, by one address, one token, one trust."""

import logging
import os
import ssl
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx

from zndraw_joblib.client_answers import LoginRefused, json_of, judge
from zndraw_joblib.client_transport import CONNECT_SECONDS, SafeLogger
from zndraw_joblib.events import FrozenEvent

log = SafeLogger(logging.getLogger(__name__))

LONGEST_PAUSE_SECONDS = 300.0
CLOSE_SECONDS = 2.0
#: Where programs say whom to trust; the first that is set counts.
TRUST_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class HostApi:
    """A host, and a user of it: by a token, or by a name and a password.

    Parameters
    ----------
    base_url : str
        Where the host is, with the path that it is served below, if any.
    token : str, optional
        A bearer token.
    user, password : str, optional
        Used to log in, and to log in again when the token has expired.

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
        self.authority = _authority()
        self.proxy = proxy_for(httpx.URL(self.base_url))
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
                verify=self.trust() or True,
                proxy=self.proxy,
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

    def trust(self) -> ssl.SSLContext | None:
        """Return what checks the host's certificate, if the environment says whom to trust.

        Raises
        ------
        ValueError
            When the file or directory that it names can't be read.
        """
        if self.authority is None:
            return None
        name, place = self.authority
        try:
            if os.path.isdir(place):
                return ssl.create_default_context(capath=place)
            return ssl.create_default_context(cafile=place)
        except OSError as exc:
            raise ValueError(f"{name}={place}: {exc}") from None

    def get_headers(self) -> dict[str, str]:
        """Return the ``Authorization`` header, after logging in if need be.

        Raises
        ------
        PermissionError
            When the host refuses user and password.
        ConnectionError
            When it can't be reached.
        ValueError
            When the token can't be one.
        """
        return {"Authorization": f"Bearer {self.token()}"}

    def token(self) -> str:
        """Return a token that the host has not refused yet; raises as `get_headers`."""
        http = self.http
        with self._lock:
            if self._token is None:
                self._token = self._log_in(http)
            token = self._token
        # the token itself is in no message
        if not token:
            raise ValueError("the token is empty")
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError(
                "the token has a blank, a line break or another character that no token"
                " has: read from a file, it has to be stripped"
            )
        return token

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
        status = response.status_code
        if status < 400:
            return
        problem = json_of(response)
        detail = f"answered {status}"
        if isinstance(problem, dict):
            detail = str(problem.get("detail") or problem.get("title"))
        if status == 404:
            raise KeyError(detail)
        if status in (401, 403):
            raise PermissionError(detail)
        raise (ValueError if status < 500 else ConnectionError)(detail)

    def close(self) -> None:
        """Close the connections to the host."""
        self._http.close()

    def _log_in(self, http: httpx.Client) -> str:
        url = f"{self.base_url}/auth/jwt/login"
        response = http.post(url, data=self._credentials)
        if response.status_code in (400, 401, 403, 422) and json_of(response):
            raise LoginRefused(f"{self.base_url} refuses this user and password")
        return str(judge(response, lambda body: body["access_token"], url).value)

    def _forget_refused_token(self, response: httpx.Response) -> None:
        if response.status_code != 401 or self._credentials is None:
            return
        with self._lock:
            # another thread may have logged in since this request was sent
            if response.request.headers.get("Authorization") == f"Bearer {self._token}":
                self._token = None


def _check_url(given: str) -> str:
    try:
        url = httpx.URL(given.strip())
    except httpx.InvalidURL as exc:
        raise ValueError(f"{given!r} is not an address: {exc}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(
            f"{given!r} is not the address of a host: it has to begin with http:// or https://"
        )
    return str(url.copy_with(query=None, fragment=None)).rstrip("/")


def _authority() -> tuple[str, str] | None:
    """Return the variable that says whom to trust, and the file or directory."""
    for name in (*TRUST_VARIABLES, "SSL_CERT_DIR"):
        if place := os.environ.get(name):
            return name, place
    return None


def proxy_for(url: httpx.URL) -> str | None:
    """Return the proxy by which the environment wants this address reached, if any."""
    for entry in getproxies().get("no", "").split(","):
        try:
            if ip_address(url.host) in ip_network(entry.strip(" []"), strict=False):
                return None
        except ValueError:
            # a name, for which the standard library looks
            continue
    if proxy_bypass(url.host):
        return None
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


class Socket:
    """What a worker says and hears over Socket.IO; without a client, nothing.

    Parameters
    ----------
    tsio : socketio.Client or a wrapper of one, or None
        Whose connection it is. Its earlier handlers are still called.
    api : HostApi, optional
        Where to open a connection of the worker's own, when it is first needed.
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
        handlers = getattr(self.tsio, "handlers", {})
        earlier = handlers.get("/", {}).get(event)

        def both(*args: Any) -> Any:
            try:
                handler(*args)
            except Exception:
                log.exception("could not handle %s", event)
            return None if earlier is None else earlier(*args)

        self._handlers[event] = both
        if self.tsio is not None:
            self.tsio.on(event, both)

    def emit(self, event: FrozenEvent, *, wait: bool = False) -> None:
        """Tell the host, if it can be told now; wait, if asked to, until it has heard."""
        if self.tsio is None:
            return
        told = event.event_name, event.model_dump(mode="json")
        try:
            if wait and hasattr(self.tsio, "call") and self.connected:
                self.tsio.call(*told, timeout=CONNECT_SECONDS)
            else:
                self.tsio.emit(*told)
        except Exception as exc:
            # rooms are joined at every connect
            log.debug("could not emit %s: %s", event.event_name, exc)

    def open(self) -> None:
        """Begin to connect, in a thread of its own, if the connection is the worker's."""
        if self._api is None or self._opening is not None:
            return
        if find_spec("websocket") and find_spec("requests"):
            # not before: who only submits does not wait for what is imported here
            self.tsio = _own_client(self._api)
            for event, handler in self._handlers.items():
                self.tsio.on(event, handler)
            self._opening = threading.Thread(
                target=self._connect, name="zndraw-socket", daemon=True
            )
            self._opening.start()
        else:
            self.reason = "pip install 'zndraw-joblib[worker]' brings it"

    def settle(self) -> None:
        """Wait until the first try to connect is over, whatever came of it."""
        if self._opening is not None:
            self._tried.wait(CONNECT_SECONDS)

    def close(self) -> None:
        """Disconnect, and connect no more."""
        self._closed.set()
        if self._opening is not None and self.tsio is not None:
            self._opening.join(CLOSE_SECONDS)
            # without WebSocket its last request waits for the server's next word
            closing = threading.Thread(target=self.tsio.shutdown, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)

    def _connect(self) -> None:
        assert self._api is not None
        tsio, api, pause = self.tsio, self._api, 1.0
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
                tell = log.debug if self._tried.is_set() else log.warning
                tell("no Socket.IO, tasks are claimed without it: %s", self.reason)
                self._tried.set()
                self._closed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            self._tried.set()
            if self._closed.is_set():
                tsio.shutdown()
            # from here on the client reconnects by itself
            return


def _own_client(api: HostApi) -> Any:
    """Return a Socket.IO client that trusts whom HTTP trusts, by the same proxy."""
    session = import_module("requests").session()
    session.trust_env = False
    options: dict[str, Any] = {}
    if api.authority is not None:
        session.verify = api.authority[1]
        options["sslopt"] = {"context": api.trust()}
    if api.proxy is not None:
        session.proxies = {"http": api.proxy, "https": api.proxy}
    # else the library would look at the environment by itself
    options["http_no_proxy"] = ["*"] if api.proxy is None else ["-"]
    return import_module("socketio").Client(
        # signals are for the program to handle
        handle_sigint=False,
        http_session=session,
        websocket_extra_options=options,
    )
