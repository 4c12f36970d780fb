"""Brings a reader's request to its provider, and the provider's answer to its readers."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import anyio

from zndraw_joblib.delivery import Dispatcher
from zndraw_joblib.events import Emitter, ProviderRequest, providers_channel
from zndraw_joblib.exceptions import (
    InternalProviderNotConfigured,
    PayloadTooLarge,
    ProblemException,
    ProviderExecutionFailed,
    ProviderTimeout,
    ServiceUnavailable,
)
from zndraw_joblib.names import INTERNAL_ROOM
from zndraw_joblib.results import ResultBackend
from zndraw_joblib.schemas import ProviderResponse, parse_json
from zndraw_joblib.settings import JobLibSettings

log = logging.getLogger(__name__)

# What a failure is kept as, for the seconds that its waiting readers need to be told.
_FAILURE = b"\x00zndraw-joblib problem 5f0c5a7e\x00"
_FAILURE_SECONDS = 5
_MAX_FAILURE = 64 * 1024


def result_key(full_name: str, digest: str) -> str:
    """Return the key of a result; hosts rely on it."""
    return f"provider-result:{full_name}:{digest}"


def inflight_key(full_name: str, digest: str) -> str:
    """Return the key of the mark that a request is under way; hosts rely on it."""
    return f"provider-inflight:{full_name}:{digest}"


def _origin_key(full_name: str, digest: str) -> str:
    return f"provider-origin:{full_name}:{digest}"


def _asked_key(full_name: str, digest: str) -> str:
    return f"provider-asked:{full_name}:{digest}"


@asynccontextmanager
async def reachable() -> AsyncIterator[None]:
    """Turn a result backend's failures into 503 for whoever needs it right now."""
    try:
        yield
    except ProblemException:
        raise
    except Exception as exc:
        log.warning("result backend unavailable: %s", exc)
        raise ServiceUnavailable.exception(
            "results can't be reached right now", headers={"Retry-After": "2"}
        ) from exc


async def cached(
    provider: ProviderResponse, digest: str, results: ResultBackend
) -> bytes | None:
    """Return a result that this very provider uploaded, or that the host put there."""
    data = await results.get(result_key(provider.full_name, digest))
    if data is None or data.startswith(_FAILURE):
        return None
    origin = await results.get(_origin_key(provider.full_name, digest))
    return data if origin in (None, _identity(provider.id)) else None


def _identity(provider_id: UUID) -> bytes:
    return str(provider_id).encode()


async def ask(
    provider: ProviderResponse,
    digest: str,
    results: ResultBackend,
    settings: JobLibSettings,
    send: Callable[[], Awaitable[None]],
) -> None:
    """Send a request to its provider, unless one is under way to the same worker.

    Raises
    ------
    ProblemException
        ``service-unavailable``; the request is not under way then.
    """
    mark = inflight_key(provider.full_name, digest)
    asked_key = _asked_key(provider.full_name, digest)
    asked = f"{provider.id} {provider.worker_id}".encode()
    ttl = settings.provider_inflight_ttl_seconds
    if not await results.acquire_inflight(mark, ttl):
        if await results.get(asked_key) in (None, asked):
            return
        # it was sent to a worker that has gone since
        await results.release_inflight(mark)
        if not await results.acquire_inflight(mark, ttl):
            return
    try:
        await results.store(asked_key, asked, ttl)
        # what an earlier provider of this name left must wake nobody
        await results.delete(result_key(provider.full_name, digest))
        with anyio.fail_after(settings.dispatch_timeout_seconds):
            await send()
    except BaseException as exc:
        with anyio.CancelScope(shield=True):
            await results.release_inflight(mark)
        if not isinstance(exc, Exception):
            raise
        log.exception("request for %s did not leave", provider.full_name)
        raise ServiceUnavailable.exception(
            "the request can't be sent to its provider", headers={"Retry-After": "2"}
        ) from exc


def sender(
    provider: ProviderResponse,
    params: dict[str, Any],
    digest: str,
    tsio: Emitter | None,
    registry: Dispatcher | None,
) -> Callable[[], Awaitable[None]]:
    """Return what sends a request: Socket.IO to a worker, the broker to the server's own.

    Raises
    ------
    ProblemException
        ``internal-provider-not-configured``.
    """
    event = ProviderRequest.from_dict_params(
        request_id=digest, provider_name=provider.full_name, params=params
    )
    if provider.room_id != INTERNAL_ROOM:

        async def emit() -> None:
            if tsio is None:
                raise RuntimeError("the host has no Socket.IO server")
            await tsio.emit(
                event.event_name(),
                event.model_dump(mode="json"),
                room=providers_channel(provider.full_name),
            )

        return emit
    if registry is None or provider.full_name not in registry:
        raise InternalProviderNotConfigured.exception()

    async def dispatch() -> None:
        await registry.send(
            provider.full_name,
            provider_id=str(provider.id),
            request_id=digest,
            params=event.params,
        )

    return dispatch


async def wait(
    provider: ProviderResponse,
    digest: str,
    results: ResultBackend,
    seconds: float,
    settings: JobLibSettings,
    hung_up: Callable[[], Awaitable[bool]],
) -> bytes:
    """Return the answer when it comes.

    Raises
    ------
    ProblemException
        ``provider-timeout``, or what the provider says went wrong.
    """
    deadline = anyio.current_time() + seconds
    key = result_key(provider.full_name, digest)
    while (left := deadline - anyio.current_time()) > 0 and not await hung_up():
        # in turns, so that a reader who hung up is noticed
        data = await results.wait_for_key(key, min(left, settings.recheck_seconds))
        if data is not None:
            if data.startswith(_FAILURE):
                raise _told(data.removeprefix(_FAILURE))
            return data
    raise ProviderTimeout.exception(
        f"provider {provider.full_name} did not answer within {seconds:g} s",
        headers={"Retry-After": "2"},
    )


def _told(body: bytes) -> ProblemException:
    try:
        told = parse_json(body)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        told = {"detail": body.decode(errors="replace")}
    status = told.get("status")
    problem = ProviderExecutionFailed.create(str(told.get("detail") or "") or None)
    if isinstance(status, int) and 400 <= status <= 599:
        problem.status = status
    if isinstance(told.get("title"), str):
        problem.title = told["title"]
    return ProblemException(problem)


async def take(
    body: AsyncIterator[bytes], failed: bool, settings: JobLibSettings
) -> bytes:
    """Read an upload up to its limit.

    Raises
    ------
    ProblemException
        ``payload-too-large``, before more than the limit is buffered.
    """
    limit = _MAX_FAILURE if failed else settings.provider_result_max_bytes
    chunks: list[bytes] = []
    size = 0
    async for chunk in body:
        size += len(chunk)
        if size > limit:
            raise PayloadTooLarge.exception(f"a result is limited to {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


async def answer(
    provider: ProviderResponse,
    digest: str,
    data: bytes,
    failed: bool,
    results: ResultBackend,
    settings: JobLibSettings,
) -> None:
    """Give an upload to the readers that wait; keep it, unless it is a failure."""
    key = result_key(provider.full_name, digest)
    if failed:
        await results.store(key, _FAILURE + data, _FAILURE_SECONDS)
    else:
        ttl = settings.provider_result_ttl_seconds
        # first whose it is, and for longer: a result alone would pass for the host's
        await results.store(
            _origin_key(provider.full_name, digest), _identity(provider.id), ttl + 60
        )
        await results.store(key, data, ttl)
    await results.release_inflight(inflight_key(provider.full_name, digest))
    await results.notify_key(key)
