"""Submitting tasks and waiting for what becomes of them."""

import math
import time
import uuid
from collections.abc import Iterable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from zndraw_joblib import telemetry
from zndraw_joblib.client_tasks import TaskFailed
from zndraw_joblib.client_transport import (
    CONNECT_SECONDS,
    Api,
    Transport,
    Unreachable,
    path,
)
from zndraw_joblib.extension import Extension
from zndraw_joblib.lifecycle import TERMINAL, TaskStatus
from zndraw_joblib.names import GLOBAL_ROOM, FullName
from zndraw_joblib.schemas import TaskResponse

# an answer that took less did not wait, whatever its headers say
WAITED_SECONDS = 0.5


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
        job = FullName(job_room, category_of(extension), type(extension).__name__)
        body: dict[str, Any] = {"payload": extension.model_dump(mode="json")}
        # what is not asked for is not said: an older host does not know the words
        if priority:
            body["priority"] = priority
        if delay_seconds:
            body["delay_seconds"] = delay_seconds
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        if trace := telemetry.submitting(str(job)):
            headers["traceparent"] = trace
        response = self._transport.send(
            "post",
            path("rooms", room, "tasks", job),
            json=body,
            headers=headers,
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
        ended = []
        with bar:
            for task_id in ids:
                ended.append(self._wait_until_ended(task_id, deadline))
                if progress:
                    bar.update()
        return ended

    def _wait_until_ended(self, task_id: str, deadline: float) -> TaskResponse:
        while True:
            left = max(0.0, deadline - time.monotonic())
            wait = int(min(left, self._transport.longest_wait))
            asked = time.monotonic()
            try:
                response = self._transport.send(
                    "get",
                    path("tasks", task_id),
                    headers=prefer(wait),
                    timeout=wait + CONNECT_SECONDS,
                    patience=min(left, self._transport.patience),
                )
            except Unreachable as exc:
                if time.monotonic() < deadline:
                    raise
                raise TimeoutError(f"no answer about task {task_id}") from exc
            self.api.raise_for_status(response)
            task = TaskResponse.model_validate(response.json())
            if task.status in TERMINAL:
                return task
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"task {task_id} is still {task.status.value}")
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


def _deadline(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout
