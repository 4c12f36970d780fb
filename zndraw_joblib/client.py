"""A worker: what a program registers with a host, and the threads that serve it.

Three kinds of threads work side by side. The *claim* thread asks for as many tasks as
there are free hands, and hands them over; each *task* thread starts, executes and
reports one task at a time (its end through the *report* thread, which tells at once of
all that ended meanwhile); the *heartbeat* thread tells the host that the worker lives
and how far its tasks are, and learns from the answer which of them to stop.

`JobManager` holds these threads and ends them. What they do one step at a time is in
its bases: `Submitter` submits and waits, `Registrant` offers jobs and providers,
`Claimant` claims and reports.
"""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

from zndraw_joblib import telemetry
from zndraw_joblib.client_claiming import Claimant
from zndraw_joblib.client_registering import Source
from zndraw_joblib.client_sockets import OwnSocket, Socket
from zndraw_joblib.client_tasks import (
    ClaimedTask,
    Report,
    TaskCancelled,
    TaskFailed,
    as_json,
)
from zndraw_joblib.client_threads import DaemonPool, Gatherer, Ticker
from zndraw_joblib.client_transport import (
    Api,
    HostApi,
    Unreachable,
    path,
)
from zndraw_joblib.events import ProviderRequest, TaskAvailable, TaskStatusEvent
from zndraw_joblib.exceptions import (
    PROBLEM_JSON,
    ProviderExecutionFailed,
    describe,
    storable,
)
from zndraw_joblib.extension import Category, Extension
from zndraw_joblib.lifecycle import TaskStatus, WorkerState
from zndraw_joblib.provider import read_content
from zndraw_joblib.schemas import MAX_CLAIM, TaskResponse

__all__ = [
    "Category",
    "ClaimedTask",
    "Extension",
    "JobManager",
    "TaskCancelled",
    "TaskFailed",
]

log = logging.getLogger(__name__)

# With tasks at hand: how long a cancel takes to arrive where no websocket brings it.
BUSY_BEAT_SECONDS = 0.5
PROVIDER_THREADS = 4
# How long a claim may still be answered when the worker leaves. What it brings later
# can't be handed back: it ends with the worker.
LAST_CLAIM_SECONDS = 1.0
LAST_THREAD_SECONDS = 2.0
LAST_REQUEST_SECONDS = 5.0
LAST_RETRIES = 3
AT_ONCE_SECONDS = 1.0


