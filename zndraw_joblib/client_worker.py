"""A worker: its threads, and what it offers at its host."""

import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Self, TypedDict
from uuid import UUID

from zndraw_joblib.client_api import Answer
from zndraw_joblib.client_transport import Socket, Transport, path
from zndraw_joblib.events import TaskAvailable
from zndraw_joblib.exceptions import SchemaConflict, WorkerNotFound, storable
from zndraw_joblib.extension import category_of, schema_of
from zndraw_joblib.lifecycle import GLOBAL_ROOM, FullName
from zndraw_joblib.schemas import JobPolicy
from zndraw_joblib.telemetry import SafeLogger

# where NVIDIA's driver tells of its devices
NVIDIA = Path("/proc/driver/nvidia/gpus")

log = SafeLogger(logging.getLogger(__name__))


@dataclass
class Life:
    """How far a worker's end has come, for all of its threads."""

    #: given what went wrong: the worker can't go on
    give_up: Callable[[BaseException], None]
    #: given why: the worker has stayed as long as it was to
    leave: Callable[[str], None]
    #: set: there may be work
    wake: threading.Event = field(default_factory=threading.Event)
    #: set: nothing is registered or begun any more
    stopping: threading.Event = field(default_factory=threading.Event)
    #: set: no report is repeated any more
    aborting: threading.Event = field(default_factory=threading.Event)
    #: all that the worker has started
    threads: list[threading.Thread] = field(default_factory=list)
    #: what is called that they end, after ``aborting`` was set
    closing: list[Callable[[], None]] = field(default_factory=list)
    _pid: int = field(default_factory=os.getpid)

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the worker's, as a task may make one."""
        return os.getpid() != self._pid

    def start(self, name: str, run: Callable[[], None]) -> threading.Thread:
        """Start a thread that the end waits for, and the process does not."""
        thread = threading.Thread(target=run, name=f"zndraw-{name}", daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread


class Pool:
    """Threads that take calls from one queue, until the worker ends.

    Those of `concurrent.futures` would keep the process alive until the last call
    returns, and a call may hang.
    """

    def __init__(self, life: Life, size: int, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        life.closing.append(partial(self._calls.put, None))
        for n in range(size):
            life.start(f"{name}-{n}", self._work)

    def submit(self, call: Callable[[], None]) -> None:
        """Have a thread make the call as soon as one is free."""
        self._calls.put(call)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except BaseException:
                # even SystemExit: it would end this thread and nothing else
                log.exception("unexpected")
        # the others end, too, once the calls submitted so far are made
        self._calls.put(None)


class Registering(TypedDict, total=False):
    """What may be said of a job beside its class."""

    room: str
    run_kwargs: dict[str, Any] | None
    policy: JobPolicy | None
    replace: bool | None


def in_notebook() -> bool:
    """Return whether this program is an IPython kernel, where classes are defined again."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


@dataclass
class Offered:
    """A job or a provider that is offered."""

    kind: Literal["jobs", "providers"]
    cls: type[Any]
    name: FullName
    #: what was given with it: a job's ``run_kwargs``, a provider's handler
    given: Any
    #: what the host gets beside its name and schema
    options: dict[str, Any]
    id: UUID | None = None

    @classmethod
    def job(cls, extension: type[Any], how: Registering) -> Self:
        """Return the job of an extension."""
        room, policy = how.get("room", GLOBAL_ROOM), how.get("policy") or JobPolicy()
        name = FullName.of(room, category_of(extension), extension.__name__)
        options = policy.model_dump(exclude_unset=True)
        replace = how.get("replace")
        if in_notebook() if replace is None else replace:
            options["replace"] = True
        return cls("jobs", extension, name, how.get("run_kwargs") or {}, options)

    @classmethod
    def provider(cls, provider: type[Any], name: str, handler: Any, room: str) -> Self:
        """Return a provider by its class and its name."""
        full_name = FullName.of(room, category_of(provider), name)
        options = {"content_type": provider.content_type}
        return cls("providers", provider, full_name, handler, options)


class Registrations:
    """A worker's entry at the host: itself, its jobs and its providers.

    ``on_lost`` is called when the host has lost the worker, and its tasks with it.
    """

    def __init__(
        self, transport: Transport, socket: Socket, life: Life, on_lost: Callable[[], None]
    ) -> None:
        self.socket = socket
        self.worker_id: UUID | None = None
        self.jobs: dict[str, Offered] = {}
        self.providers: dict[str, Offered] = {}
        # over all of what stands above; held while the host is asked, so that what is
        # registered here and there doesn't differ
        self.lock = threading.RLock()
        self._transport = transport
        self._life = life
        self._on_lost = on_lost
        socket.on("connect", self.join_rooms)
        socket.on(TaskAvailable.event_name, self._on_task_available)

    def create_worker(self) -> UUID:
        """Make the worker, if there is none yet, and return its id."""
        self.check_process()
        with self.lock:
            if self._life.stopping.is_set():
                raise RuntimeError("this manager has disconnected: make another one")
            if self.worker_id is None:
                self.worker_id = self._post_worker()
            return self.worker_id

    def add(self, offered: Offered) -> UUID:
        """Offer a job or a provider, and return its id."""
        full_name = str(offered.name)
        known = self.jobs if offered.kind == "jobs" else self.providers
        self.check_process()
        with self.lock:
            self.create_worker()
            earlier = known.get(full_name)
            if earlier is not None and offered.kind == "jobs":
                _check_same_class(full_name, earlier.cls, offered.cls)
            # first here: tasks and readers may come as soon as the host knows of it
            known[full_name] = offered
            if offered.kind == "providers":
                self.socket.settle()
                self._emit("join", offered, wait=True)
            try:
                self.as_worker(partial(self._put, offered))
                # once: another worker may take its place
                offered.options.pop("replace", None)
            except BaseException:
                if earlier is None:
                    del known[full_name]
                    if offered.kind == "providers":
                        self._emit("leave", offered)
                else:
                    known[full_name] = earlier
                raise
            if offered.kind == "jobs":
                self._emit("join", offered)
            elif not self.socket.connected:
                why = f"there is no Socket.IO ({self.socket.reason})"
                log.warning("%s is offered, but no request reaches it: %s", full_name, why)
            assert offered.id is not None
            return offered.id

    def remove_provider(self, full_name: str) -> None:
        """Take back a provider."""
        self.check_process()
        with self.lock:
            provider = self.providers[full_name]
            stop = self._life.stopping
            answer = self._transport.send("delete", path("providers", provider.id), stop=stop)
            if answer.status != 404:
                self._transport.value(answer)
            del self.providers[full_name]
            self._emit("leave", provider)

    def as_worker(self, ask: Callable[[UUID], Answer]) -> Answer:
        """Return the answer to what the worker asks, made anew if the host lost it."""
        self.check_process()
        worker_id = self.worker_id or self.create_worker()
        answer = ask(worker_id)
        if answer.is_problem(WorkerNotFound) and not self._life.stopping.is_set():
            answer = ask(self._register_again(worker_id))
        self._transport.value(answer)
        return answer

    def counts(self) -> dict[str, int]:
        """Return how many jobs and providers the host has; none while that changes."""
        if not self.lock.acquire(blocking=False):
            return {"jobs": 0, "providers": 0}
        try:
            return {"jobs": len(self.jobs), "providers": len(self.providers)}
        finally:
            self.lock.release()

    def put_again(self) -> None:
        """Offer again what the host has lost of a worker that it knows."""
        with self.lock:
            if self.worker_id is not None and not self._life.stopping.is_set():
                log.warning("the host has lost registrations: making them again")
                self._put_all(self.worker_id)

    def _on_task_available(self, data: dict[str, Any]) -> None:
        if data.get("job_name") in self.jobs:
            self._life.wake.set()

    def join_rooms(self) -> None:
        """Have the events of everything that is offered come here."""
        # without the lock: the socket's thread must not wait for a registration
        if self.worker_id is not None:
            for offered in self._all():
                self._emit("join", offered)

    def retire(self, **options: Any) -> None:
        """Delete the worker, and with it all that it offers."""
        for offered in self._all():
            self._emit("leave", offered)
        self.delete_worker(**options)
        self.worker_id = None
        self.jobs.clear()
        self.providers.clear()

    def delete_worker(self, worker_id: UUID | None = None, **options: Any) -> None:
        """Delete this worker or another; if it fails, the host will notice its silence."""
        worker_id = worker_id or self.worker_id
        try:
            if worker_id is not None:
                self._transport.send("delete", path("workers", worker_id), **options)
        except Exception as exc:
            log.warning("could not delete worker %s: %s", worker_id, exc)

    def _emit(self, verb: str, offered: Offered, **options: Any) -> None:
        """Join the host's room of what is offered, where its events go, or leave it."""
        what = offered.kind.removesuffix("s")
        about = {f"{what}_name": str(offered.name), "worker_id": str(self.worker_id)}
        self.socket.emit(f"{verb}_{what}_room", about, **options)

    def _all(self) -> list[Offered]:
        return [*list(self.jobs.values()), *list(self.providers.values())]

    def check_process(self) -> None:
        """Raise RuntimeError in a fork: its copy of the lock may be held for ever."""
        if self._life.is_forked:
            raise RuntimeError(
                "this process is a fork of the worker's: make a JobManager of its own"
            )

    def _post_worker(self) -> UUID:
        about, stop = _describe_process(), self._life.stopping
        return self._transport.ask("post", path("workers"), _read_id, json=about, stop=stop)

    def _put(self, offered: Offered, worker_id: UUID) -> Answer:
        answer = self._transport.send(
            "put",
            path("rooms", offered.name.room, offered.kind),
            read=_read_id,
            json={
                "category": offered.name.category,
                "name": offered.name.name,
                "schema": schema_of(offered.cls),
                "worker_id": str(worker_id),
                **offered.options,
            },
            stop=self._life.stopping,
        )
        offered.id = answer.value or offered.id
        return answer

    def _put_all(self, worker_id: UUID) -> None:
        for offered in self._all():
            answer = self._put(offered, worker_id)
            if not answer.is_problem(SchemaConflict):
                self._transport.value(answer)
                continue
            # its class was defined anew elsewhere, and is served there
            why = f"{offered.name} is offered no more: {(answer.problem or {}).get('detail')}"
            log.error("%s", why)
            del self.jobs[str(offered.name)]
            self._emit("leave", offered)
            if not self._all():
                self._life.give_up(RuntimeError(why))

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


def _read_id(body: dict[str, Any]) -> UUID:
    return UUID(body["id"])


def _check_same_class(name: str, one: type, other: type) -> None:
    # defined a second time, as in a notebook; of those that a function makes, any two
    places = [f"{cls.__module__}.{cls.__qualname__}" for cls in (one, other)]
    if one is not other and (places[0] != places[1] or "<locals>" in places[0]):
        raise ValueError(
            f"{name} is {places[0]} in this worker, and {places[1]} has the same name:"
            " rename one of them"
        )


def _describe_process() -> dict[str, Any]:
    """Return what people know a worker in this process by, as the host takes it."""
    # here: who only submits does not wait for what is imported
    import socket
    from importlib.metadata import PackageNotFoundError, version

    host, pid = storable(socket.gethostname())[:200], os.getpid()
    info: dict[str, Any] = {"host": host, "pid": pid, "devices": _devices()}
    with suppress(PackageNotFoundError):
        info["version"] = version("zndraw-joblib")
    return {"name": f"{host}:{pid}", "info": info}


def _devices() -> list[str]:
    """Return the GPUs that this process may use, as far as that is told without a tool."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        models = [_model(device) for device in sorted(NVIDIA.glob("*/information"))]
        return [f"cuda:{n} {model}".strip() for n, model in enumerate(models)][:64]
    ids = [storable(part).strip() for part in chosen.split(",")]
    # as CUDA reads it: what follows an invalid one does not count
    return [f"cuda:{part}"[:255] for part in takewhile(lambda part: part not in ("", "-1"), ids)][
        :64
    ]


def _model(information: Path) -> str:
    with suppress(OSError, UnicodeError):
        found = re.search(r"^Model:\s*(.*?)\s*$", information.read_text(), re.MULTILINE)
        return found[1][:200] if found else ""
    return ""
