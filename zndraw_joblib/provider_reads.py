"""Brings a reader's request to its provider, and the provider's answer to its readers.

What the result backend holds of a request, each under a key of its own:

=========  =======================================================================
result     the bytes as uploaded; hosts read them
origin     which provider uploaded them; a result without it is nobody's
inflight   a mark: the request is in flight; hosts set and respect it
requested  whom it went to; what nobody requested is not kept
outcome    for some seconds: that there is a result, or why there is none
=========  =======================================================================
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from uuid import UUID

import anyio

from zndraw_joblib import exceptions
from zndraw_joblib.encoding import parse_json
from zndraw_joblib.events import Dispatcher, Emitter, ProviderRequest, providers_channel
from zndraw_joblib.lifecycle import INTERNAL_ROOM
from zndraw_joblib.results import ResultBackend
from zndraw_joblib.schemas import ProviderResponse
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
CHUNK_BYTES = 64 * 1024


class InFlight:
    """The requests that this process sent to providers and has no answers to."""

    def __init__(self) -> None:
        self._by_provider: dict[UUID, dict[str, asyncio.TimerHandle]] = {}
        self._sending: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return sum(map(len, self._by_provider.values()))

    async def send(self, sending: Coroutine[Any, Any, None]) -> None:
        """Send a request to its end, whoever gives up: others count on it."""
        task = asyncio.create_task(sending)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        await asyncio.shield(task)

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


@asynccontextmanager
async def reachable(seconds: float) -> AsyncIterator[None]:
    """Turn a result backend that fails, or takes longer, into 503."""
    try:
        with anyio.fail_after(seconds):
            yield
    except exceptions.ProblemException:
        raise
    except Exception as exc:
        log.warning("result backend unavailable: %r", exc)
        raise exceptions.ServiceUnavailable.exception(
            "results can't be reached right now", headers=_AGAIN
        ) from exc


@dataclass(frozen=True)
class Read:
    """What one set of parameters is to be read from a provider, and where answers wait."""

    provider: ProviderResponse
    # the hash of the parameters
    digest: str
    results: ResultBackend
    settings: JobLibSettings
    in_flight: InFlight

    def key(self, kind: str) -> str:
        """Return the result backend's key of one part of what is held of the read."""
        return f"provider-{kind}:{self.provider.full_name}:{self.digest}"

    @property
    def outcome_key(self) -> str:
        """The key of the outcome."""
        # by id: what becomes of another provider's request wakes nobody here
        return f"provider-outcome:{self.provider.id}:{self.digest}"

    @property
    def origin(self) -> bytes:
        """What is kept with a result, to tell whose it is."""
        # bytes of one content type are not answered as another
        return f"{self.provider.id} {self.provider.content_type}".encode()

    @property
    def recipient(self) -> str:
        """Whom a request goes to: another worker may take the provider over."""
        return f"{self.provider.id} {self.provider.worker_id}"


async def cached(read: Read) -> bytes | None:
    """Return a result that this very provider uploaded.

    One whose origin isn't known, since a full cache let it go, is nobody's.
    """
    data = await read.results.get(read.key("result"))
    if data is None or await read.results.get(read.key("origin")) != read.origin:
        return None
    return data


async def fetch(read: Read, send: Callable[[], Awaitable[None]], seconds: float) -> bytes:
    """Request an answer, unless it is requested already, and return it when it comes.

    Parameters
    ----------
    read : Read
        What is read.
    send : coroutine function
        Sends the request to its provider.
    seconds : float
        Longest wait.

    Raises
    ------
    ProblemException
        ``provider-timeout``, or what the provider says went wrong.
    """
    deadline = anyio.current_time() + seconds
    while True:
        await read.in_flight.send(_request(read, send))
        outcome: bytes | None = None
        while outcome is None and (left := deadline - anyio.current_time()) > 0:
            # in turns: what is not told is found
            turn = min(left, read.settings.recheck_seconds)
            outcome = await read.results.wait_for_key(read.outcome_key, turn)
            if outcome is not None and outcome.startswith(_FAILED):
                read.in_flight.remove(read.provider.id, read.digest)
                raise _failure(outcome.removeprefix(_FAILED))
            data = await cached(read)
            if data is not None:
                read.in_flight.remove(read.provider.id, read.digest)
                return data
        if outcome is None:
            raise exceptions.ProviderTimeout.exception(
                f"provider {read.provider.full_name} did not answer within {seconds:g} s",
                headers=_AGAIN,
            )
        # the result has gone already
        await read.results.delete(read.outcome_key)


