"""Run a script that dies with its parent: ``python docs/tied.py SCRIPT [ARGS]``.

The parent holds the other end of standard input. Once it is gone, however it went, the
pipe ends, and so does this process.
"""

import os
import runpy
import signal
import sys
import threading


def die_with_parent() -> None:
    """Wait for the end of standard input, then end the process."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=die_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