class JobManager(Claimant):
    """A worker of a host.

    A mapping of the full names of its jobs to their classes, and a context manager
    that ends with `disconnect`.

    Parameters
    ----------
    api : Api
        The host, and who asks; see also `connect`.
    tsio : socketio.Client or a wrapper of one, optional
        Brings wake-ups and cancels at once, and the requests to providers.
    execute : callable, optional
        Given each claimed task, in a thread. What it returns becomes the task's
        ``result``, what it raises its ``error``. Without it, tasks are for the program
        to claim; see `listen`.
    heartbeat_interval : float
        Seconds between two signs of life while there is nothing to do.
    polling_interval : float
        Seconds between two claims, where the host does not wait with its answers.
    max_unreachable_seconds : float
        How long the host may be away until the worker gives up.
    max_startup_retries : int
        How often a request is repeated as long as the host never answered.
    concurrency : int
        How many tasks are executed side by side, in threads.
    grace_seconds : float
        How long running tasks may go on when the worker is to leave.

    Examples
    --------
    >>> def execute(task):
    ...     return task.extension.run(None, **task.run_kwargs)
    >>> with JobManager.connect(url, token=token, execute=execute) as manager:
    ...     manager.register(Rotate)
    ...     manager.wait()
    """

    def __init__(
        self,
        api: Api,
        tsio: Any = None,
        *,
        execute: Callable[[ClaimedTask[Any]], Any] | None = None,
        heartbeat_interval: float = 30.0,
        polling_interval: float = 2.0,
        max_unreachable_seconds: float = 120.0,
        max_startup_retries: int = 5,
        concurrency: int = 1,
        grace_seconds: float = 30.0,
    ) -> None:
        super().__init__(
            api,
            polling_interval=polling_interval,
            max_unreachable_seconds=max_unreachable_seconds,
            max_startup_retries=max_startup_retries,
        )
        self.tsio = tsio
        self.heartbeat_interval = heartbeat_interval
        self.concurrency = concurrency
        self.grace_seconds = grace_seconds
        self._execute = execute
        self._own_api: HostApi | None = None
        self._own_socket: OwnSocket | None = None

        self._slots = threading.Semaphore(concurrency)
        #: claimed tasks whose end was not told yet, begun or not
        self._in_hand: set[str] = set()
        self._heart: Ticker | None = None
        self._claimer: threading.Thread | None = None
        self._runners: DaemonPool | None = None
        self._reporter: Gatherer[tuple[ClaimedTask[Any], Report]] | None = None
        self._readers: DaemonPool | None = None

        self._pid = os.getpid()
        self._leaving = threading.Lock()
        self._done = threading.Event()
        self._failure: Exception | None = None
        self._signals = 0
        self._listen_to(Socket(tsio))

    @classmethod
    def connect(
        cls,
        url: str,
        *,
        token: str | None = None,
        user: str | None = None,
        password: str | None = None,
        **options: Any,
    ) -> Self:
        """Return a manager for the host at ``url``.

        It has a Socket.IO connection of its own, opened at the first registration, if
        python-socketio's ``client`` extra is installed.

        Parameters
        ----------
        url : str
            Where the host is.
        token : str, optional
            A bearer token.
        user, password : str, optional
            Used to log in, and to log in again when the token has expired.
        **options
            As for `JobManager`.

        Raises
        ------
        ValueError
            When neither a token nor a user with a password is given.
        """
        api = HostApi(url, token=token, user=user, password=password)
        manager = cls(api, **options)
        manager._own_api = api
        manager._own_socket = OwnSocket(api)
        manager.tsio = manager._own_socket.tsio
        manager._listen_to(manager._own_socket)
        return manager

    # --- threads ---

    def _serve_jobs(self) -> None:
        if self._execute is None or self._claimer is not None:
            return
        self._start_heart()
        self._runners = DaemonPool(self.concurrency, "zndraw-task")
        self._reporter = Gatherer(
            self._tell_ends, lambda: len(self._in_hand), "zndraw-report"
        )
        self._claimer = threading.Thread(
            target=self._claim_tasks, name="zndraw-claim", daemon=True
        )
        self._claimer.start()

    def _serve_providers(self) -> None:
        if self._readers is not None:
            return
        if self.tsio is None:
            log.warning("without Socket.IO no request reaches a provider")
        self._start_heart()
        self._readers = DaemonPool(PROVIDER_THREADS, "zndraw-provider")

    def _start_heart(self) -> None:
        if self._heart is not None:
            return
        self._heart = Ticker(self._beat, "zndraw-heartbeat")
        self._heart.start(self.heartbeat_interval)
        if self._own_socket is not None:
            self._own_socket.open()

    def _beat(self) -> float:
        try:
            self._send_beat(stop=self._hopeless)
        except Exception as exc:
            if self._hopeless.is_set():
                # the worker may have been deleted under this heartbeat
                return self.heartbeat_interval
            if not isinstance(exc, Unreachable | PermissionError):
                raise
            self._give_up(exc)
        # of a host that doesn't count attempts a heartbeat learns nothing of tasks
        busy = bool(self._held) and self._host_counts_attempts
        return BUSY_BEAT_SECONDS if busy else self.heartbeat_interval

    def _accept(self, claimed: TaskResponse) -> ClaimedTask[Any] | None:
        task = super()._accept(claimed)
        if task is not None and self._heart is not None and self._host_counts_attempts:
            self._heart.hasten(BUSY_BEAT_SECONDS)
        return task

    def _claim_tasks(self) -> None:
        """Claim for every free hand, until the worker leaves."""
        assert self._runners is not None
        while True:
            free = self._wait_for_slots()
            tasks: list[TaskResponse] = []
            waited = False
            # before the look at what ends the loop: who sets that, wakes it afterwards
            self._wake.clear()
            if self._stopping.is_set():
                return
            try:
                if not self._draining:
                    wait = self._transport.longest_wait
                    tasks, waited = self._claim(
                        free, wait, start=self._starts, stop=self._stopping
                    )
            except Exception as exc:
                if self._stopping.is_set():
                    if isinstance(exc, Unreachable):
                        self._hand_back_unheard(free)
                    return
                if isinstance(exc, Unreachable | PermissionError):
                    self._give_up(exc)
                    return
                log.exception("could not claim")
            # before one of them ends, which may be at once: it is told with the others
            self._in_hand.update(str(task.id) for task in tasks)
            for task in tasks:
                self._runners.submit(partial(self._run, task))
            for _ in range(free - len(tasks)):
                self._slots.release()
            if not tasks and not waited:
                self._wake.wait(self.polling_interval)

    @property
    def _starts(self) -> bool:
        """Whether tasks run from their claim on.

        A worker of one hand asks once more before it begins: a cancel may have come.
        """
        return self.concurrency > 1

    def _wait_for_slots(self) -> int:
        self._slots.acquire()
        free = 1
        while free < MAX_CLAIM and self._slots.acquire(blocking=False):
            free += 1
        return free

    def _run(self, claimed: TaskResponse) -> None:
        assert self._reporter is not None
        task = end = None
        try:
            if self._stopping.is_set():
                self._hand_back(claimed)
            elif (task := self._accept(claimed)) is not None:
                end = self._perform(task, claimed.status)
        finally:
            if task is not None and end is not None:
                # the hand is free when the host knows
                self._reporter.put((task, end))
            else:
                if task is not None:
                    self._held.discard(task)
                self._in_hand.discard(str(claimed.id))
                self._slots.release()

    def _tell_ends(self, ends: list[tuple[ClaimedTask[Any], Report]]) -> None:
        try:
            self._tell_all([report for _, report in ends])
        finally:
            for task, _ in ends:
                self._held.discard(task)
                self._in_hand.discard(task.task_id)
            # all at once: so the next claim asks for as many
            self._slots.release(len(ends))

    def _hand_back(self, claimed: TaskResponse) -> None:
        if "attempt" in claimed.model_fields_set:
            self._tell(
                Report(str(claimed.id), TaskStatus.PENDING, claimed.attempt),
                retries=LAST_RETRIES,
            )

    def _hand_back_unheard(self, limit: int) -> None:
        """Hand back what the last claim brought, if its answer got lost."""
        try:
            tasks, _ = self._claim(
                limit, wait=0, start=self._starts, stop=self._stopping
            )
        except Exception as exc:
            log.debug("the last claim stays without an answer: %s", exc)
            return
        for task in tasks:
            self._hand_back(task)

    def _perform(self, task: ClaimedTask[Any], status: TaskStatus) -> Report | None:
        """Start a task, execute it, and return what is to be told of its end."""
        assert self._execute is not None
        report = partial(Report, task.task_id, attempt=task.attempt)
        # a claim may have started it
        if status is not TaskStatus.RUNNING and not self._tell(
            report(status=TaskStatus.RUNNING)
        ):
            self._note("lost", task)
            return None
        self._note("started", task)
        trace = (task.job_name, task.task_id, task.attempt, task.traceparent)
        try:
            with telemetry.processing(*trace):
                result = as_json(self._execute(task))
        except TaskCancelled:
            # who cancelled it knows; a task that ends itself this way has to say so
            self._note("cancelled", task)
            return None if task.cancelled else report(status=TaskStatus.CANCELLED)
        except BaseException as exc:
            # SystemExit and the like end the task, not the thread
            log.exception("task %s of %s failed", task.task_id, task.job_name)
            self._note("failed", task)
            return report(status=TaskStatus.FAILED, error=describe(exc))
        self._note("completed", task)
        return report(status=TaskStatus.COMPLETED, result=result)

    # --- Socket.IO ---

    def _listen_to(self, socket: Socket) -> None:
        self._socket = socket
        socket.on("connect", self._on_connect)
        for event, handler in (
            (TaskAvailable, self._on_task_available),
            (TaskStatusEvent, self._on_task_status),
            (ProviderRequest, self._on_provider_request),
        ):
            socket.on(event.event_name, handler)

    def _on_connect(self) -> None:
        if self._worker_id is not None:
            self._join_rooms()

    def _on_task_available(self, data: dict[str, Any]) -> None:
        if data.get("job_name") in self._jobs:
            self._wake.set()

    def _on_task_status(self, data: dict[str, Any]) -> None:
        if data.get("status") == TaskStatus.CANCELLED:
            self._held.cancel(data["id"], data.get("attempt"))

    def _on_provider_request(self, data: dict[str, Any]) -> None:
        source = self._sources.get(data["provider_name"])
        if source is not None and self._readers is not None:
            self._readers.submit(partial(self._read, source.name, data))

    def _read(self, name: object, request: dict[str, Any]) -> None:
        """Read from a provider for somebody, and send what was read, or why not."""
        source = self._sources.get(str(name))
        if source is None or self._stopping.is_set():
            return
        send = partial(self._send_result, source, request["request_id"])
        try:
            params = json.loads(request["params"])
            content = read_content(source.cls, source.handler, params)
        except BaseException as exc:
            # SystemExit and the like end this request, not the thread
            log.exception("provider %s could not be read", name)
            error = describe(exc)
        else:
            refused = send(content, {"Content-Type": source.cls.content_type})
            if not refused:
                return
            error = f"the host refused the result: {refused}"
        problem = ProviderExecutionFailed.create(detail=storable(error))
        send(
            problem.model_dump_json(exclude_none=True).encode(),
            {"Content-Type": PROBLEM_JSON, "X-Result-Status": "error"},
        )

    def _send_result(
        self, source: Source, digest: str, content: bytes, headers: dict[str, str]
    ) -> str:
        """Answer a reader; return why the host doesn't want the answer, if it doesn't."""
        try:
            response = self._transport.send(
                "post",
                path("providers", source.id, "results"),
                content=content,
                headers={"X-Request-Hash": digest, **headers},
                retries=LAST_RETRIES,
                stop=self._stopping,
            )
        except Unreachable as exc:
            # the reader is told of a timeout
            log.warning("could not answer a reader of %s: %s", source.name, exc)
            return ""
        return "" if response.status_code < 400 else str(response.text[:1000])

    # --- the end ---

    def wait(self) -> None:
        """Block until `disconnect`, or in the main thread until SIGINT or SIGTERM.

        The first signal lets running tasks finish, for at most ``grace_seconds``; a
        second one doesn't.

        Raises
        ------
        ConnectionError
            When the host was away for longer than ``max_unreachable_seconds``.
        PermissionError
            When the host refuses who asks.
        """
        if threading.current_thread() is threading.main_thread():
            with self._signals_handled():
                self._wait_until_done()
        else:
            self._wait_until_done()
        if self._failure is not None:
            raise self._failure

    def disconnect(self) -> None:
        """End the worker: let tasks finish, delete it, and end its threads.

        Running tasks get ``grace_seconds``, claimed ones are handed back. Any thread
        may call it, any number of times; it returns when all is done.
        """
        if os.getpid() != self._pid:
            # a fork of this process, made by a task: the worker is not its own to end
            return
        if threading.current_thread() in self._own_threads():
            # a task or provider wants it: it has to go on before this can be done
            self._in_thread(self.disconnect)
            return
        with self._leaving:
            first = not self._stopping.is_set()
            self._stopping.set()
        if not first:
            self._wait_until_done()
            return
        try:
            self._leave()
        except BaseException:
            self._leave_at_once()
            raise
        finally:
            self._done.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.disconnect()

    def _leave(self) -> None:
        deadline = time.monotonic() + (0 if self._failure else self.grace_seconds)
        self._wake.set()
        self._slots.release()
        if self._claimer is not None and self._failure is None:
            self._finish_tasks(deadline)
        self._hopeless.set()
        self._lose_tasks()
        # the lock: a registration under way is to be over
        with self._lock:
            for part in self._parts():
                part.close()
            self._leave_rooms()
            if self._worker_id is not None:
                retries = 0 if self._failure else LAST_RETRIES
                self._delete_worker(
                    self._worker_id, retries=retries, timeout=LAST_REQUEST_SECONDS
                )
            self._worker_id = None
            self._jobs.clear()
            self._sources.clear()
        deadline = time.monotonic() + LAST_THREAD_SECONDS
        for thread in self._own_threads():
            thread.join(max(0.0, deadline - time.monotonic()))
        if self._own_socket is not None:
            self._own_socket.close()
        if self._own_api is not None:
            self._own_api.close()

    def _finish_tasks(self, deadline: float) -> None:
        """Take no more tasks, and let those at hand end."""
        assert self._claimer is not None
        assert self._runners is not None
        assert self._reporter is not None
        if self._worker_id is not None:
            try:
                # a claim that waits at the host gets nothing after this
                self._transport.exchange(
                    "patch",
                    path("workers", self._worker_id),
                    json={"state": WorkerState.DRAINING.value},
                    timeout=LAST_REQUEST_SECONDS,
                )
            except Exception as exc:
                log.warning("could not announce the end: %s", exc)
        left = deadline - time.monotonic()
        self._claimer.join(max(0.0, min(left, LAST_CLAIM_SECONDS)))
        self._runners.close()
        if not self._runners.join(deadline):
            log.warning("tasks still run after %s s of grace", self.grace_seconds)
        self._reporter.close()
        self._reporter.join(deadline)

    def _leave_at_once(self) -> None:
        self._hopeless.set()
        self._lose_tasks()
        worker_id = self._worker_id
        if worker_id is not None:
            self._delete_worker(worker_id, timeout=AT_ONCE_SECONDS)
        self._done.set()

    def _give_up(self, exc: Exception) -> None:
        with self._leaving:
            if self._stopping.is_set():
                return
            self._failure = exc
        log.error("giving up: %s", exc)
        self._in_thread(self.disconnect)

    def _own_threads(self) -> list[threading.Thread]:
        threads = [] if self._claimer is None else [self._claimer]
        for part in self._parts():
            threads += part.threads
        return threads

    def _parts(self) -> list[Any]:
        parts = (self._heart, self._runners, self._reporter, self._readers)
        return [part for part in parts if part is not None]

    def _wait_until_done(self) -> None:
        # in turns: on Windows Ctrl-C does not interrupt a wait
        while not self._done.wait(1.0):
            pass

    @contextmanager
    def _signals_handled(self) -> Iterator[None]:
        earlier = {
            signum: signal.signal(signum, self._on_signal)
            for signum in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for signum, handler in earlier.items():
                signal.signal(signum, handler or signal.SIG_DFL)

    def _on_signal(self, signum: int, frame: object) -> None:
        if os.getpid() != self._pid:
            # a fork of this process, made by a task, has inherited the handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        # in a thread: the main one may hold the very lock that is needed
        self._signals += 1
        self._in_thread(self.disconnect if self._signals == 1 else self._leave_at_once)

    def _in_thread(self, call: Callable[[], None]) -> None:
        threading.Thread(target=call, name="zndraw-end", daemon=True).start()
