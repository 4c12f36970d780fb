"""The life of a task: its states, and which may follow which.

::

    pending ──claim──▶ claimed ──start──▶ running ──complete──▶ completed
       ▲ │                │  │               │ │
       │ │                │  └──────fail─────┤ └──cancel──▶ cancelled
       │ └──cancel─────▶  │                  ▼
       │    cancelled  ◀──┘ cancel        failed
       └──────── retry, lost worker, time-out: while attempts are left ┘

A claim may start what it brings: its tasks are running at once.
"""

from enum import StrEnum


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

#: For each state that a report can ask for: the states it may follow.
REPORTABLE: dict[TaskStatus, frozenset[TaskStatus]] = {
    # Handed back by a worker that goes: no attempt is lost. A running task only as its
    # claim left it, which started it: nobody has said that its work began.
    TaskStatus.PENDING: HELD,
    TaskStatus.RUNNING: frozenset({TaskStatus.CLAIMED}),
    TaskStatus.COMPLETED: frozenset({TaskStatus.RUNNING}),
    TaskStatus.FAILED: HELD,
    TaskStatus.CANCELLED: HELD | {TaskStatus.PENDING},
}

MAX_ATTEMPTS = 100
MAX_PRIORITY = 1000

WORKER_LOST_ERROR = "Worker disconnected"
TIMEOUT_ERROR = "Ran longer than the job allows"
INTERNAL_TIMEOUT_ERROR = "Internal task timed out"
