"""What goes over the wire: request and response models."""

from datetime import datetime
from typing import Generic, Literal, Self, TypeVar
from uuid import UUID

from pydantic import AliasChoices, Field, field_validator, model_validator

from zndraw_joblib import lifecycle
from zndraw_joblib.encoding import Json
from zndraw_joblib.exceptions import ProblemDetail
from zndraw_joblib.lifecycle import ErrorType, Model, TaskStatus, example
from zndraw_joblib.schemas_workers import MAX_HEARTBEAT_TASKS as MAX_HEARTBEAT_TASKS
from zndraw_joblib.schemas_workers import HeartbeatResponse as HeartbeatResponse
from zndraw_joblib.schemas_workers import RunningTask as RunningTask
from zndraw_joblib.schemas_workers import TaskHeartbeat as TaskHeartbeat
from zndraw_joblib.schemas_workers import WorkerDescription as WorkerDescription
from zndraw_joblib.schemas_workers import WorkerResponse as WorkerResponse
from zndraw_joblib.schemas_workers import WorkerSummary as WorkerSummary
from zndraw_joblib.schemas_workers import WorkerUpdateRequest as WorkerUpdateRequest

MAX_CLAIM = 32
MAX_REPORTS = 32
MAX_BATCH = 1000
MAX_CLAIM_JOBS = 256
MAX_PAGE = 500

T = TypeVar("T")
_ID = "0198a2f4-6c1e-7b3a-9d52-4f8e1c0b7a63"


class PaginatedResponse(Model, Generic[T]):
    """One page of a listing, newest first; ``total`` counts all pages."""

    items: list[T]
    total: int
    limit: int
    offset: int


class Limits(Model):
    """What one request may ask for at most, in this host."""

    max_claim: int = MAX_CLAIM
    """Tasks of a claim."""
    max_claim_jobs: int = MAX_CLAIM_JOBS
    """Jobs that a claim names."""
    max_reports: int = MAX_REPORTS
    """Reports of a batch."""
    max_batch: int = MAX_BATCH
    """Tasks of a submission."""
    max_heartbeat_tasks: int = MAX_HEARTBEAT_TASKS
    """Tasks of a heartbeat."""
    max_page: int = MAX_PAGE
    """Entries of a page, and tasks of a query."""
    max_payload_bytes: int
    """Bytes of a JSON body."""
    max_result_bytes: int
    """Bytes of a report with its result."""
    long_poll_max_wait_seconds: float
    worker_timeout_seconds: float
    """Silence after which a worker counts as lost."""


class PolicyResponse(Model):
    """How a job's tasks are tried, as it stands."""

    max_attempts: int = 1
    retry_delay_seconds: float = 0
    timeout_seconds: float | None = None
    start_timeout_seconds: float | None = None
    max_interruptions: int = 10
    expected_seconds: float | None = None


class JobPolicy(Model):
    """How a job's tasks are tried: all of it is optional, times in seconds."""

    max_attempts: lifecycle.Integer = Field(default=1, ge=1, le=lifecycle.MAX_ATTEMPTS)
    retry_delay_seconds: lifecycle.Seconds = 0
    timeout_seconds: lifecycle.Limit | None = None
    start_timeout_seconds: lifecycle.Limit | None = None
    max_interruptions: lifecycle.Integer = Field(default=10, ge=0, le=lifecycle.MAX_ATTEMPTS)
    """How often a running task may be given back, by workers that have to leave, until that
    counts as a failed attempt."""
    expected_seconds: lifecycle.Limit | None = None
    """How long a run takes: a worker that is to leave sooner takes no such task."""


class JobRegisterRequest(JobPolicy):
    """A job that a worker offers to serve."""

    model_config = example(
        category="analysis",
        name="Double",
        schema={"type": "object", "properties": {"number": {"type": "integer"}}},
        max_attempts=3,
    )

    category: lifecycle.Name
    name: lifecycle.JobName
    schema_: lifecycle.JsonObject = Field(default={}, alias="schema")
    worker_id: UUID | None = None
    worker: WorkerDescription | None = None
    replace: bool = Field(default=False, strict=True)
    """Another schema takes the place of the job's, if all of its live workers are the
    caller's. The other ones serve it no more until they register again."""


class JobUpdateRequest(Model):
    """What the operators of a job's room set."""

    model_config = example(paused=True)

    paused: bool = Field(strict=True)
    """Whether its tasks wait, whoever serves it."""


