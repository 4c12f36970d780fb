"""What goes over the wire of workers."""

from datetime import datetime
from uuid import UUID

from pydantic import Field

from zndraw_joblib.fields import AnyState, Integer, Label, Model, example
from zndraw_joblib.lifecycle import WorkerState


class WorkerResponse(Model):
    """A worker."""

    id: UUID
    last_heartbeat: datetime
    state: AnyState = WorkerState.ACTIVE


class WorkerInfo(Model):
    """Where a worker runs, as it says itself: all of it is optional."""

    host: Label | None = None
    pid: Integer | None = Field(default=None, ge=0, le=2**31 - 1)
    version: Label | None = None
    """Of the package."""
    devices: list[Label] = Field(default=[], max_length=64)
    """The GPUs that it may use."""


class WorkerDescription(Model):
    """What people know a worker by: all of it is optional."""

    model_config = example(name="node7:4242", info={"host": "node7", "devices": ["cuda:0"]})

    name: Label | None = None
    info: WorkerInfo | None = None


class HeartbeatResponse(WorkerResponse):
    """A worker, and what it should know about the tasks that it reported."""

    cancelled: list[UUID] = []
    lost: list[UUID] = []
    desired_state: AnyState = WorkerState.ACTIVE
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
