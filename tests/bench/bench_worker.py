"""A worker or a submitter of tasks that do nothing: ``bench_worker.py ROLE URL TOKEN``.

It runs in this tree's environment and in the release's, so the release does what it can
with what it has: one task a request. The submitter reads from its standard input how
many tasks to submit; it answers with the seconds until it knew how all of them ended.
"""

import sys
import time
from typing import Any, ClassVar

import httpx

from zndraw_joblib import Category, ClaimedTask, Extension, JobManager

ROOM = "bench"
CONCURRENCY = 32
#: with which a claim and a report are of few tasks
FEW = 4
BATCHES = hasattr(JobManager, "connect")


class Relax(Extension):
    """Do nothing, with the parameters of something."""

    category: ClassVar[Category] = Category.MODIFIER
    n: int
    structure: str = "Cu"
    steps: int = 100
    scale: tuple[float, ...] = (1.0, 1.0, 1.5)

    def run(self, vis: Any, **kwargs: Any) -> int:
        return self.n


class Api:
    """The host, and who asks, as the release wants to be told."""

    def __init__(self, url: str, token: str) -> None:
        self.http = httpx.Client(timeout=120)
        self.base_url = url
        self.headers = {"Authorization": f"Bearer {token}"}

    def get_headers(self) -> dict[str, str]:
        return self.headers

    def raise_for_status(self, response: httpx.Response) -> None:
        response.raise_for_status()


def execute(task: ClaimedTask) -> int:
    return task.extension.run(None)


def work(url: str, token: str, **options: Any) -> None:
    if BATCHES:
        options = {"execute": execute, "concurrency": CONCURRENCY, **options}
        manager = JobManager.connect(url, token=token, **options)
    else:
        # no event wakes it: with the 2 s that it is left with, it would often sleep
        # beside work
        manager = JobManager(Api(url, token), execute=execute, polling_interval=0.05)
    with manager:
        manager.register(Relax)
        while BATCHES and manager._shutdown.work._open < options["concurrency"]:
            # child processes start
            time.sleep(0.1)
        say("ready")
        manager.wait()


def isolated(url: str, token: str) -> None:
    """Work with a child process for each hand."""
    work(url, token, isolate=True)


def few_isolated(url: str, token: str) -> None:
    work(url, token, isolate=True, concurrency=FEW)


def few(url: str, token: str) -> None:
    work(url, token, concurrency=FEW)


def submit(url: str, token: str) -> None:
    run = many(url, token) if BATCHES else one_by_one(url, token)
    say("ready")
    for line in sys.stdin:
        tasks = [Relax(n=n) for n in range(int(line))]
        begun = time.perf_counter()
        run(tasks)
        say(time.perf_counter() - begun)


def many(url: str, token: str) -> Any:
    manager = JobManager.connect(url, token=token)

    def run(tasks: list[Relax]) -> None:
        ended = manager.wait_all(manager.submit_many(tasks, ROOM), 600)
        assert [task.result for task in ended] == [task.n for task in tasks]

    return run


def one_by_one(url: str, token: str) -> Any:
    api = Api(url, token)
    manager = JobManager(api)

    def ended(task_id: Any) -> dict[str, Any]:
        path = f"{url}/v1/joblib/tasks/{task_id}"
        while True:
            answer = api.http.get(path, headers=api.headers | {"Prefer": "wait=60"})
            answer.raise_for_status()
            task = answer.json()
            if task["status"] not in ("pending", "claimed", "running"):
                return task

    def run(tasks: list[Relax]) -> None:
        ids = [manager.submit(task, ROOM) for task in tasks]
        # the last one first: it runs last, so no other has to be waited for
        for task_id in reversed(ids):
            assert ended(task_id)["status"] == "completed"

    return run


def say(word: object) -> None:
    print(word, flush=True)


if __name__ == "__main__":
    roles = {"work": work, "isolated": isolated, "submit": submit}
    roles |= {"few": few, "few_isolated": few_isolated}
    roles[sys.argv[1]](*sys.argv[2:])