class JobSummary(Model):
    """A job in a listing."""

    full_name: str
    category: str
    name: str
    workers: list[UUID]
    workers_alive: int = 0
    paused: bool = False


class _Offer(Model):
    id: UUID
    room_id: str
    category: str
    name: str
    full_name: str
    schema_: lifecycle.JsonObject = Field(
        validation_alias=AliasChoices("schema", "schema_"), serialization_alias="schema"
    )


class JobResponse(_Offer, PolicyResponse):
    """A job."""

    workers: list[UUID]
    workers_alive: int = 0
    paused: bool = False
    worker_id: UUID | None = None
    policy_kept: bool = False
    """Whether another policy was asked for and this one stays, since live workers of other
    users serve the job."""


class JobStats(Model):
    """What goes on in a job, over all rooms."""

    job_name: str
    """The job's full name."""
    pending: int
    """Tasks that wait for a worker, counted up to `queue_position_max`."""
    delayed: int
    """Pending tasks that wait for their time, counted up to the same."""
    claimed: int
    running: int
    oldest_pending_seconds: float | None
    """Since when the oldest of the counted pending tasks was submitted."""
    completed_last_minute: int
    failed_last_minute: int
    workers_alive: int
    """Workers of the job that were heard within `worker_timeout_seconds`."""


class TaskSubmitRequest(Model):
    """A task to run."""

    model_config = example(payload={"number": 21})

    payload: lifecycle.JsonObject = {}
    priority: lifecycle.Integer = Field(
        default=0, ge=-lifecycle.MAX_PRIORITY, le=lifecycle.MAX_PRIORITY
    )
    delay_seconds: lifecycle.Seconds = 0


class TaskBatchRequest(Model):
    """Tasks of one job to run: all of them are submitted, or none."""

    model_config = example(tasks=[{"payload": {"number": 1}}, {"payload": {"number": 2}}])

    tasks: list[TaskSubmitRequest] = Field(min_length=1, max_length=MAX_BATCH)


class TaskBatchResponse(Model):
    """The ids of submitted tasks, in the order of the request."""

    ids: list[UUID]


class TaskError(Model):
    """How one attempt ended."""

    attempt: int
    error_type: lifecycle.AnyErrorType
    error: str | None = None


class TaskResponse(Model):
    """A task."""

    id: UUID
    job_name: str
    room_id: str
    status: lifecycle.AnyStatus
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    worker_id: UUID | None = None
    error: str | None = None
    payload: lifecycle.JsonObject = {}
    queue_position: int | None = None
    attempt: int = 0
    max_attempts: int = 1
    claimed_at: datetime | None = None
    available_at: datetime | None = None
    error_type: lifecycle.AnyErrorType | None = None
    errors: list[TaskError] = []
    result: Json = None
    progress: float | None = None
    progress_message: str | None = None
    priority: int = 0
    created_by_id: UUID | None = None
    traceparent: str | None = None
    revision: int = 1
    """Grows with every change of the task: whoever holds a larger one drops this state of
    it."""
    payload_checked: bool = True
    """Whether the host compared `payload` with the job's schema; the worker always does."""
    waiting_for: lifecycle.AnyWaitingFor | None = None
    """Why it is pending."""
    ended_by_id: UUID | None = None
    """The user who cancelled it."""
    reason: str | None = None
    """Why it was cancelled."""
    retried_by_id: UUID | None = None
    """The user who last set it going again after its end."""
    interruptions: int = 0
    """How often a worker had to leave while it ran."""
    checkpoint: Json = None
    """What its last attempt saved, for the next one to go on from; not in listings."""
    abridged: bool = False
    """Too large for an answer with many: `payload`, `result` and `errors` are left out and
    `error` is cut. The task itself tells them."""


class LogLine(Model):
    """A line of a task's log."""

    number: int
    """Counts through all attempts."""
    attempt: int
    text: str
    omitted: int = 0
    """How many lines were left out, and this one stands for."""


class TaskLogResponse(Model):
    """A part of a task's log."""

    lines: list[LogLine]
    next: int
    """The number of the last of them: the `after` that leads on."""
    ended: bool
    """Whether this is the end: the task has ended, and there is no further line."""


class TaskClaimRequest(Model):
    """A worker's request for work."""

    model_config = example(worker_id=_ID, max_tasks=4, start=True)

    worker_id: UUID
    max_tasks: lifecycle.Integer = Field(default=1, ge=1, le=MAX_CLAIM)
    start: bool = Field(default=False, strict=True)
    """The tasks are running at once."""
    jobs: list[lifecycle.Message] | None = Field(
        default=None, min_length=1, max_length=MAX_CLAIM_JOBS
    )
    """Full names: of the worker's jobs, these alone."""


