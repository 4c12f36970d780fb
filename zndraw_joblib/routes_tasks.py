"""The routes of tasks: submit, read, claim, report, retry."""

from typing import Annotated
from uuid import UUID

from fastapi import Query, Request, Response, status
from pydantic_core import to_json
from sqlalchemy.ext.asyncio import AsyncSession
from zndraw_auth.db import SessionDep

from zndraw_joblib import claims, jobs, long_polls, reports, submissions, tasks, validation
from zndraw_joblib.delivery import require_broker
from zndraw_joblib.dependencies import (
    Access,
    Context,
    CurrentUser,
    IdempotencyKey,
    PageQuery,
    Sessions,
    WaitingUser,
    Writable,
    check_writable,
    context_of,
    enter,
    json_response,
    location_of_task,
    page_response,
    preferred_wait,
    wait_headers,
    written,
)
from zndraw_joblib.events import TaskView
from zndraw_joblib.exceptions import (
    Forbidden,
    IdempotencyKeyReused,
    InternalJobNotConfigured,
    InvalidTaskTransition,
    JobNotFound,
    LeaseLost,
    NoWorkersAvailable,
    PayloadMismatch,
    ProblemException,
    QuotaExceeded,
    TaskNotFound,
    WorkerNotFound,
)
from zndraw_joblib.lifecycle import TaskStatus, split_full_name
from zndraw_joblib.problem_route import BODY, ROOM, WAITING, WAITS, new_router, problems
from zndraw_joblib.schemas import (
    PaginatedResponse,
    TaskBatchRequest,
    TaskBatchResponse,
    TaskClaimRequest,
    TaskClaimResponse,
    TaskQueryRequest,
    TaskQueryResponse,
    TaskReportsRequest,
    TaskReportsResponse,
    TaskResponse,
    TaskSubmitRequest,
    TaskUpdateRequest,
)
from zndraw_joblib.workers import Action

router = new_router()

SUBMITTING = problems(
    *ROOM,
    *BODY,
    JobNotFound,
    PayloadMismatch,
    IdempotencyKeyReused,
    InternalJobNotConfigured,
    NoWorkersAvailable,
    QuotaExceeded,
)


class TaskPageQuery(PageQuery):
    """Which page of a listing of tasks is asked for."""

    status: TaskStatus | None = None


