"""The example host, with ways to hurt it and to look into it.

``POST /harm/event`` and ``/harm/broker`` end the process, at once and without a word, when
it is next about to tell of a commit; ``/harm/clock?seconds=N`` moves its clock.
``GET /inside`` counts what must not grow.
"""

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from datetime import datetime, timedelta, tzinfo
from typing import Any, Self

import host
import uvicorn
from fastapi import FastAPI

real_time, real_time_ns = time.time, time.time_ns
ahead = 0.0


class Shifted(datetime):
    """A clock that is off."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz) + timedelta(seconds=ahead)


def shift_clock(seconds: float) -> None:
    """Move what this process takes for the time; timers go on as they do in a jump."""
    global ahead
    ahead = seconds
    time.time = lambda: real_time() + ahead
    time.time_ns = lambda: real_time_ns() + int(ahead * 1e9)
    for name, module in list(sys.modules.items()):
        if name.startswith("zndraw_joblib") and hasattr(module, "datetime"):
            module.datetime = Shifted


async def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def create_app() -> FastAPI:
    app = host.create_app()

    @app.post("/harm/{what}")
    async def harm(what: str, seconds: float = 0) -> None:
        if what == "event":
            app.state.tsio.manager.emit = die
        elif what == "broker":
            for task in app.state.internal_registry.tasks.values():
                task.broker.kick = die
        elif what == "clock":
            shift_clock(seconds)
        else:
            raise ValueError(what)

    @app.get("/inside")
    async def inside() -> dict[str, int]:
        gc.collect()
        return {
            "objects": len(gc.get_objects()),
            "tasks": len(asyncio.all_tasks()),
            "connections": app.state.engine.pool.checkedout(),
        }

    return app


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    port = int(os.environ["PORT"])
    uvicorn.run(create_app(), port=port, timeout_graceful_shutdown=1)
