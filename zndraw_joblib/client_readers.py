"""What answers those who read from a worker's providers."""

import json
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from zndraw_joblib.client_answers import Unreachable
from zndraw_joblib.client_registrations import Life, OfferedProvider, Registrations
from zndraw_joblib.client_transport import SafeLogger, Transport, path
from zndraw_joblib.exceptions import PROBLEM_JSON, ProviderExecutionFailed, describe, storable
from zndraw_joblib.provider import read_content

log = SafeLogger(logging.getLogger(__name__))

PROVIDER_THREADS = 4
ANSWER_RETRIES = 3


class Pool:
    """Daemon threads that take calls from one queue.

    Those of `concurrent.futures` would keep the process alive until the last call
    returns, and a call may hang.
    """

    def __init__(self, size: int, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True)
            for i in range(size)
        ]
        for thread in self.threads:
            thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """Have a thread make the call as soon as one is free."""
        self._calls.put(call)

    def close(self) -> None:
        """Let the threads end once they have made the calls submitted so far."""
        for _ in self.threads:
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException:
                # even SystemExit: it would end this thread and nothing else
                log.exception("unexpected")


@dataclass
class Readers:
    """Threads that read from providers for who asks over Socket.IO."""

    transport: Transport
    registrations: Registrations
    life: Life
    _pool: Pool | None = None

    @property
    def threads(self) -> list[threading.Thread]:
        """All of them."""
        return [] if self._pool is None else self._pool.threads

    def start(self) -> None:
        """Begin, if they have not begun."""
        if self._pool is None:
            self._pool = Pool(PROVIDER_THREADS, "zndraw-provider")

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None:
            self._pool.close()

    def request(self, data: dict[str, Any]) -> None:
        """Have a request answered, if it is for a provider of this worker."""
        provider = self.registrations.providers.get(data["provider_name"])
        if provider is not None and self._pool is not None:
            self._pool.submit(partial(self._read, provider, data))

    def _read(self, provider: OfferedProvider, data: dict[str, Any]) -> None:
        """Read from a provider for somebody, and send what was read, or why not."""
        name = str(provider.name)
        if self.registrations.providers.get(name) is not provider:
            return
        send = partial(self._send, provider, data["request_id"])
        try:
            params = json.loads(data["params"])
            content = read_content(provider.cls, provider.handler, params)
        except BaseException as exc:
            # SystemExit and the like end this request, not the thread
            error = describe(exc)
            log.exception("provider %s could not be read", name)
        else:
            refused = send(content, {"Content-Type": provider.cls.content_type})
            if not refused:
                return
            error = f"the host refused the result: {refused}"
        problem = ProviderExecutionFailed.create(detail=storable(error))
        send(
            problem.model_dump_json(exclude_none=True).encode(),
            {"Content-Type": PROBLEM_JSON, "X-Result-Status": "error"},
        )

    def _send(
        self, provider: OfferedProvider, digest: str, content: bytes, headers: dict[str, str]
    ) -> str:
        """Answer a reader; return why the host doesn't want the answer, if it doesn't."""
        try:
            answer = self.transport.send(
                "post",
                path("providers", provider.id, "results"),
                content=content,
                headers={"X-Request-Hash": digest, **headers},
                retries=ANSWER_RETRIES,
                stop=self.life.stopping,
            )
        except (Unreachable, PermissionError) as exc:
            # the reader is told of a timeout
            log.warning("could not answer a reader of %s: %s", provider.name, exc)
            return ""
        return answer.reason if answer.problem else ""
