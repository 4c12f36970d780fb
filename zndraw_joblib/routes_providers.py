"""The routes of providers: register, list, read, upload, withdraw."""

from functools import partial
from typing import Annotated, Literal
from uuid import UUID

from fastapi import Header, Query, Request, Response, status
from fastapi.responses import StreamingResponse
from zndraw_auth.db import SessionDep

from zndraw_joblib import long_polls, provider_reads, providers, validation, workers
from zndraw_joblib.dependencies import (
    Access,
    CurrentUser,
    PageQuery,
    Results,
    Sessions,
    WaitingUser,
    Writable,
    context_of,
    enter,
    get_internal_providers,
    json_response,
    look_up,
    page_response,
    preferred_wait,
    query_params,
    request_hash,
    wait_headers,
)
from zndraw_joblib.exceptions import (
    Forbidden,
    InternalProviderNotConfigured,
    InvalidCategory,
    InvalidSchema,
    PayloadTooLarge,
    ProviderExecutionFailed,
    ProviderNotFound,
    ProviderTimeout,
    QuotaExceeded,
    ServiceUnavailable,
    WorkerNotFound,
)
from zndraw_joblib.lifecycle import GLOBAL_ROOM, INTERNAL_ROOM, FullName
from zndraw_joblib.problem_route import (
    ANYTHING,
    BODY,
    PREFER,
    ROOM,
    WAITING,
    Responses,
    new_router,
    problems,
)
from zndraw_joblib.schemas import PaginatedResponse, ProviderRegisterRequest, ProviderResponse

router = new_router()

_REPLACED: Responses = {200: {"model": ProviderResponse, "description": "It was replaced"}}
_BYTES: Responses = {200: {"content": ANYTHING}}

_ANY_QUERY = {
    "name": "params",
    "in": "query",
    "description": "Whatever the provider's schema asks for, each under its own name.",
    "style": "form",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": True},
}


@router.put(
    "/rooms/{room_id}/providers",
    response_model=ProviderResponse,
    status_code=status.HTTP_201_CREATED,
    responses=_REPLACED
    | problems(*ROOM, *BODY, InvalidCategory, InvalidSchema, WorkerNotFound, QuotaExceeded),
)
async def register_provider(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    _: Writable,
    room_id: str,
    body: ProviderRegisterRequest,
) -> Response:
    """Offer data, served by one of the caller's workers."""
    context = await context_of(request, user)
    caller, settings = context.caller, context.settings
    action = workers.Action("register", body.category)
    await enter(session, caller, room_id, may_enter, action)
    if room_id == INTERNAL_ROOM:
        raise Forbidden.exception("the server's own providers come from its code")
    if room_id == GLOBAL_ROOM and not caller.is_superuser:
        raise Forbidden.exception(f"registering in {room_id} needs a superuser")
    allowed = settings.allowed_provider_categories
    if allowed is not None and body.category not in allowed:
        raise InvalidCategory.exception(f"category {body.category!r} is not one of {allowed}")
    validation.check_schema(body.schema_)
    worker_id = await workers.mine(session, body.worker_id, caller, settings)
    provider, created = await providers.register(
        session,
        FullName(room_id, body.category, body.name),
        body.schema_,
        body.content_type,
        worker_id,
        caller,
        settings,
    )
    context.outbox.providers_changed([room_id])
    await context.commit(session)
    return json_response(provider, 201 if created else 200)


@router.get(
    "/rooms/{room_id}/providers",
    response_model=PaginatedResponse[ProviderResponse],
    responses=problems(*ROOM),
)
async def list_providers(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    query: Annotated[PageQuery, Query()],
) -> Response:
    """List the providers that the room sees."""
    context = await context_of(request, user)
    await enter(session, context.caller, room_id, may_enter)
    items, listing = await providers.list_visible(session, room_id, query.page(), context.settings)
    return page_response(request, query, listing, items)


@router.get(
    "/rooms/{room_id}/providers/{provider_name:fullname}/info",
    response_model=ProviderResponse,
    responses=problems(*ROOM, ProviderNotFound),
)
async def read_provider_info(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    provider_name: str,
) -> Response:
    """Show a provider that the room sees."""
    context = await context_of(request, user)
    await enter(session, context.caller, room_id, may_enter)
    return json_response(await providers.read(session, room_id, provider_name))


