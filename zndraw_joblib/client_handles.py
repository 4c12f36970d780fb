"""Tasks as a user sees them: to wait for, to cancel and to try again."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from importlib import import_module
from typing import Any, Literal, Self, TypeVar, overload
from uuid import UUID

from zndraw_joblib.client_api import Answer, Unreachable
from zndraw_joblib.client_transport import Transport, path
from zndraw_joblib.exceptions import shortened
from zndraw_joblib.lifecycle import TERMINAL, TaskStatus
from zndraw_joblib.schemas import LogLine, TaskLogResponse, TaskResponse

# how often running tasks are asked how far they are
LIVE_SECONDS = 1
BAR_WIDTH = 40
# what a notebook shows of a list
SHOWN_ROWS = 50
TASK_COLUMNS = "id job_name status progress progress_message queue_position created_at error"

T = TypeVar("T")


class TaskFailed(Exception):
    """A task that was waited for ended as failed or cancelled.

    Attributes
    ----------
    task : TaskResponse
        The task, ``task.error`` and ``task.errors`` among the rest.
    """

    def __init__(self, task: TaskResponse) -> None:
        super().__init__(f"task {task.id} {task.status.value}: {task.error}")
        self.task = task


class ShownTask(TaskResponse):
    """A task as the host had it when it was asked, to be shown by a notebook."""

    def _repr_html_(self) -> str:
        return _table([name, value] for name, value in self if value not in (None, [], {}))


class Listing(list[T]):
    """A list that a notebook shows as a table."""

    def _repr_html_(self) -> str:
        rows: list[Any] = self[:SHOWN_ROWS]
        if rows and isinstance(rows[0], TaskHandle):
            try:
                transport, where = rows[0].view.transport, path("tasks", "query")
                asked = {"ids": rows}
                rows = transport.ask("post", where, _read_tasks, json=asked, retries=0)
            except (OSError, LookupError, ValueError) as exc:
                return _table([["id"], *([handle] for handle in rows), [exc]])
        if not rows:
            return "<p>nothing</p>"
        columns = TASK_COLUMNS.split()
        if not isinstance(rows[0], TaskResponse):
            columns = list(type(rows[0]).model_fields)
        table = _table([columns, *([getattr(row, name) for name in columns] for row in rows)])
        more = len(self) - len(rows)
        return f"{table}<p>and {more} more</p>" if more else table


class TaskHandle(str):
    """The id of a task, by which it is watched, waited for, cancelled and tried again.

    What it tells it asks the host for, until the task has ended. A pickled one is the id
    alone.
    """

    view: "View"
    _ended: TaskResponse | None

    def __new__(cls, task_id: str, view: "View") -> Self:
        handle = super().__new__(cls, task_id)
        handle.view, handle._ended = view, None
        return handle

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)

    @property
    def status(self) -> TaskStatus:
        """What state the task is in."""
        return (self._ended or self.refresh()).status

    @property
    def progress(self) -> float | None:
        """How far it is, from 0 to 1, if its worker tells."""
        return (self._ended or self.refresh()).progress

    def refresh(self) -> TaskResponse:
        """Ask the host, and return all that it tells of the task."""
        return self._ask("get")

    def result(self, timeout: float | None = None) -> Any:
        """Wait until the task is completed, and return its result.

        ``timeout`` is in seconds; by default there is no limit.

        Raises
        ------
        TaskFailed, TimeoutError, KeyError
            When it ended as failed or cancelled, or not in time; when there is none.
        """
        if self._ended is None:
            for task in self.view.ends([self], timeout):
                self.keep(task)
        return completed(self._ended or self.refresh()).result

    def cancel(self) -> bool:
        """Cancel the task, and return whether it is: not if it had ended before.

        Raises
        ------
        PermissionError, KeyError
            When it is another user's; when there is no such task.
        """
        try:
            task = self._ask("patch", json={"status": TaskStatus.CANCELLED.value})
        except ValueError:
            task = self.refresh()
            if task.status not in TERMINAL:
                # it was refused for another reason than its end
                raise
        return task.status == TaskStatus.CANCELLED

    def retry(self) -> Self:
        """Set the task going again, which has ended; its result is gone then.

        Raises
        ------
        ValueError, PermissionError, KeyError
            When it has not ended; when it is another user's; when there is no such task.
        """
        self._ask("post", "retry")
        return self

    @overload
    def log(self, *, follow: Literal[False] = False) -> list[str]: ...
    @overload
    def log(self, *, follow: Literal[True]) -> Iterator[str]: ...
    def log(self, *, follow: bool = False) -> Iterable[str]:
        """Return the lines that the task has logged, in all attempts.

        With ``follow``, an iterator that waits for more of them until the task has ended. A
        KeyError when there is no such task.
        """
        lines = shown_lines(self.view.log(self, follow))
        return lines if follow else list(lines)

    def _ask(self, method: str, *action: str, **content: Any) -> TaskResponse:
        where = path("tasks", self, *action)
        return self.keep(self.view.transport.ask(method, where, _read_task, **content))

    def keep(self, task: TaskResponse) -> TaskResponse:
        """Remember how the task has ended, if it has."""
        self._ended = task if task.status in TERMINAL else None
        return task

    def _repr_html_(self) -> str:
        return Listing([self])._repr_html_()


def shown_lines(lines: Iterable[LogLine]) -> Iterator[str]:
    """Yield what is shown of a log; where another attempt begins, it says so."""
    attempt = 1
    for line in lines:
        if line.attempt != attempt:
            attempt = line.attempt
            yield f"--- attempt {attempt} ---"
        yield line.text


def completed(task: TaskResponse) -> TaskResponse:
    """Return a task that has ended; raise TaskFailed unless it is completed."""
    if task.status != TaskStatus.COMPLETED:
        raise TaskFailed(task)
    return task


def as_completed(
    handles: Iterable[TaskHandle], timeout: float | None = None, *, progress: bool = False
) -> Iterator[TaskHandle]:
    """Yield handles of one manager as their tasks end, well or not.

    Parameters
    ----------
    handles : iterable of TaskHandle
        What `JobManager.submit` and `JobManager.submit_many` returned.
    timeout : float, optional
        Seconds, for all of them together; by default there is no limit.
    progress : bool
        Whether a bar shows how far they are.

    Raises
    ------
    TimeoutError, KeyError
        When not all have ended in time; when there is no such task.
    """
    by_id = {str(handle): handle for handle in handles}
    for handle in list(by_id.values())[:1]:
        for task in handle.view.ends(list(by_id), timeout, live=True, bar=progress):
            by_id[str(task.id)].keep(task)
            yield by_id[str(task.id)]


def gather(
    handles: Iterable[TaskHandle], timeout: float | None = None, *, progress: bool = False
) -> list[Any]:
    """Return the results of tasks of one manager, in the order of their handles.

    Parameters are those of `as_completed`.

    Raises
    ------
    TaskFailed
        When all have ended, and one of them as failed or cancelled.
    TimeoutError, KeyError
        As for `as_completed`.
    """
    handles = list(handles)
    if not handles:
        return []
    ended = handles[0].view.wait_all(handles, timeout, progress)
    return [completed(task).result for task in ended]


@dataclass
class View:
    """What a host tells a user of tasks."""

    transport: Transport
    polling_interval: float

    def task(self, task_id: str | UUID) -> TaskHandle:
        """Return a handle of a task; the host is not asked for it."""
        try:
            return TaskHandle(str(UUID(str(task_id))), self)
        except ValueError:
            raise ValueError(f"{task_id!r} is not the id of a task") from None

    def log(self, task_id: str, follow: bool) -> Iterator[LogLine]:
        """Yield the lines of a task's log; with ``follow``, those to come until it has ended."""
        after = wait = 0
        while True:
            answer = self.transport.send(
                "get",
                path("tasks", task_id, "log"),
                read=TaskLogResponse.model_validate,
                params={"after": after},
                wait=wait,
                optional=True,
            )
            part: TaskLogResponse | None = self.transport.value(answer)
            if part is None:
                raise ValueError("this host is older than logs are, and keeps none")
            yield from part.lines
            after = part.next
            if part.ended or not (part.lines or follow):
                return
            if not part.lines and wait and not answer.waited:
                time.sleep(self.polling_interval)
            wait = self.transport.longest_wait if follow else 0

    def wait_all(
        self, ids: Iterable[str], timeout: float | None, progress: bool
    ) -> list[TaskResponse]:
        """Wait until all of these tasks have ended."""
        tasks = [self.task(task_id) for task_id in ids]
        ended = {str(t.id): t for t in self.ends(tasks, timeout, live=progress, bar=progress)}
        return [ended[task] for task in tasks]

    def ends(
        self, ids: Iterable[str], timeout: float | None, *, live: bool = False, bar: bool = False
    ) -> Iterator[TaskResponse]:
        """Yield tasks as they end.

        The host answers when all that it is asked for have ended; with ``live``, it is
        asked every second.
        """
        # duplicates apart, in their order
        left = list(dict.fromkeys(str(self.task(task_id)) for task_id in ids))
        total = len(left)
        most = LIVE_SECONDS if live else self.transport.longest_wait
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        with _progress_bar(total if bar else 0) as show:
            while left:
                try:
                    tasks, answer = self._ask_for(left, deadline, most)
                except Unreachable as exc:
                    if time.monotonic() < deadline:
                        raise
                    raise TimeoutError(str(exc)) from None
                ended = {str(task.id): task for task in tasks if task.status in TERMINAL}
                going = [task for task in tasks if task.status not in TERMINAL]
                left = [task_id for task_id in left if task_id not in ended]
                show(total - len(left), sum(task.progress or 0 for task in going))
                yield from ended.values()
                if going:
                    self._pause(going[0], answer, deadline)

    def _ask_for(
        self, ids: list[str], deadline: float, most: int
    ) -> tuple[list[TaskResponse], Answer]:
        """Return the first of these tasks, after a wait for all that are asked for."""
        page = self.transport.limits().max_page if len(ids) > 1 else 1
        left = max(0.0, deadline - time.monotonic())
        patience = min(left, self.transport.patience)
        options: dict[str, Any] = {"wait": int(min(left, most)), "patience": patience}
        if page == 1:
            answer = self.transport.send("get", path("tasks", ids[0]), read=_read_task, **options)
            return [self.transport.value(answer)], answer
        body = {"ids": ids[:page]}
        answer = self.transport.send(
            "post", path("tasks", "query"), read=_read_tasks, json=body, **options
        )
        tasks: list[TaskResponse] = self.transport.value(answer)
        if len(tasks) < len(body["ids"]):
            missing = set(body["ids"]) - {str(task.id) for task in tasks}
            raise KeyError(f"there is no task {missing.pop()}")
        # what is too large for one answer to many has to be asked for by itself
        whole = [
            self.task(task.id).refresh() if task.abridged and task.status in TERMINAL else task
            for task in tasks
        ]
        return whole, answer

    def _pause(self, task: TaskResponse, answer: Answer, deadline: float) -> None:
        """Wait until it is worth to ask again for a task that goes on."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"task {task.id} is still {task.status.value}")
        if not answer.waited:
            # less than a second is left, or the host does not wait
            time.sleep(min(left, self.polling_interval))


def _read_task(body: Any) -> TaskResponse:
    return ShownTask.model_validate(body)


def _read_tasks(body: Any) -> list[TaskResponse]:
    return [_read_task(task) for task in body["tasks"]]


def _table(rows: Iterable[Iterable[Any]]) -> str:
    lines = ("".join(f"<td>{escape(shortened(str(cell)))}</td>" for cell in row) for row in rows)
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>"


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int, float], None]]:
    """Yield what shows how many have ended, and the fractions of others; tqdm, if there is."""
    bar: Any = None
    with suppress(Exception):
        # one that is missing or closed would raise while tqdm holds its lock, for ever
        sys.stderr.write("")
        bar = import_module("tqdm.auto").tqdm(total=total, unit="task") if total else None

    def show(ended: int, fractions: float) -> None:
        with suppress(Exception):
            if bar is not None:
                bar.update(round(ended + fractions, 2) - bar.n)
            elif total:
                drawn = "#" * int(BAR_WIDTH * (ended + fractions) / total)
                end = "\n" if ended == total else ""
                sys.stderr.write(f"\r[{drawn:<{BAR_WIDTH}}] {ended} of {total} tasks{end}")
                sys.stderr.flush()

    try:
        yield show
    finally:
        with suppress(Exception):
            if bar is not None:
                bar.close()
