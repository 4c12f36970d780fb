"""A worker that writes a history; each of its requests goes to whichever replica."""

import os
import random
import time
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import history
import httpx
import socketio

from zndraw_joblib import Category, ClaimedTask, Extension, JobManager
from zndraw_joblib.client_api import HostApi
from zndraw_joblib.schemas import JobPolicy

ROOM = "lab"
#: the fraction of answers that are lost
LOST = 0.02


class Often(Extension):
    """Takes its time, or fails; tried several times."""

    category: ClassVar[Category] = Category.ANALYSIS
    name: str
    seconds: float = 0
    fails: bool = False

    def run(self, vis: Any, *, task: ClaimedTask) -> None:
        end = time.monotonic() + self.seconds
        while (left := end - time.monotonic()) > 0:
            task.raise_if_cancelled()
            task.progress(1 - left / self.seconds)
            time.sleep(min(left, 0.02))
        if self.fails:
            raise ValueError("as it was told to")


class Once(Often):
    """The same, tried once."""


POLICIES = {
    Often: JobPolicy(max_attempts=5, retry_delay_seconds=0.2, start_timeout_seconds=3),
    Once: JobPolicy(timeout_seconds=3),
}


class Replicas:
    """A host of several replicas, and a user of it."""

    def __init__(
        self, urls: list[str], token: str, record: history.Record, rng: random.Random
    ) -> None:
        self.urls = urls
        self.rng = rng
        self.raise_for_status = HostApi(urls[0], token=token).raise_for_status
        self.headers = {"Authorization": f"Bearer {token}"}
        # an answer that takes longer is one that is lost
        self.http = httpx.Client(timeout=8, event_hooks=history.recorded(record, rng, LOST))

    @property
    def base_url(self) -> str:
        return self.rng.choice(self.urls)

    def get_headers(self) -> dict[str, str]:
        return self.headers


def work(path: Path, token: str, seed: str, websocket: bool, urls: list[str]) -> None:
    """Serve two jobs until SIGTERM."""
    record = history.recorder(path)
    rng = random.Random(seed)
    runs = count()
    # in minutes of forks, a process id comes again
    life = f"{os.getpid()}-{time.monotonic_ns()}"

    def execute(task: ClaimedTask) -> Any:
        run = f"{life}-{next(runs)}"
        record(run=run, task=task.task_id, attempt=task.attempt)
        result = None
        try:
            task.extension.run(None, task=task)
            result = {"run": run}
        finally:
            record(ran=run, result=result)
        return result

    tsio = socketio.Client(handle_sigint=False) if websocket else None
    manager = JobManager(
        Replicas(urls, token, record, rng),
        tsio,
        execute=execute,
        heartbeat_interval=0.5,
        concurrency=rng.choice((1, 1, 3)),
        grace_seconds=3,
    )
    with manager:
        if tsio is not None:
            tsio.connect(rng.choice(urls), auth={"token": token}, retry=True)
        for job, policy in POLICIES.items():
            manager.register(job, room=ROOM, policy=policy)
        manager.wait()
