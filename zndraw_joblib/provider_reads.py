"""Brings a reader's request to its provider, and the provider's answer to its readers.

What the result backend holds of a request, each under a key of its own:

========  =======================================================================
result    the bytes as uploaded; hosts read them, and may put some there
origin    which provider uploaded them
inflight  a mark: the request is in flight; hosts set and respect it
asked     whom it is in flight to
outcome   for some seconds: that there is a result, or why there is none
========  =======================================================================
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from typing import Any
from uuid import UUID

import anyio

from zndraw_joblib.delivery import Dispatcher
from zndraw_joblib.events import Emitter, ProviderRequest, providers_channel
from zndraw_joblib.exceptions import (
    InternalProviderNotConfigured,
    PayloadTooLarge,
    ProblemDetail,
    ProblemException,
    ProviderExecutionFailed,
    ProviderTimeout,
    ServerBusy,
    ServiceUnavailable,
)
from zndraw_joblib.lifecycle import INTERNAL_ROOM
from zndraw_joblib.results import ResultBackend
from zndraw_joblib.schemas import ProviderResponse, parse_json
from zndraw_joblib.settings import JobLibSettings

log = logging.getLogger(__name__)

_AGAIN = {"Retry-After": "2"}

# Outcomes; what follows `_FAILED` is the problem.
_ANSWERED = b"+"
_FAILED = b"-"
# As long as the readers that wait need to be told.
_OUTCOME_SECONDS = 5
_MAX_FAILURE = 64 * 1024
# A server buffers what it is handed, whole, for a reader who is slow to take it.
PIECE = 64 * 1024


class InFlight:
    """The requests that this process sent to providers and has no answers to."""

    def __init__(self) -> None:
        self._by_provider: dict[UUID, dict[str, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_provider.values()))

    def add(self, provider_id: UUID, digest: str, seconds: float, most: int) -> bool:
        """Count a request for so many seconds; False when its provider has ``most``."""
        others = self._by_provider.get(provider_id, {})
        if len(others) >= most:
            return False
        self.remove(provider_id, digest)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, self.remove, provider_id, digest)
        self._by_provider.setdefault(provider_id, {})[digest] = timer
        return True

    def remove(self, provider_id: UUID, digest: str) -> None:
        """Count a request no more."""
        others = self._by_provider.get(provider_id, {})
        timer = others.pop(digest, None)
        if timer is not None:
            timer.cancel()
            if not others:
                del self._by_provider[provider_id]

    def forget(self, provider_id: UUID) -> None:
        """Count none of a provider's requests: it is gone."""
        for digest in tuple(self._by_provider.get(provider_id, ())):
            self.remove(provider_id, digest)


def result_key(full_name: str, digest: str) -> str:
    """Return the key of a result; hosts rely on it."""
    return f"provider-result:{full_name}:{digest}"


def inflight_key(full_name: str, digest: str) -> str:
    """Return the key of the mark that a request is in flight; hosts rely on it."""
    return f"provider-inflight:{full_name}:{digest}"


def _origin_key(full_name: str, digest: str) -> str:
    return f"provider-origin:{full_name}:{digest}"


def _asked_key(full_name: str, digest: str) -> str:
    return f"provider-asked:{full_name}:{digest}"


def _outcome_key(provider: ProviderResponse, digest: str) -> str:
    # by id: what becomes of another provider's request wakes nobody here
    return f"provider-outcome:{provider.id}:{digest}"


@asynccontextmanager
async def reachable(seconds: float) -> AsyncIterator[None]:
    """Turn a result backend that fails, or takes longer, into 503."""
    try:
        with anyio.fail_after(seconds):
            yield
    except ProblemException:
        raise
    except Exception as exc:
        log.warning("result backend unavailable: %r", exc)
        raise ServiceUnavailable.exception(
            "results can't be reached right now", headers=_AGAIN
        ) from exc


async def cached(
    provider: ProviderResponse, digest: str, results: ResultBackend
) -> bytes | None:
    """Return a result that this very provider uploaded, or that the host put there."""
    data = await results.get(result_key(provider.full_name, digest))
    if data is None:
        return None
    origin = await results.get(_origin_key(provider.full_name, digest))
    return data if origin in (None, _identity(provider)) else None


def _identity(provider: ProviderResponse) -> bytes:
    # bytes of one content type are not answered as another
    return f"{provider.id} {provider.content_type}".encode()


async def ask(
    provider: ProviderResponse,
    digest: str,
    results: ResultBackend,
    settings: JobLibSettings,
    send: Callable[[], Awaitable[None]],
    in_flight: InFlight,
) -> None:
    """Send a request to its provider, unless it is in flight.

    If it can't be sent, all who wait for its outcome are told.
    """
    if not await _mark(
        provider, digest, results, _whole(settings.provider_inflight_ttl_seconds)
    ):
        return
    if await cached(provider, digest, results) is not None:
        # answered since the reader looked
        await _settle(provider, digest, _ANSWERED, results, in_flight)
        return
    sent = False
    problem = ServiceUnavailable.create("the request can't be sent to its provider")
    try:
        most, ttl = (
            settings.max_requests_per_provider,
            settings.provider_inflight_ttl_seconds,
        )
        if not in_flight.add(provider.id, digest, ttl, most):
            problem = ServerBusy.create("too many requests wait for this provider")
            return
        with anyio.fail_after(settings.dispatch_timeout_seconds):
            await send()
        sent = True
    except Exception:
        log.exception("request for %s did not leave", provider.full_name)
    finally:
        if not sent:
            outcome = _FAILED + problem.model_dump_json().encode()
            # also when this reader is cancelled: others wait for it
            patience = settings.dispatch_timeout_seconds
            with anyio.move_on_after(patience, shield=True), suppress(Exception):
                await _settle(provider, digest, outcome, results, in_flight)


