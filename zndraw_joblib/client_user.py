"""A user of a host: who asks, and what they submit. It needs no worker."""

import json
import os
import ssl
import threading
import uuid
from collections.abc import Iterable, Iterator
from importlib import import_module
from ipaddress import ip_address, ip_network
from itertools import groupby
from operator import itemgetter
from typing import Any, TypedDict
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import BaseModel

from zndraw_joblib import telemetry
from zndraw_joblib.client_handles import Listing, TaskHandle, View
from zndraw_joblib.client_transport import (
    CONNECT_SECONDS,
    LoginRefused,
    Transport,
    json_of,
    judge,
    path,
)
from zndraw_joblib.exceptions import JobNotFound
from zndraw_joblib.extension import Extension, as_json, category_of, check_parameters, parameters_of
from zndraw_joblib.lifecycle import FullName, check_room, split_full_name, visible_rooms

#: Where programs say whom to trust; the first that is set counts.
TRUST_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR")
# proxies commonly take a mebibyte
BATCH_BYTES = 512 * 1024
# of the question how much the host takes at once
LIMITS_RETRIES = 5


class HostApi:
    """A host, and a user of it: by a token, or by a name and a password.

    HTTP and Socket.IO have one address, one token, one trust and one proxy.

    Raises
    ------
    ValueError
        When the address can't be one, when neither a token nor a user with a password
        is given, or when the environment's proxy or certificates are no good.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        user: str | None = None,
        password: str | None = None,
    ) -> None:
        if token is None and (user is None or password is None):
            raise ValueError("give a token, or a user and a password")
        self.base_url = _check_url(base_url)
        self._authority = next(((n, os.environ[n]) for n in TRUST_VARIABLES if os.getenv(n)), None)
        self._proxy = proxy_for(httpx.URL(self.base_url))
        self._credentials = None if user is None else {"username": user, "password": password}
        self._token = token
        self._open()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        try:
            self._http = httpx.Client(
                timeout=CONNECT_SECONDS,
                event_hooks={"response": [self._forget_refused_token]},
                # both were read from the environment, for Socket.IO as well
                trust_env=False,
                verify=self._trust() or True,
                proxy=self._proxy,
            )
        except (ValueError, ImportError, httpx.InvalidURL) as exc:
            names = [name for name in os.environ if name.lower().endswith("_proxy")]
            raise ValueError(
                f"the proxy of the environment ({', '.join(names)}) can't be used: {exc}"
            ) from None

    @property
    def http(self) -> httpx.Client:
        """The client; in a fork of the process another one than in its parent."""
        if os.getpid() != self._pid:
            self._open()
        return self._http

    def socket_client(self) -> Any:
        """Return a Socket.IO client that trusts whom HTTP trusts, by the same proxy."""
        session = import_module("requests").session()
        session.trust_env = False
        options: dict[str, Any] = {}
        if self._authority is not None:
            session.verify = self._authority[1]
            options["sslopt"] = {"context": self._trust()}
        if self._proxy is not None:
            session.proxies = {"http": self._proxy, "https": self._proxy}
        # else the library would look at the environment by itself
        options["http_no_proxy"] = ["*"] if self._proxy is None else ["-"]
        return import_module("socketio").Client(
            # signals are for the program to handle
            handle_sigint=False,
            http_session=session,
            websocket_extra_options=options,
        )

    def get_headers(self) -> dict[str, str]:
        """Return the ``Authorization`` header, after logging in if need be."""
        return {"Authorization": f"Bearer {self.token()}"}

    def token(self) -> str:
        """Return a token that the host has not refused yet.

        Raises
        ------
        PermissionError
            When the host refuses user and password.
        ConnectionError
            When it can't be reached.
        ValueError
            When the token can't be one.
        """
        http = self.http
        with self._lock:
            if self._token is None:
                self._token = self._log_in(http)
            token = self._token
        # the token itself is in no message
        if not token:
            raise ValueError("the token is empty")
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError(
                "the token has a blank, a line break or another character that no token"
                " has: read from a file, it has to be stripped"
            )
        return token

    def raise_for_status(self, response: Any) -> None:
        """Raise KeyError (404), PermissionError (401, 403), ValueError, ConnectionError (5xx)."""
        status = response.status_code
        if status < 400:
            return
        problem = json_of(response)
        detail = f"answered {status}"
        if isinstance(problem, dict):
            detail = str(problem.get("detail") or problem.get("title"))
        kinds = {401: PermissionError, 403: PermissionError, 404: KeyError}
        raise kinds.get(status, ValueError if status < 500 else ConnectionError)(detail)

    def close(self) -> None:
        """Close the connections to the host."""
        self._http.close()

    def _trust(self) -> ssl.SSLContext | None:
        """Return what checks the host's certificate, if the environment says whom to trust."""
        if self._authority is None:
            return None
        name, place = self._authority
        try:
            if os.path.isdir(place):
                return ssl.create_default_context(capath=place)
            return ssl.create_default_context(cafile=place)
        except OSError as exc:
            raise ValueError(f"{name}={place}: {exc}") from None

    def _log_in(self, http: httpx.Client) -> str:
        url = f"{self.base_url}/auth/jwt/login"
        response = http.post(url, data=self._credentials)
        if response.status_code in (400, 401, 403, 422) and json_of(response):
            raise LoginRefused(
                f"{self.base_url} refuses this user and password: the user is to be the"
                " address that was registered there"
            )
        return str(judge(response, lambda body: body["access_token"], url).value)

    def _forget_refused_token(self, response: httpx.Response) -> None:
        if response.status_code != 401 or self._credentials is None:
            return
        with self._lock:
            # another thread may have logged in since this request was sent
            if response.request.headers.get("Authorization") == f"Bearer {self._token}":
                self._token = None


