"""The worker's process of the end-to-end tests: ``end_to_end_worker.py URL TOKEN ROOM``.

With a fourth argument it has no websocket. It prints a line when the host has it in all
of its rooms.
"""

import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from zndraw_joblib import Category, Extension, JobManager, Provider
from zndraw_joblib.client_api import HostApi


class Wait(Extension):
    """Wait until there is a file, and return what it says."""

    category: ClassVar[Category] = Category.ANALYSIS
    path: Path

    def run(self, vis: Any, **kwargs: Any) -> str:
        while not self.path.exists():
            time.sleep(0.01)
        return self.path.read_text()


class Numbers(Provider):
    """Bytes, counted up."""

    category: ClassVar[str] = "numbers"
    content_type: ClassVar[str] = "application/octet-stream"
    size: int

    def read(self, handler: int) -> bytes:
        return bytes(range(handler, handler + self.size))


def main(url: str, token: str, room: str, *without_websocket: str) -> None:
    options: dict[str, Any] = {
        "execute": lambda task: task.extension.run(None),
        # what could wake it, does; it does not look by itself
        "polling_interval": 3600,
        "heartbeat_interval": 0.5,
    }
    if without_websocket:
        manager = JobManager(HostApi(url, token=token), **options)
    else:
        manager = JobManager.connect(url, token=token, **options)
    with manager:
        manager.register(Wait, room=room)
        if not without_websocket:
            manager.register_provider(Numbers, name="count", handler=10, room=room)
            while not manager.tsio.connected:
                time.sleep(0.01)
            # the answer comes after the rooms that were joined before are
            manager.tsio.call("join_room", {"room_id": room})
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        manager.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
