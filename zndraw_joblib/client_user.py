"""What a user sees in the rooms of a host, and what they submit. It needs no worker."""

import math
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, TypedDict
from uuid import UUID

import pydantic_core
from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from zndraw_joblib import exceptions, schemas, telemetry
from zndraw_joblib.client_handles import Listing, ShownTask, TaskHandle, View
from zndraw_joblib.client_transport import Transport, path
from zndraw_joblib.encoding import as_json, encode
from zndraw_joblib.extension import Extension, category_of, check_parameters, nearest
from zndraw_joblib.lifecycle import (
    FullName,
    WorkerState,
    check_room,
    split_full_name,
    visible_rooms,
)

#: Entries of a page, which every host allows.
PAGE = 500
# proxies commonly take a mebibyte
BATCH_BYTES = 512 * 1024
# of the question how much the host takes at once
LIMITS_RETRIES = 5


@dataclass
class Rooms:
    """What rooms see: tasks, jobs, workers and data."""

    transport: Transport

    def tasks(
        self, room: str, status: str | None, job: str | None, limit: int
    ) -> Listing[schemas.TaskResponse]:
        """Return the latest tasks of a room."""
        what = ["jobs", job, "tasks"] if job else ["tasks"]
        asked = {"status": status} if status else {}
        return self.all_of(ShownTask, room, *what, most=limit, **asked)

    def job(self, room: str, name: str) -> schemas.JobResponse:
        """Return a job that a room sees; raise a KeyError that says what it sees."""
        where = path("rooms", check_room(room), "jobs", name or "-")
        answer = self.transport.send("get", where, read=schemas.JobResponse.model_validate)
        if answer.is_problem(exceptions.JobNotFound):
            raise self.not_found("jobs", room, name)
        job: schemas.JobResponse = self.transport.value(answer)
        return job

    def drain(self, worker_id: str | UUID) -> schemas.WorkerResponse:
        """Let a worker finish what it has, and give it nothing more."""
        body = {"state": WorkerState.DRAINING.value}
        read = schemas.WorkerResponse.model_validate
        return self.transport.ask("patch", path("workers", worker_id), read, json=body)

    def all_of(
        self, kind: type[BaseModel], room: str, *what: str, most: float = math.inf, **asked: Any
    ) -> Listing[Any]:
        """Return what there is of a kind in a room, page by page."""
        where = path("rooms", check_room(room), *what)
        found: Listing[Any] = Listing()
        while len(found) < most:
            limit = int(min(PAGE, most - len(found)))
            params = {**asked, "limit": limit, "offset": len(found)}
            page = self.transport.ask("get", where, lambda body: body["items"], params=params)
            found += map(kind.model_validate, page)
            if len(page) < limit:
                break
        return found

    def not_found(self, kind: str, room: str, name: str) -> KeyError:
        """Return the error for a job or provider that is not there: it says what is."""
        where, what = path("rooms", room, kind), kind.removesuffix("s")
        names: list[str] = []
        with suppress(OSError, LookupError, ValueError):
            page = self.transport.ask("get", where, dict, params={"limit": PAGE}, retries=0)
            names = [item["full_name"] for item in page["items"]]
        return KeyError(
            f"{what} not found: room {room!r} sees no {what} {name!r}; {nearest(name, names)}"
        )

    def read(self, provider: str, params: dict[str, Any]) -> Any:
        """Return what a provider has for these parameters: JSON unpacked, else bytes."""
        room = split_full_name(provider).room
        answer = self.transport.send(
            "get",
            path("rooms", room, "providers", provider),
            read=lambda body: body,
            params=params,
            wait=self.transport.longest_wait,
        )
        if answer.is_problem(exceptions.ProviderNotFound):
            raise self.not_found("providers", room, provider)
        if answer.is_problem(exceptions.ProviderTimeout):
            raise exceptions.ProviderTimeoutError(answer.reason)
        self.transport.value(answer)
        is_json = "json" in answer.response.headers.get("content-type", "")
        return answer.value if is_json else answer.response.content


