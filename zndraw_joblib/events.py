"""What browsers and workers hear over Socket.IO, and the outbox it leaves through."""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar, NamedTuple, Protocol, Self
from uuid import UUID

import anyio
from pydantic import BaseModel, ConfigDict

from zndraw_joblib.lifecycle import INTERNAL_ROOM, TERMINAL, FullName, TaskStatus

log = logging.getLogger(__name__)


class FrozenEvent(BaseModel):
    """An event: its name on the wire is the class's name in snake_case."""

    model_config = ConfigDict(frozen=True)

    #: the name under which Socket.IO carries it; typed wrappers of Socket.IO read it too
    event_name: ClassVar[str]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if "event_name" not in vars(cls):
            cls.event_name = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class JobsInvalidate(FrozenEvent):
    """The room's list of jobs, or of their workers, changed."""


class ProvidersInvalidate(FrozenEvent):
    """The room's list of providers changed."""


class TasksInvalidate(FrozenEvent):
    """Tasks were deleted from the room's list."""


class TaskAvailable(FrozenEvent):
    """A task waits for one of the job's workers."""

    job_name: str
    room_id: str
    task_id: str


class TaskStatusEvent(FrozenEvent):
    """A task was submitted, or changed its state."""

    id: str
    name: str
    room_id: str
    status: TaskStatus
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    queue_position: int | None = None
    worker_id: str | None = None
    error: str | None = None
    attempt: int = 0
    progress: float | None = None
    progress_message: str | None = None
    revision: int = 1


class ProviderRequest(FrozenEvent):
    """A reader waits for what the provider answers to ``params``."""

    request_id: str
    provider_name: str
    params: str

    @classmethod
    def from_dict_params(
        cls, *, request_id: str, provider_name: str, params: dict[str, Any]
    ) -> Self:
        """Build the event from parameters that are not encoded yet."""
        return cls(
            request_id=request_id,
            provider_name=provider_name,
            params=json.dumps(params, sort_keys=True, separators=(",", ":")),
        )


class ProviderResultReady(FrozenEvent):
    """The provider's answer to a request can be read."""

    provider_name: str
    request_hash: str


class JoinJobRoom(FrozenEvent):
    """Client to server: a worker wants to hear of the job's tasks."""

    job_name: str
    worker_id: str


class LeaveJobRoom(FrozenEvent):
    """Client to server: a worker no longer serves the job."""

    job_name: str
    worker_id: str


class JoinProviderRoom(FrozenEvent):
    """Client to server: a worker wants to hear of the provider's requests."""

    provider_name: str
    worker_id: str


class LeaveProviderRoom(FrozenEvent):
    """Client to server: a worker no longer serves the provider."""

    provider_name: str
    worker_id: str


def room_channel(room_id: str) -> str:
    """Return the Socket.IO room that the people in ``room_id`` are in."""
    return f"room:{room_id}"


def jobs_channel(full_name: str) -> str:
    """Return the Socket.IO room of the workers of a job."""
    return f"jobs:{full_name}"


def providers_channel(full_name: str) -> str:
    """Return the Socket.IO room of the worker that serves a provider."""
    return f"providers:{full_name}"


class Emission(NamedTuple):
    """An event and the Socket.IO room that hears of it."""

    event: FrozenEvent
    room: str


# what a status event tells of a task as it stands there
_AS_IT_IS = TaskStatusEvent.model_fields.keys() - {"id", "name", "queue_position", "worker_id"}


def build_task_status_emission(
    task: Any, job_full_name: str, queue_position: int | None = None
) -> Emission:
    """Return the event that tells the task's room where the task is now.

    Parameters
    ----------
    task : Task or TaskResponse
        A row of the table, or what the wire shows of it.
    job_full_name : str
        The full name of its job.
    queue_position : int, optional
        Its place among the job's pending tasks, from 1 on.
    """
    event = TaskStatusEvent(
        id=str(task.id),
        name=job_full_name,
        queue_position=queue_position,
        worker_id=None if task.worker_id is None else str(task.worker_id),
        **{name: getattr(task, name) for name in _AS_IT_IS},
    )
    return Emission(event, room_channel(task.room_id))