def _check_url(given: str) -> str:
    try:
        url = httpx.URL(given.strip())
    except httpx.InvalidURL as exc:
        raise ValueError(f"{given!r} is not an address: {exc}") from None
    if url.userinfo:
        raise ValueError("credentials don't belong into the address: give user and password")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(
            f"{given!r} is not the address of a host: it has to begin with http:// or"
            " https://, as http://127.0.0.1:8000 does"
        )
    return str(url.copy_with(query=None, fragment=None)).rstrip("/")


def proxy_for(url: httpx.URL) -> str | None:
    """Return the proxy by which the environment wants this address reached, if any."""
    proxies = getproxies()
    for entry in proxies.get("no", "").split(","):
        try:
            if ip_address(url.host) in ip_network(entry.strip(" []"), strict=False):
                return None
        except ValueError:
            # a name, for which the standard library looks
            continue
    if proxy_bypass(url.host):
        return None
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


class Submitting(TypedDict, total=False):
    """What may be said of a submission beside the room."""

    job_room: str | None
    priority: int
    delay_seconds: float
    idempotency_key: str | None


class Submissions:
    """How tasks get to a host."""

    def __init__(self, transport: Transport, view: View) -> None:
        self._transport = transport
        self._view = view

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
        return self._submit_named(job, parameters or {}, room, how)

    def submit_many(
        self, extensions: Iterable[Extension], room: str, how: Submitting
    ) -> Listing[TaskHandle]:
        """Submit tasks, as many of one job as the host takes in one request."""
        job_room = how.get("job_room")
        rooms = (job_room,) if job_room else visible_rooms(room)
        return self._send(((_jobs(e, rooms), parameters_of(e)) for e in extensions), room, how)

    def _submit_named(
        self, name: str, parameters: dict[str, Any], room: str, how: Submitting
    ) -> TaskHandle:
        job = self._view.job(room, name)
        schema = job.schema_
        if "properties" in schema and "additionalProperties" not in schema:
            check_parameters(name, parameters, schema["properties"])
        task = (split_full_name(job.full_name),), as_json(parameters, "payload")
        return self._send([task], room, how)[0]

    def _send(
        self, tasks: Iterable[tuple[tuple[FullName, ...], Any]], room: str, how: Submitting
    ) -> Listing[TaskHandle]:
        """Submit payloads, each to the first of some jobs that is there."""
        key = how.get("idempotency_key") or uuid.uuid4().hex
        # what is not asked for is left out: an older host does not know it
        options = {word: how[word] for word in ("priority", "delay_seconds") if how.get(word)}
        bodies = ((jobs, _encoded({"payload": payload, **options})) for jobs, payload in tasks)
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
                limits = self._transport.limits(LIMITS_RETRIES)
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
            return [self._view.task(task_id) for task_id in ids]

        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        if trace := telemetry.carried():
            headers["traceparent"] = trace
        alone = len(bodies) == 1
        for job in jobs:
            answer = self._transport.send(
                "post",
                path("rooms", check_room(room), "tasks" if alone else "batches", job),
                read=read,
                content=bodies[0] if alone else b'{"tasks":[%s]}' % b",".join(bodies),
                headers=headers,
            )
            if not answer.is_problem(JobNotFound):
                handles: list[TaskHandle] = self._transport.value(answer)
                return handles
        sought = job if len(jobs) == 1 else f"{job.category}:{job.name}"
        raise self._view.not_found("jobs", room, str(sought))


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


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
