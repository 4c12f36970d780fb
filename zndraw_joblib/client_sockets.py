"""A worker's Socket.IO: the events that come from its host."""

import logging
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import httpx

from zndraw_joblib.client_api import CONNECT_SECONDS, HostApi
from zndraw_joblib.events import FrozenEvent
from zndraw_joblib.telemetry import SafeLogger

LONGEST_PAUSE_SECONDS = 300.0
CLOSE_SECONDS = 2.0

log = SafeLogger(logging.getLogger(__name__))


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

    def emit(self, event: FrozenEvent, *, wait: bool = False) -> None:
        """Emit an event if that is possible now; ``wait`` until the host has handled it."""
        if self.tsio is None:
            return
        content = event.event_name, event.model_dump(mode="json")
        try:
            if wait and hasattr(self.tsio, "call") and self.connected:
                self.tsio.call(*content, timeout=CONNECT_SECONDS)
            else:
                self.tsio.emit(*content)
        except Exception as exc:
            # rooms are joined at every connect
            log.debug("could not emit %s: %s", event.event_name, exc)

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
            self._opening.join(CLOSE_SECONDS)
            # without WebSocket its last request waits for the server's next word
            closing = threading.Thread(target=self.tsio.shutdown, daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)
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
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            self._tried.set()
            if self._closed.is_set():
                tsio.shutdown()
            # from here on the client reconnects by itself
            return
