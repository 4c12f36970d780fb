"""What a task says while it runs: lines, until heartbeats have taken them to the host."""

import re
import threading
import traceback
from collections import deque
from typing import Any

from zndraw_joblib.lifecycle import MAX_LOG_LINES, as_line

# what may wait for heartbeats; beyond, the oldest lines are left out
MAX_UNSENT_LINES = 2000
MAX_UNSENT_CHARACTERS = 256 * 1024
# half of what a host takes of a task at once
BYTES_A_BEAT = 32 * 1024
MAX_TRACEBACK = 16 * 1024

#: What sets colours, and moves the cursor.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class TaskLog:
    """The lines of a task's attempt that the host does not have yet; for any thread."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._characters = 0
        self._omitted = 0
        self._first = 1
        #: what is under way, as long as the host has not answered
        self._sent: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def add(self, text: str) -> None:
        """Add one line, or several."""
        lines = [as_line(_as_on_a_terminal(line)) for line in text.split("\n")]
        with self._lock:
            self._lines += lines
            self._characters += sum(map(len, lines))
            while len(self._lines) > MAX_UNSENT_LINES or self._characters > MAX_UNSENT_CHARACTERS:
                self._take()
                self._omitted += 1

    def unsent(self) -> dict[str, Any] | None:
        """Return what a heartbeat is to carry, the same until it is kept."""
        with self._lock:
            if self._sent is None and self._lines:
                lines = []
                if self._omitted:
                    lines.append(f"... {self._omitted} lines left out ...")
                    self._omitted = 0
                size = 0
                while self._lines and len(lines) < MAX_LOG_LINES:
                    size += len(self._lines[0].encode()) + 1
                    if size > BYTES_A_BEAT:
                        break
                    lines.append(self._take())
                self._sent = {"first": self._first, "lines": lines}
                self._first += len(lines)
            return self._sent

    def keep(self, sent: dict[str, Any]) -> None:
        """Note what the host has, or won't have."""
        with self._lock:
            if self._sent is sent:
                self._sent = None

    def _take(self) -> str:
        line = self._lines.popleft()
        self._characters -= len(line)
        return line


def _as_on_a_terminal(line: str) -> str:
    """Return what of a line a terminal would show in the end, without colours."""
    return _ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2])


def traceback_of(exc: BaseException) -> str:
    """Return the traceback of an exception, of a long one the first part and the last."""
    text = "".join(traceback.format_exception(exc))
    if (beyond := len(text) - MAX_TRACEBACK) > 0:
        half = MAX_TRACEBACK // 2
        text = f"{text[:half]}\n... {beyond} characters left out ...\n{text[-half:]}"
    return text
