"""How its host knows that a worker lives: its heartbeat, and its end."""

import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from uuid import UUID

from zndraw_joblib.client_api import Answer, SlowDown, Unreachable
from zndraw_joblib.client_claims import LAST_RETRIES, Claims
from zndraw_joblib.client_transport import path
from zndraw_joblib.execution import Executor, Report, report_of
from zndraw_joblib.extension import ClaimedTask
from zndraw_joblib.lifecycle import TaskStatus, WorkerState
from zndraw_joblib.telemetry import SafeLogger

PAUSE_AFTER_ERROR_SECONDS = 5.0
# with tasks at hand: how long a cancel takes to arrive where no websocket brings it
BUSY_BEAT_SECONDS = 0.5
# between two, whatever a host takes for silence
SHORTEST_SECONDS = 0.1
# together three quarters of what a host takes as one body
CHECKPOINTS_A_BEAT = LOGS_A_BEAT = 8

LAST_THREAD_SECONDS = 2.0
LAST_REQUEST_SECONDS = 5.0
# in which tasks that have to stop may do so, and child processes are ended
LAST_TASK_SECONDS = 4.0
AT_ONCE_SECONDS = 1.0

log = SafeLogger(logging.getLogger(__name__))


def _has_rest(task: ClaimedTask[Any], status: str) -> bool:
    # what is completed, nobody goes on with
    saved = status != TaskStatus.COMPLETED and task.unsent_checkpoint()
    return bool(saved or task.unsent_log.unsent())


