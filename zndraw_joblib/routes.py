"""The HTTP surface: all routes, and those of workers, jobs and providers."""

from functools import partial
from typing import Annotated, Literal
from uuid import UUID

from fastapi import Header, Response
from fastapi.responses import StreamingResponse
from zndraw_auth.db import SessionDep

from zndraw_joblib import dependencies as deps
from zndraw_joblib import (
    exceptions,
    heartbeats,
    jobs,
    long_polls,
    operations,
    providers,
    routes_tasks,
    schemas,
    validation,
    workers,
)
from zndraw_joblib.delivery import lifespan
from zndraw_joblib.dependencies import Access, Paging, RequestContext, WaitingContext, enter
from zndraw_joblib.events import worker_key
from zndraw_joblib.lifecycle import INTERNAL_ROOM, SPECIAL_ROOMS, FullName
from zndraw_joblib.problem_route import (
    BODY,
    BYTES,
    JOB,
    PROVIDER,
    ROOM,
    WORKER,
    answers,
    new_router,
)
from zndraw_joblib.results import reachable
from zndraw_joblib.schemas import PaginatedResponse
from zndraw_joblib.sweeper import retire

router = new_router()
router.lifespan_context = lifespan


@router.get("/limits", **answers(schemas.Limits))
async def read_limits(context: WaitingContext) -> Response:
    """Tell what one request may ask for at most."""
    settings = context.settings
    limits = schemas.Limits(
        max_payload_bytes=settings.max_payload_bytes,
        max_result_bytes=max(settings.max_result_bytes, settings.max_payload_bytes),
        long_poll_max_wait_seconds=settings.long_poll_max_wait_seconds,
        worker_timeout_seconds=settings.worker_timeout_seconds,
    )
    return deps.json_response(limits)


# --- workers ---


@router.post(
    "/workers", **answers(schemas.WorkerResponse, *BODY, exceptions.QuotaExceeded, status=201)
)
async def create_worker(
    context: RequestContext, session: SessionDep, body: schemas.WorkerDescription | None = None
) -> Response:
    """Make a worker that belongs to the caller."""
    row = await workers.create(session, context.caller.id, context.settings, body)
    await context.commit(session)
    return deps.json_response(schemas.WorkerResponse(**row._mapping), 201)


@router.get("/workers", **answers(PaginatedResponse[schemas.WorkerSummary]))
async def list_workers(context: RequestContext, session: SessionDep, page: Paging) -> Response:
    """List all workers."""
    items, listing = await operations.list_workers(session, page, context.caller, context.settings)
    return deps.page_response(context.request, page, listing, items)


@router.patch("/workers/{worker_id}", **answers(schemas.HeartbeatResponse, *BODY, *WORKER))
async def heartbeat(
    context: RequestContext,
    session: SessionDep,
    worker_id: UUID,
    body: schemas.WorkerUpdateRequest | None = None,
) -> Response:
    """Take a sign of life, with what the worker's tasks are at."""
    beat = body or schemas.WorkerUpdateRequest()
    kept = await heartbeats.beat(session, worker_id, context.caller, beat, context.settings)
    if beat.state is not None:
        context.outbox.ended.append(worker_key(worker_id))
    context.outbox.tasks_changed(kept.progressed)
    context.outbox.logged += kept.logged
    await context.commit(session)
    return deps.json_response(kept.answer)


@router.delete("/workers/{worker_id}", **answers(None, *WORKER, status=204))
async def delete_worker(context: RequestContext, session: SessionDep, worker_id: UUID) -> None:
    """Remove a worker; what it held is failed or tried again."""
    chosen = workers.commanded(worker_id, context.caller)
    if not await retire(session, chosen, context.settings, context.outbox):
        raise await workers.refusal(session, worker_id)
    await context.commit(session)


@router.get("/rooms/{room_id}/workers", **answers(PaginatedResponse[schemas.WorkerSummary], *ROOM))
async def list_room_workers(
    context: RequestContext, session: SessionDep, may_enter: Access, room_id: str, page: Paging
) -> Response:
    """List the workers of the jobs that the room sees."""
    await enter(session, context.caller, room_id, may_enter)
    items, listing = await operations.list_workers(
        session, page, context.caller, context.settings, room_id
    )
    return deps.page_response(context.request, page, listing, items)


# --- jobs ---


async def _serving(
    context: deps.Context,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    body: schemas.JobRegisterRequest | schemas.ProviderRegisterRequest,
    categories: list[str] | None,
) -> UUID:
    """Return the worker that is to serve a job or provider, if the caller may offer it."""
    action = workers.Action("register", body.category)
    await enter(session, context.caller, room_id, may_enter, action)
    if room_id in SPECIAL_ROOMS and not context.caller.is_superuser:
        raise exceptions.Forbidden.exception(f"registering in {room_id} needs a superuser")
    if categories is not None and body.category not in categories:
        detail = f"category {body.category!r} is not one of {categories}"
        raise exceptions.InvalidCategory.exception(detail)
    validation.check_schema(body.schema_)
    return await workers.mine(
        session, body.worker_id, context.caller, context.settings, body.worker
    )


