"""A provider's process: ``provider_process.py URL TOKEN ANSWER``.

It writes a line when requests reach it, and one when it is in the middle of a read; it
ends a read only if there is something to answer.
"""

import os
import sys
import time
from typing import ClassVar

from zndraw_joblib import JobManager, Provider


class Numbers(Provider):
    """What was given with it, after a while."""

    category: ClassVar[str] = "numbers"
    content_type: ClassVar[str] = "text/plain"

    def read(self, handler: str) -> str:
        os.write(1, b"reads\n")
        while not handler:
            time.sleep(0.1)
        return handler


def main(url: str, token: str, answer: str) -> None:
    with JobManager.connect(url, token=token) as manager:
        manager.register_provider(Numbers, name="slow", handler=answer, room="lab")
        while not manager.tsio.connected:
            time.sleep(0.01)
        # answered after the rooms that were joined before
        manager.tsio.call("join_room", {"room_id": "lab"})
        os.write(1, b"ready\n")
        manager.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