class TaskClaimResponse(Model):
    """The claimed tasks, oldest first; ``task`` is the first of them."""

    task: TaskResponse | None = None
    tasks: list[TaskResponse] = []


class TaskUpdateRequest(Model):
    """A report: what became of a task."""

    model_config = example(status="completed", attempt=1, result=42)

    status: TaskStatus
    error: lifecycle.ErrorText | None = None
    attempt: lifecycle.Attempt | None = None
    error_type: Literal[ErrorType.USER_ERROR, ErrorType.CRASHED] = ErrorType.USER_ERROR
    """Of a failure: whether the process that ran the task died."""
    retryable: bool = Field(default=True, strict=True)
    result: Json = None
    reason: lifecycle.Message | None = None
    """Of a cancel: why. The first one stays."""
    interrupted: bool = Field(default=False, strict=True)
    """Of `pending`: the task was at work, and its worker has to leave."""

    @model_validator(mode="after")
    def _interrupts(self) -> Self:
        if self.interrupted and (self.status is not TaskStatus.PENDING or self.attempt is None):
            raise ValueError("what is interrupted becomes pending, and is a certain attempt")
        return self


class TaskReport(TaskUpdateRequest):
    """A report, and of which task."""

    model_config = example(id=_ID, status="completed", attempt=1, result=42)

    id: UUID


class TaskReportsRequest(Model):
    """What became of several tasks; each report is judged on its own."""

    model_config = example(
        reports=[{"id": _ID, "status": "failed", "attempt": 1, "error": "no such file"}]
    )

    reports: list[TaskReport] = Field(min_length=1, max_length=MAX_REPORTS)

    @field_validator("reports")
    @classmethod
    def _one_each(cls, reports: list[TaskReport]) -> list[TaskReport]:
        if len({report.id for report in reports}) < len(reports):
            raise ValueError("there may be one report of each task")
        return reports


class TaskOutcome(Model):
    """What a single report of this task would have been answered."""

    id: UUID
    status: int
    """200, or the `status` of the problem."""
    task: TaskResponse | None = None
    problem: ProblemDetail | None = None


class TaskReportsResponse(Model):
    """The outcome of each report, in the order of the request."""

    outcomes: list[TaskOutcome]


class TaskBulkRequest(Model):
    """Which of a room's tasks to cancel, to retry or to delete: one filter at least."""

    model_config = example(action="cancel", job="lab:analysis:Double", status="pending")

    action: Literal["cancel", "retry", "delete"]
    job: lifecycle.Message | None = None
    """The full name of the tasks' job."""
    status: TaskStatus | None = None
    created_by: UUID | None = None
    """The user who submitted them."""
    before: lifecycle.Moment | None = None
    """They were submitted earlier than that."""
    reason: lifecycle.Message | None = None
    """Of a cancel: why."""
    dry_run: bool = Field(default=False, strict=True)
    """Nothing is changed."""

    @model_validator(mode="after")
    def _filtered(self) -> "TaskBulkRequest":
        if not any((self.job, self.status, self.created_by, self.before)):
            raise ValueError("one of job, status, created_by and before has to say which tasks")
        return self


class TaskBulkResponse(Model):
    """How many tasks were changed, or would have been."""

    count: int
    """At most 1000, the oldest first."""
    more: bool
    """Whether there are others: for these the request is to be repeated."""


class TaskQueryRequest(Model):
    """Tasks that somebody waits for."""

    model_config = example(ids=[_ID])

    ids: list[UUID] = Field(min_length=1, max_length=MAX_PAGE)


class TaskQueryResponse(Model):
    """Tasks in the order of the request, and ids of which there is none."""

    tasks: list[TaskResponse]
    missing: list[UUID] = []


class ProviderRegisterRequest(Model):
    """A provider that a worker offers."""

    model_config = example(category="files", name="structures")

    category: lifecycle.Name
    name: lifecycle.ProviderName
    schema_: lifecycle.JsonObject = Field(default={}, alias="schema")
    content_type: lifecycle.MediaType = "application/json"
    worker_id: UUID | None = None
    worker: WorkerDescription | None = None


class ProviderResponse(_Offer):
    """A provider."""

    content_type: str = "application/json"
    worker_id: UUID | None
    created_at: datetime
    abridged: bool = False
    """Too large for a listing: `schema` is left out. `/info` tells it."""
