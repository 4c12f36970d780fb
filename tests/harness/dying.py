"""A job that dies in as many ways as a task of its worker can."""

import ctypes
import os
import re
import resource
import signal
import time
from typing import Any, ClassVar

from isolated_worker import hold_the_lock

from zndraw_joblib import Category, ClaimedTask, Extension


class Die(Extension):
    """Do what ends a task, a process or more; or nothing, for some seconds."""

    category: ClassVar[Category] = Category.ANALYSIS
    how: str = ""
    seconds: float = 0.0

    def run(self, vis: Any, *, task: ClaimedTask, **kwargs: Any) -> str:
        match self.how:
            case "lock":
                hold_the_lock(self.seconds)
            case "loop":
                # it takes for ever, and looks for no signals
                re.match(r"(a+)+$", "a" * 64 + "b")
            case "segfault":
                ctypes.string_at(0)
            case "memory":
                limit = 2**30
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
                try:
                    return str(len(bytearray(limit)))
                finally:
                    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                    resource.setrlimit(resource.RLIMIT_AS, unlimited)
            case "exit":
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "disk":
                with open("/dev/full", "wb", buffering=0) as full:
                    full.write(b"x")
            case "sleep":
                time.sleep(self.seconds)
        return "done"
