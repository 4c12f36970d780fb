"""The routes of tasks: submit, read, claim, report, retry."""

import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any
from uuid import UUID

from fastapi import Query, Response
from pydantic_core import to_json
from sqlalchemy.ext.asyncio import AsyncSession
from zndraw_auth.db import SessionDep

from zndraw_joblib import (
    claims,
    exceptions,
    heartbeats,
    jobs,
    long_polls,
    operations,
    reports,
    schemas,
    submissions,
    tasks,
    validation,
)
from zndraw_joblib import dependencies as deps
from zndraw_joblib.delivery import require_broker
from zndraw_joblib.dependencies import (
    Access,
    IdempotencyKey,
    RequestContext,
    Sessions,
    TaskPaging,
    WaitingContext,
    enter,
)
from zndraw_joblib.encoding import MAX_INT, Written
from zndraw_joblib.events import TaskView
from zndraw_joblib.lifecycle import TERMINAL, TaskStatus, split_full_name
from zndraw_joblib.problem_route import BODY, JOB, ROOM, TASK, WORKER, answers, new_router
from zndraw_joblib.schemas import PaginatedResponse
from zndraw_joblib.workers import OPERATE, Action

log = logging.getLogger(__name__)
router = new_router()

RUNNABLE = (
    exceptions.JobNotFound,
    exceptions.InternalJobNotConfigured,
    exceptions.NoWorkersAvailable,
    exceptions.QuotaExceeded,
)
SUBMITTING = (*ROOM, *BODY, *RUNNABLE, exceptions.PayloadMismatch, exceptions.IdempotencyKeyReused)


def _submitting(job_name: str) -> Action:
    # a malformed name is the business of those who look for the job
    return Action("submit", job_name.split(":", 2)[1] if ":" in job_name else None)


def _checking(
    context: deps.Context, submitted: Sequence[schemas.TaskSubmitRequest], where: str
) -> Callable[[jobs.Target], bool]:
    """Return what checks whether a job takes what is submitted; ``where`` has its number."""

    def check(target: jobs.Target) -> bool:
        require_broker(context.transports, target.name, submitted, where)
        payloads = {f"{where.format(n)}/payload": task.payload for n, task in enumerate(submitted)}
        return validation.check_payloads(target.schema, payloads)

    return check


async def _submitted(
    context: deps.Context, session: AsyncSession, submission: submissions.Submission
) -> None:
    """Admit what is new, commit, and publish it."""
    if submission.created:
        name = split_full_name(submission.tasks[0].job_name)
        await jobs.admit(session, name, context.caller, context.settings)
        context.outbox.tasks_changed(submission.tasks)
    await context.commit(session)


# before the submission, which takes any name
@router.post(
    "/rooms/{room_id}/tasks/bulk", **answers(schemas.TaskBulkResponse, *ROOM, *BODY, *RUNNABLE)
)
async def change_tasks(
    context: RequestContext,
    session: SessionDep,
    session_maker: Sessions,
    may_enter: Access,
    room_id: str,
    body: schemas.TaskBulkRequest,
) -> Response:
    """Cancel, retry or delete up to 1000 tasks of the room, the oldest first."""
    caller, settings = context.caller, context.settings
    await enter(session, caller, room_id, may_enter, OPERATE)
    chosen = await operations.choose(session, room_id, body)
    ids, more = chosen[: operations.MOST], len(chosen) > operations.MOST
    if body.dry_run:
        count = len(ids)
    elif body.action == "cancel":
        cancelled = await operations.cancel(session, ids, caller, body.reason, settings)
        context.outbox.tasks_changed(cancelled)
        count = len(cancelled)
    elif body.action == "retry":
        await deps.check_writable(context.request, room_id)
        retried = await operations.retry_many(session, ids, caller, settings)
        await _retried(context, session, retried)
        count = len(retried)
    else:
        count = len(await operations.delete(session, ids))
        context.outbox.tasks_deleted(room_id)
    await context.commit(session)
    if body.action == "delete" and not body.dry_run:
        log.info("user %s deleted %d tasks of room %s", caller.id, count, room_id)
    return deps.json_response({"count": count, "more": more})


