"""A user of a host: who asks, and what they submit and wait for. It needs no worker."""

import json
import math
import os
import ssl
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from ipaddress import ip_address, ip_network
from itertools import groupby
from operator import itemgetter
from typing import Any
from urllib.request import getproxies, proxy_bypass
from uuid import UUID

import httpx

from zndraw_joblib import telemetry
from zndraw_joblib.client_transport import (
    CONNECT_SECONDS,
    Answer,
    LoginRefused,
    Transport,
    Unreachable,
    json_of,
    judge,
    path,
    prefer,
)
from zndraw_joblib.extension import Extension, category_of, parameters_of
from zndraw_joblib.lifecycle import TERMINAL, FullName, TaskStatus, check_room
from zndraw_joblib.schemas import TaskQueryResponse, TaskResponse

#: Where programs say whom to trust; the first that is set counts.
TRUST_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_DIR")
# proxies commonly take a mebibyte
BATCH_BYTES = 512 * 1024
# of the question how much the host takes at once
LIMITS_RETRIES = 5
BAR_WIDTH = 40


class TaskFailed(Exception):
    """A task that was waited for ended as failed or cancelled.

    Attributes
    ----------
    task : TaskResponse
        The task, ``task.error`` and ``task.errors`` among the rest.
    """

    def __init__(self, task: TaskResponse) -> None:
        super().__init__(f"task {task.id} {task.status.value}: {task.error}")
        self.task = task


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
            raise LoginRefused(f"{self.base_url} refuses this user and password")
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
            f"{given!r} is not the address of a host: it has to begin with http:// or https://"
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


class Submissions:
    """Tasks that are submitted and waited for."""

    def __init__(self, transport: Transport, polling_interval: float) -> None:
        self._transport = transport
        self._polling_interval = polling_interval

    def submit(
        self,
        extensions: Iterable[Extension],
        room: str,
        job_room: str,
        key: str,
        options: dict[str, Any],
    ) -> list[str]:
        """Submit tasks, as many of one job as the host takes in one request."""
        # what is not asked for is left out: an older host does not know it
        options = {word: value for word, value in options.items() if value}
        bodies = ((_job(e, job_room), _body(e, options)) for e in extensions)
        ids: list[str] = []
        number = 0
        for job, alike in groupby(bodies, key=itemgetter(0)):
            for batch in self._batches(body for _, body in alike):
                ids += self._submit(room, job, batch, f"{key}-{number}" if number else key)
                number += 1
        return ids

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

    def _submit(self, room: str, job: FullName, bodies: list[bytes], key: str) -> list[str]:
        def read(answer: dict[str, Any]) -> list[str]:
            ids = [answer["id"]] if len(bodies) == 1 else answer["ids"]
            if len(ids) != len(bodies):
                raise ValueError("it is about other tasks")
            return [str(task_id) for task_id in ids]

        headers = {"Idempotency-Key": key, "Content-Type": "application/json"}
        if trace := telemetry.carried():
            headers["traceparent"] = trace
        alone = len(bodies) == 1
        answer = self._transport.send(
            "post",
            path("rooms", check_room(room), "tasks" if alone else "batches", job),
            read=read,
            content=bodies[0] if alone else b'{"tasks":[%s]}' % b",".join(bodies),
            headers=headers,
        )
        ids: list[str] = self._transport.value(answer)
        return ids

    def wait_for(self, task_id: str, timeout: float | None) -> TaskResponse:
        """Wait until a task is completed; raise TaskFailed if it is not."""
        with _until(timeout) as deadline:
            task = self._wait_for(task_id, deadline)
        if task.status != TaskStatus.COMPLETED:
            raise TaskFailed(task)
        return task

    def wait_all(self, ids: list[str], timeout: float | None, progress: bool) -> list[TaskResponse]:
        """Wait until all of these tasks have ended."""
        # as the host writes them
        ids = [str(UUID(task_id)) for task_id in ids]
        # duplicates apart, in their order
        left = list(dict.fromkeys(ids))
        total = len(left)
        ended: dict[str, TaskResponse] = {}
        with _until(timeout) as deadline:
            while left:
                ended |= self._ended_of(left, deadline)
                left = [task_id for task_id in left if task_id not in ended]
                if progress:
                    _show(len(ended), total)
        return [ended[task_id] for task_id in ids]

    def _ended_of(self, ids: list[str], deadline: float) -> dict[str, TaskResponse]:
        """Return those of the first tasks that have ended, after a wait for all of these."""
        page = 1
        if len(ids) > 1:
            page = self._transport.limits().max_page
        if page == 1:
            return {ids[0]: self._wait_for(ids[0], deadline)}
        read, asked = TaskQueryResponse.model_validate, {"ids": ids[:page]}
        answer = self._ask("post", path("tasks", "query"), deadline, read=read, json=asked)
        found: TaskQueryResponse = answer.value
        if found.missing:
            raise KeyError(f"there is no task {found.missing[0]}")
        ended = {
            # what is too large for one answer to many has to be asked for by itself
            str(task.id): self._wait_for(str(task.id), deadline) if task.abridged else task
            for task in found.tasks
            if task.status in TERMINAL
        }
        for task in found.tasks:
            if task.status not in TERMINAL:
                self._pause(task, answer, deadline)
                break
        return ended

    def _wait_for(self, task_id: str, deadline: float) -> TaskResponse:
        read = TaskResponse.model_validate
        while True:
            answer = self._ask("get", path("tasks", task_id), deadline, read=read)
            task: TaskResponse = answer.value
            if task.status in TERMINAL:
                return task
            self._pause(task, answer, deadline)

    def _ask(self, method: str, path: str, deadline: float, **content: Any) -> Answer:
        """Ask for what is to be waited for, and let the host wait."""
        wait = int(min(max(0.0, deadline - time.monotonic()), self._transport.longest_wait))
        answer = self._transport.send(
            method,
            path,
            headers=prefer(wait),
            timeout=wait + CONNECT_SECONDS,
            patience=self._patience(deadline),
            **content,
        )
        self._transport.value(answer)
        return answer

    def _patience(self, deadline: float) -> float:
        return min(max(0.0, deadline - time.monotonic()), self._transport.patience)

    def _pause(self, task: TaskResponse, answer: Answer, deadline: float) -> None:
        """Wait until it is worth to ask again for a task that goes on."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"task {task.id} is still {task.status.value}")
        if not answer.waited:
            # less than a second is left, or the host does not wait
            time.sleep(min(left, self._polling_interval))


def _show(ended: int, total: int) -> None:
    bar = "#" * (BAR_WIDTH * ended // total)
    # a service's process may have no stream to draw on
    with suppress(Exception):
        end = "\n" if ended == total else ""
        sys.stderr.write(f"\r[{bar:<{BAR_WIDTH}}] {ended} of {total} tasks{end}")
        sys.stderr.flush()


def _job(extension: Extension, job_room: str) -> FullName:
    return FullName.of(job_room, category_of(extension), type(extension).__name__)


def _body(extension: Extension, options: dict[str, Any]) -> bytes:
    body = {"payload": parameters_of(extension), **options}
    return json.dumps(body, allow_nan=False, ensure_ascii=False).encode()


@contextmanager
def _until(timeout: float | None) -> Iterator[float]:
    """Yield when to give up, by `time.monotonic`; a host away by then is a TimeoutError."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    try:
        yield deadline
    except Unreachable as exc:
        if time.monotonic() < deadline:
            raise
        raise TimeoutError(str(exc)) from None