class Submitting(TypedDict, total=False):
    """What may be said of a submission beside the room."""

    job_room: str | None
    priority: int
    delay_seconds: float
    idempotency_key: str | None


@dataclass
class Submissions:
    """How tasks get to a host."""

    rooms: Rooms
    view: View

    def submit(
        self, job: Any, parameters: dict[str, Any] | str | None, room: str | None, how: Submitting
    ) -> TaskHandle:
        """Submit one task, of an extension or of a job by its name."""
        if room is None and isinstance(parameters, str):
            # the second of two arguments
            parameters, room = None, parameters
        if room is None:
            raise TypeError("the room is missing: submit(Rotate(angle=90), 'lab') has one")
        if not isinstance(job, str):
            if parameters is not None:
                raise TypeError("the parameters are those of the object: give the room alone")
            return self.submit_many([job], room, how)[0]
        if not isinstance(parameters, dict | None):
            raise TypeError(f"the parameters of {job!r} are to be a dict")
        payload = as_json(parameters or {}, "payload")
        found = self.rooms.job(room, job)
        schema = found.schema_
        if "properties" in schema and "additionalProperties" not in schema:
            check_parameters(job, payload, schema["properties"])
        return self._send([((split_full_name(found.full_name),), payload)], room, how)[0]

    def submit_many(
        self, extensions: Iterable[Extension], room: str, how: Submitting
    ) -> Listing[TaskHandle]:
        """Submit tasks, as many of one job as the host takes in one request."""
        job_room = how.get("job_room")
        rooms = (job_room,) if job_room else visible_rooms(room)
        return self._send(((_jobs(e, rooms), parameters_of(e)) for e in extensions), room, how)

    def _send(
        self, tasks: Iterable[tuple[tuple[FullName, ...], Any]], room: str, how: Submitting
    ) -> Listing[TaskHandle]:
        """Submit payloads, each to the first of some jobs that is there."""
        key = how.get("idempotency_key") or uuid.uuid4().hex
        # what is not asked for is left out: an older host does not know it
        options = {w: value for w in ("priority", "delay_seconds") if (value := how.get(w))}
        bodies = ((jobs, encode({"payload": payload, **options})) for jobs, payload in tasks)
        handles: Listing[TaskHandle] = Listing()
        number = 0
        for jobs, alike in groupby(bodies, key=itemgetter(0)):
            for batch in self._batches(body for _, body in alike):
                handles += self._submit(room, jobs, batch, f"{key}-{number}" if number else key)
                number += 1
        return handles

    def _batches(self, bodies: Iterable[bytes]) -> Iterator[list[bytes]]:
        batch: list[bytes] = []
        size = 0
        for body in bodies:
            if batch:
                # a repetition under the same key is to be cut into the same batches
                limits = self.view.transport.limits(LIMITS_RETRIES)
                most_bytes = min(BATCH_BYTES, limits.max_payload_bytes - len(b'{"tasks":[]}'))
                if len(batch) == limits.max_batch or size + len(body) > most_bytes:
                    yield batch
                    batch, size = [], 0
            batch.append(body)
            # and a comma
            size += len(body) + 1
        yield batch

    def _submit(
        self, room: str, jobs: tuple[FullName, ...], bodies: list[bytes], key: str
    ) -> list[TaskHandle]:
        def read(answer: dict[str, Any]) -> list[TaskHandle]:
            ids = [answer["id"]] if alone else answer["ids"]
            if len(ids) != len(bodies):
                raise ValueError("it is about other tasks")
            return [self.view.task(task_id) for task_id in ids]

        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        if trace := telemetry.carried():
            headers["traceparent"] = trace
        alone = len(bodies) == 1
        for job in jobs:
            answer = self.view.transport.send(
                "post",
                path("rooms", check_room(room), "tasks" if alone else "batches", job),
                read=read,
                content=bodies[0] if alone else b'{"tasks":[%s]}' % b",".join(bodies),
                headers=headers,
            )
            if not answer.is_problem(exceptions.JobNotFound):
                handles: list[TaskHandle] = self.view.transport.value(answer)
                return handles
        name = job if len(jobs) == 1 else f"{job.category}:{job.name}"
        raise self.rooms.not_found("jobs", room, str(name))