@dataclass
class Heartbeat:
    """The thread that shows the host that the worker lives, and how far its tasks are."""

    claims: Claims
    interval: float
    draining: bool = False
    _host_counts_attempts: bool = True
    _started: bool = False
    _due: threading.Event = field(default_factory=threading.Event)
    _put_again_at: float = 0.0
    #: how many hands are stuck, as the host knows it
    _told_stuck: int = 0

    def __post_init__(self) -> None:
        self._life = self.claims.life
        self._life.closing.append(self._due.set)

    def start(self) -> None:
        """Begin, if it has not begun."""
        if not self._started:
            self._started = True
            self._life.start("heartbeat", self._run)

    @property
    def _pause(self) -> float:
        """For how long nothing need be said: a third of what the host takes for silence."""
        silence = self.claims.transport.limits().worker_timeout_seconds
        return min(self.interval, max(SHORTEST_SECONDS, silence / 3))

    def hurry(self) -> None:
        """Have the next heartbeat soon: there is a task to ask about."""
        if self._host_counts_attempts:
            self._due.set()

    def send(self, **options: Any) -> bool:
        """Send a heartbeat; return whether the host has lost registrations."""
        before = self.claims.registrations.counts()
        # hosts that count no attempts have no use for the tasks in a heartbeat
        tasks = [task for task in self.claims.held.all() if task.attempt is not None]
        most = self._max_tasks(tasks)
        for first in range(0, len(tasks) or 1, most):
            some = tasks[first : first + most]
            answer = self._send(some, options)
            # these objects, not what is held under their ids by now
            stop = {*(answer.get("cancelled") or ()), *(answer.get("lost") or ())}
            for task in some:
                if task.task_id in stop:
                    task.end()
        for task in self.claims.held.all():
            if task.ended:
                # there is nothing more to report or to learn
                self.claims.held.discard(task)
        self._host_counts_attempts = "cancelled" in answer
        self.draining = answer.get("desired_state") == WorkerState.DRAINING
        # only what was offered all the time that the heartbeat was under way
        after = self.claims.registrations.counts()
        return any(
            isinstance(answer.get(kind), int) and answer[kind] < min(before[kind], after[kind])
            for kind in before
        )

    def send_rest(
        self, ends: Iterable[tuple[ClaimedTask[Any] | None, Report]], **options: Any
    ) -> None:
        """Send what tasks logged, and saved for the next attempt, before ends are reported."""
        left = {task: report["status"] for task, report in ends if task and task.attempt}
        try:
            while tasks := [task for task, status in left.items() if _has_rest(task, status)]:
                some = tasks[: self._max_tasks(tasks)]
                answer = self._send(some, {"stop": self._life.aborting, **options})
                for task in some:
                    if task.task_id in (*answer.get("cancelled", ()), *answer.get("lost", ())):
                        del left[task]
        except Exception as exc:
            ids = ", ".join(task.task_id for task in left)
            log.warning("task %s: could not send the rest of its log: %s", ids, exc)

    def _max_tasks(self, tasks: Sequence[ClaimedTask[Any]]) -> int:
        return self.claims.transport.limits().max_heartbeat_tasks if len(tasks) > 1 else 1

    def report_end(self, task: ClaimedTask[Any], status: TaskStatus, **fields: Any) -> None:
        """Report the end of a task that the program runs by itself; raise if it is refused."""
        self.send_rest([(task, report_of(task, status))])
        self.claims.report_or_raise(task, status, **fields)

    def _send(self, tasks: list[ClaimedTask[Any]], options: dict[str, Any]) -> dict[str, Any]:
        entries: list[dict[str, Any]] = []
        checkpoints: list[Callable[[], None]] = []
        logs: list[Callable[[], None]] = []
        # of many that have much to say, not always the same
        for task in random.sample(tasks, len(tasks)):
            entry = {"id": task.task_id, "attempt": task.attempt, **task.unsent_progress()}
            checkpoint = task.unsent_checkpoint()
            if checkpoint is not None and len(checkpoints) < CHECKPOINTS_A_BEAT:
                entry["checkpoint"] = json.loads(checkpoint)
                checkpoints.append(partial(task.keep_checkpoint, checkpoint))
            if len(logs) < LOGS_A_BEAT and (lines := task.unsent_log.unsent()):
                entry["log"] = lines
                logs.append(partial(task.unsent_log.keep, lines))
            entries.append(entry)
        stuck = len(self.claims.held.stuck())
        content: dict[str, Any] = {"tasks": entries} if tasks else {}
        if stuck != self._told_stuck:
            content["stuck"] = stuck
        if content:
            options = {"json": content, **options}

        def ask(worker_id: UUID) -> Answer:
            def read(body: dict[str, Any]) -> dict[str, Any]:
                if UUID(body["id"]) != worker_id:
                    raise ValueError("it is about another worker")
                return body

            return self.claims.transport.send(
                "patch", path("workers", worker_id), read=read, **options
            )

        carried = [*checkpoints, *logs]
        try:
            answer: dict[str, Any] = self.claims.registrations.as_worker(ask).value
        except OSError:
            # they leave with the next one
            carried.clear()
            raise
        finally:
            # what is refused too: with it, no other heartbeat would get through
            for keep in carried:
                keep()
        self._told_stuck = stuck
        return answer

    def _run(self) -> None:
        # the first one at once: children may take long to start, and claim nothing until then
        pause = 0.0
        while not self._life.aborting.is_set():
            if self._due.wait(pause):
                self._due.clear()
                self._life.stopping.wait(min(BUSY_BEAT_SECONDS, self._pause))
            if self._life.aborting.is_set():
                return
            try:
                pause = self._beat()
            except BaseException:
                log.exception("no heartbeat")
                pause = min(PAUSE_AFTER_ERROR_SECONDS, self.interval)

    def _beat(self) -> float:
        try:
            lost = self.send(stop=self._life.aborting)
            now = time.monotonic()
            if lost and now - self._put_again_at > self.interval / 2:
                # not more often: the host may have reasons of its own
                self._put_again_at = now
                self.claims.registrations.put_again()
        except SlowDown:
            return self._pause
        except (Unreachable, PermissionError) as exc:
            if not self._life.aborting.is_set():
                # the worker may have been deleted under this heartbeat
                self._life.give_up(exc)
            return self._pause
        # of a host that doesn't count attempts a heartbeat learns nothing of tasks
        held = self.claims.held
        untold = len(held.stuck()) != self._told_stuck
        busy = self._host_counts_attempts and (held.all() or untold)
        return min(BUSY_BEAT_SECONDS, self._pause) if busy else self._pause


class Work(Protocol):
    """What executes a worker's tasks, as far as its end goes."""

    executor: Executor

    @property
    def busy(self) -> int:
        """How many tasks are at hand."""
        ...

    def finish(self, deadline: float) -> bool:
        """Take no more tasks, and let those at hand end; return whether they did."""
        ...


