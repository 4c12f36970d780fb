"""The HTTP surface: what is asked for, who may ask, and which step answers."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request, Response, status
from fastapi.responses import StreamingResponse
from zndraw_auth.db import SessionDep

from zndraw_joblib import (
    claims,
    heartbeats,
    jobs,
    providers,
    relay,
    reports,
    stats,
    submissions,
    tasks,
    validation,
    watch,
    workers,
)
from zndraw_joblib.dependencies import (
    Access,
    Changing,
    CurrentCaller,
    FarewellDep,
    IdempotencyKey,
    InternalProviders,
    NewsDep,
    Offering,
    OutboxDep,
    PagerDep,
    Reading,
    Registry,
    Results,
    Sessions,
    Settings,
    Submitting,
    Tsio,
    WaitingCaller,
    WaitingDesk,
    WorkHatch,
    enter,
    preferred_wait,
    query_params,
    request_hash,
)
from zndraw_joblib.door import Door
from zndraw_joblib.events import worker_key
from zndraw_joblib.exceptions import (
    Forbidden,
    IdempotencyKeyReused,
    InternalJobNotConfigured,
    InternalProviderNotConfigured,
    InvalidCategory,
    InvalidRequest,
    InvalidSchema,
    InvalidTaskTransition,
    JobNotFound,
    LeaseLost,
    PayloadMismatch,
    PayloadTooLarge,
    ProblemException,
    ProviderExecutionFailed,
    ProviderNotFound,
    ProviderTimeout,
    QuotaExceeded,
    SchemaConflict,
    ServiceUnavailable,
    TaskNotFound,
    WorkerNotFound,
)
from zndraw_joblib.lifecycle import TaskStatus
from zndraw_joblib.names import (
    GLOBAL_ROOM,
    INTERNAL_ROOM,
    SPECIAL_ROOMS,
    FullName,
    split_full_name,
)
from zndraw_joblib.openapi import (
    ANY_QUERY,
    ANYTHING,
    BODY,
    CLAIM_LINKS,
    JOB_LINKS,
    PAGE,
    PREFER,
    PROVIDER_LINKS,
    ROOM,
    TASK_LINKS,
    WAITING,
    WAITS,
    WORKER_LINKS,
    answer,
    problems,
)
from zndraw_joblib.schemas import (
    HeartbeatResponse,
    JobPolicy,
    JobRegisterRequest,
    JobResponse,
    JobStats,
    JobSummary,
    PaginatedResponse,
    ProviderRegisterRequest,
    ProviderResponse,
    TaskBatchRequest,
    TaskBatchResponse,
    TaskClaimRequest,
    TaskClaimResponse,
    TaskOutcome,
    TaskQueryRequest,
    TaskQueryResponse,
    TaskReportsRequest,
    TaskReportsResponse,
    TaskResponse,
    TaskSubmitRequest,
    TaskUpdateRequest,
    WorkerResponse,
    WorkerSummary,
    WorkerUpdateRequest,
)
from zndraw_joblib.sweeper import retire

StatusFilter = Annotated[TaskStatus | None, Query(alias="status")]

router = APIRouter(
    prefix="/v1/joblib",
    tags=["joblib"],
    route_class=Door,
    responses=problems(),
)


# --- workers ---


@router.post(
    "/workers",
    status_code=status.HTTP_201_CREATED,
    responses=answer(201, links=WORKER_LINKS) | problems(QuotaExceeded),
)
async def create_worker(
    caller: CurrentCaller, session: SessionDep, settings: Settings
) -> WorkerResponse:
    """Make a worker that belongs to the caller."""
    row = await workers.create(session, caller.id, settings)
    await session.commit()
    return WorkerResponse(**row._mapping)


@router.get("/workers", responses=PAGE)
async def list_workers(
    caller: CurrentCaller,
    session: SessionDep,
    pager: PagerDep,
    settings: Settings,
) -> PaginatedResponse[WorkerSummary]:
    """List all workers."""
    listing = await workers.list_all(session, pager.page, settings)
    items = [WorkerSummary(**row._mapping) for row in listing.rows]
    return pager.show(listing, items)


@router.patch(
    "/workers/{worker_id}", responses=problems(*BODY, WorkerNotFound, Forbidden)
)
async def heartbeat(
    worker_id: UUID,
    change: Changing,
    body: WorkerUpdateRequest | None = None,
) -> HeartbeatResponse:
    """Take a sign of life, with what the worker's tasks are at."""
    caller, session, settings, outbox = change
    beat = body or WorkerUpdateRequest()
    standing = heartbeats.standing(worker_id, beat.tasks)
    if beat.state is None:
        worker = await workers.touch(session, worker_id, caller, *standing)
    else:
        worker = await workers.set_state(
            session, worker_id, caller, beat.state, *standing
        )
        outbox.ended.append(worker_key(worker_id))
    heard = await heartbeats.beat(session, worker, beat.tasks, settings)
    await session.commit()
    for task in heard.progressed:
        outbox.task_changed(task)
    return HeartbeatResponse(
        id=worker.id,
        last_heartbeat=worker.last_heartbeat,
        state=worker.state,
        cancelled=heard.cancelled,
        lost=heard.lost,
        desired_state=worker.state,
    )