OFFERING = (
    *ROOM,
    *BODY,
    exceptions.InvalidCategory,
    exceptions.InvalidSchema,
    exceptions.WorkerNotFound,
    exceptions.QuotaExceeded,
)


@router.put(
    "/rooms/{room_id}/jobs",
    **answers(
        schemas.JobResponse,
        *OFFERING,
        exceptions.SchemaConflict,
        status=201,
        or_200="It was there already",
    ),
)
async def register_job(
    context: RequestContext,
    session: SessionDep,
    may_enter: Access,
    _: deps.Writable,
    room_id: str,
    body: schemas.JobRegisterRequest,
) -> Response:
    """Offer a job, served by one of the caller's workers."""
    caller, settings = context.caller, context.settings
    categories = settings.allowed_categories
    worker_id = await _serving(context, session, may_enter, room_id, body, categories)
    policy = body.model_dump(include=body.model_fields_set & set(schemas.JobPolicy.model_fields))
    name = FullName(room_id, body.category, body.name)
    registered = await jobs.register(
        session, name, body.schema_, policy, worker_id, caller, settings, replace=body.replace
    )
    job = await jobs.read(
        session,
        registered.job_id,
        settings,
        worker_id=worker_id,
        policy_kept=registered.policy_kept,
    )
    # a claim of this worker may wait for other jobs only, and of these for no such job
    context.outbox.ended += map(worker_key, [worker_id, *(registered.replaced or ())])
    if registered.created or registered.joined or registered.replaced is not None:
        context.outbox.jobs_changed([room_id])
    await context.commit(session)
    return deps.json_response(job, 201 if registered.created else 200)


@router.get("/rooms/{room_id}/jobs", **answers(PaginatedResponse[schemas.JobSummary], *ROOM))
async def list_jobs(
    context: RequestContext, session: SessionDep, may_enter: Access, room_id: str, page: Paging
) -> Response:
    """List the jobs that the room sees."""
    await enter(session, context.caller, room_id, may_enter)
    items, listing = await jobs.list_visible(session, room_id, page, context.settings)
    return deps.page_response(context.request, page, listing, items)


@router.get("/rooms/{room_id}/stats", **answers(PaginatedResponse[schemas.JobStats], *ROOM))
async def read_stats(
    context: RequestContext, session: SessionDep, may_enter: Access, room_id: str, page: Paging
) -> Response:
    """Show what goes on in the jobs that the room sees, over all rooms."""
    await enter(session, context.caller, room_id, may_enter)
    items, listing = await operations.list_stats(session, room_id, page, context.settings)
    return deps.page_response(context.request, page, listing, items)


# the tasks of a job first: a job's name takes what follows it
router.routes += routes_tasks.router.routes


@router.get("/rooms/{room_id}/jobs/{job_name:fullname}", **answers(schemas.JobResponse, *JOB))
async def read_job(
    context: RequestContext, session: SessionDep, may_enter: Access, room_id: str, job_name: str
) -> Response:
    """Show a job that the room sees."""
    await enter(session, context.caller, room_id, may_enter)
    job = await jobs.read_named(session, room_id, job_name, context.settings)
    return deps.json_response(job)


@router.patch(
    "/rooms/{room_id}/jobs/{job_name:fullname}", **answers(schemas.JobResponse, *JOB, *BODY)
)
async def update_job(
    context: RequestContext,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    job_name: str,
    body: schemas.JobUpdateRequest,
) -> Response:
    """Pause a job, or let it go on."""
    # where the job is: of one that all rooms see, none of them decides
    owner = jobs.find_name(deps.validate_room_id(room_id), job_name).room
    await enter(session, context.caller, owner, may_enter, workers.OPERATE)
    job = await jobs.require(session, room_id, job_name, context.settings)
    changed, waiting = await operations.pause(session, job, body.paused)
    if changed:
        context.outbox.jobs_changed([owner])
        context.outbox.job_resumed(str(job.name), waiting)
    updated = await jobs.read(session, job.id, context.settings)
    await context.commit(session)
    return deps.json_response(updated)


# --- providers ---


@router.put(
    "/rooms/{room_id}/providers",
    **answers(schemas.ProviderResponse, *OFFERING, status=201, or_200="It was replaced"),
)
async def register_provider(
    context: RequestContext,
    session: SessionDep,
    may_enter: Access,
    _: deps.Writable,
    room_id: str,
    body: schemas.ProviderRegisterRequest,
) -> Response:
    """Offer data, served by one of the caller's workers."""
    if room_id == INTERNAL_ROOM:
        raise exceptions.Forbidden.exception("the server's own providers come from its code")
    categories = context.settings.allowed_provider_categories
    worker_id = await _serving(context, session, may_enter, room_id, body, categories)
    provider, created = await providers.register(
        session,
        FullName(room_id, body.category, body.name),
        body.schema_,
        body.content_type,
        worker_id,
        context.caller,
        context.settings,
    )
    context.outbox.providers_changed([room_id])
    await context.commit(session)
    return deps.json_response(provider, 201 if created else 200)


