"""A worker program that knows only what 0.1.7 has: ``compat_worker.py ROLE URL TOKEN``.

As ``serves`` it serves a job and a provider until SIGTERM, woken over Socket.IO. As
``claims`` it does everything by hand and writes what came of it.
"""

import json
import sys
import time
from importlib.util import find_spec
from typing import Any, ClassVar

import httpx
import socketio

from zndraw_joblib import Category, ClaimedTask, Extension, JobManager, Provider


class Double(Extension):
    """Take a while, or fail."""

    category: ClassVar[Category] = Category.MODIFIER
    seconds: float = 0
    fails: bool = False

    def run(self, vis: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)
        if self.fails:
            raise ValueError("as it was told to")


class Text(Provider):
    """Some letters."""

    category: ClassVar[str] = "text"
    content_type: ClassVar[str] = "text/plain"
    size: int

    def read(self, handler: str) -> bytes:
        return (handler * self.size).encode()


class Api:
    """The host, and who asks."""

    def __init__(self, url: str, token: str) -> None:
        self.http = httpx.Client()
        self.base_url = url
        self.token = token

    def get_headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def raise_for_status(self, response: httpx.Response) -> None:
        kinds = {404: KeyError, 401: PermissionError, 403: PermissionError}
        kinds |= {409: ValueError, 422: ValueError}
        if response.status_code in kinds:
            raise kinds[response.status_code](response.text)
        response.raise_for_status()


def tell(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def serve(url: str, token: str) -> None:
    plain = socketio.Client(handle_sigint=False)
    tsio: Any = plain
    if find_spec("zndraw_socketio"):
        # what 0.1.7 wants around it
        import zndraw_socketio

        tsio = zndraw_socketio.wrap(plain)

    def execute(task: ClaimedTask) -> None:
        task.extension.run(None, **(task.run_kwargs or {}))

    # nothing but an event wakes it
    options = {"polling_interval": 3600.0, "heartbeat_interval": 0.5}
    manager = JobManager(Api(url, token), tsio, execute=execute, **options)
    plain.connect(url, auth={"token": token})
    with manager:
        manager.register(Double, room="lab", run_kwargs={"factor": 2})
        manager.register_provider(Text, name="letters", handler="ab", room="lab")
        # answered after the rooms that were joined before
        plain.call("join_room", {"room_id": "lab"})
        tell(worker=str(manager.worker_id), jobs=list(manager))
        manager.wait()
    plain.disconnect()
    tell(gone=True)


def claim(url: str, token: str) -> None:
    manager = JobManager(Api(url, token))
    told: dict[str, Any] = {"nothing": None}
    told["made"] = str(manager.create_worker()) == str(manager.worker_id)
    manager.register(Double, room="lab")
    told["nothing"] = manager.claim() is None

    def submitted() -> str:
        return str(manager.submit(Double(seconds=1.5), "lab", job_room="lab"))

    ids = {name: submitted() for name in ("completed", "failed", "by id", "cancelled")}
    order = []
    for end in ids:
        task = manager.claim()
        order.append(str(task.task_id))
        assert task.extension == Double(seconds=1.5), task
        assert (task.room_id, task.job_name) == ("lab", "lab:modifiers:Double")
        if end != "by id":
            manager.start(task)
        manager.heartbeat()
        if end == "completed":
            manager.complete(task)
        elif end == "failed":
            manager.fail(task, "it did not work")
        elif end == "by id":
            manager.fail_by_id(str(task.task_id), "nor did this")
        else:
            manager.cancel(task)
        try:
            manager.complete(task)
        except ValueError:
            # the completed one may be told so once more
            told[f"{end} is over"] = True
    told["order"] = order == list(ids.values())
    last = submitted()
    for task in manager.listen(polling_interval=0.1):
        told["listened"] = str(task.task_id) == last
        manager.start(task)
        manager.complete(task)
        break
    told["tasks"] = ids | {"listened": last}
    worker = str(manager.worker_id)
    manager.disconnect()
    manager.disconnect()
    tell(**told, worker=worker)


if __name__ == "__main__":
    {"serves": serve, "claims": claim}[sys.argv[1]](*sys.argv[2:])