@router.delete(
    "/workers/{worker_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    responses=problems(WorkerNotFound, Forbidden),
)
async def delete_worker(
    outbox: FarewellDep,
    worker_id: UUID,
    caller: CurrentCaller,
    session: SessionDep,
    settings: Settings,
) -> None:
    """Remove a worker; what it held is failed or tried again."""
    gone = await workers.retire(session, worker_id, caller)
    await retire(session, gone, settings, outbox)
    await session.commit()


@router.get("/rooms/{room_id}/workers", responses=PAGE | problems(*ROOM))
async def list_room_workers(
    visit: Reading,
    pager: PagerDep,
    settings: Settings,
) -> PaginatedResponse[WorkerSummary]:
    """List the workers of the jobs that the room sees."""
    room, _, session = visit
    listing = await workers.list_serving(session, room, pager.page, settings)
    items = [WorkerSummary(**row._mapping) for row in listing.rows]
    return pager.show(listing, items)


# --- jobs ---


@router.put(
    "/rooms/{room_id}/jobs",
    status_code=status.HTTP_201_CREATED,
    responses=answer(201, links=JOB_LINKS)
    | answer(
        200, model=JobResponse, description="It was there already", links=JOB_LINKS
    )
    | problems(
        *ROOM,
        *BODY,
        InvalidCategory,
        InvalidSchema,
        WorkerNotFound,
        SchemaConflict,
        QuotaExceeded,
    ),
)
async def register_job(
    offer: Offering, body: JobRegisterRequest, response: Response
) -> JobResponse:
    """Offer a job, served by one of the caller's workers."""
    room, caller, session, settings, outbox = offer
    if room in SPECIAL_ROOMS and not caller.is_superuser:
        raise Forbidden.exception(f"registering in {room} needs a superuser")
    if body.category not in settings.allowed_categories:
        raise InvalidCategory.exception(
            f"category {body.category!r} is not one of {settings.allowed_categories}"
        )
    validation.check_schema(body.schema_)
    worker_id = await workers.mine(session, body.worker_id, caller, settings)
    policy = body.model_dump(
        include=body.model_fields_set & set(JobPolicy.model_fields)
    )
    name = FullName(room, body.category, body.name)
    registered = await jobs.register(session, name, body.schema_, policy, worker_id)
    job = await jobs.read(
        session, registered.job_id, settings.worker_timeout_seconds, worker_id
    )
    await session.commit()
    # a claim of this worker may wait for other jobs only
    outbox.ended.append(worker_key(worker_id))
    if registered.created or registered.joined:
        outbox.jobs_changed([room])
    if not registered.created:
        response.status_code = status.HTTP_200_OK
    return job


@router.get("/rooms/{room_id}/jobs", responses=PAGE | problems(*ROOM))
async def list_jobs(
    visit: Reading,
    settings: Settings,
    pager: PagerDep,
) -> PaginatedResponse[JobSummary]:
    """List the jobs that the room sees."""
    room, _, session = visit
    items, listing = await jobs.list_visible(
        session, room, pager.page, settings.worker_timeout_seconds
    )
    return pager.show(listing, items)