@router.get(
    "/rooms/{room_id}/providers", **answers(PaginatedResponse[schemas.ProviderResponse], *ROOM)
)
async def list_providers(
    context: RequestContext, session: SessionDep, may_enter: Access, room_id: str, page: Paging
) -> Response:
    """List the providers that the room sees."""
    await enter(session, context.caller, room_id, may_enter)
    items, listing = await providers.list_visible(session, room_id, page, context.settings)
    return deps.page_response(context.request, page, listing, items)


@router.get(
    "/rooms/{room_id}/providers/{provider_name:fullname}/info",
    **answers(schemas.ProviderResponse, *ROOM, exceptions.ProviderNotFound),
)
async def read_provider_info(
    context: RequestContext,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    provider_name: str,
) -> Response:
    """Show a provider that the room sees."""
    await enter(session, context.caller, room_id, may_enter)
    return deps.json_response(await providers.read(session, room_id, provider_name))


_ANY_QUERY = {
    "name": "params",
    "in": "query",
    "description": "Whatever the provider's schema asks for, each under its own name.",
    "style": "form",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": True},
}


@router.get(
    "/rooms/{room_id}/providers/{provider_name:fullname}",
    **answers(
        bytes,
        *ROOM,
        exceptions.ProviderNotFound,
        exceptions.ProviderTimeout,
        exceptions.InternalProviderNotConfigured,
        exceptions.ProviderExecutionFailed,
        waits=True,
        handed_on=True,
        parameters=[_ANY_QUERY],
    ),
)
async def read_provider(
    context: WaitingContext,
    session_maker: deps.Sessions,
    may_enter: Access,
    results: deps.Results,
    room_id: str,
    provider_name: str,
) -> Response:
    """Ask a provider for what the query parameters say."""
    settings, request = context.settings, context.request

    async def find() -> schemas.ProviderResponse:
        async with session_maker() as session:
            await enter(session, context.caller, room_id, may_enter)
            return await providers.read(session, room_id, provider_name)

    provider = await find()
    params = deps.query_params(request.query_params.multi_items())
    digest = deps.request_hash(params)
    wait = context.preferred_wait(settings.provider_long_poll_max_seconds)
    seconds = settings.provider_long_poll_default_seconds if wait is None else wait
    patience = seconds + 2 * settings.dispatch_timeout_seconds
    wanted = providers.Read(provider, digest, results, settings, context.runtime.reads)
    async with reachable(patience):
        data = await providers.cached(wanted)
        if data is None:
            registry = getattr(request.app.state, "internal_provider_registry", None)
            tsio = context.transports.tsio
            send = providers.sender(provider, params, digest, tsio, registry)
            fetch = partial(providers.fetch, wanted, send, seconds)
            data = await long_polls.for_answer(context, session_maker, provider.full_name, fetch)
    if data is None:
        # it is gone, or the server stops
        await find()
        raise exceptions.ServiceUnavailable.exception(headers={"Retry-After": "1"})
    headers = {
        # as it stands: Response would add a charset to text
        "Content-Type": provider.content_type,
        "Content-Length": str(len(data)),
        "X-Content-Type-Options": "nosniff",
        **deps.wait_headers(wait),
    }
    if len(data) <= deps.CHUNK_BYTES:
        return Response(data, headers=headers)
    return StreamingResponse(deps.chunks(data), headers=headers)


@router.post(
    "/providers/{provider_id}/results",
    **answers(None, *PROVIDER, exceptions.PayloadTooLarge, status=204),
    openapi_extra={"requestBody": {"content": BYTES}},
)
async def upload_result(
    context: WaitingContext,
    session_maker: deps.Sessions,
    may_enter: Access,
    results: deps.Results,
    provider_id: UUID,
    x_request_hash: Annotated[str, Header(pattern="^[0-9a-fA-F]{64}$")],
    x_result_status: Annotated[Literal["ok", "error"], Header()] = "ok",
) -> None:
    """Answer a request that was sent to a provider."""
    settings = context.settings

    async def find() -> schemas.ProviderResponse:
        async with session_maker() as session:
            return await providers.owned(session, provider_id, context.caller, may_enter)

    await find()
    failed = x_result_status == "error"
    limit = providers.MAX_FAILURE if failed else settings.provider_result_max_bytes
    data = await deps.bounded(context.request.stream(), limit, "a result")
    digest = x_request_hash.lower()
    # again: it may have gone while the body came in
    provider = await find()
    answered = providers.Read(provider, digest, results, settings, context.runtime.reads)
    # no reader waits longer
    async with reachable(settings.provider_long_poll_max_seconds):
        kept = await providers.accept(answered, data, failed)
    if kept:
        context.outbox.result_ready(provider.full_name, digest, provider.room_id)
        context.publish()


@router.delete("/providers/{provider_id}", **answers(None, *PROVIDER, status=204))
async def delete_provider(
    context: RequestContext, session: SessionDep, may_enter: Access, provider_id: UUID
) -> None:
    """Withdraw a provider."""
    name = await providers.remove(session, provider_id, context.caller, may_enter)
    context.outbox.providers_gone([name])
    await context.commit(session)
