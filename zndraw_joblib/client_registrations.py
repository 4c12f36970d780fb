"""A worker's entry at its host: itself, its jobs and its providers."""

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID

from zndraw_joblib.client_answers import Answer
from zndraw_joblib.client_connection import Socket
from zndraw_joblib.client_transport import SafeLogger, Transport, path
from zndraw_joblib.events import (
    FrozenEvent,
    JoinJobRoom,
    JoinProviderRoom,
    LeaveJobRoom,
    LeaveProviderRoom,
)
from zndraw_joblib.exceptions import WorkerNotFound
from zndraw_joblib.extension import Extension, schema_of
from zndraw_joblib.lifecycle import FullName
from zndraw_joblib.provider import Provider
from zndraw_joblib.schemas import JobPolicy

log = SafeLogger(logging.getLogger(__name__))


@dataclass
class Life:
    """How far a worker's end has come, for all of its threads.

    Attributes
    ----------
    give_up : callable
        Given what went wrong: the worker can't go on.
    wake : threading.Event
        Set: there may be work.
    stopping : threading.Event
        Set: nothing is registered or begun any more.
    hopeless : threading.Event
        Set: no report is repeated any more.
    """

    give_up: Callable[[BaseException], None]
    wake: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)
    hopeless: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class OfferedJob:
    """A job that is offered."""

    cls: type[Extension]
    name: FullName
    run_kwargs: dict[str, Any]
    policy: JobPolicy


@dataclass
class OfferedProvider:
    """A provider that is offered, and what it reads from."""

    cls: type[Provider]
    name: FullName
    handler: Any
    id: UUID | None = None