class Emitter(Protocol):
    """A ``socketio.AsyncServer``, or what wraps one."""

    async def emit(self, event: str, data: Any, *, room: str) -> Any:
        """Send ``data`` to everybody in ``room``."""


class Dispatcher(Protocol):
    """What hands ``@internal`` tasks to a broker."""

    def __contains__(self, name: object) -> bool:
        """Tell whether the broker takes messages of this name."""
        ...

    async def send(self, name: str, *, subject: Any, **message: Any) -> None:
        """Hand over one message about a task or provider; raise if it isn't taken."""


async def emit(
    tsio: Emitter | None, emissions: Iterable[Emission], *, timeout: float = 5.0
) -> bool:
    """Send events in their order; one that can't leave is logged and skipped.

    Once the server's manager has let one wait for too long, the rest is skipped too.

    Parameters
    ----------
    tsio : socketio.AsyncServer or a wrapper of one, or None
        None sends nothing.
    emissions : iterable of Emission
        What to send; equal ones are sent once.
    timeout : float
        Seconds that the server's manager may take for one event.

    Returns
    -------
    bool
        False when the manager let one wait for too long.
    """
    if tsio is None:
        return True
    # One scope for all, and its end is moved seldom: a timer takes longer than an event.
    with anyio.move_on_after(timeout) as patience:
        for event, room in dict.fromkeys(emissions):
            if (now := anyio.current_time()) > patience.deadline - 0.9 * timeout:
                patience.deadline = now + timeout
            try:
                await tsio.emit(event.event_name, event.model_dump(mode="json"), room=room)
            except Exception:
                log.exception("event %s for %s did not leave", event.event_name, room)
    if patience.cancelled_caught:
        # of a thousand events each would wait as long
        log.error("event %s for %s did not leave in time", event.event_name, room)
    return not patience.cancelled_caught


class TaskView(Protocol):
    """A task as statements bring it, with all that its status event tells.

    Attributes
    ----------
    payload : str or None
        JSON; None of many tasks, whose contents nobody hears of.
    available_at : datetime or None
        Until when it waits; None when it waits for no time.
    """

    id: Any
    job_name: str
    room_id: str
    payload: str | None
    status: TaskStatus
    created_at: datetime
    available_at: datetime | None
    queue_position: int | None
    worker_id: Any
    attempt: int
    error: str | None
    error_type: Any
    traceparent: str | None


class Dispatch(NamedTuple):
    """An attempt of an ``@internal`` task on its way to the broker.

    Attributes
    ----------
    task : TaskView
        As it was when it was claimed for the broker.
    again : bool
        Whether this attempt's message may be queued already.
    """

    task: TaskView
    again: bool


class TaskLogged(NamedTuple):
    """Lines of a task's log, for the host's hook.

    Attributes
    ----------
    task_id : UUID
        Whose they are.
    attempt : int
        In which attempt.
    first : int
        The number of the first of them in this attempt.
    lines : list of str
        At most 100.
    """

    task_id: UUID
    attempt: int
    first: int
    lines: list[str]


