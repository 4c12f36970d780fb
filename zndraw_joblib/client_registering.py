"""Offering jobs and providers to a host, for a worker that is made when needed."""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, overload
from uuid import UUID

from zndraw_joblib.client_sockets import Socket
from zndraw_joblib.client_submitting import Submitter, category_of
from zndraw_joblib.client_transport import Api, is_problem, path
from zndraw_joblib.events import (
    JoinJobRoom,
    JoinProviderRoom,
    LeaveJobRoom,
    LeaveProviderRoom,
)
from zndraw_joblib.exceptions import WorkerNotFound
from zndraw_joblib.extension import Extension
from zndraw_joblib.names import GLOBAL_ROOM, FullName
from zndraw_joblib.provider import Provider
from zndraw_joblib.schemas import JobPolicy

log = logging.getLogger(__name__)

E = TypeVar("E", bound=type[Extension])


@dataclass(frozen=True)
class _Job:
    cls: type[Extension]
    name: FullName
    run_kwargs: dict[str, Any]
    policy: JobPolicy


@dataclass
class Source:
    """A provider that is offered, and what it reads from."""

    cls: type[Provider]
    name: FullName
    handler: Any
    id: UUID | None = None


class Registrant(Submitter):
    """A worker's entry at the host: itself, its jobs and its providers.

    Parameters
    ----------
    api : Api
        The host, and who asks.
    **options
        As for `Submitter`.
    """

    def __init__(self, api: Api, **options: Any) -> None:
        super().__init__(api, **options)
        # over all of what follows; held while the host is asked, so that what is
        # registered here and there doesn't differ
        self._lock = threading.RLock()
        self._worker_id: UUID | None = None
        self._jobs: dict[str, _Job] = {}
        self._sources: dict[str, Source] = {}
        self._socket = Socket(None)
        #: set: nothing is registered any more
        self._stopping = threading.Event()

    @property
    def worker_id(self) -> UUID | None:
        """The worker's id; None before the first registration and after the end."""
        return self._worker_id

    @property
    def handlers(self) -> dict[str, Any]:
        """What was given with each provider, by the provider's full name."""
        sources = dict(self._sources)
        return {name: source.handler for name, source in sources.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._jobs

    def __getitem__(self, name: str) -> type[Extension]:
        return self._jobs[name].cls

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._jobs))

    def __len__(self) -> int:
        return len(self._jobs)

    def get_run_kwargs(self, name: str) -> dict[str, Any]:
        """Return what was given with a job, by the job's full name.

        Raises
        ------
        KeyError
            When no such job is registered here.
        """
        return self._jobs[name].run_kwargs

    def create_worker(self) -> UUID:
        """Make the worker, if there is none yet, and return its id.

        Raises
        ------
        ConnectionError
            When the host can't be reached.
        PermissionError
            When the host does not know the user.
        RuntimeError
            After `disconnect`.
        """
        with self._lock:
            if self._stopping.is_set():
                raise RuntimeError("this manager has disconnected: make another one")
            if self._worker_id is None:
                self._worker_id = self._new_worker()
            return self._worker_id

    @overload
    def register(
        self,
        extension_class: E,
        *,
        room: str = ...,
        run_kwargs: dict[str, Any] | None = ...,
        policy: JobPolicy | None = ...,
    ) -> E: ...
    @overload
    def register(
        self,
        extension_class: None = None,
        *,
        room: str = ...,
        run_kwargs: dict[str, Any] | None = ...,
        policy: JobPolicy | None = ...,
    ) -> Callable[[E], E]: ...
    def register(
        self,
        extension_class: Any = None,
        *,
        room: str = GLOBAL_ROOM,
        run_kwargs: dict[str, Any] | None = None,
        policy: JobPolicy | None = None,
    ) -> Any:
        """Offer a job; also as a decorator, with or without arguments.

        With ``execute``, the first registration starts the threads that serve it.

        Parameters
        ----------
        extension_class : type of Extension
            The job.
        room : str
            Who sees it; ``@global``, for which the host wants a superuser, is everyone.
        run_kwargs : dict, optional
            Found again as ``run_kwargs`` of each of its tasks.
        policy : JobPolicy, optional
            How often and how long its tasks are tried.

        Raises
        ------
        PermissionError
            When the host does not let this user register here.
        ValueError
            When the host refuses category or name, or knows another job of this name.
        TypeError
            When the class has no category.
        ConnectionError
            When the host can't be reached.
        RuntimeError
            After `disconnect`.
        """
        if extension_class is None:
            return partial(
                self.register, room=room, run_kwargs=run_kwargs, policy=policy
            )
        name = FullName(room, category_of(extension_class), extension_class.__name__)
        self._offer_job(
            _Job(extension_class, name, run_kwargs or {}, policy or JobPolicy())
        )
        return extension_class

    def register_provider(
        self, cls: type[Provider], *, name: str, handler: Any, room: str = GLOBAL_ROOM
    ) -> UUID:
        """Offer data that is read on demand; requests for it come over Socket.IO.

        Parameters
        ----------
        cls : type of Provider
            Its fields are the parameters of a request.
        name : str
            What it is called.
        handler : object
            Given to ``cls.read`` with each request.
        room : str
            Who sees it; ``@global``, for which the host wants a superuser, is everyone.

        Returns
        -------
        UUID
            The provider's id.

        Raises
        ------
        PermissionError, ValueError, TypeError, ConnectionError, RuntimeError
            As for `register`.
        """
        source = Source(cls, FullName(room, category_of(cls), name), handler)
        full_name = str(source.name)
        with self._lock:
            worker_id = str(self.create_worker())
            earlier = self._sources.get(full_name)
            # first here, and listening: readers may come as soon as the host knows of it
            self._sources[full_name] = source
            self._serve_providers()
            self._socket.settle()
            self._socket.ask(
                JoinProviderRoom(provider_name=full_name, worker_id=worker_id)
            )
            try:
                self._as_worker(partial(self._put_provider, source))
            except BaseException:
                del self._sources[full_name]
                if earlier is not None:
                    self._sources[full_name] = earlier
                else:
                    self._socket.say(
                        LeaveProviderRoom(provider_name=full_name, worker_id=worker_id)
                    )
                raise
        assert source.id is not None
        return source.id

    def unregister_provider(self, full_name: str) -> None:
        """Take back a provider.

        Raises
        ------
        KeyError
            When no such provider is registered here.
        ConnectionError
            When the host can't be reached.
        """
        with self._lock:
            source = self._sources[full_name]
            response = self._transport.send(
                "delete",
                path("providers", source.id),
                retries=self._retries,
                stop=self._stopping,
            )
            if response.status_code != 404:
                self.api.raise_for_status(response)
            del self._sources[full_name]
            self._socket.say(
                LeaveProviderRoom(
                    provider_name=full_name, worker_id=str(self._worker_id)
                )
            )

    def _offer_job(self, job: _Job) -> None:
        full_name = str(job.name)
        with self._lock:
            self.create_worker()
            earlier = self._jobs.get(full_name)
            # first here: the claim thread may be given its first task at any moment
            self._jobs[full_name] = job
            try:
                self._as_worker(partial(self._put_job, job))
            except BaseException:
                del self._jobs[full_name]
                if earlier is not None:
                    self._jobs[full_name] = earlier
                raise
            self._join_rooms()
            self._serve_jobs()

    def _new_worker(self) -> UUID:
        response = self._transport.send(
            "post",
            path("workers"),
            retries=self._retries,
            stop=self._stopping,
        )
        self.api.raise_for_status(response)
        return UUID(response.json()["id"])

    def _delete_worker(self, worker_id: UUID, **options: Any) -> None:
        try:
            response = self._transport.send(
                "delete", path("workers", worker_id), **{"retries": 0, **options}
            )
            if response.status_code != 404:
                self.api.raise_for_status(response)
        except Exception as exc:
            # the host will notice by itself that the worker is silent
            log.warning("could not delete worker %s: %s", worker_id, exc)

    def _put_job(self, job: _Job, worker_id: UUID) -> Any:
        return self._transport.send(
            "put",
            path("rooms", job.name.room, "jobs"),
            json={
                "category": job.name.category,
                "name": job.name.name,
                "schema": job.cls.model_json_schema(),
                "worker_id": str(worker_id),
                **job.policy.model_dump(exclude_unset=True),
            },
            retries=self._retries,
            stop=self._stopping,
        )

    def _put_provider(self, source: Source, worker_id: UUID) -> Any:
        response = self._transport.send(
            "put",
            path("rooms", source.name.room, "providers"),
            json={
                "category": source.name.category,
                "name": source.name.name,
                "schema": source.cls.model_json_schema(),
                "content_type": source.cls.content_type,
                "worker_id": str(worker_id),
            },
            retries=self._retries,
            stop=self._stopping,
        )
        if response.status_code < 300:
            source.id = UUID(response.json()["id"])
        return response

    def _as_worker(self, ask: Callable[[UUID], Any]) -> Any:
        """Return the answer to what the worker asks, made anew if the host lost it."""
        worker_id = self._worker_id or self.create_worker()
        response = ask(worker_id)
        if is_problem(response, WorkerNotFound) and not self._stopping.is_set():
            response = ask(self._register_again(worker_id))
        self.api.raise_for_status(response)
        return response

    def _register_again(self, lost_id: UUID) -> UUID:
        with self._lock:
            if self._worker_id == lost_id:
                # silent for too long, a laptop that slept: the host took it for dead
                log.warning("worker %s is gone: registering again", lost_id)
                self._lose_tasks()
                worker_id = self._new_worker()
                try:
                    for job in self._jobs.values():
                        self.api.raise_for_status(self._put_job(job, worker_id))
                    for source in self._sources.values():
                        self.api.raise_for_status(self._put_provider(source, worker_id))
                except BaseException:
                    # all of it has to be done again
                    self._delete_worker(worker_id)
                    raise
                self._worker_id = worker_id
                self._join_rooms()
            return self._worker_id or self.create_worker()

    def _join_rooms(self) -> None:
        # without the lock: the socket's thread must not wait for a registration
        worker_id = str(self._worker_id)
        for name in list(self._jobs):
            self._socket.say(JoinJobRoom(job_name=name, worker_id=worker_id))
        for name in list(self._sources):
            self._socket.say(JoinProviderRoom(provider_name=name, worker_id=worker_id))

    def _leave_rooms(self) -> None:
        worker_id = str(self._worker_id)
        for name in list(self._jobs):
            self._socket.say(LeaveJobRoom(job_name=name, worker_id=worker_id))
        for name in list(self._sources):
            self._socket.say(LeaveProviderRoom(provider_name=name, worker_id=worker_id))

    # --- what happens then ---

    def _serve_jobs(self) -> None:
        """A job was registered."""

    def _serve_providers(self) -> None:
        """A provider was registered."""

    def _lose_tasks(self) -> None:
        """The worker is gone, and its tasks with it."""
