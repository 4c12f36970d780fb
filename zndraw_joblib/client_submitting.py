"""Submitting tasks and waiting for what becomes of them."""

import json
import math
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from importlib import import_module
from itertools import groupby
from operator import itemgetter
from typing import Any

from zndraw_joblib import telemetry
from zndraw_joblib.client_tasks import TaskFailed
from zndraw_joblib.client_transport import (
    CONNECT_SECONDS,
    Api,
    Transport,
    Unreachable,
    is_problem,
    path,
)
from zndraw_joblib.exceptions import JobNotFound, PayloadTooLarge
from zndraw_joblib.extension import Extension
from zndraw_joblib.lifecycle import TERMINAL, TaskStatus
from zndraw_joblib.names import GLOBAL_ROOM, FullName
from zndraw_joblib.schemas import MAX_BATCH, MAX_PAGE, TaskResponse

# an answer that took less did not wait, whatever its headers say
WAITED_SECONDS = 0.5
# what a host answers that has no such route
UNKNOWN = frozenset({404, 405})
# half of what a host takes that is left as it is
BATCH_BYTES = 512 * 1024


class Submitter:
    """Who submits tasks and waits for them: it needs no worker.

    Parameters
    ----------
    api : Api
        The host, and who asks.
    polling_interval : float
        Seconds between two looks, where the host does not wait with its answers.
    max_unreachable_seconds : float
        How long a request is repeated when the host does not answer.
    max_startup_retries : int
        How often a request is repeated as long as the host never answered.
    """

    def __init__(
        self,
        api: Api,
        *,
        polling_interval: float,
        max_unreachable_seconds: float,
        max_startup_retries: int,
    ) -> None:
        self.api = api
        self.polling_interval = polling_interval
        self.max_startup_retries = max_startup_retries
        self._transport = Transport(api, max_unreachable_seconds)
        self._host_takes_batches = True

    @property
    def _retries(self) -> float:
        # before the first answer a wrong address is likelier than a restart
        return math.inf if self._transport.reached else self.max_startup_retries

    def submit(
        self,
        extension: Extension,
        room: str,
        *,
        job_room: str = GLOBAL_ROOM,
        priority: int = 0,
        delay_seconds: float = 0,
        idempotency_key: str | None = None,
    ) -> str:
        """Submit a task.

        Parameters
        ----------
        extension : Extension
            The job, with the parameters of this task.
        room : str
            The room to submit it in.
        job_room : str
            The room that the job is registered in.
        priority : int
            Tasks of a higher one are claimed first.
        delay_seconds : float
            How long no worker gets it.
        idempotency_key : str, optional
            A second submission under the same key makes no second task. By default one
            is drawn, so that a submission whose answer got lost can be repeated.

        Returns
        -------
        str
            The task's id.

        Raises
        ------
        KeyError
            When the room sees no such job.
        ValueError
            When the host refuses the parameters.
        ConnectionError
            When the host can't be reached.
        """
        asked = _asked(priority, delay_seconds)
        job, body = _submission(extension, job_room, asked)
        return self._submit(room, job, body, idempotency_key or uuid.uuid4().hex)

    def submit_many(
        self,
        extensions: Iterable[Extension],
        room: str,
        *,
        job_room: str = GLOBAL_ROOM,
        priority: int = 0,
        delay_seconds: float = 0,
        idempotency_key: str | None = None,
    ) -> list[str]:
        """Submit any number of tasks, up to a thousand in one request.

        Parameters
        ----------
        extensions : iterable of Extension
            The jobs, with the parameters of each task; best of one class after another.
        room : str
            The room to submit them in.
        job_room : str
            The room that the jobs are registered in.
        priority : int
            Tasks of a higher one are claimed first.
        delay_seconds : float
            How long no worker gets them.
        idempotency_key : str, optional
            The same submissions under the same key make no second tasks. By default one
            is drawn, so that a submission whose answer got lost can be repeated.

        Returns
        -------
        list of str
            The tasks' ids, in the order of the extensions.

        Raises
        ------
        KeyError
            When the room sees no such job.
        ValueError
            When the host refuses the parameters. Of those in one request all are
            refused; earlier requests stand.
        ConnectionError
            When the host can't be reached.
        """
        asked = _asked(priority, delay_seconds)
        key = idempotency_key or uuid.uuid4().hex
        ids: list[str] = []
        for n, (job, bodies) in enumerate(_batches(extensions, job_room, asked)):
            ids += self._submit_batch(room, job, bodies, f"{key}-{n}")
        return ids

    def _submit_batch(
        self, room: str, job: FullName, bodies: list[bytes], key: str
    ) -> list[str]:
        if not self._host_takes_batches:
            return [
                self._submit(room, job, body, f"{key}-{n}")
                for n, body in enumerate(bodies)
            ]
        response = self._transport.send(
            "post",
            path("rooms", room, "batches", job),
            content=b'{"tasks":[%s]}' % b",".join(bodies),
            headers=_headers(job, key),
            retries=self._retries,
        )
        if response.status_code in UNKNOWN and not is_problem(response, JobNotFound):
            self._host_takes_batches = False
            return self._submit_batch(room, job, bodies, key)
        if response.status_code == PayloadTooLarge.status and len(bodies) > 1:
            # this host takes less at once
            half = len(bodies) // 2
            halves = (bodies[:half], f"{key}a"), (bodies[half:], f"{key}b")
            return [
                task_id
                for some, own_key in halves
                for task_id in self._submit_batch(room, job, some, own_key)
            ]
        self.api.raise_for_status(response)
        return [str(task_id) for task_id in response.json()["ids"]]

    def _submit(self, room: str, job: FullName, body: bytes, key: str) -> str:
        response = self._transport.send(
            "post",
            path("rooms", room, "tasks", job),
            content=body,
            headers=_headers(job, key),
            retries=self._retries,
        )
        self.api.raise_for_status(response)
        return str(response.json()["id"])

    def wait_for(self, task_id: str, timeout: float | None = None) -> TaskResponse:
        """Wait until a task is completed, and return it: its ``result`` among the rest.

        Parameters
        ----------
        task_id : str
            As `submit` returned it.
        timeout : float, optional
            Seconds; by default there is no limit.

        Raises
        ------
        TaskFailed
            When it ended as failed or cancelled.
        TimeoutError
            When it has not ended in time.
        KeyError
            When there is no such task.
        ConnectionError
            When the host can't be reached.
        """
        task = self._wait_until_ended(task_id, _deadline(timeout))
        if task.status != TaskStatus.COMPLETED:
            raise TaskFailed(task)
        return task

    def wait_all(
        self,
        task_ids: Iterable[str],
        timeout: float | None = None,
        *,
        progress: bool = False,
    ) -> list[TaskResponse]:
        """Wait until all of these tasks have ended, whether well or not.

        Parameters
        ----------
        task_ids : iterable of str
            As `submit` returned them.
        timeout : float, optional
            Seconds for all of them together; by default there is no limit.
        progress : bool
            Show a progress bar; this needs tqdm.

        Returns
        -------
        list of TaskResponse
            In the order of the ids; ``status`` tells which are completed.

        Raises
        ------
        TimeoutError
            When one has not ended in time.
        KeyError
            When there is no such task.
        ConnectionError
            When the host can't be reached.
        """
        ids = list(task_ids)
        deadline = _deadline(timeout)
        bar: Any = nullcontext()
        if progress:
            bar = import_module("tqdm.auto").tqdm(total=len(ids), unit="task")
        ended: dict[str, TaskResponse] = {}
        with bar:
            for first in range(0, len(ids), MAX_PAGE):
                # duplicates apart, in their order
                left = list(dict.fromkeys(ids[first : first + MAX_PAGE]))
                while left := [task_id for task_id in left if task_id not in ended]:
                    found = self._some_ended(left, deadline)
                    ended |= found
                    if progress:
                        bar.update(len(found))
        return [ended[task_id] for task_id in ids]

    def _some_ended(
        self, task_ids: list[str], deadline: float
    ) -> dict[str, TaskResponse]:
        """Return those of the tasks that have ended, after a wait for all of them."""
        if not self._host_takes_batches:
            first = task_ids[0]
            return {first: self._wait_until_ended(first, deadline)}
        asked = time.monotonic()
        response = self._ask(
            "post", path("tasks", "query"), deadline, json={"ids": task_ids}
        )
        if response.status_code in UNKNOWN:
            self._host_takes_batches = False
            return {}
        self.api.raise_for_status(response)
        answer = response.json()
        if answer["missing"]:
            raise KeyError(f"there is no task {answer['missing'][0]}")
        tasks = [TaskResponse.model_validate(task) for task in answer["tasks"]]
        ended = {
            # what is too large for one answer to many has to be asked for by itself
            str(task.id): self._wait_until_ended(str(task.id), deadline)
            if task.abridged
            else task
            for task in tasks
            if task.status in TERMINAL
        }
        if len(ended) < len(tasks):
            going = next(task for task in tasks if task.status not in TERMINAL)
            self._pause(going, response, asked, deadline)
        return ended

    def _wait_until_ended(self, task_id: str, deadline: float) -> TaskResponse:
        while True:
            asked = time.monotonic()
            response = self._ask("get", path("tasks", task_id), deadline)
            self.api.raise_for_status(response)
            task = TaskResponse.model_validate(response.json())
            if task.status in TERMINAL:
                return task
            self._pause(task, response, asked, deadline)

    def _ask(self, method: str, path: str, deadline: float, **content: Any) -> Any:
        """Ask for what is to be waited for, and let the host wait."""
        left = max(0.0, deadline - time.monotonic())
        wait = int(min(left, self._transport.longest_wait))
        try:
            return self._transport.send(
                method,
                path,
                headers=prefer(wait),
                timeout=wait + CONNECT_SECONDS,
                patience=min(left, self._transport.patience),
                **content,
            )
        except Unreachable as exc:
            if time.monotonic() < deadline:
                raise
            raise TimeoutError(f"no answer to {path}") from exc

    def _pause(
        self, task: TaskResponse, response: Any, asked: float, deadline: float
    ) -> None:
        """Wait until it is worth to ask again for a task that goes on."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"task {task.id} is still {task.status.value}")
        if not has_waited(response, asked):
            # less than a second is left, or the host does not wait
            time.sleep(min(left, self.polling_interval))


def prefer(wait: int) -> dict[str, str]:
    """Return the header that asks a host to wait with its answer (RFC 7240)."""
    return {"Prefer": f"wait={wait}"} if wait else {}


def has_waited(response: Any, asked: float) -> bool:
    """Return whether the host waited before it gave this answer.

    Parameters
    ----------
    response : httpx.Response
        The answer.
    asked : float
        When it was asked for, in the seconds of `time.monotonic`.
    """
    # the clock as well: a host that says so and yet answers at once would be asked
    # without a pause
    return (
        "preference-applied" in response.headers
        and time.monotonic() - asked > WAITED_SECONDS
    )


def category_of(cls: Any) -> str:
    """Return the category of an extension or provider as a plain string.

    Raises
    ------
    TypeError
        When it has none.
    """
    category = getattr(cls, "category", None)
    if not isinstance(category, str):
        raise TypeError(f"{cls} needs a ClassVar 'category'")
    # an enum that is not a StrEnum says its name otherwise
    return str.__str__(category)


def _headers(job: FullName, key: str) -> dict[str, str]:
    headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
    if trace := telemetry.submitting(str(job)):
        headers["traceparent"] = trace
    return headers


def _asked(priority: int, delay_seconds: float) -> dict[str, Any]:
    # what is not asked for is not said: an older host does not know the words
    asked = {"priority": priority, "delay_seconds": delay_seconds}
    return {word: value for word, value in asked.items() if value}


def _submission(
    extension: Extension, job_room: str, asked: dict[str, Any]
) -> tuple[FullName, bytes]:
    job = FullName(job_room, category_of(extension), type(extension).__name__)
    body = {"payload": extension.model_dump(mode="json"), **asked}
    return job, json.dumps(body, allow_nan=False, ensure_ascii=False).encode()


def _batches(
    extensions: Iterable[Extension], job_room: str, asked: dict[str, Any]
) -> Iterator[tuple[FullName, list[bytes]]]:
    """Yield what goes into one request each."""
    submissions = (_submission(each, job_room, asked) for each in extensions)
    for job, alike in groupby(submissions, key=itemgetter(0)):
        batch: list[bytes] = []
        size = 0
        for _, body in alike:
            if batch and (size + len(body) > BATCH_BYTES or len(batch) == MAX_BATCH):
                yield job, batch
                batch, size = [], 0
            batch.append(body)
            size += len(body)
        yield job, batch


def _deadline(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout
