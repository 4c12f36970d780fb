"""The life of a task: its states, and which may follow which."""

from enum import StrEnum
from typing import NamedTuple


class TaskStatus(StrEnum):
    """Where a task is in its life."""

    PENDING = "pending"
    """Waits for a worker, or (after a failed attempt) for its backoff to pass."""
    CLAIMED = "claimed"
    """A worker holds it, or (``@internal``) it was handed to the broker."""
    RUNNING = "running"
    """Its holder reported that it started."""
    COMPLETED = "completed"
    """Terminal: its holder reported success."""
    FAILED = "failed"
    """Terminal: no attempt is left; ``error`` says why."""
    CANCELLED = "cancelled"
    """Terminal: somebody entitled to it said stop."""


class ErrorType(StrEnum):
    """Why an attempt failed."""

    WORKER_LOST = "worker_lost"
    """Its worker was deleted, or fell silent."""
    TIMEOUT = "timeout"
    """It ran longer than the job's ``timeout_seconds``."""
    DISPATCH = "dispatch"
    """The broker did not take the message of an ``@internal`` task."""
    USER_ERROR = "user_error"
    """Its holder reported the failure."""


class WorkerState(StrEnum):
    """Whether a worker is to be given tasks."""

    ACTIVE = "active"
    """Claims are answered with tasks."""
    DRAINING = "draining"
    """It finishes what it holds and gets nothing new."""


HELD = frozenset({TaskStatus.CLAIMED, TaskStatus.RUNNING})
TERMINAL = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED})

#: Where a task comes from that was not there before.
UNBORN: frozenset[TaskStatus] = frozenset()


class Transition(NamedTuple):
    """A way on: what it is called, whence it comes, and where it leads.

    Attributes
    ----------
    name : str
        What happens.
    sources : frozenset of TaskStatus
        The states that the task may be in before.
    target : TaskStatus
        The state that it is in afterwards.
    reported : bool
        Whether a report can ask for it.
    """

    name: str
    sources: frozenset[TaskStatus]
    target: TaskStatus
    reported: bool = False


#: Every way there is. What is not here does not happen.
TRANSITIONS = (
    Transition("submit", UNBORN, TaskStatus.PENDING),
    Transition("submit, @internal", UNBORN, TaskStatus.CLAIMED),
    Transition("claim", frozenset({TaskStatus.PENDING}), TaskStatus.CLAIMED),
    # by a claim that asks for it
    Transition("claim and start", frozenset({TaskStatus.PENDING}), TaskStatus.RUNNING),
    # By a worker that goes, or because it was never started: no attempt is lost. A running
    # task only as its claim left it, which started it: nobody has said that its work began.
    Transition("hand back", HELD, TaskStatus.PENDING, reported=True),
    Transition(
        "start", frozenset({TaskStatus.CLAIMED}), TaskStatus.RUNNING, reported=True
    ),
    Transition(
        "complete", frozenset({TaskStatus.RUNNING}), TaskStatus.COMPLETED, reported=True
    ),
    # reported, or its worker is lost, or its time is over
    Transition("fail", HELD, TaskStatus.FAILED, reported=True),
    Transition("try again", HELD, TaskStatus.PENDING),
    Transition(
        "cancel", HELD | {TaskStatus.PENDING}, TaskStatus.CANCELLED, reported=True
    ),
    Transition("retry", TERMINAL, TaskStatus.PENDING),
    Transition("retry, @internal", TERMINAL, TaskStatus.CLAIMED),
)

#: For each state that a report can ask for: the states it may follow.
REPORTABLE = {way.target: way.sources for way in TRANSITIONS if way.reported}

MAX_ATTEMPTS = 100
MAX_PRIORITY = 1000

WORKER_LOST_ERROR = "Worker disconnected"
TIMEOUT_ERROR = "Ran longer than the job allows"
INTERNAL_TIMEOUT_ERROR = "Internal task timed out"