@dataclass
class Shutdown:
    """The end of a worker, which happens once, whoever begins it.

    Running tasks may go on for ``grace_seconds``.
    """

    heartbeat: Heartbeat
    grace_seconds: float
    work: Work | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: threading.Event = field(default_factory=threading.Event)
    _failure: BaseException | None = None
    #: whether tasks were left that had not ended
    _left: bool = False
    _signals: int = 0

    def __post_init__(self) -> None:
        self._claims = self.heartbeat.claims
        self._life = self._claims.life

    def begin(self) -> None:
        """End the worker, and return when all is done."""
        if self._life.is_forked:
            # the worker is not this process's own to end
            return
        if threading.current_thread() in self._life.threads:
            # a task or provider wants it: it has to go on before this can be done
            _in_thread(self.begin)
            return
        with self._lock:
            first = not self._life.stopping.is_set()
            self._life.stopping.set()
        if not first:
            self._wait_until_done()
            return
        try:
            self._end()
        except BaseException:
            self._end_at_once()
            raise
        finally:
            self._done.set()

    def give_up(self, exc: BaseException) -> None:
        """End the worker, which can't go on."""
        with self._lock:
            if self._life.stopping.is_set():
                return
            self._failure = self._failure or exc
        log.error("giving up: %s", exc)
        _in_thread(self.begin)

    def leave(self, why: str) -> None:
        """End the worker, which has stayed as long as it was to."""
        log.warning("leaving: %s", why)
        self.grace_seconds = 0.0
        _in_thread(self.begin)

    def wait(self) -> bool:
        """Return when the worker has ended, whether its tasks had; raise if it gave up."""
        in_main = threading.current_thread() is threading.main_thread()
        with self._signals_handled() if in_main else nullcontext():
            self._wait_until_done()
        if self._failure is not None:
            kinds = (PermissionError, RuntimeError)
            kind = next((k for k in kinds if isinstance(self._failure, k)), ConnectionError)
            raise kind(f"the worker gave up: {self._failure}") from None
        return not self._left

    def _end(self) -> None:
        self._life.wake.set()
        if self.work is not None and self._failure is None:
            self._finish_tasks(self.work)
        self._abort()
        registrations = self._claims.registrations
        # the lock: a registration under way is to be over
        with registrations.lock:
            for close in self._life.closing:
                close()
            retries = 0 if self._failure else LAST_RETRIES
            registrations.retire(retries=retries, timeout=LAST_REQUEST_SECONDS)
        deadline = time.monotonic() + LAST_THREAD_SECONDS
        for thread in filter(threading.Thread.is_alive, self._life.threads):
            thread.join(max(0.0, deadline - time.monotonic()))
        registrations.socket.close()

    def _finish_tasks(self, work: Work) -> None:
        deadline = time.monotonic() + self.grace_seconds
        try:
            # a claim that waits at the host gets nothing after this
            self._claims.transport.exchange(
                "patch",
                path("workers", self._claims.registrations.worker_id),
                read=dict,
                json={"state": WorkerState.DRAINING.value},
                timeout=LAST_REQUEST_SECONDS,
            )
        except Exception as exc:
            log.warning("could not announce the end: %s", exc)
        if not work.finish(deadline):
            self._left = True
            log.warning("tasks still run after %s s of grace", self.grace_seconds)
            tasks = self._interruptible()
            self._claims.held.end_all()
            work.executor.close()
            work.finish(time.monotonic() + LAST_TASK_SECONDS)
            ends = [(task, report_of(task, TaskStatus.PENDING)) for task in tasks]
            self.heartbeat.send_rest(ends, retries=LAST_RETRIES)
            self._claims.interrupt(tasks, timeout=LAST_REQUEST_SECONDS)

    def _interruptible(self) -> list[ClaimedTask[Any]]:
        # a host that counts no attempts knows of no interruptions either
        held = self._claims.held.all()
        return [task for task in held if not task.ended and task.attempt is not None]

    def _end_at_once(self) -> None:
        self._left = True
        self._claims.interrupt(self._interruptible(), retries=0, timeout=AT_ONCE_SECONDS)
        self._abort()
        self._claims.registrations.delete_worker(retries=0, timeout=AT_ONCE_SECONDS)
        self._done.set()

    def _abort(self) -> None:
        self._life.aborting.set()
        self._claims.held.end_all()

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
        if self._life.is_forked:
            # a fork of this process, made by a task, has inherited the handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        # in a thread: the main one may hold the very lock that is needed
        self._signals += 1
        again = "Ctrl-C again" if signum == signal.SIGINT else "a second signal"
        first = partial(self._begin_to_finish, again)
        _in_thread(first if self._signals == 1 else self._end_at_once)

    def _begin_to_finish(self, again: str) -> None:
        if self.work is not None and (busy := self.work.busy):
            tasks, them = ("task", "it") if busy == 1 else ("tasks", "them")
            log.warning("finishing %s %s, %s to stop %s now", busy, tasks, again, them)
        self.begin()


def _in_thread(call: Callable[[], None]) -> None:
    threading.Thread(target=call, name="zndraw-end", daemon=True).start()