async def _request(read: Read, send: Callable[[], Awaitable[None]]) -> None:
    """Send a request to its provider, unless it is in flight.

    If it can't be sent, all who wait for its outcome are told.
    """
    settings = read.settings
    if not await _mark(read):
        return
    if await cached(read) is not None:
        # answered since the reader looked
        await _settle(read, _ANSWERED)
        return
    sent = False
    problem = exceptions.ServiceUnavailable.create("the request can't be sent to its provider")
    ttl, most = settings.provider_inflight_ttl_seconds, settings.max_requests_per_provider
    try:
        if not read.in_flight.add(read.provider.id, read.digest, ttl, most):
            problem = exceptions.ServerBusy.create("too many requests wait for this provider")
            return
        with anyio.fail_after(settings.dispatch_timeout_seconds):
            await send()
        sent = True
    except Exception:
        log.exception("request for %s did not leave", read.provider.full_name)
    finally:
        if not sent:
            outcome = _FAILED + problem.model_dump_json().encode()
            # also when this reader is cancelled: others wait for it
            patience = settings.dispatch_timeout_seconds
            with anyio.move_on_after(patience, shield=True), suppress(Exception):
                await _settle(read, outcome)


async def _mark(read: Read) -> bool:
    """Mark a request as in flight to this provider; tell whether it was not."""
    results, settings = read.results, read.settings
    ttl = settings.provider_inflight_ttl_seconds
    mark = read.key("inflight")
    if not await results.acquire_inflight(mark, ttl):
        if await results.get(read.key("requested")) in (None, read.recipient.encode()):
            return False
        # it went to a worker that has gone since: one reader takes it over
        if not await results.acquire_inflight(f"{mark}:{read.recipient}", ttl):
            return False
    # that of an earlier request; first, since others begin to wait for this one's
    await results.delete(read.outcome_key)
    # longer than the mark: an answer may be late, and is welcome
    late = ttl + settings.provider_result_ttl_seconds
    await results.store(read.key("requested"), read.recipient.encode(), late)
    return True


async def _is_requested(read: Read) -> bool:
    """Tell whether this provider was sent such a request, by this host or by others."""
    recipient = await read.results.get(read.key("requested"))
    if recipient is not None:
        return recipient.split()[0] == str(read.provider.id).encode()
    mark = read.key("inflight")
    if not await read.results.acquire_inflight(mark, 1):
        # a host that asked by itself
        return True
    await read.results.release_inflight(mark)
    return False


async def _settle(read: Read, outcome: bytes) -> None:
    """End a request: those who wait are told, and the next reader asks again."""
    read.in_flight.remove(read.provider.id, read.digest)
    await read.results.store(read.outcome_key, outcome, _OUTCOME_SECONDS)
    await read.results.delete(read.key("requested"))
    await read.results.release_inflight(read.key("inflight"))
    await read.results.notify_key(read.outcome_key)


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
        raise exceptions.InternalProviderNotConfigured.exception()

    async def dispatch() -> None:
        await registry.send(
            provider.full_name,
            subject=provider,
            provider_id=str(provider.id),
            request_id=digest,
            params=event.params,
        )

    return dispatch


def _failure(body: bytes) -> exceptions.ProblemException:
    """Return the problem that a provider uploaded, made whole where it is none."""
    problem = exceptions.ProviderExecutionFailed.create()
    try:
        uploaded = parse_json(body)
        if not isinstance(uploaded, dict):
            raise ValueError("not a problem")
        problem = exceptions.ProblemDetail.model_validate({**problem.model_dump(), **uploaded})
    except ValueError:
        problem.detail = body.decode(errors="replace") or problem.detail
    if not 400 <= problem.status <= 599:
        problem.status = exceptions.ProviderExecutionFailed.status
    return exceptions.ProblemException(problem, _AGAIN if problem.status == 503 else None)


async def read_upload(body: AsyncIterator[bytes], failed: bool, settings: JobLibSettings) -> bytes:
    """Read an upload up to its limit.

    Raises
    ------
    ProblemException
        ``payload-too-large``, before more than the limit is buffered.
    """
    limit = _MAX_FAILURE if failed else settings.provider_result_max_bytes
    # one growing block: chunks that are joined would need their size twice
    data = BytesIO()
    async for chunk in body:
        if data.tell() + len(chunk) > limit:
            raise exceptions.PayloadTooLarge.exception(f"a result is limited to {limit} bytes")
        data.write(chunk)
    return data.getvalue()


async def accept(read: Read, data: bytes, failed: bool) -> bool:
    """Give an upload to the readers that wait; keep it, unless it is a failure.

    What nobody asked for is dropped: it would take the place of others' results.

    Returns
    -------
    bool
        Whether there is a result to be read.
    """
    if not await _is_requested(read):
        log.debug("%s was not asked for", read.key("result"))
        return False
    if failed:
        await _settle(read, _FAILED + data)
        return False
    results, ttl = read.results, read.settings.provider_result_ttl_seconds
    # First whose it is, and again: a former provider's late upload, between the two, is
    # not this one's.
    await results.store(read.key("origin"), read.origin, ttl + 60)
    await results.store(read.key("result"), data, ttl)
    await results.store(read.key("origin"), read.origin, ttl + 60)
    await _settle(read, _ANSWERED)
    # hosts that wait for it themselves
    await results.notify_key(read.key("result"))
    return True


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    """Yield a large result in chunks."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]