async def _mark(
    provider: ProviderResponse, digest: str, results: ResultBackend, ttl: float
) -> bool:
    """Mark a request as in flight to this provider; tell whether it was not."""
    mark = inflight_key(provider.full_name, digest)
    asked_key = _asked_key(provider.full_name, digest)
    whom = f"{provider.id} {provider.worker_id}"
    if not await results.acquire_inflight(mark, ttl):
        if await results.get(asked_key) in (None, whom.encode()):
            return False
        # it went to a worker that has gone since: one reader takes it over
        if not await results.acquire_inflight(f"{mark}:{whom}", ttl):
            return False
    # that of an earlier request; first, since others begin to wait for this one's
    await results.delete(_outcome_key(provider, digest))
    await results.store(asked_key, whom.encode(), ttl)
    return True


def _whole(seconds: float) -> int:
    # hosts' backends hand a time to live on to Redis, which takes no fractions
    return math.ceil(seconds)


async def _settle(
    provider: ProviderResponse,
    digest: str,
    outcome: bytes,
    results: ResultBackend,
    in_flight: InFlight,
) -> None:
    """End a request: those who wait are told, and the next reader asks again."""
    in_flight.remove(provider.id, digest)
    key = _outcome_key(provider, digest)
    await results.store(key, outcome, _OUTCOME_SECONDS)
    await results.delete(_asked_key(provider.full_name, digest))
    await results.release_inflight(inflight_key(provider.full_name, digest))
    await results.notify_key(key)


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
                event.event_name,
                event.model_dump(mode="json"),
                room=providers_channel(provider.full_name),
            )

        return emit
    if registry is None or provider.full_name not in registry:
        raise InternalProviderNotConfigured.exception()

    async def dispatch() -> None:
        await registry.send(
            provider.full_name,
            subject=provider,
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
    in_flight: InFlight,
) -> bytes:
    """Return the answer when it comes.

    Raises
    ------
    ProblemException
        ``provider-timeout``, or what the provider says went wrong.
    """
    deadline = anyio.current_time() + seconds
    key = _outcome_key(provider, digest)
    while (left := deadline - anyio.current_time()) > 0:
        # in turns, so that a result that the host put there is noticed
        outcome = await results.wait_for_key(key, min(left, settings.recheck_seconds))
        if outcome is not None and outcome.startswith(_FAILED):
            in_flight.remove(provider.id, digest)
            raise _told(outcome.removeprefix(_FAILED))
        data = await cached(provider, digest, results)
        if data is not None:
            in_flight.remove(provider.id, digest)
            return data
        if outcome is not None:
            # the result has gone already: without this the next turn would not wait
            await results.delete(key)
    raise ProviderTimeout.exception(
        f"provider {provider.full_name} did not answer within {seconds:g} s",
        headers=_AGAIN,
    )


def _told(body: bytes) -> ProblemException:
    """Return the problem that a provider uploaded, made whole where it is none."""
    problem = ProviderExecutionFailed.create()
    try:
        told = parse_json(body)
        if not isinstance(told, dict):
            raise ValueError("not a problem")
        problem = ProblemDetail.model_validate({**problem.model_dump(), **told})
    except ValueError:
        problem.detail = body.decode(errors="replace") or problem.detail
    if not 400 <= problem.status <= 599:
        problem.status = ProviderExecutionFailed.status
    return ProblemException(problem, _AGAIN if problem.status == 503 else None)


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
    # one growing block: chunks that are joined would need their size twice
    taken = BytesIO()
    async for chunk in body:
        if taken.tell() + len(chunk) > limit:
            raise PayloadTooLarge.exception(f"a result is limited to {limit} bytes")
        taken.write(chunk)
    return taken.getvalue()


async def answer(
    provider: ProviderResponse,
    digest: str,
    data: bytes,
    failed: bool,
    results: ResultBackend,
    settings: JobLibSettings,
    in_flight: InFlight,
) -> None:
    """Give an upload to the readers that wait; keep it, unless it is a failure."""
    if failed:
        await _settle(provider, digest, _FAILED + data, results, in_flight)
        return
    key = result_key(provider.full_name, digest)
    origin_key = _origin_key(provider.full_name, digest)
    ttl = _whole(settings.provider_result_ttl_seconds)
    # First whose it is, and for longer: a result alone would pass for the host's. And
    # again: a former provider's late upload, between the two, is not this one's.
    await results.store(origin_key, _identity(provider), ttl + 60)
    await results.store(key, data, ttl)
    await results.store(origin_key, _identity(provider), ttl + 60)
    await _settle(provider, digest, _ANSWERED, results, in_flight)
    # hosts that wait for it themselves
    await results.notify_key(key)


async def pieces(data: bytes) -> AsyncIterator[bytes]:
    """Yield a large result in pieces."""
    for start in range(0, len(data), PIECE):
        yield data[start : start + PIECE]