@router.get(
    "/rooms/{room_id}/jobs/{job_name:fullname}/tasks",
    responses=PAGE | problems(*ROOM, JobNotFound),
)
async def list_job_tasks(
    visit: Reading,
    job_name: str,
    settings: Settings,
    pager: PagerDep,
    task_status: StatusFilter = None,
) -> PaginatedResponse[TaskResponse]:
    """List the tasks of a job that this room submitted."""
    room, _, session = visit
    name = jobs.find(room, job_name)
    rows = await session.execute(jobs.SERVED, name._asdict())
    job = jobs.found(rows.one_or_none(), room, job_name)
    items, listing = await tasks.list_tasks(
        session, room, pager.page, settings, job_id=job.id, status=task_status
    )
    return pager.show(listing, items)


@router.get(
    "/rooms/{room_id}/jobs/{job_name:fullname}", responses=problems(*ROOM, JobNotFound)
)
async def read_job(
    visit: Reading,
    job_name: str,
    settings: Settings,
) -> JobResponse:
    """Show a job that the room sees."""
    room, _, session = visit
    return await jobs.read_named(
        session, room, job_name, settings.worker_timeout_seconds
    )


@router.get("/rooms/{room_id}/stats", responses=PAGE | problems(*ROOM))
async def read_stats(
    visit: Reading,
    settings: Settings,
    pager: PagerDep,
) -> PaginatedResponse[JobStats]:
    """Show what goes on in the jobs that the room sees, over all rooms."""
    room, _, session = visit
    items, listing = await stats.list_visible(session, room, pager.page, settings)
    return pager.show(listing, items)


# --- tasks ---