class Registrations:
    """A worker's entry at the host: itself, its jobs and its providers.

    Parameters
    ----------
    transport : Transport
        How the host is asked.
    life : Life
        The worker's end.
    on_lost : callable
        Called when the host has lost the worker, and its tasks with it.
    """

    def __init__(self, transport: Transport, life: Life, on_lost: Callable[[], None]) -> None:
        self.socket = Socket()
        self.worker_id: UUID | None = None
        self.jobs: dict[str, OfferedJob] = {}
        self.providers: dict[str, OfferedProvider] = {}
        # over all of what stands above; held while the host is asked, so that what is
        # registered here and there doesn't differ
        self.lock = threading.RLock()
        self._transport = transport
        self._life = life
        self._on_lost = on_lost
        self._pid = os.getpid()

    def create_worker(self) -> UUID:
        """Make the worker, if there is none yet, and return its id."""
        self._check_process()
        with self.lock:
            if self._life.stopping.is_set():
                raise RuntimeError("this manager has disconnected: make another one")
            if self.worker_id is None:
                self.worker_id = self._post_worker()
            return self.worker_id

    def add_job(self, job: OfferedJob) -> None:
        """Offer a job."""
        full_name = str(job.name)
        with self.lock:
            worker_id = self.create_worker()
            earlier = self.jobs.get(full_name)
            if earlier is not None and not _is_same_class(earlier.cls, job.cls):
                raise ValueError(
                    f"{full_name} is {_place(earlier.cls)} in this worker, and"
                    f" {_place(job.cls)} has the same name: rename one of them"
                )
            # first here: the claim thread may be given its first task at any moment
            self.jobs[full_name] = job
            try:
                worker_id = self.as_worker(partial(self._put_job, job)).value
            except BaseException:
                del self.jobs[full_name]
                if earlier is not None:
                    self.jobs[full_name] = earlier
                raise
            self.socket.emit(JoinJobRoom(job_name=full_name, worker_id=str(worker_id)))

    def add_provider(self, provider: OfferedProvider) -> None:
        """Offer a provider."""
        full_name = str(provider.name)
        with self.lock:
            worker_id = str(self.create_worker())
            earlier = self.providers.get(full_name)
            # first here, and listening: readers may come as soon as the host knows of it
            self.providers[full_name] = provider
            self.socket.settle()
            self.socket.emit(
                JoinProviderRoom(provider_name=full_name, worker_id=worker_id), wait=True
            )
            try:
                self.as_worker(partial(self._put_provider, provider))
            except BaseException:
                del self.providers[full_name]
                if earlier is not None:
                    self.providers[full_name] = earlier
                else:
                    self._leave_provider(full_name)
                raise
        if not self.socket.connected:
            log.warning(
                "%s is offered, but no request reaches it: there is no Socket.IO (%s)",
                full_name,
                self.socket.reason,
            )

    def remove_provider(self, full_name: str) -> None:
        """Take back a provider."""
        with self.lock:
            provider = self.providers[full_name]
            answer = self._transport.send(
                "delete", path("providers", provider.id), stop=self._life.stopping
            )
            if answer.status != 404:
                self._transport.value(answer)
            del self.providers[full_name]
            self._leave_provider(full_name)

    def as_worker(self, ask: Callable[[UUID], Answer]) -> Answer:
        """Return the answer to what the worker asks, made anew if the host lost it."""
        self._check_process()
        worker_id = self.worker_id or self.create_worker()
        answer = ask(worker_id)
        if answer.is_problem(WorkerNotFound) and not self._life.stopping.is_set():
            answer = ask(self._register_again(worker_id))
        self._transport.value(answer)
        return answer

    def counted(self) -> tuple[int, int]:
        """Return how many jobs and providers the host has; none while that changes."""
        if not self.lock.acquire(blocking=False):
            return 0, 0
        try:
            return len(self.jobs), len(self.providers)
        finally:
            self.lock.release()

    def put_again(self) -> None:
        """Offer again what the host has lost of a worker that it knows."""
        with self.lock:
            if self.worker_id is not None and not self._life.stopping.is_set():
                log.warning("the host has lost registrations: making them again")
                self._put_all(self.worker_id)

    def join_rooms(self) -> None:
        """Have the events of everything that is offered come here."""
        # without the lock: the socket's thread must not wait for a registration
        self._emit_each(JoinJobRoom, JoinProviderRoom)

    def retire(self, **options: Any) -> None:
        """Delete the worker, and with it all that it offers."""
        self._emit_each(LeaveJobRoom, LeaveProviderRoom)
        if self.worker_id is not None:
            self.delete_worker(self.worker_id, **options)
        self.worker_id = None
        self.jobs.clear()
        self.providers.clear()

    def delete_worker(self, worker_id: UUID, **options: Any) -> None:
        """Delete a worker; if that fails, the host will notice that it is silent."""
        try:
            answer = self._transport.send("delete", path("workers", worker_id), **options)
            if answer.status != 404:
                self._transport.value(answer)
        except Exception as exc:
            log.warning("could not delete worker %s: %s", worker_id, exc)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this process is a fork of the worker's: make a JobManager of its own"
            )

    def _post_worker(self) -> UUID:
        answer = self._transport.send(
            "post", path("workers"), read=_read_id, stop=self._life.stopping
        )
        worker_id: UUID = self._transport.value(answer)
        return worker_id

    def _put_job(self, job: OfferedJob, worker_id: UUID) -> Answer:
        return self._transport.send(
            "put",
            path("rooms", job.name.room, "jobs"),
            read=lambda body: _read_id(body) and worker_id,
            json={
                "category": job.name.category,
                "name": job.name.name,
                "schema": schema_of(job.cls),
                "worker_id": str(worker_id),
                **job.policy.model_dump(exclude_unset=True),
            },
            stop=self._life.stopping,
        )

    def _put_provider(self, provider: OfferedProvider, worker_id: UUID) -> Answer:
        answer = self._transport.send(
            "put",
            path("rooms", provider.name.room, "providers"),
            read=_read_id,
            json={
                "category": provider.name.category,
                "name": provider.name.name,
                "schema": schema_of(provider.cls),
                "content_type": provider.cls.content_type,
                "worker_id": str(worker_id),
            },
            stop=self._life.stopping,
        )
        provider.id = answer.value or provider.id
        return answer

    def _put_all(self, worker_id: UUID) -> None:
        for job in self.jobs.values():
            self._transport.value(self._put_job(job, worker_id))
        for provider in self.providers.values():
            self._transport.value(self._put_provider(provider, worker_id))

    def _register_again(self, lost_id: UUID) -> UUID:
        with self.lock:
            if self.worker_id == lost_id:
                # silent for too long, a laptop that slept: the host took it for dead
                log.warning("worker %s is gone: registering again", lost_id)
                self._on_lost()
                worker_id = self._post_worker()
                try:
                    self._put_all(worker_id)
                except BaseException:
                    # all of it has to be done again
                    self.delete_worker(worker_id, retries=0)
                    raise
                self.worker_id = worker_id
                self.join_rooms()
            return self.worker_id or self.create_worker()

    def _emit_each(self, of_job: type[FrozenEvent], of_provider: type[FrozenEvent]) -> None:
        worker = {"worker_id": str(self.worker_id)}
        for name in list(self.jobs):
            self.socket.emit(of_job.model_validate({"job_name": name, **worker}))
        for name in list(self.providers):
            self.socket.emit(of_provider.model_validate({"provider_name": name, **worker}))

    def _leave_provider(self, full_name: str) -> None:
        self.socket.emit(LeaveProviderRoom(provider_name=full_name, worker_id=str(self.worker_id)))


def _read_id(body: dict[str, Any]) -> UUID:
    return UUID(body["id"])


def _is_same_class(one: type, other: type) -> bool:
    # defined a second time, as in a notebook; of those that a function makes, any two
    return one is other or (_place(one) == _place(other) and "<locals>" not in one.__qualname__)


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
