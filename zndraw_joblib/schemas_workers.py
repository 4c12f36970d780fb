"""What goes over the wire of workers."""

from datetime import datetime
from uuid import UUID

from pydantic import Field

from zndraw_joblib import lifecycle
from zndraw_joblib.lifecycle import Model, WorkerState, example

MAX_HEARTBEAT_TASKS = 256
_ID = "0198a2f4-6c1e-7b3a-9d52-4f8e1c0b7a63"


class WorkerResponse(Model):
    """A worker."""

    id: UUID
    last_heartbeat: datetime
    state: lifecycle.AnyState = WorkerState.ACTIVE


class WorkerInfo(Model):
    """Where a worker runs, as it says itself: all of it is optional."""

    host: lifecycle.Label | None = None
    pid: lifecycle.Integer | None = Field(default=None, ge=0, le=2**31 - 1)
    version: lifecycle.Label | None = None
    """Of the package."""
    devices: list[lifecycle.Label] = Field(default=[], max_length=64)
    """The GPUs that it may use."""


class WorkerDescription(Model):
    """What people know a worker by: all of it is optional."""

    model_config = example(name="node7:4242", info={"host": "node7", "devices": ["cuda:0"]})

    name: lifecycle.Label | None = None
    info: WorkerInfo | None = None


class LoggedLines(Model):
    """Some lines of a task's log."""

    first: lifecycle.Integer = Field(ge=1, le=2**31 - 1)
    """The number of the first of them among those that the worker sent in this attempt, from 1:
    what was sent before is not taken twice."""
    lines: lifecycle.LogLines
    """Control characters become blanks, and what is longer than 4000 characters is cut; at most
    64 KiB."""


class TaskHeartbeat(Model):
    """What a worker says of one task that it runs."""

    id: UUID
    attempt: lifecycle.Attempt
    progress: lifecycle.Fraction | None = None
    message: lifecycle.Message | None = None
    checkpoint: lifecycle.Checkpoint = None
    """Where the next attempt is to go on, at most 64 KiB of JSON."""
    log: LoggedLines | None = None


class WorkerUpdateRequest(Model):
    """A heartbeat: all of it is optional."""

    model_config = example(tasks=[{"id": _ID, "attempt": 1, "progress": 0.5, "message": "step 50"}])

    tasks: list[TaskHeartbeat] = Field(default=[], max_length=MAX_HEARTBEAT_TASKS)
    state: WorkerState | None = None
    stuck: lifecycle.Integer | None = Field(default=None, ge=0, le=10_000)
    """How many hands still run code of attempts that are over."""


class HeartbeatResponse(WorkerResponse):
    """A worker, and what it should know about the tasks that it reported."""

    cancelled: list[UUID] = []
    lost: list[UUID] = []
    desired_state: lifecycle.AnyState = WorkerState.ACTIVE
    jobs: int | None = None
    """How many jobs the worker serves: of fewer than it registered the host lost some."""
    providers: int | None = None
    """How many providers the worker serves."""


class RunningTask(Model):
    """A task that a worker runs."""

    id: UUID
    job_name: str


class WorkerSummary(WorkerResponse, WorkerDescription):
    """A worker in a listing."""

    job_count: int
    alive: bool = False
    """Whether it was heard within `worker_timeout_seconds`, by the database's clock."""
    held: int = 0
    """How many tasks it has, of whatever room."""
    stuck: int = 0
    """How many of its hands still run code of attempts that are over; they take no tasks."""
    running: list[RunningTask] = []
    """What it runs now, of this room; among all workers, to its owner and to superusers."""
