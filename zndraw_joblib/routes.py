"""The HTTP surface: all routes, and those of workers and jobs."""

from typing import Annotated
from uuid import UUID

from fastapi import Query, Request, Response, status
from zndraw_auth.db import SessionDep

from zndraw_joblib import (
    heartbeats,
    jobs,
    routes_providers,
    routes_tasks,
    schemas,
    validation,
    workers,
)
from zndraw_joblib.dependencies import (
    Access,
    CurrentUser,
    PageQuery,
    Writable,
    context_of,
    enter,
    json_response,
    page_response,
)
from zndraw_joblib.events import worker_key
from zndraw_joblib.exceptions import (
    Forbidden,
    InvalidCategory,
    InvalidSchema,
    JobNotFound,
    QuotaExceeded,
    SchemaConflict,
    WorkerNotFound,
)
from zndraw_joblib.lifecycle import SPECIAL_ROOMS, FullName
from zndraw_joblib.problem_route import BODY, ROOM, Responses, new_router, problems
from zndraw_joblib.runtime import lifespan
from zndraw_joblib.schemas import (
    HeartbeatResponse,
    JobPolicy,
    JobRegisterRequest,
    JobResponse,
    JobStats,
    JobSummary,
    Limits,
    PaginatedResponse,
    WorkerResponse,
    WorkerSummary,
    WorkerUpdateRequest,
)
from zndraw_joblib.sweeper import retire

_KNOWN: Responses = {200: {"model": JobResponse, "description": "It was there already"}}

router = new_router()
router.lifespan_context = lifespan


@router.get("/limits", response_model=Limits)
async def read_limits(request: Request, user: CurrentUser) -> Response:
    """Tell what one request may ask for at most."""
    settings = (await context_of(request, user)).settings
    limits = Limits(
        max_claim=schemas.MAX_CLAIM,
        max_claim_jobs=schemas.MAX_CLAIM_JOBS,
        max_reports=schemas.MAX_REPORTS,
        max_batch=schemas.MAX_BATCH,
        max_heartbeat_tasks=schemas.MAX_HEARTBEAT_TASKS,
        max_page=schemas.MAX_PAGE,
        max_payload_bytes=settings.max_payload_bytes,
        max_result_bytes=settings.max_payload_bytes,
        long_poll_max_wait_seconds=settings.long_poll_max_wait_seconds,
        worker_timeout_seconds=settings.worker_timeout_seconds,
    )
    return json_response(limits)


# --- workers ---


@router.post(
    "/workers",
    response_model=WorkerResponse,
    status_code=status.HTTP_201_CREATED,
    responses=problems(QuotaExceeded),
)
async def create_worker(request: Request, user: CurrentUser, session: SessionDep) -> Response:
    """Make a worker that belongs to the caller."""
    context = await context_of(request, user)
    row = await workers.create(session, context.caller.id, context.settings)
    await context.commit(session)
    return json_response(WorkerResponse(**row._mapping), 201)


@router.get("/workers", response_model=PaginatedResponse[WorkerSummary])
async def list_workers(
    request: Request, user: CurrentUser, session: SessionDep, query: Annotated[PageQuery, Query()]
) -> Response:
    """List all workers."""
    context = await context_of(request, user)
    listing = await workers.list_all(session, query.page(), context.settings)
    items = [WorkerSummary(**row._mapping) for row in listing.rows]
    return page_response(request, query, listing, items)


@router.patch(
    "/workers/{worker_id}",
    response_model=HeartbeatResponse,
    responses=problems(*BODY, WorkerNotFound, Forbidden),
)
async def heartbeat(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    worker_id: UUID,
    body: WorkerUpdateRequest | None = None,
) -> Response:
    """Take a sign of life, with what the worker's tasks are at."""
    context = await context_of(request, user)
    beat = body or WorkerUpdateRequest()
    heard = await heartbeats.beat(session, worker_id, context.caller, beat, context.settings)
    if beat.state is not None:
        context.outbox.ended.append(worker_key(worker_id))
    context.outbox.tasks_changed(heard.progressed)
    await context.commit(session)
    return json_response(heard.answer)


