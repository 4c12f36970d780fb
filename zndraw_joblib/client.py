"""A worker: what a program registers with a host, submits to it and waits for.

`JobManager` is the face of what the modules beside it do.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from typing import Any, Self, TypeVar, Unpack, overload
from uuid import UUID

from zndraw_joblib.client_api import Api, HostApi
from zndraw_joblib.client_claims import Claims, HeldTasks
from zndraw_joblib.client_handles import Listing, TaskFailed, TaskHandle, View, as_completed, gather
from zndraw_joblib.client_hands import Allocation, Hands, Readers, executor_of
from zndraw_joblib.client_heartbeat import Heartbeat, Shutdown
from zndraw_joblib.client_transport import Socket, Transport
from zndraw_joblib.client_user import Rooms, Submissions, Submitting
from zndraw_joblib.client_worker import Life, Offered, Registering, Registrations
from zndraw_joblib.events import ProviderRequest, TaskStatusEvent
from zndraw_joblib.execution import Execute, Options, Threads, run_extension
from zndraw_joblib.extension import Category, ClaimedTask, Extension, TaskCancelled
from zndraw_joblib.lifecycle import GLOBAL_ROOM, TaskStatus
from zndraw_joblib.provider import Provider
from zndraw_joblib.schemas import JobSummary, TaskResponse, WorkerSummary

__all__ = [
    "Category", "ClaimedTask", "Extension", "JobManager", "TaskCancelled", "TaskFailed",
    "TaskHandle", "as_completed", "gather",
]  # fmt: skip

E = TypeVar("E", bound=type[Extension])


class JobManager:
    """A worker of a host.

    A mapping of the full names of its jobs to their classes, and a context manager that
    ends with `disconnect`. Methods that ask the host raise `ConnectionError` when it can't
    be reached, and `PermissionError` when it doesn't let this user.

    Parameters
    ----------
    api : Api
        The host, and who asks; see also `connect`.
    tsio : socketio.Client or a wrapper of one, optional
        Brings wake-ups and cancels at once, and the requests to providers.
    execute : callable, optional
        Given each claimed task, in a thread. What it returns becomes the task's
        ``result``, what it raises its ``error``. Without it the program claims by
        itself (see `listen`), or calls `wait`, which runs each task's extension.
    heartbeat_interval : float
        At most so many seconds between two heartbeats; a third of the host's time-out, if less.
    polling_interval : float
        Seconds between two claims, where the host does not wait with its answers.
    max_unreachable_seconds : float
        How long the host may be away until the worker gives up.
    max_startup_retries : int
        How often a request is repeated as long as the host never answered.
    concurrency : int
        How many tasks are executed side by side.
    grace_seconds : float
        How long running tasks may go on when the worker is to leave.
    isolate : bool
        Execute tasks in child processes, which last, each beside the others: a crash ends
        its task alone. Without ``execute``, each task's extension is run.
    setup : callable, optional
        Called once in each child; a dict that it returns is added to ``run_kwargs``.
    kill_after : float
        Seconds until a task that is to stop, and doesn't, is ended with its child.
    until : datetime or float, optional
        When the worker leaves by itself, or in how many seconds. What runs then goes on at
        another worker; a job whose ``expected_seconds`` don't fit any more is not begun.
    idle_seconds : float, optional
        After so long without a task the worker leaves.

    Examples
    --------
    >>> with JobManager.connect(url, token=token) as manager:
    ...     manager.register(Rotate)
    ...     manager.wait()
    """

    def __init__(
        self,
        api: Api,
        tsio: Any = None,
        *,
        execute: Execute | None = None,
        heartbeat_interval: float = 30.0,
        polling_interval: float = 2.0,
        max_unreachable_seconds: float = 120.0,
        max_startup_retries: int = 5,
        concurrency: int = 1,
        grace_seconds: float = 30.0,
        isolate: bool = False,
        setup: Callable[[], Any] | None = None,
        kill_after: float = 10.0,
        until: datetime | float | None = None,
        idle_seconds: float | None = None,
    ) -> None:
        self.api = api
        self.polling_interval = polling_interval
        self.concurrency = concurrency
        self._life = life = Life(
            lambda e: self._shutdown.give_up(e), lambda w: self._shutdown.leave(w)
        )
        self._held = HeldTasks()
        self._transport = Transport(api, max_unreachable_seconds, max_startup_retries)
        self._rooms = Rooms(self._transport)
        self._view = View(self._transport, polling_interval)
        self._submissions = Submissions(self._rooms, self._view)
        self._socket = tsio if isinstance(tsio, Socket) else Socket(tsio)
        self._registrations = Registrations(self._transport, self._socket, life, self._held.end_all)
        self._claims = Claims(self._transport, self._registrations, life, self._held)
        self._heartbeat = Heartbeat(self._claims, heartbeat_interval)
        self._readers = Readers(self._transport, self._registrations, life)
        self._shutdown = Shutdown(self._heartbeat, grace_seconds)
        self._executor = executor_of(life, execute, isolate, setup, kill_after)
        self._allocation = Allocation(until, idle_seconds, self._executor)
        self._socket.on(TaskStatusEvent.event_name, self._held.on_status)
        self._socket.on(ProviderRequest.event_name, self._readers.request)

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        token: str | None = None,
        user: str | None = None,
        password: str | None = None,
        **options: Unpack[Options],
    ) -> Self:
        """Return a manager for the host at ``url``, with a Socket.IO connection of its own.

        That is opened at the first registration, if python-socketio's ``client`` extra is
        installed. Options are those of `JobManager`.

        Parameters
        ----------
        url : str
            Where the host is, with the path that it is served below, if any.
        token : str, optional
            A bearer token; else ``user`` and ``password`` log in, whenever it is needed.

        Raises
        ------
        ValueError
            When the address can't be one, or there is neither a token nor a user; when
            proxy or certificates that the environment names can't be used.
        """
        api = HostApi(url, token=token, user=user, password=password)
        return cls(api, Socket(api=api), **options)

    # --- what is offered ---

    @property
    def tsio(self) -> Any:
        """The Socket.IO client, if there is one; of its own, from the first job on."""
        return self._socket.tsio

    @property
    def worker_id(self) -> UUID | None:
        """The worker's id; None before the first registration and after the end."""
        return self._registrations.worker_id

    @property
    def handlers(self) -> dict[str, Any]:
        """What was given with each provider, by the provider's full name."""
        return {n: p.given for n, p in dict(self._registrations.providers).items()}

    def __contains__(self, name: object) -> bool:
        return name in self._registrations.jobs

    def __getitem__(self, name: str) -> type[Extension]:
        return self._registrations.jobs[name].cls

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._registrations.jobs))

    def __len__(self) -> int:
        return len(self._registrations.jobs)

    def get_run_kwargs(self, name: str) -> dict[str, Any]:
        """Return what was given with a job, by its full name; KeyError if there is none."""
        return dict(self._registrations.jobs[name].given)

    def create_worker(self) -> UUID:
        """Make the worker, if there is none yet, and return its id.

        A RuntimeError after `disconnect`, and in a fork of the manager's process.
        """
        return self._registrations.create_worker()

    @overload
    def register(self, extension_class: E, **how: Unpack[Registering]) -> E: ...
    @overload
    def register(self, **how: Unpack[Registering]) -> Callable[[E], E]: ...
    def register(self, extension_class: Any = None, **how: Unpack[Registering]) -> Any:
        """Offer a job; also as a decorator, with or without arguments.

        With ``execute``, the first registration starts the threads that serve it.

        Parameters
        ----------
        extension_class : type of Extension
            The job. The same class, defined anew, takes the place of the earlier one.
        room : str
            Who sees it; ``@global``, for which the host wants a superuser, is everyone.
        run_kwargs : dict, optional
            Found again as ``run_kwargs`` of each of its tasks.
        policy : JobPolicy, optional
            How often and how long its tasks are tried.
        replace : bool, optional
            Take the place of a job with other fields, if your workers alone serve it, which
            stop; by default in notebooks, where classes are defined again.

        Raises
        ------
        ValueError
            When the host refuses category or name, when it or this worker knows another
            job of this name, or when the schema is no JSON.
        TypeError, RuntimeError
            When the class has no category; as for `create_worker`.
        """
        if extension_class is None:
            return partial(self.register, **how)
        job = Offered.job(extension_class, how)
        if self._executor is not None:
            self._executor.check(job)
        self._registrations.add(job)
        self._serve()
        return extension_class

    def register_provider(
        self, cls: type[Provider], *, name: str, handler: Any, room: str = GLOBAL_ROOM
    ) -> UUID:
        """Offer data that is read on demand, and return the provider's id.

        Its fields are the parameters of a request, which comes over Socket.IO, and ``handler``
        is given to ``cls.read`` with each. Room and errors are as for `register`.
        """
        provider = Offered.provider(cls, name, handler, room)
        self.create_worker()
        with self._registrations.lock:
            self._readers.start()
            self._heartbeat.start()
            self._socket.open()
            return self._registrations.add(provider)

    def unregister_provider(self, full_name: str) -> None:
        """Take back a provider; KeyError when no such provider is registered here."""
        self._registrations.remove_provider(full_name)

    # --- tasks to run, one by one ---

    def claim(self) -> ClaimedTask[Any] | None:
        """Return a task to run, or None when there is none; errors as for `create_worker`.

        One that doesn't fit its job, or whose job is not registered here, is failed.
        """
        return self._claims.claim_one(wait=0)[0]

    def listen(
        self, polling_interval: float = 2.0, stop_event: threading.Event | None = None
    ) -> Iterator[ClaimedTask[Any]]:
        """Yield tasks to run, as they come, until `disconnect`.

        ``stop_event`` ends it too; it is looked at every ``polling_interval`` seconds.
        """
        return self._claims.listen(polling_interval, stop_event or threading.Event())

    def start(self, task: ClaimedTask[Any]) -> None:
        """Report that a task runs; ValueError when it is not this worker's any more."""
        self._claims.report_or_raise(task, TaskStatus.RUNNING)

    def complete(self, task: ClaimedTask[Any], result: Any = None) -> None:
        """Report that a task succeeded; Pydantic models and NumPy's arrays become JSON.

        A ValueError when it is not this worker's any more, or the result can't be kept.
        """
        self._heartbeat.report_end(task, TaskStatus.COMPLETED, result=result)

    def fail(self, task: ClaimedTask[Any], error: str, *, retryable: bool = True) -> None:
        """Report that a task failed, and whether another attempt may go better.

        A ValueError when it is not this worker's any more.
        """
        self._heartbeat.report_end(task, TaskStatus.FAILED, error=error, retryable=retryable)

    def fail_by_id(self, task_id: str, error: str) -> None:
        """Report that a task failed, whatever its attempt.

        A KeyError when there is no such task, a ValueError when it has ended.
        """
        self._claims.fail_by_id(task_id, error)

    def cancel(self, task: ClaimedTask[Any]) -> None:
        """Report that nobody is to run a task; ValueError when it has ended."""
        self._claims.report_or_raise(task, TaskStatus.CANCELLED)

    def heartbeat(self) -> None:
        """Tell the host that the worker lives, and how far its tasks are.

        Tasks that the host wants stopped are `ClaimedTask.cancelled` afterwards.
        """
        if self._heartbeat.send(retries=0):
            self._registrations.put_again()

    # --- tasks for others to run ---

    def submit(
        self,
        extension: Extension | str,
        parameters: dict[str, Any] | str | None = None,
        room: str | None = None,
        **how: Unpack[Submitting],
    ) -> TaskHandle:
        """Submit a task, and return its id, which is a handle of it as well.

        ``submit(Rotate(angle=90), room)``, or by the full name of the job, without its class:
        ``submit("lab:modifiers:Rotate", {"angle": 90}, room)``.

        Parameters
        ----------
        job_room : str, optional
            Where an extension's job is registered; by default it is looked for in the room,
            and then among the jobs for all rooms.
        priority : int
            Tasks of a higher one are claimed first.
        delay_seconds : float
            How long no worker gets it.
        idempotency_key : str, optional
            A second submission under the same key makes no second task.

        Raises
        ------
        KeyError, ValueError, TypeError
            When the room sees no such job; when the host refuses the parameters, or the
            worker would read others; when there is no object, or no room.
        """
        return self._submissions.submit(extension, parameters, room, how)

    def submit_many(
        self, extensions: Iterable[Extension], room: str, **how: Unpack[Submitting]
    ) -> Listing[TaskHandle]:
        """Submit any number of tasks, and return their ids in the order of the extensions.

        Up to a thousand of one class go into one request. Arguments and errors are those of
        `submit`: those in one request are all refused, and earlier requests stand.
        """
        return self._submissions.submit_many(extensions, room, how)

    def wait_for(self, task_id: str, timeout: float | None = None) -> TaskResponse:
        """Wait until a task is completed, and return it: its ``result`` among the rest.

        Timeout and errors are those of `TaskHandle.result`.
        """
        (task,) = self.wait_all([task_id], timeout)
        if task.status != TaskStatus.COMPLETED:
            raise TaskFailed(task)
        return task

    def wait_all(
        self, task_ids: Iterable[str], timeout: float | None = None, *, progress: bool = False
    ) -> list[TaskResponse]:
        """Wait until all of these tasks have ended, well or not; return them in this order.

        ``timeout`` is in seconds, for all of them together. With ``progress``, a bar shows
        how far they are. A TimeoutError or KeyError as for `wait_for`.
        """
        return self._view.wait_all(task_ids, timeout, progress)

    def task(self, task_id: str | UUID) -> TaskHandle:
        """Return a handle of a task by its id; the host is not asked for it."""
        return self._view.task(task_id)

    def tasks(
        self, room: str, *, status: str | None = None, job: str | None = None, limit: int = 50
    ) -> Listing[TaskResponse]:
        """Return the latest tasks of a room, of one ``status`` or job, by its full name."""
        return self._rooms.tasks(room, status, job, limit)

    def jobs(self, room: str) -> Listing[JobSummary]:
        """Return the jobs that a room sees."""
        return self._rooms.all_of(JobSummary, room, "jobs")

    def workers(self, room: str) -> Listing[WorkerSummary]:
        """Return the workers of the jobs that a room sees."""
        return self._rooms.all_of(WorkerSummary, room, "workers")

    def read(self, provider: str, /, **params: Any) -> Any:
        """Return the data of a provider, by its full name: JSON unpacked, all else as bytes.

        A KeyError when there is no such provider, a ValueError when it fails, and a
        ProviderTimeoutError when it does not answer.
        """
        return self._rooms.read(provider, params)

    # --- threads, Socket.IO, and the end ---

    def _serve(self) -> None:
        with self._registrations.lock:
            if self._executor is None or self._shutdown.work or self._life.stopping.is_set():
                return
            self._heartbeat.start()
            self._socket.open()
            hands = self.concurrency, self.polling_interval, self._allocation
            self._shutdown.work = Hands(self._heartbeat, self._executor, *hands)

    def wait(self) -> bool:
        """Serve until `disconnect`, or in the main thread until SIGINT or SIGTERM.

        The first signal lets running tasks finish, for at most ``grace_seconds``; a
        second one doesn't. Return whether all of them had ended.

        Raises
        ------
        ConnectionError, PermissionError, RuntimeError
            When the host was away for ``max_unreachable_seconds``, when it refuses who asks;
            when a child process for tasks could not begin, nothing was registered, or all of
            it was replaced elsewhere.
        """
        if self.worker_id is None and not self._life.stopping.is_set():
            raise RuntimeError("nothing is offered: register a job or a provider before wait()")
        if len(self):
            self._executor = self._executor or Threads(run_extension)
            self._serve()
        return self._shutdown.wait()

    def disconnect(self) -> None:
        """End the worker: let tasks finish, delete it, and end its threads.

        Running tasks get ``grace_seconds``, claimed ones are handed back. Any thread
        may call it, any number of times; it returns when all is done.
        """
        self._shutdown.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.disconnect()
