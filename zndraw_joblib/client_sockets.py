"""A worker's Socket.IO connection: its own or its program's, or none at all."""

import logging
import threading
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from zndraw_joblib.client_transport import CONNECT_SECONDS, HostApi
from zndraw_joblib.events import FrozenEvent

log = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 300.0
CLOSE_SECONDS = 2.0


class Socket:
    """What a worker says and hears over Socket.IO; without a client, nothing.

    Parameters
    ----------
    tsio : socketio.Client or a wrapper of one, or None
        Whose connection it is. Its earlier handlers are still called.
    """

    def __init__(self, tsio: Any) -> None:
        self.tsio = tsio

    def on(self, event: str, handler: Callable[..., None]) -> None:
        """Call ``handler`` at every such event, before what was called until now."""
        if self.tsio is None:
            return
        # python-socketio keeps one handler an event
        handlers = getattr(self.tsio, "handlers", {})
        earlier = handlers.get("/", {}).get(event)

        def both(*args: Any) -> Any:
            try:
                handler(*args)
            except Exception:
                log.exception("could not handle %s", event)
            return None if earlier is None else earlier(*args)

        self.tsio.on(event, both)

    def say(self, event: FrozenEvent) -> None:
        """Tell the host, if it can be told now."""
        if self.tsio is None:
            return
        try:
            self.tsio.emit(event.event_name, event.model_dump(mode="json"))
        except Exception as exc:
            # rooms are joined at every connect
            log.debug("could not say %s: %s", event.event_name, exc)

    def ask(self, event: FrozenEvent) -> None:
        """Tell the host and wait, for a bounded time, until it has heard."""
        if not (hasattr(self.tsio, "call") and getattr(self.tsio, "connected", False)):
            self.say(event)
            return
        try:
            self.tsio.call(
                event.event_name,
                event.model_dump(mode="json"),
                timeout=CONNECT_SECONDS,
            )
        except Exception as exc:
            log.debug("could not ask for %s: %s", event.event_name, exc)

    def settle(self) -> None:
        """Wait until the first try to connect is over, whatever came of it."""


class OwnSocket(Socket):
    """A connection of the worker's own, opened when it is first needed.

    Parameters
    ----------
    api : HostApi
        The host, and whose token to show.
    """

    def __init__(self, api: HostApi) -> None:
        super().__init__(None)
        self._api = api
        self._closed = threading.Event()
        self._tried = threading.Event()
        self._opening: threading.Thread | None = None
        if find_spec("websocket") and find_spec("requests"):
            # signals are for the program to handle
            self.tsio = import_module("socketio").Client(handle_sigint=False)

    def open(self) -> None:
        """Begin to connect, in a thread of its own."""
        if self.tsio is not None:
            self._opening = threading.Thread(
                target=self._connect, name="zndraw-socket", daemon=True
            )
            self._opening.start()

    def settle(self) -> None:
        """Wait until the first try to connect is over, whatever came of it."""
        if self._opening is not None:
            self._tried.wait(CONNECT_SECONDS)

    def close(self) -> None:
        """Disconnect, and connect no more."""
        self._closed.set()
        if self._opening is not None:
            self._opening.join(CLOSE_SECONDS)
            self.tsio.shutdown()

    def _connect(self) -> None:
        pause = 1.0
        while not self._closed.is_set():
            try:
                self.tsio.connect(
                    self._api.base_url,
                    # a function: when it reconnects, the token may be another one
                    auth=lambda: {"token": self._api.token()},
                    wait_timeout=CONNECT_SECONDS,
                )
            except Exception as exc:
                log.info("no Socket.IO yet, tasks are claimed without it: %s", exc)
                self._tried.set()
                self._closed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            self._tried.set()
            if self._closed.is_set():
                self.tsio.shutdown()
            # from here on the client reconnects by itself
            return
