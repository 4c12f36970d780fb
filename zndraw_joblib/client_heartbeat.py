"""The heartbeat of a worker, which keeps its tasks: what it tells of them, and is told."""

import json
import logging
import random
import threading
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from zndraw_joblib.client_api import Answer, SlowDown, Unreachable
from zndraw_joblib.client_claims import Claims
from zndraw_joblib.client_transport import path
from zndraw_joblib.extension import ClaimedTask
from zndraw_joblib.lifecycle import TaskStatus, WorkerState
from zndraw_joblib.task_log import TaskLog
from zndraw_joblib.telemetry import SafeLogger

PAUSE_AFTER_ERROR_SECONDS = 5.0
# with tasks at hand: how long a cancel takes to arrive where no websocket brings it
BUSY_BEAT_SECONDS = 0.5
# between two, whatever a host takes for silence
SHORTEST_SECONDS = 0.1
# half of what a host takes as one body
CHECKPOINTS_A_BEAT = 8
# a quarter
LOGS_A_BEAT = 8

log = SafeLogger(logging.getLogger(__name__))


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

    def close(self) -> None:
        """Send no more of them, after ``aborting`` was set."""
        self._due.set()

    def send(self, **options: Any) -> bool:
        """Send a heartbeat; return whether the host has lost registrations."""
        before = self.claims.registrations.counts()
        # hosts that count no attempts have no use for the tasks in a heartbeat
        tasks = [task for task in self.claims.held.all() if task.attempt is not None]
        most = self.claims.transport.limits().max_heartbeat_tasks if len(tasks) > 1 else 1
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

    def send_rest(self, task: ClaimedTask[Any], *, saved: bool, **options: Any) -> None:
        """Send what a task logged, and what it ``saved``, before its end is reported."""
        if task.attempt is None:
            return
        try:
            while task.unsent_log.unsent() or (saved and task.unsent_checkpoint()):
                answer = self._send([task], {"stop": self._life.aborting, **options})
                if task.task_id in (*answer.get("cancelled", ()), *answer.get("lost", ())):
                    return
        except Exception as exc:
            log.warning("task %s: could not send the rest of its log: %s", task.task_id, exc)

    def report_end(self, task: ClaimedTask[Any], status: TaskStatus, **fields: Any) -> None:
        """Report the end of a task that the program runs by itself; raise if it is refused."""
        self.send_rest(task, saved=status != TaskStatus.COMPLETED)
        self.claims.report_or_raise(task, status, **fields)

    def _send(self, tasks: list[ClaimedTask[Any]], options: dict[str, Any]) -> dict[str, Any]:
        entries: list[dict[str, Any]] = []
        saved: list[tuple[ClaimedTask[Any], str]] = []
        logged: list[tuple[TaskLog, dict[str, Any]]] = []
        # of many that have much to say, not always the same
        for task in random.sample(tasks, len(tasks)):
            entry = {"id": task.task_id, "attempt": task.attempt, **task.unsent_progress()}
            checkpoint = task.unsent_checkpoint()
            if checkpoint is not None and len(saved) < CHECKPOINTS_A_BEAT:
                entry["checkpoint"] = json.loads(checkpoint)
                saved.append((task, checkpoint))
            if len(logged) < LOGS_A_BEAT and (lines := task.unsent_log.unsent()):
                entry["log"] = lines
                logged.append((task.unsent_log, lines))
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

        try:
            answer: dict[str, Any] = self.claims.registrations.as_worker(ask).value
        except OSError:
            # they leave with the next one
            saved.clear()
            logged.clear()
            raise
        finally:
            # what is refused too: with it, no other heartbeat would get through
            for task, checkpoint in saved:
                task.keep_checkpoint(checkpoint)
            for unsent, lines in logged:
                unsent.keep(lines)
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