@router.get(
    "/rooms/{room_id}/providers/{provider_name:fullname}",
    responses=_BYTES
    | problems(
        *ROOM,
        ProviderNotFound,
        ProviderTimeout,
        InternalProviderNotConfigured,
        ProviderExecutionFailed,
        *WAITING,
        handed_on=True,
    ),
    openapi_extra={"parameters": [_ANY_QUERY, PREFER]},
)
async def read_provider(
    request: Request,
    user: WaitingUser,
    session_maker: Sessions,
    may_enter: Access,
    results: Results,
    room_id: str,
    provider_name: str,
) -> Response:
    """Ask a provider for what the query parameters say."""
    context = await context_of(request, user)
    settings, tsio = context.settings, context.transports.tsio
    registry = await look_up(request, get_internal_providers)

    async def look() -> ProviderResponse:
        async with session_maker() as session:
            await enter(session, context.caller, room_id, may_enter)
            return await providers.read(session, room_id, provider_name)

    provider = await look()
    params = query_params(request.query_params.multi_items())
    digest = request_hash(params)
    preferences = request.headers.getlist("prefer")
    wait = preferred_wait(preferences, settings.provider_long_poll_max_seconds)
    seconds = settings.provider_long_poll_default_seconds if wait is None else wait
    patience = seconds + 2 * settings.dispatch_timeout_seconds
    wanted = provider_reads.Read(provider, digest, results, settings, context.runtime.reads)
    async with provider_reads.reachable(patience):
        data = await provider_reads.cached(wanted)
        if data is None:
            send = provider_reads.sender(provider, params, digest, tsio, registry)
            fetch = partial(provider_reads.fetch, wanted, send, seconds)
            poll = context.long_poll(session_maker, seconds)
            data = await long_polls.for_answer(poll, provider.full_name, fetch)
    if data is None:
        # it is gone, or the server stops
        await look()
        raise ServiceUnavailable.exception(headers={"Retry-After": "1"})
    headers = {
        # as it stands: Response would add a charset to text
        "Content-Type": provider.content_type,
        "Content-Length": str(len(data)),
        "X-Content-Type-Options": "nosniff",
        **wait_headers(wait),
    }
    if len(data) <= provider_reads.CHUNK_BYTES:
        return Response(data, headers=headers)
    return StreamingResponse(provider_reads.chunks(data), headers=headers)


@router.post(
    "/providers/{provider_id}/results",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    responses=problems(ProviderNotFound, Forbidden, PayloadTooLarge),
    openapi_extra={"requestBody": {"content": ANYTHING}},
)
async def upload_result(
    request: Request,
    user: WaitingUser,
    session_maker: Sessions,
    may_enter: Access,
    results: Results,
    provider_id: UUID,
    x_request_hash: Annotated[str, Header(pattern="^[0-9a-fA-F]{64}$")],
    x_result_status: Annotated[Literal["ok", "error"], Header()] = "ok",
) -> None:
    """Answer a request that was sent to a provider."""
    context = await context_of(request, user)
    settings = context.settings

    async def look() -> ProviderResponse:
        async with session_maker() as session:
            return await providers.owned(session, provider_id, context.caller, may_enter)

    await look()
    failed = x_result_status == "error"
    data = await provider_reads.read_upload(request.stream(), failed, settings)
    digest = x_request_hash.lower()
    # again: it may have gone while the body came in
    provider = await look()
    answered = provider_reads.Read(provider, digest, results, settings, context.runtime.reads)
    # no reader waits longer
    async with provider_reads.reachable(settings.provider_long_poll_max_seconds):
        kept = await provider_reads.accept(answered, data, failed)
    if kept:
        context.outbox.result_ready(provider.full_name, digest, provider.room_id)
        context.publish()


@router.delete(
    "/providers/{provider_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    responses=problems(ProviderNotFound, Forbidden),
)
async def delete_provider(
    request: Request, user: CurrentUser, session: SessionDep, may_enter: Access, provider_id: UUID
) -> None:
    """Withdraw a provider."""
    context = await context_of(request, user)
    name = await providers.remove(session, provider_id, context.caller, may_enter)
    context.outbox.providers_gone([name])
    await context.commit(session)
    context.runtime.reads.forget(provider_id)