@dataclass
class Outbox:
    """What leaves once the transaction is committed and its session closed.

    Attributes
    ----------
    emissions : list of Emission
        Events, in the order of the changes that they tell of.
    dispatches : list of Dispatch
        Messages to the TaskIQ broker.
    providers_removed : list of FullName
        Providers that went away, for the host's hook.
    ended : list of str
        Keys of what ended, tasks, workers and providers: whoever waits for one is woken.
    queued : list of str
        Keys of jobs, one for each task that can be claimed: one claim is woken.
    changes : list of TaskView
        Tasks as they stand after each change, for logs and metrics.
    workers_gone : list of UUID
        Workers that were retired, for logs.
    logged : list of TaskLogged
        What tasks logged, for the host's hook.
    """

    emissions: list[Emission] = field(default_factory=list)
    dispatches: list[Dispatch] = field(default_factory=list)
    providers_removed: list[FullName] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    queued: list[str] = field(default_factory=list)
    changes: list[TaskView] = field(default_factory=list)
    workers_gone: list[UUID] = field(default_factory=list)
    logged: list[TaskLogged] = field(default_factory=list)

    @property
    def leaves(self) -> bool:
        """Whether there is anything to send, or to log."""
        sent = (self.emissions, self.dispatches, self.providers_removed, self.logged)
        return any((*sent, self.changes, self.workers_gone))

    def tasks_changed(self, tasks: Iterable[TaskView]) -> None:
        """Tell everybody whom a change of tasks concerns.

        The room hears of each, the workers of a job once; the broker of those that were
        claimed for it.
        """
        available: dict[str, TaskAvailable] = {}
        for task in tasks:
            self.changes.append(task)
            self.emissions.append(
                build_task_status_emission(task, task.job_name, task.queue_position)
            )
            name = task.job_name
            if task.status in TERMINAL:
                self.ended.append(task_key(task.id))
            elif task.status is TaskStatus.CLAIMED and task.worker_id is None:
                self.dispatches.append(Dispatch(task, again=False))
            # what waits for its time is not available yet, what waits for the server
            # never
            elif (
                task.status is TaskStatus.PENDING
                and task.available_at is None
                and name.partition(":")[0] != INTERNAL_ROOM
            ):
                self.queued.append(job_key(name))
                if name not in available:
                    available[name] = TaskAvailable(
                        job_name=name, room_id=task.room_id, task_id=str(task.id)
                    )
        self.emissions += [Emission(event, jobs_channel(name)) for name, event in available.items()]

    def dispatch_again(self, tasks: Iterable[TaskView]) -> None:
        """Hand to the broker once more what was claimed for it."""
        self.dispatches += [Dispatch(task, again=True) for task in tasks]

    def jobs_changed(self, rooms: Iterable[str]) -> None:
        """Tell rooms that their list of jobs, or of their workers, changed."""
        self.emissions += [Emission(JobsInvalidate(), room_channel(room)) for room in sorted(rooms)]

    def job_resumed(self, full_name: str, waiting: Sequence[Any]) -> None:
        """Tell the workers of a job of the tasks that waited, each with its id and room."""
        self.queued += [job_key(full_name)] * len(waiting)
        for task in waiting[:1]:
            first = TaskAvailable(job_name=full_name, room_id=task.room_id, task_id=str(task.id))
            self.emissions.append(Emission(first, jobs_channel(full_name)))

    def tasks_deleted(self, room: str) -> None:
        """Tell a room that its list of tasks is shorter."""
        self.emissions.append(Emission(TasksInvalidate(), room_channel(room)))

    def providers_changed(self, rooms: Iterable[str]) -> None:
        """Tell rooms that their list of providers changed."""
        self.emissions += [
            Emission(ProvidersInvalidate(), room_channel(room)) for room in sorted(rooms)
        ]

    def result_ready(self, full_name: str, digest: str, room: str) -> None:
        """Tell a provider's room that an answer can be read."""
        ready = ProviderResultReady(provider_name=full_name, request_hash=digest)
        self.emissions.append(Emission(ready, room_channel(room)))

    def providers_gone(self, names: Iterable[FullName]) -> None:
        """Tell rooms and the host that providers went away."""
        names = list(names)
        self.providers_removed += names
        self.ended += map(provider_key, names)
        self.providers_changed({name.room for name in names})


def task_key(task_id: Any) -> str:
    """Return the key under which requests of this process wait for a task's end."""
    return f"task:{task_id}"


def worker_key(worker_id: Any) -> str:
    """Return the key under which a worker's waiting claims hear that it drains."""
    return f"worker:{worker_id}"


def provider_key(full_name: Any) -> str:
    """Return the key under which a provider's readers hear that it is gone."""
    return f"provider:{full_name}"


def job_key(job_name: str) -> str:
    """Return the key under which claims of this process wait for a job's tasks."""
    return f"job:{job_name}"
