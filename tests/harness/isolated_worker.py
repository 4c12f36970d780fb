"""A worker with isolated hands, and a job that does there whatever a test wants.

``isolated_worker.py URL TOKEN`` prints the ids of its children when it serves. It is
imported by the tests, too.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import field_validator

from zndraw_joblib import Category, ClaimedTask, Extension


class Odd(Extension):
    """Does what it is told."""

    category: ClassVar[Category] = Category.ANALYSIS
    what: str = ""
    seconds: float = 0.0

    @field_validator("what")
    @classmethod
    def check(cls, what: str) -> str:
        # in a child, not where it is submitted
        if what == "unfit" and multiprocessing.parent_process() is not None:
            os._exit(4)
        return what

    def run(self, vis: Any, *, task: ClaimedTask, **kwargs: Any) -> Any:
        match self.what:
            case "segfault":
                ctypes.string_at(0)
            case "sys.exit":
                sys.exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "lock":
                hold_the_lock(self.seconds)
            case "polite":
                while True:
                    task.progress(0.5, "half")
                    task.raise_if_cancelled()
                    time.sleep(0.01)
            case "steps" | "steps and crash":
                return {"steps": list(self.steps(task))}
            case "sleep":
                time.sleep(self.seconds)
            case "loud":
                sys.stdout.write("printed\n")
                os.system("echo by another program")
                os.write(2, b"in C \xc3\xa9\xff\n")
                logging.getLogger("theirs").warning("logged")
                task.log("said\nand more")
                sys.stdout.write("\r10 %\r20 %")
            case "loud and crash":
                sys.stdout.write("x" * 100_000 + "".join(f"\n{n}" for n in range(30_000)) + "\n")
                os.write(1, b"the last word")
                ctypes.string_at(0)
            case "raise":
                raise ValueError("as asked")
            case "family":
                # what it has forked holds its pipes open
                child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
                child.start()
                os._exit(5)
        return {"pid": os.getpid(), **kwargs}

    def steps(self, task: ClaimedTask) -> Iterator[int]:
        """Take ten steps, and stop half way the first time."""
        for step in range(task.saved or 0, 10):
            yield step
            task.save(step + 1)
            if step == 4 and self.what == "steps":
                raise RuntimeError("half way")
            if step == 4:
                while task.unsent_checkpoint() is not None:
                    time.sleep(0.01)
                os._exit(1)


def set_up_slowly() -> None:
    """Take longer than the host takes for silence."""
    time.sleep(3)


def hold_the_lock(seconds: float) -> None:
    """Sleep in C with the interpreter's lock held, as f2py does."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        # a signal interrupts it
        ctypes.PyDLL(None).usleep(int(left * 1e6) + 1)


def set_up() -> dict[str, Any]:
    """Return what is loaded once in each child."""
    return {"loaded_in": os.getpid()}


def fail() -> None:
    """Don't find a GPU."""
    raise LookupError("no GPU here")


def main(url: str, token: str) -> None:
    # a child needs nothing of it
    from zndraw_joblib import JobManager

    with JobManager.connect(url, token=token, isolate=True, heartbeat_interval=0.5) as manager:
        manager.register(Odd)
        manager.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