@router.delete(
    "/workers/{worker_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    responses=problems(WorkerNotFound, Forbidden),
)
async def delete_worker(
    request: Request, user: CurrentUser, session: SessionDep, worker_id: UUID
) -> None:
    """Remove a worker; what it held is failed or tried again."""
    context = await context_of(request, user)
    chosen = workers.commanded(worker_id, context.caller)
    if not await retire(session, chosen, context.settings, context.outbox):
        raise await workers.refusal(session, worker_id)
    await context.commit(session)


@router.get(
    "/rooms/{room_id}/workers",
    response_model=PaginatedResponse[WorkerSummary],
    responses=problems(*ROOM),
)
async def list_room_workers(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    query: Annotated[PageQuery, Query()],
) -> Response:
    """List the workers of the jobs that the room sees."""
    context = await context_of(request, user)
    await enter(session, context.caller, room_id, may_enter)
    listing = await workers.list_serving(session, room_id, query.page(), context.settings)
    items = [WorkerSummary(**row._mapping) for row in listing.rows]
    return page_response(request, query, listing, items)


# --- jobs ---


@router.put(
    "/rooms/{room_id}/jobs",
    response_model=JobResponse,
    status_code=status.HTTP_201_CREATED,
    responses=_KNOWN
    | problems(
        *ROOM, *BODY, InvalidCategory, InvalidSchema, WorkerNotFound, SchemaConflict, QuotaExceeded
    ),
)
async def register_job(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    _: Writable,
    room_id: str,
    body: JobRegisterRequest,
) -> Response:
    """Offer a job, served by one of the caller's workers."""
    context = await context_of(request, user)
    caller, settings = context.caller, context.settings
    action = workers.Action("register", body.category)
    await enter(session, caller, room_id, may_enter, action)
    if room_id in SPECIAL_ROOMS and not caller.is_superuser:
        raise Forbidden.exception(f"registering in {room_id} needs a superuser")
    if body.category not in settings.allowed_categories:
        raise InvalidCategory.exception(
            f"category {body.category!r} is not one of {settings.allowed_categories}"
        )
    validation.check_schema(body.schema_)
    worker_id = await workers.mine(session, body.worker_id, caller, settings)
    policy = body.model_dump(include=body.model_fields_set & set(JobPolicy.model_fields))
    name = FullName(room_id, body.category, body.name)
    registered = await jobs.register(
        session, name, body.schema_, policy, worker_id, caller, settings
    )
    job = await jobs.read(
        session,
        registered.job_id,
        settings.worker_timeout_seconds,
        worker_id=worker_id,
        policy_kept=registered.policy_kept,
    )
    # a claim of this worker may wait for other jobs only
    context.outbox.ended.append(worker_key(worker_id))
    if registered.created or registered.joined:
        context.outbox.jobs_changed([room_id])
    await context.commit(session)
    return json_response(job, 201 if registered.created else 200)


@router.get(
    "/rooms/{room_id}/jobs", response_model=PaginatedResponse[JobSummary], responses=problems(*ROOM)
)
async def list_jobs(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    query: Annotated[PageQuery, Query()],
) -> Response:
    """List the jobs that the room sees."""
    context = await context_of(request, user)
    await enter(session, context.caller, room_id, may_enter)
    items, listing = await jobs.list_visible(
        session, room_id, query.page(), context.settings.worker_timeout_seconds
    )
    return page_response(request, query, listing, items)


@router.get(
    "/rooms/{room_id}/stats", response_model=PaginatedResponse[JobStats], responses=problems(*ROOM)
)
async def read_stats(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    query: Annotated[PageQuery, Query()],
) -> Response:
    """Show what goes on in the jobs that the room sees, over all rooms."""
    context = await context_of(request, user)
    await enter(session, context.caller, room_id, may_enter)
    items, listing = await jobs.list_stats(session, room_id, query.page(), context.settings)
    return page_response(request, query, listing, items)


# the tasks of a job first: a job's name takes what follows it
router.routes += routes_tasks.router.routes + routes_providers.router.routes


@router.get(
    "/rooms/{room_id}/jobs/{job_name:fullname}",
    response_model=JobResponse,
    responses=problems(*ROOM, JobNotFound),
)
async def read_job(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    job_name: str,
) -> Response:
    """Show a job that the room sees."""
    context = await context_of(request, user)
    await enter(session, context.caller, room_id, may_enter)
    job = await jobs.read_named(session, room_id, job_name, context.settings.worker_timeout_seconds)
    return json_response(job)