def _jobs(extension: Any, rooms: Iterable[str]) -> tuple[FullName, ...]:
    """Return what an extension's job may be called."""
    cls = type(extension)
    if isinstance(extension, type):
        name = extension.__name__
        raise TypeError(f"{name} is a class: submit an object of it, {name}(...)")
    if not isinstance(extension, BaseModel):
        raise TypeError(
            f"a {cls.__name__} doesn't say of which job: submit an extension,"
            " or submit('room:category:name', {...}, room)"
        )
    return tuple(FullName.of(room, category_of(extension), cls.__name__) for room in rooms)


def parameters_of(extension: BaseModel) -> dict[str, Any]:
    """Return an extension's parameters as JSON that its class reads as the same.

    What a model is dumped as need not be what it takes: aliases, excluded and computed
    fields, secrets and serializers of its own may come between.

    Raises
    ------
    ValueError
        When the worker's class would read other parameters; the message names class and
        field.
    """
    cls = type(extension)
    try:
        parameters = _dump(extension)
        read = cls.model_validate_json(encode(parameters))
    except (ValueError, TypeError, RecursionError) as exc:
        raise ValueError(f"{_blame(extension)} can't be sent as JSON: {exc}") from None
    for name in cls.model_fields:
        if not _same(vars(extension).get(name), vars(read).get(name)):
            raise ValueError(
                f"{cls.__name__}.{name} would reach the worker as another value than"
                " this one: what it is written as is not what it is read from"
            )
    if not _same(extension.model_extra, read.model_extra):
        raise ValueError(f"the extra fields of {cls.__name__} change on their way")
    return parameters


def _dump(extension: BaseModel) -> dict[str, Any]:
    options: dict[str, Any] = {"mode": "json", "by_alias": True, "round_trip": True}
    dumped = extension.model_dump(**options, warnings=False)
    for name, field in type(extension).model_fields.items():
        written = field.serialization_alias or name
        if written in dumped:
            value = dumped.pop(written)
        elif field.exclude:
            value = pydantic_core.to_jsonable_python(
                vars(extension).get(name), by_alias=True, round_trip=True
            )
        else:
            # a serializer of the class leaves it out
            continue
        dumped[_key(name, field)] = value
    return dumped


def _key(name: str, field: FieldInfo) -> str:
    """Return what a field is called in what its class reads, and in its schema."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        alias = next((a for a in alias.choices if isinstance(a, str)), None)
    return alias if isinstance(alias, str) else name


def _blame(extension: BaseModel) -> str:
    """Return the class, and the first of its fields that can't be written."""
    for name in type(extension).model_fields:
        try:
            encode(extension.model_dump(mode="json", include={name}, warnings=False))
        except (ValueError, TypeError, RecursionError):
            return f"{type(extension).__name__}.{name}"
    return type(extension).__name__


def _same(one: Any, other: Any) -> bool:
    """Return whether two values mean the same to who computes with them."""
    if isinstance(one, BaseModel):
        return type(one) is type(other) and all(
            _same(vars(one).get(name), vars(other).get(name)) for name in type(one).model_fields
        )
    if isinstance(one, dict) and isinstance(other, dict):
        # in their order: it may matter
        return list(one) == list(other) and all(map(_same, one.values(), other.values()))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one) is type(other) and getattr(type(one), "__eq__", None) is object.__eq__:
        # no value of its own to compare but what it is written as
        return bool(
            pydantic_core.to_json(one, fallback=vars) == pydantic_core.to_json(other, fallback=vars)
        )
    equal = one == other
    return bool(equal.all() if hasattr(equal, "all") else equal)