async def _retried(
    context: deps.Context, session: AsyncSession, retried: Sequence[TaskView]
) -> None:
    """Admit tasks that go again, and put them into the outbox."""
    for job_name in {task.job_name: None for task in retried}:
        name = split_full_name(job_name)
        await jobs.admit(session, name, context.caller, context.settings)
        require_broker(context.transports, name, [], "")
    context.outbox.tasks_changed(retried)


@router.post(
    "/rooms/{room_id}/tasks/{job_name:fullname}",
    **answers(schemas.TaskResponse, *SUBMITTING, status=202),
)
async def submit_task(
    context: RequestContext,
    session: SessionDep,
    session_maker: Sessions,
    may_enter: Access,
    _: deps.Writable,
    room_id: str,
    job_name: str,
    body: schemas.TaskSubmitRequest,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit a task to a job that the room sees."""
    caller, settings = context.caller, context.settings
    await enter(session, caller, room_id, may_enter, _submitting(job_name))
    check = _checking(context, [body], "/body")
    submission = await submissions.submit(
        session, room_id, job_name, caller, [body], settings, check, idempotency_key=idempotency_key
    )
    await _submitted(context, session, submission)
    (task,) = submission.tasks
    where = deps.location_of_task(context.request, task.id)
    headers = {"Location": where, "Retry-After": "1"}
    return deps.json_response(tasks.as_json(task), 202, headers)


@router.post(
    "/rooms/{room_id}/batches/{job_name:fullname}",
    **answers(schemas.TaskBatchResponse, *SUBMITTING, status=202),
)
async def submit_batch(
    context: RequestContext,
    session: SessionDep,
    session_maker: Sessions,
    may_enter: Access,
    _: deps.Writable,
    room_id: str,
    job_name: str,
    body: schemas.TaskBatchRequest,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Submit up to 1000 tasks to a job that the room sees: all of them, or none."""
    caller, settings = context.caller, context.settings
    await enter(session, caller, room_id, may_enter, _submitting(job_name))
    check = _checking(context, body.tasks, "/body/tasks/{}")
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
    return deps.json_response({"ids": submission.ids}, 202)


@router.get(
    "/rooms/{room_id}/jobs/{job_name:fullname}/tasks",
    **answers(PaginatedResponse[schemas.TaskResponse], *JOB),
)
async def list_job_tasks(
    context: RequestContext,
    session: SessionDep,
    may_enter: Access,
    room_id: str,
    job_name: str,
    page: TaskPaging,
) -> Response:
    """List the tasks of a job that this room submitted."""
    await enter(session, context.caller, room_id, may_enter)
    job = await jobs.require(session, room_id, job_name, context.settings)
    listing = await tasks.list_tasks(
        session, room_id, page, context.settings, job_id=job.id, status=page.status
    )
    return deps.page_response(context.request, page, listing, map(tasks.as_json, listing.rows))


@router.get("/rooms/{room_id}/tasks", **answers(PaginatedResponse[schemas.TaskResponse], *ROOM))
async def list_room_tasks(
    context: RequestContext, session: SessionDep, may_enter: Access, room_id: str, page: TaskPaging
) -> Response:
    """List the tasks that the room submitted."""
    await enter(session, context.caller, room_id, may_enter)
    listing = await tasks.list_tasks(session, room_id, page, context.settings, status=page.status)
    return deps.page_response(context.request, page, listing, map(tasks.as_json, listing.rows))


@router.post("/tasks/claim", **answers(schemas.TaskClaimResponse, *BODY, *WORKER, waits=True))
async def claim_tasks(
    context: WaitingContext,
    session_maker: Sessions,
    body: schemas.TaskClaimRequest,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Give a worker the oldest tasks of its jobs, waiting for them if preferred."""

    async def claim() -> claims.Claim:
        async with session_maker() as session:
            claimed = await claims.claim(
                session,
                body.worker_id,
                context.caller,
                context.settings,
                limit=body.max_tasks,
                key=idempotency_key,
                start=body.start,
                jobs=body.jobs,
            )
            if not claimed.repeated:
                context.outbox.tasks_changed(claimed.tasks)
            await context.commit(session)
        return claimed

    wait = context.preferred_wait(context.settings.long_poll_max_wait_seconds)
    claimed = await long_polls.for_work(
        context, session_maker, wait or 0, body.worker_id, body.jobs, claim
    )
    given = [tasks.as_json(task) for task in claimed.tasks]
    answer = b'{"task":%b,"tasks":%b}' % (given[0] if given else b"null", deps.written(given))
    return deps.json_response(answer, headers=deps.wait_headers(wait))


@router.get(
    "/tasks/{task_id}", **answers(schemas.TaskResponse, exceptions.TaskNotFound, waits=True)
)
async def read_task(
    context: WaitingContext, session_maker: Sessions, may_enter: Access, task_id: UUID
) -> Response:
    """Show a task; with `Prefer: wait` once it has ended."""

    async def read() -> tuple[TaskView, UUID | None]:
        async with session_maker() as session:
            task = await tasks.read(session, task_id, context.caller, may_enter, context.settings)
        return task, None if task.status in TERMINAL else task_id

    wait = context.preferred_wait(context.settings.long_poll_max_wait_seconds)
    task = await long_polls.for_ends(context, session_maker, wait or 0, read, task_id)
    return deps.json_response(tasks.as_json(task), headers=deps.wait_headers(wait))


@router.get(
    "/tasks/{task_id}/result",
    **answers(Any, exceptions.TaskNotFound, exceptions.ResultNotFound, waits=True),
)
async def read_result(
    context: WaitingContext, session_maker: Sessions, may_enter: Access, task_id: UUID
) -> Response:
    """Show the result of a completed task alone; with `Prefer: wait` once it has ended."""

    async def read() -> tuple[Any, UUID | None]:
        async with session_maker() as session:
            task = await reports.read_result(session, task_id, context.caller, may_enter)
        return task, None if task.status in TERMINAL else task_id

    wait = context.preferred_wait(context.settings.long_poll_max_wait_seconds)
    task = await long_polls.for_ends(context, session_maker, wait or 0, read, task_id)
    if task.status is not TaskStatus.COMPLETED:
        raise exceptions.ResultNotFound.exception(
            f"task {task_id} is {task.status.value}: it has no result"
        )
    result = (task.result or "null").encode()
    return deps.json_response(result, headers=deps.wait_headers(wait))


@router.get(
    "/tasks/{task_id}/log", **answers(schemas.TaskLogResponse, exceptions.TaskNotFound, waits=True)
)
async def read_log(
    context: WaitingContext,
    session_maker: Sessions,
    may_enter: Access,
    task_id: UUID,
    after: Annotated[int, Query(ge=0, le=MAX_INT)] = 0,
) -> Response:
    """Show a task's log behind line `after`; with `Prefer: wait` once there is more of it, or
    the task has ended."""

    async def read() -> tuple[Any, UUID | None]:
        async with session_maker() as session:
            found = await heartbeats.read_log(session, task_id, after, context.caller, may_enter)
        return found, None if found["lines"] or found["ended"] else task_id

    wait = context.preferred_wait(context.settings.long_poll_max_wait_seconds)
    found = await long_polls.for_ends(
        context, session_maker, wait or 0, read, task_id, log_after=after
    )
    return deps.json_response(found, headers=deps.wait_headers(wait))


@router.post("/tasks/query", **answers(schemas.TaskQueryResponse, *BODY, waits=True))
async def query_tasks(
    context: WaitingContext,
    session_maker: Sessions,
    may_enter: Access,
    body: schemas.TaskQueryRequest,
) -> Response:
    """Show up to 500 tasks; with `Prefer: wait` once all of them have ended."""
    async with session_maker() as session:
        there = await tasks.readable(session, body.ids, context.caller, may_enter)

    async def unfinished() -> tuple[None, UUID | None]:
        async with session_maker() as session:
            return None, await tasks.last_unfinished(session, there)

    wait = context.preferred_wait(context.settings.long_poll_max_wait_seconds)
    if wait:
        await long_polls.for_ends(context, session_maker, wait, unfinished)
    async with session_maker() as session:
        found = await tasks.read_many(session, there, context.settings)
    missing = dict.fromkeys(body.ids).keys() - {task.id for task in found}
    shown = deps.written(map(tasks.as_json, found))
    answer = b'{"tasks":%b,"missing":%b}' % (shown, to_json(sorted(missing)))
    return deps.json_response(answer, headers=deps.wait_headers(wait))


@router.patch("/tasks", **answers(schemas.TaskReportsResponse, *BODY))
async def report_tasks(
    context: RequestContext,
    session: SessionDep,
    may_enter: Access,
    body: schemas.TaskReportsRequest,
) -> Response:
    """Report what became of up to 32 tasks, each as if it were reported alone."""
    by_id = {report.id: report for report in body.reports}
    reported = await reports.report(session, by_id, context.caller, may_enter, context.settings)
    context.outbox.tasks_changed(
        report.task
        for report in reported
        if isinstance(report, reports.Reported) and report.changed
    )
    await context.commit(session)
    outcomes = deps.written(_outcome(*outcome) for outcome in zip(by_id, reported, strict=True))
    return deps.json_response(b'{"outcomes":%b}' % outcomes)


def _outcome(task_id: UUID, report: reports.Reported | exceptions.ProblemException) -> bytes:
    if isinstance(report, exceptions.ProblemException):
        problem = report.problem
        return to_json({"id": task_id, "status": problem.status, "task": None, "problem": problem})
    head = to_json({"id": task_id, "status": 200, "problem": None})
    return head[:-1] + b',"task":%b}' % tasks.as_json(report.task)


@router.patch(
    "/tasks/{task_id}", **answers(schemas.TaskResponse, *BODY, *TASK, exceptions.LeaseLost)
)
async def report_task(
    context: RequestContext,
    session: SessionDep,
    may_enter: Access,
    task_id: UUID,
    body: schemas.TaskUpdateRequest,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Report what became of a task, or cancel it."""
    (reported,) = await reports.report(
        session, {task_id: body}, context.caller, may_enter, context.settings, key=idempotency_key
    )
    if isinstance(reported, exceptions.ProblemException):
        raise reported
    if reported.changed:
        context.outbox.tasks_changed([reported.task])
    await context.commit(session)
    # a large result is not sent back
    large = isinstance(body.result, Written)
    return deps.json_response(tasks.as_json(reported.task, abridged=large))


@router.delete("/tasks/{task_id}", **answers(None, *TASK, status=204))
async def delete_task(
    context: RequestContext, session: SessionDep, may_enter: Access, task_id: UUID
) -> None:
    """Delete a task that has ended."""
    room = await operations.delete_one(session, task_id, context.caller, may_enter)
    context.outbox.tasks_deleted(room)
    await context.commit(session)
    log.info("user %s deleted task %s of room %s", context.caller.id, task_id, room)


@router.post(
    "/tasks/{task_id}/retry", **answers(schemas.TaskResponse, *RUNNABLE, *TASK, status=202)
)
async def retry_task(
    context: RequestContext,
    session: SessionDep,
    session_maker: Sessions,
    may_enter: Access,
    task_id: UUID,
) -> Response:
    """Set a task that has ended going again."""
    caller, settings = context.caller, context.settings
    task = await operations.retry(session, task_id, caller, may_enter, settings)
    # its submitter reads it wherever it is, and retries it where they still may submit
    await enter(session, caller, task.room_id, may_enter, _submitting(task.job_name))
    await deps.check_writable(context.request, task.room_id)
    await _retried(context, session, [task])
    await context.commit(session)
    where = deps.location_of_task(context.request, task.id)
    return deps.json_response(tasks.as_json(task), 202, {"Location": where})