@router.post(
    "/rooms/{room_id}/tasks/{job_name:fullname}",
    response_model=TaskResponse,
    status_code=status.HTTP_202_ACCEPTED,
    responses=SUBMITTING,
)
async def submit_task(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    session_maker: Sessions,
    may_enter: Access,
    _: Writable,
    room_id: str,
    job_name: str,
    body: TaskSubmitRequest,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit a task to a job that the room sees."""
    context = await context_of(request, user, session_maker)
    caller, settings = context.caller, context.settings
    await enter(session, caller, room_id, may_enter, _submitting(job_name))

    def check(target: jobs.Target) -> bool:
        require_broker(context.transports, target.name, [body], "/body")
        return validation.check_payloads(target.schema, {"/body/payload": body.payload})

    submission = await submissions.submit(
        session, room_id, job_name, caller, [body], settings, check, idempotency_key=idempotency_key
    )
    await _submitted(context, session, submission)
    (task,) = submission.tasks
    headers = {"Location": location_of_task(request, task.id), "Retry-After": "1"}
    return json_response(tasks.as_json(task), 202, headers)


async def _submitted(
    context: Context, session: AsyncSession, submission: submissions.Submission
) -> None:
    """Admit what is new, commit, and tell of it."""
    if submission.created:
        name = split_full_name(submission.tasks[0].job_name)
        await jobs.admit(session, name, context.caller, context.settings)
        context.outbox.tasks_changed(submission.tasks)
        context.outbox.dispatch(submission.tasks)
    await context.commit(session)


@router.post(
    "/rooms/{room_id}/batches/{job_name:fullname}",
    response_model=TaskBatchResponse,
    status_code=status.HTTP_202_ACCEPTED,
    responses=SUBMITTING,
)
async def submit_batch(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    session_maker: Sessions,
    may_enter: Access,
    _: Writable,
    room_id: str,
    job_name: str,
    body: TaskBatchRequest,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit up to 1000 tasks to a job that the room sees: all of them, or none."""
    context = await context_of(request, user, session_maker)
    caller, settings = context.caller, context.settings
    await enter(session, caller, room_id, may_enter, _submitting(job_name))

    def check(target: jobs.Target) -> bool:
        require_broker(context.transports, target.name, body.tasks, "/body/tasks/{}")
        payloads = {f"/body/tasks/{n}/payload": task.payload for n, task in enumerate(body.tasks)}
        return validation.check_payloads(target.schema, payloads)

    submission = await submissions.submit(
        session,
        room_id,
        job_name,
        caller,
        body.tasks,
        settings,
        check,
        idempotency_key=idempotency_key,
    )
    await _submitted(context, session, submission)
    return json_response({"ids": submission.ids}, 202)


def _submitting(job_name: str) -> Action:
    # a malformed name is the business of those who look for the job
    return Action("submit", job_name.split(":", 2)[1] if ":" in job_name else None)


@router.get(
    "/rooms/{room_id}/jobs/{job_name:fullname}/tasks",
    response_model=PaginatedResponse[TaskResponse],
    responses=problems(*ROOM, JobNotFound),
)
async def list_job_tasks(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    job_name: str,
    query: Annotated[TaskPageQuery, Query()],
) -> Response:
    """List the tasks of a job that this room submitted."""
    context = await context_of(request, user)
    await enter(session, context.caller, room_id, may_enter)
    job = await jobs.require(session, room_id, job_name)
    listing = await tasks.list_tasks(
        session, room_id, query.page(), context.settings, job_id=job.id, status=query.status
    )
    return page_response(request, query, listing, map(tasks.as_json, listing.rows))


@router.get(
    "/rooms/{room_id}/tasks",
    response_model=PaginatedResponse[TaskResponse],
    responses=problems(*ROOM),
)
async def list_room_tasks(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    query: Annotated[TaskPageQuery, Query()],
) -> Response:
    """List the tasks that the room submitted."""
    context = await context_of(request, user)
    await enter(session, context.caller, room_id, may_enter)
    listing = await tasks.list_tasks(
        session, room_id, query.page(), context.settings, status=query.status
    )
    return page_response(request, query, listing, map(tasks.as_json, listing.rows))


@router.post(
    "/tasks/claim",
    response_model=TaskClaimResponse,
    responses=problems(*BODY, *WAITING, WorkerNotFound, Forbidden),
    openapi_extra=WAITS,
)
async def claim_tasks(
    request: Request,
    user: WaitingUser,
    session_maker: Sessions,
    body: TaskClaimRequest,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Give a worker the oldest tasks of its jobs, waiting for them if preferred."""
    context = await context_of(request, user)

    async def look() -> claims.Claim:
        async with session_maker() as session:
            claim = await claims.claim(
                session,
                body.worker_id,
                context.caller,
                context.settings,
                limit=body.max_tasks,
                key=idempotency_key,
                start=body.start,
                jobs=body.jobs,
            )
            if not claim.repeated:
                context.outbox.tasks_changed(claim.tasks)
            await context.commit(session)
        return claim

    wait = _preferred(context)
    poll = context.long_poll(session_maker, wait)
    claim = await long_polls.for_work(poll, body.worker_id, body.jobs, look)
    claimed = [tasks.as_json(task) for task in claim.tasks]
    answer = b'{"task":%b,"tasks":%b}' % (claimed[0] if claimed else b"null", written(claimed))
    return json_response(answer, headers=wait_headers(wait))


def _preferred(context: Context) -> float | None:
    preferences = context.request.headers.getlist("prefer")
    return preferred_wait(preferences, context.settings.long_poll_max_wait_seconds)


@router.get(
    "/tasks/{task_id}",
    response_model=TaskResponse,
    responses=problems(*WAITING, TaskNotFound),
    openapi_extra=WAITS,
)
async def read_task(
    request: Request, user: WaitingUser, session_maker: Sessions, may_enter: Access, task_id: UUID
) -> Response:
    """Show a task; with `Prefer: wait` once it has ended."""
    context = await context_of(request, user)

    async def look() -> TaskView:
        async with session_maker() as session:
            return await tasks.read(session, task_id, context.caller, may_enter, context.settings)

    wait = _preferred(context)
    poll = context.long_poll(session_maker, wait)
    task = await long_polls.for_end(poll, task_id, look)
    return json_response(tasks.as_json(task), headers=wait_headers(wait))


@router.post(
    "/tasks/query",
    response_model=TaskQueryResponse,
    responses=problems(*BODY, *WAITING),
    openapi_extra=WAITS,
)
async def query_tasks(
    request: Request,
    user: WaitingUser,
    session_maker: Sessions,
    may_enter: Access,
    body: TaskQueryRequest,
) -> Response:
    """Show up to 500 tasks; with `Prefer: wait` once all of them have ended."""
    context = await context_of(request, user)
    async with session_maker() as session:
        there = await tasks.readable(session, body.ids, context.caller, may_enter)

    async def unfinished() -> UUID | None:
        async with session_maker() as session:
            return await tasks.last_unfinished(session, there)

    wait = _preferred(context)
    await long_polls.for_ends(context.long_poll(session_maker, wait), unfinished)
    async with session_maker() as session:
        found = await tasks.read_many(session, there, context.settings)
    missing = dict.fromkeys(body.ids).keys() - {task.id for task in found}
    shown = written(map(tasks.as_json, found))
    answer = b'{"tasks":%b,"missing":%b}' % (shown, to_json(sorted(missing)))
    return json_response(answer, headers=wait_headers(wait))


@router.patch("/tasks", response_model=TaskReportsResponse, responses=problems(*BODY))
async def report_tasks(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    body: TaskReportsRequest,
) -> Response:
    """Report what became of up to 32 tasks, each as if it were reported alone."""
    context = await context_of(request, user)
    by_id = {report.id: report for report in body.reports}
    reported = await reports.report_many(
        session, by_id, context.caller, may_enter, context.settings
    )
    context.outbox.tasks_changed(
        report.task
        for report in reported
        if isinstance(report, reports.Reported) and report.changed
    )
    await context.commit(session)
    outcomes = written(_outcome(*outcome) for outcome in zip(by_id, reported, strict=True))
    return json_response(b'{"outcomes":%b}' % outcomes)


def _outcome(task_id: UUID, report: reports.Reported | ProblemException) -> bytes:
    if isinstance(report, ProblemException):
        problem = report.problem
        return to_json({"id": task_id, "status": problem.status, "task": None, "problem": problem})
    head = to_json({"id": task_id, "status": 200, "problem": None})
    return head[:-1] + b',"task":%b}' % tasks.as_json(report.task)


@router.patch(
    "/tasks/{task_id}",
    response_model=TaskResponse,
    responses=problems(*BODY, TaskNotFound, Forbidden, InvalidTaskTransition, LeaseLost),
)
async def report_task(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    may_enter: Access,
    task_id: UUID,
    body: TaskUpdateRequest,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Report what became of a task, or cancel it."""
    context = await context_of(request, user)
    reported = await reports.report(
        session, task_id, context.caller, may_enter, body, context.settings, key=idempotency_key
    )
    if reported.changed:
        context.outbox.task_changed(reported.task)
    await context.commit(session)
    return json_response(tasks.as_json(reported.task))


@router.post(
    "/tasks/{task_id}/retry",
    response_model=TaskResponse,
    status_code=status.HTTP_202_ACCEPTED,
    responses=problems(
        TaskNotFound,
        JobNotFound,
        Forbidden,
        InvalidTaskTransition,
        InternalJobNotConfigured,
        NoWorkersAvailable,
        QuotaExceeded,
    ),
)
async def retry_task(
    request: Request,
    user: CurrentUser,
    session: SessionDep,
    session_maker: Sessions,
    may_enter: Access,
    task_id: UUID,
) -> Response:
    """Set a task that has ended going again."""
    context = await context_of(request, user, session_maker)
    task = await submissions.retry(session, task_id, context.caller, may_enter, context.settings)
    # its submitter reads it wherever it is, and retries it where they still may submit
    submitting = _submitting(task.job_name)
    await enter(session, context.caller, task.room_id, may_enter, submitting)
    await check_writable(request, task.room_id)
    name = split_full_name(task.job_name)
    await jobs.admit(session, name, context.caller, context.settings)
    require_broker(context.transports, name, [], "")
    context.outbox.task_changed(task)
    context.outbox.dispatch([task])
    await context.commit(session)
    where = location_of_task(request, task.id)
    return json_response(tasks.as_json(task), 202, {"Location": where})