@router.post(
    "/rooms/{room_id}/tasks/{job_name:fullname}",
    status_code=status.HTTP_202_ACCEPTED,
    responses=answer(202, "Location", "Retry-After", links=TASK_LINKS)
    | problems(
        *ROOM,
        *BODY,
        JobNotFound,
        PayloadMismatch,
        IdempotencyKeyReused,
        InternalJobNotConfigured,
        QuotaExceeded,
    ),
)
async def submit_task(
    submission: Submitting,
    job_name: str,
    body: TaskSubmitRequest,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> TaskResponse:
    """Submit a task to a job that the room sees."""
    room, caller, session, settings, outbox, registry = submission

    def check(target: submissions.Target) -> bool:
        _check_broker(target.name, registry, [body], "/body")
        return validation.check_payloads(target.schema, {"/body/payload": body.payload})

    submitted = await submissions.submit(
        session,
        room,
        job_name,
        caller,
        body,
        settings,
        check,
        idempotency_key=idempotency_key,
    )
    if submitted.created:
        await submissions.check_quota(session, caller, settings)
    await session.commit()
    task = submitted.task
    if submitted.created:
        outbox.task_changed(task)
        outbox.dispatch([task])
    response.headers["Location"] = f"/v1/joblib/tasks/{task.id}"
    response.headers["Retry-After"] = "1"
    return task


@router.post(
    "/rooms/{room_id}/batches/{job_name:fullname}",
    status_code=status.HTTP_202_ACCEPTED,
    responses=problems(
        *ROOM,
        *BODY,
        JobNotFound,
        PayloadMismatch,
        IdempotencyKeyReused,
        InternalJobNotConfigured,
        QuotaExceeded,
    ),
)
async def submit_batch(
    submission: Submitting,
    job_name: str,
    body: TaskBatchRequest,
    idempotency_key: IdempotencyKey = None,
) -> TaskBatchResponse:
    """Submit up to 1000 tasks to a job that the room sees: all of them, or none."""
    room, caller, session, settings, outbox, registry = submission

    def check(target: submissions.Target) -> bool:
        _check_broker(target.name, registry, body.tasks, "/body/tasks/{}")
        payloads = {
            f"/body/tasks/{n}/payload": task.payload
            for n, task in enumerate(body.tasks)
        }
        return validation.check_payloads(target.schema, payloads)

    batch = await submissions.submit_many(
        session,
        room,
        job_name,
        caller,
        body.tasks,
        settings,
        check,
        idempotency_key=idempotency_key,
    )
    if batch.created:
        await submissions.check_quota(session, caller, settings, len(batch.created))
    await session.commit()
    outbox.tasks_changed(batch.created)
    outbox.dispatch(batch.created)
    return TaskBatchResponse(ids=batch.ids)


def _check_broker(
    name: FullName,
    registry: Registry,
    submitted: Sequence[TaskSubmitRequest],
    where: str,
) -> None:
    """Refuse what would go to the broker, if there is none here that takes it."""
    if name.room != INTERNAL_ROOM:
        return
    if registry is None or str(name) not in registry:
        raise InternalJobNotConfigured.exception(f"nothing here runs {name}")
    detail = "an @internal task starts at once"
    errors = [
        {"pointer": f"{where.format(n)}/delay_seconds", "detail": detail}
        for n, task in enumerate(submitted)
        if task.delay_seconds
    ]
    if errors:
        raise InvalidRequest.exception(detail, errors=errors[:1])


@router.get("/rooms/{room_id}/tasks", responses=PAGE | problems(*ROOM))
async def list_room_tasks(
    visit: Reading,
    settings: Settings,
    pager: PagerDep,
    task_status: StatusFilter = None,
) -> PaginatedResponse[TaskResponse]:
    """List the tasks that the room submitted."""
    room, _, session = visit
    items, listing = await tasks.list_tasks(
        session, room, pager.page, settings, status=task_status
    )
    return pager.show(listing, items)


@router.post(
    "/tasks/claim",
    responses=answer(200, "Preference-Applied", links=CLAIM_LINKS)
    | problems(*BODY, *WAITING, WorkerNotFound, Forbidden),
    openapi_extra=WAITS,
)
async def claim_tasks(
    body: TaskClaimRequest,
    hatch: WorkHatch,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> TaskClaimResponse:
    """Give a worker the oldest tasks of its jobs, waiting for them if preferred."""
    desk, outbox = hatch

    async def look() -> claims.Claim:
        async with desk.session_maker() as session:
            claim = await claims.claim(
                session,
                body.worker_id,
                desk.caller,
                desk.settings,
                limit=body.max_tasks,
                key=idempotency_key,
                start=body.start,
            )
            await session.commit()
        return claim

    seconds = _applied(desk.wait, response)
    if seconds:
        claim = await watch.for_work(desk, body.worker_id, seconds, look)
    else:
        claim = await look()
    if not claim.repeated:
        outbox.tasks_changed(claim.tasks)
    return TaskClaimResponse(task=next(iter(claim.tasks), None), tasks=claim.tasks)


def _applied(wait: float | None, response: Response) -> float:
    response.headers["Vary"] = "Prefer"
    if wait is None:
        return 0
    response.headers["Preference-Applied"] = f"wait={wait:g}"
    return wait


@router.get(
    "/tasks/{task_id}",
    responses=answer(200, "Preference-Applied") | problems(*WAITING, TaskNotFound),
    openapi_extra=WAITS,
)
async def read_task(
    task_id: UUID,
    desk: WaitingDesk,
    may_enter: Access,
    response: Response,
) -> TaskResponse:
    """Show a task; with `Prefer: wait` once it has ended."""

    async def look() -> TaskResponse:
        async with desk.session_maker() as session:
            return await tasks.read(
                session, task_id, desk.caller, may_enter, desk.settings
            )

    seconds = _applied(desk.wait, response)
    return await watch.for_end(desk, task_id, seconds, look)


@router.post(
    "/tasks/query",
    responses=answer(200, "Preference-Applied") | problems(*BODY, *WAITING),
    openapi_extra=WAITS,
)
async def query_tasks(
    body: TaskQueryRequest,
    desk: WaitingDesk,
    may_enter: Access,
    response: Response,
) -> TaskQueryResponse:
    """Show up to 500 tasks; with `Prefer: wait` once all of them have ended."""
    async with desk.session_maker() as session:
        there = await tasks.readable(session, body.ids, desk.caller, may_enter)

    async def unfinished() -> UUID | None:
        async with desk.session_maker() as session:
            return await tasks.last_unfinished(session, there)

    await watch.for_ends(desk, _applied(desk.wait, response), unfinished)
    async with desk.session_maker() as session:
        found = await tasks.read_many(session, there, desk.settings)
    missing = dict.fromkeys(body.ids).keys() - {task.id for task in found}
    return TaskQueryResponse(tasks=found, missing=sorted(missing))


@router.patch("/tasks", responses=problems(*BODY))
async def report_tasks(
    change: Changing, body: TaskReportsRequest, may_enter: Access
) -> TaskReportsResponse:
    """Report what became of up to 32 tasks, each as if it were reported alone."""
    caller, session, settings, outbox = change
    said = {report.id: report for report in body.reports}
    reported = await reports.report_many(session, said, caller, may_enter, settings)
    await session.commit()
    outcomes: list[TaskOutcome] = []
    for task_id, outcome in zip(said, reported, strict=True):
        if isinstance(outcome, ProblemException):
            problem = outcome.problem
            told = TaskOutcome(id=task_id, status=problem.status, problem=problem)
        else:
            told = TaskOutcome(id=task_id, status=200, task=outcome.task)
        outcomes.append(told)
    outbox.tasks_changed(
        outcome.task
        for outcome in reported
        if isinstance(outcome, reports.Reported) and outcome.changed
    )
    return TaskReportsResponse(outcomes=outcomes)


@router.patch(
    "/tasks/{task_id}",
    responses=answer(200, links=TASK_LINKS)
    | problems(*BODY, TaskNotFound, Forbidden, InvalidTaskTransition, LeaseLost),
)
async def report_task(
    task_id: UUID,
    change: Changing,
    body: TaskUpdateRequest,
    may_enter: Access,
    idempotency_key: IdempotencyKey = None,
) -> TaskResponse:
    """Report what became of a task, or cancel it."""
    caller, session, settings, outbox = change
    reported = await reports.report(
        session, task_id, caller, may_enter, body, settings, key=idempotency_key
    )
    await session.commit()
    if reported.changed:
        outbox.task_changed(reported.task)
    return reported.task


@router.post(
    "/tasks/{task_id}/retry",
    status_code=status.HTTP_202_ACCEPTED,
    responses=answer(202, "Location", links=TASK_LINKS)
    | problems(
        TaskNotFound,
        JobNotFound,
        Forbidden,
        InvalidTaskTransition,
        InternalJobNotConfigured,
    ),
)
async def retry_task(
    outbox: OutboxDep,
    task_id: UUID,
    caller: CurrentCaller,
    session: SessionDep,
    settings: Settings,
    registry: Registry,
    may_enter: Access,
    response: Response,
) -> TaskResponse:
    """Set a task that has ended going again."""
    task = await reports.retry(session, task_id, caller, may_enter, settings)
    _check_broker(split_full_name(task.job_name), registry, [], "")
    await session.commit()
    outbox.task_changed(task)
    outbox.dispatch([task])
    response.headers["Location"] = f"/v1/joblib/tasks/{task.id}"
    return task


# --- providers ---


@router.put(
    "/rooms/{room_id}/providers",
    status_code=status.HTTP_201_CREATED,
    responses=answer(201, links=PROVIDER_LINKS)
    | answer(
        200, model=ProviderResponse, description="It was replaced", links=PROVIDER_LINKS
    )
    | problems(
        *ROOM, *BODY, InvalidCategory, InvalidSchema, WorkerNotFound, QuotaExceeded
    ),
)
async def register_provider(
    offer: Offering, body: ProviderRegisterRequest, response: Response
) -> ProviderResponse:
    """Offer data, served by one of the caller's workers."""
    room, caller, session, settings, outbox = offer
    if room == INTERNAL_ROOM:
        raise Forbidden.exception("the server's own providers come from its code")
    if room == GLOBAL_ROOM and not caller.is_superuser:
        raise Forbidden.exception(f"registering in {room} needs a superuser")
    allowed = settings.allowed_provider_categories
    if allowed is not None and body.category not in allowed:
        raise InvalidCategory.exception(
            f"category {body.category!r} is not one of {allowed}"
        )
    validation.check_schema(body.schema_)
    worker_id = await workers.mine(session, body.worker_id, caller, settings)
    provider, created = await providers.register(
        session,
        FullName(room, body.category, body.name),
        body.schema_,
        body.content_type,
        worker_id,
        caller,
    )
    await session.commit()
    outbox.providers_changed([room])
    if not created:
        response.status_code = status.HTTP_200_OK
    return provider


@router.get("/rooms/{room_id}/providers", responses=PAGE | problems(*ROOM))
async def list_providers(
    visit: Reading,
    settings: Settings,
    pager: PagerDep,
) -> PaginatedResponse[ProviderResponse]:
    """List the providers that the room sees."""
    room, _, session = visit
    items, listing = await providers.list_visible(session, room, pager.page, settings)
    return pager.show(listing, items)


@router.get(
    "/rooms/{room_id}/providers/{provider_name:fullname}/info",
    responses=problems(*ROOM, ProviderNotFound),
)
async def read_provider_info(
    visit: Reading,
    provider_name: str,
) -> ProviderResponse:
    """Show a provider that the room sees."""
    room, _, session = visit
    return await providers.read(session, room, provider_name)


@router.get(
    "/rooms/{room_id}/providers/{provider_name:fullname}",
    responses=answer(200, "Preference-Applied", content=ANYTHING)
    | problems(
        *ROOM,
        ProviderNotFound,
        ProviderTimeout,
        InternalProviderNotConfigured,
        ProviderExecutionFailed,
        *WAITING,
        handed_on=True,
    ),
    openapi_extra={"parameters": [ANY_QUERY, PREFER]},
)
async def read_provider(
    room_id: str,
    provider_name: str,
    desk: WaitingDesk,
    settings: Settings,
    may_enter: Access,
    results: Results,
    tsio: Tsio,
    registry: InternalProviders,
    request: Request,
) -> Response:
    """Ask a provider for what the query parameters say."""

    async def look() -> ProviderResponse:
        async with desk.session_maker() as session:
            room = await enter(session, desk.caller, room_id, may_enter)
            return await providers.read(session, room, provider_name)

    provider = await look()
    params = query_params(request.query_params.multi_items())
    digest = request_hash(params)
    preferences = request.headers.getlist("prefer")
    wait = preferred_wait(preferences, settings.provider_long_poll_max_seconds)
    seconds = settings.provider_long_poll_default_seconds if wait is None else wait
    patience = seconds + 2 * settings.dispatch_timeout_seconds
    async with relay.reachable(patience):
        data = await relay.cached(provider, digest, results)
        if data is None:
            send = relay.sender(provider, params, digest, tsio, registry)
            await relay.ask(provider, digest, results, settings, send)
            answer = partial(relay.wait, provider, digest, results, seconds, settings)
            data = await watch.for_answer(desk, provider.full_name, answer)
    if data is None:
        # it is gone, or the server stops
        await look()
        raise ServiceUnavailable.exception(headers={"Retry-After": "1"})
    headers = {
        # as it stands: Response would add a charset to text
        "Content-Type": provider.content_type,
        "Content-Length": str(len(data)),
        "Vary": "Prefer",
        "X-Content-Type-Options": "nosniff",
    }
    if wait is not None:
        headers["Preference-Applied"] = f"wait={wait:g}"
    if len(data) <= relay.PIECE:
        return Response(data, headers=headers)
    return StreamingResponse(relay.pieces(data), headers=headers)


@router.post(
    "/providers/{provider_id}/results",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    responses=problems(ProviderNotFound, Forbidden, PayloadTooLarge),
    openapi_extra={"requestBody": {"content": ANYTHING}},
)
async def upload_result(
    outbox: NewsDep,
    provider_id: UUID,
    caller: WaitingCaller,
    session_maker: Sessions,
    settings: Settings,
    may_enter: Access,
    results: Results,
    request: Request,
    x_request_hash: Annotated[str, Header(pattern="^[0-9a-fA-F]{64}$")],
    x_result_status: Annotated[Literal["ok", "error"], Header()] = "ok",
) -> None:
    """Answer a request that was sent to a provider."""

    async def look() -> ProviderResponse:
        async with session_maker() as session:
            return await providers.owned(session, provider_id, caller, may_enter)

    await look()
    failed = x_result_status == "error"
    data = await relay.take(request.stream(), failed, settings)
    digest = x_request_hash.lower()
    # again: it may have gone while the body came in
    provider = await look()
    # no reader waits longer
    async with relay.reachable(settings.provider_long_poll_max_seconds):
        await relay.answer(provider, digest, data, failed, results, settings)
    if not failed:
        outbox.result_ready(provider.full_name, digest, provider.room_id)


@router.delete(
    "/providers/{provider_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    responses=problems(ProviderNotFound, Forbidden),
)
async def delete_provider(
    outbox: FarewellDep,
    provider_id: UUID,
    caller: CurrentCaller,
    session: SessionDep,
    may_enter: Access,
) -> None:
    """Withdraw a provider."""
    name = await providers.remove(session, provider_id, caller, may_enter)
    await session.commit()
    outbox.providers_gone([name])


# They are looked through one by one for each request: what is asked all day is first.
_BUSY = (claim_tasks, report_task, submit_task, read_task, heartbeat)
_ORDER = {busy.__name__: place for place, busy in enumerate(_BUSY)}
router.routes.sort(key=lambda route: _ORDER.get(getattr(route, "name", ""), len(_BUSY)))
