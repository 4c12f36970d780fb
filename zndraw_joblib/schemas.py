"""What goes over the wire: request and response models, and what JSON is taken."""

import gc
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Generic, TypeVar
from uuid import UUID

import pydantic_core
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)

from zndraw_joblib.exceptions import ProblemDetail
from zndraw_joblib.lifecycle import (
    MAX_ATTEMPTS,
    MAX_LENGTH,
    MAX_PRIORITY,
    UNPRINTABLE,
    ErrorType,
    TaskStatus,
    WorkerState,
    check_job_name,
    check_name,
    check_provider_name,
)

MAX_CLAIM = 32
MAX_REPORTS = 32
MAX_BATCH = 1000
MAX_HEARTBEAT_TASKS = 256
MAX_CLAIM_JOBS = 256
MAX_PAGE = 500
MAX_INT = 2**63 - 1
MAX_SECONDS = 10 * 365 * 86400
MIN_LIMIT = 0.1
#: Lists and objects in one JSON body: an atom's three coordinates are one of them.
MAX_CONTAINERS = 200_000

Json = Any
JsonObject = dict[str, Any]
T = TypeVar("T")

# What the parser lets through but no database or second parser would is looked for in
# the bytes: a walk through the values would take longer than everything else.
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
# All digits, and both signs of an exponent, are alike: a regular expression takes thirty
# times as long to find none of these.
_ALIKE = bytes.maketrans(b"123456789E", b"000000000e")
_LARGE = (b"0" * 19, b"e000", b"e+000")
_NUMBER = re.compile(rb"[-+.\deE]{5,}")
_INTEGER = re.compile(rb"(?<![-+.\deE])-?\d{19,}+(?![.eE])")


def parse_json(body: bytes) -> Json:
    """Parse JSON that can be stored and sent back as it came.

    Parameters
    ----------
    body : bytes
        UTF-8, as RFC 8259 demands.

    Raises
    ------
    ValueError
        For anything that is not JSON, NaN and Infinity, lone surrogates, NUL
        characters, integers beyond 64 bit, numbers that overflow a double,
        nesting deeper than the parser's limit (about 200), and more than
        :data:`MAX_CONTAINERS` lists and objects.
    """
    if _containers(body) > MAX_CONTAINERS and (
        _containers(_outside_strings(body)) > MAX_CONTAINERS
    ):
        raise ValueError(f"lists and objects are limited to {MAX_CONTAINERS}")
    with uncollected():
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    if b"\\u0000" in body and _NUL.search(body):
        raise ValueError("NUL characters can't be stored")
    alike = body.translate(_ALIKE)
    if any(large in alike for large in _LARGE):
        _require_storable(_outside_strings(body))
    return value


def _containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


@contextmanager
def uncollected() -> Iterator[None]:
    """Hold back the garbage collector while one call makes many values.

    They are no garbage, and it would go through all that the process has for each 36,000
    lists or so: ten times what it takes to make them.
    """
    enabled = gc.isenabled()
    if enabled:
        gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def canonical(value: Json) -> str:
    """Return JSON whose keys are sorted: equal for equal values, and for no others."""
    with uncollected():
        return json.dumps(value, sort_keys=True)


def equal_json(one: Json, other: Json) -> bool:
    """Tell whether two values are the same JSON: True is not 1, and 1 is not 1.0."""
    if pydantic_core.to_json(one) == pydantic_core.to_json(other):
        return True
    return bool(one == other) and canonical(one) == canonical(other)


def _outside_strings(body: bytes) -> bytes:
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    return b" ".join(unescaped.split(b'"')[::2])


def _require_storable(numbers: bytes) -> None:
    for digits in _INTEGER.findall(numbers):
        if len(digits) > 20 or not -MAX_INT - 1 <= int(digits) <= MAX_INT:
            raise ValueError("integers are limited to 64 bit")
    if any(map(math.isinf, map(float, _NUMBER.findall(numbers)))):
        raise ValueError("numbers are limited to the range of a double")


def check_printable(text: str) -> str:
    """Return ``text`` if it can be shown and logged.

    Raises
    ------
    ValueError
        For control characters and lone surrogates.
    """
    if UNPRINTABLE.search(text):
        raise ValueError("must not contain control characters or lone surrogates")
    return text


_Part = Field(
    json_schema_extra={
        "minLength": 1,
        "maxLength": MAX_LENGTH,
        "pattern": "^[^:\\u0000-\\u001f\\u007f-\\u009f]+$",
    }
)
Name = Annotated[str, AfterValidator(check_name), _Part]
JobName = Annotated[str, AfterValidator(check_job_name), _Part]
ProviderName = Annotated[str, AfterValidator(check_provider_name), _Part]
Message = Annotated[str, StringConstraints(max_length=1000), AfterValidator(check_printable)]
ErrorText = Annotated[str, StringConstraints(max_length=64 * 1024)]
# RFC 9110, section 8.3.1
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
MediaType = Annotated[
    str,
    StringConstraints(
        max_length=255,
        pattern=rf'^{_TOKEN}/{_TOKEN}([ \t]*;[ \t]*{_TOKEN}=({_TOKEN}|"[ !#-\[\]-~]*"))*$',
    ),
]


def _number(value: Json) -> Json:
    # left to itself Pydantic takes true for 1, and "1" too
    if isinstance(value, (bool, str)):
        raise ValueError("must be a number")
    return value


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
Seconds = Annotated[Number, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
# less than the sweeper can tell apart, and tasks would be tried again for ever
Limit = Annotated[Number, Field(ge=MIN_LIMIT, le=MAX_SECONDS, allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, le=1, allow_inf_nan=False)]
Attempt = Annotated[Integer, Field(ge=0, le=2**31 - 1)]


def _open(kind: type[StrEnum]) -> WrapValidator:
    """Return what lets clients read values that later hosts have and this enum hasn't."""

    def read(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValueError:
            if not isinstance(value, str):
                raise
            member = str.__new__(kind, value)
            member._name_ = member._value_ = value
            return member

    return WrapValidator(read)


AnyStatus = Annotated[TaskStatus, _open(TaskStatus)]
AnyErrorType = Annotated[ErrorType, _open(ErrorType)]
AnyState = Annotated[WorkerState, _open(WorkerState)]


class PaginatedResponse(BaseModel, Generic[T]):
    """One page of a listing, newest first; ``total`` counts all pages."""

    items: list[T]
    total: int
    limit: int
    offset: int


class WorkerResponse(BaseModel):
    """A worker."""

    id: UUID
    last_heartbeat: datetime
    state: AnyState = WorkerState.ACTIVE


class HeartbeatResponse(WorkerResponse):
    """A worker, and what it should know about the tasks that it reported."""

    cancelled: list[UUID] = []
    lost: list[UUID] = []
    desired_state: AnyState = WorkerState.ACTIVE
    jobs: int | None = Field(
        default=None,
        description="How many jobs the worker serves: of fewer than it registered the"
        " host lost some.",
    )
    providers: int | None = Field(default=None, description="How many providers the worker serves.")


class Limits(BaseModel):
    """What one request may ask for at most, in this host."""

    max_claim: int = Field(description="Tasks of a claim.")
    max_claim_jobs: int = Field(description="Jobs that a claim names.")
    max_reports: int = Field(description="Reports of a batch.")
    max_batch: int = Field(description="Tasks of a submission.")
    max_heartbeat_tasks: int = Field(description="Tasks of a heartbeat.")
    max_page: int = Field(description="Entries of a page, and tasks of a query.")
    max_payload_bytes: int = Field(description="Bytes of a JSON body.")
    max_result_bytes: int = Field(description="Bytes of a report with its result.")
    long_poll_max_wait_seconds: float
    worker_timeout_seconds: float = Field(
        description="Silence after which a worker counts as lost."
    )


class WorkerSummary(BaseModel):
    """A worker in a listing."""

    id: UUID
    last_heartbeat: datetime
    job_count: int
    state: AnyState = WorkerState.ACTIVE
    alive: bool = Field(
        default=False,
        description="Whether it was heard within `worker_timeout_seconds`, by the"
        " database's clock.",
    )


class TaskHeartbeat(BaseModel):
    """What a worker says of one task that it runs."""

    id: UUID
    attempt: Attempt
    progress: Fraction | None = None
    message: Message | None = None


class WorkerUpdateRequest(BaseModel):
    """A heartbeat: all of it is optional."""

    tasks: list[TaskHeartbeat] = Field(default=[], max_length=MAX_HEARTBEAT_TASKS)
    state: WorkerState | None = None


class PolicyResponse(BaseModel):
    """How a job's tasks are tried, as it stands."""

    max_attempts: int = 1
    retry_delay_seconds: float = 0
    timeout_seconds: float | None = None
    start_timeout_seconds: float | None = None


class JobPolicy(BaseModel):
    """How a job's tasks are tried: all of it is optional, times in seconds."""

    max_attempts: Integer = Field(default=1, ge=1, le=MAX_ATTEMPTS)
    retry_delay_seconds: Seconds = 0
    timeout_seconds: Limit | None = None
    start_timeout_seconds: Limit | None = None


class JobRegisterRequest(JobPolicy):
    """A job that a worker offers to serve."""

    model_config = ConfigDict(populate_by_name=True)

    category: Name
    name: JobName
    schema_: JsonObject = Field(default={}, alias="schema")
    worker_id: UUID | None = None


class JobSummary(BaseModel):
    """A job in a listing."""

    full_name: str
    category: str
    name: str
    workers: list[UUID]
    workers_alive: int = 0


class JobResponse(PolicyResponse):
    """A job."""

    model_config = ConfigDict(populate_by_name=True)

    id: UUID
    room_id: str
    category: str
    name: str
    full_name: str
    schema_: JsonObject = Field(
        validation_alias=AliasChoices("schema", "schema_"), serialization_alias="schema"
    )
    workers: list[UUID]
    workers_alive: int = 0
    worker_id: UUID | None = None
    policy_kept: bool = Field(
        default=False,
        description="Whether another policy was asked for and this one stays, since live"
        " workers of other users serve the job.",
    )


class JobStats(BaseModel):
    """What goes on in a job, over all rooms.

    Attributes
    ----------
    job_name : str
        The job's full name.
    pending : int
        Tasks that wait for a worker, counted up to ``queue_position_max``.
    delayed : int
        Pending tasks that wait for their time, counted up to the same.
    claimed, running : int
        Tasks in somebody's hands.
    oldest_pending_seconds : float or None
        Since when the oldest of the counted pending tasks was submitted.
    completed_last_minute, failed_last_minute : int
        Tasks that ended within the last 60 seconds.
    workers_alive : int
        Workers of the job that were heard within ``worker_timeout_seconds``.
    """

    job_name: str
    pending: int
    delayed: int
    claimed: int
    running: int
    oldest_pending_seconds: float | None
    completed_last_minute: int
    failed_last_minute: int
    workers_alive: int


class TaskSubmitRequest(BaseModel):
    """A task to run."""

    payload: JsonObject = {}
    priority: Integer = Field(default=0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    delay_seconds: Seconds = 0


class TaskBatchRequest(BaseModel):
    """Tasks of one job to run: all of them are submitted, or none."""

    tasks: list[TaskSubmitRequest] = Field(min_length=1, max_length=MAX_BATCH)


class TaskBatchResponse(BaseModel):
    """The ids of submitted tasks, in the order of the request."""

    ids: list[UUID]


class TaskError(BaseModel):
    """How one attempt ended."""

    attempt: int
    error_type: AnyErrorType
    error: str | None = None


class TaskResponse(BaseModel):
    """A task."""

    id: UUID
    job_name: str
    room_id: str
    status: AnyStatus
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    worker_id: UUID | None = None
    error: str | None = None
    payload: JsonObject = {}
    queue_position: int | None = None
    attempt: int = 0
    max_attempts: int = 1
    claimed_at: datetime | None = None
    available_at: datetime | None = None
    error_type: AnyErrorType | None = None
    errors: list[TaskError] = []
    result: Json = None
    progress: float | None = None
    progress_message: str | None = None
    priority: int = 0
    created_by_id: UUID | None = None
    traceparent: str | None = None
    revision: int = Field(
        default=1,
        description="Grows with every change of the task: whoever holds a larger one"
        " drops this state of it.",
    )
    payload_checked: bool = Field(
        default=True,
        description="Whether the host compared `payload` with the job's schema; the"
        " worker always does.",
    )
    abridged: bool = Field(
        default=False,
        description="Too large for an answer with many: `payload`, `result` and `errors` are left"
        " out and `error` is cut. The task itself tells them.",
    )


class TaskClaimRequest(BaseModel):
    """A worker's request for work."""

    worker_id: UUID
    max_tasks: Integer = Field(default=1, ge=1, le=MAX_CLAIM)
    start: bool = Field(default=False, strict=True, description="The tasks are running at once.")
    jobs: list[Message] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_CLAIM_JOBS,
        description="Full names: of the worker's jobs, these alone.",
    )


class TaskClaimResponse(BaseModel):
    """The claimed tasks, oldest first; ``task`` is the first of them."""

    task: TaskResponse | None = None
    tasks: list[TaskResponse] = []


class TaskUpdateRequest(BaseModel):
    """A report: what became of a task."""

    status: TaskStatus
    error: ErrorText | None = None
    attempt: Attempt | None = None
    retryable: bool = Field(default=True, strict=True)
    result: Json = None


class TaskReport(TaskUpdateRequest):
    """A report, and of which task."""

    id: UUID


class TaskReportsRequest(BaseModel):
    """What became of several tasks; each report is judged on its own."""

    reports: list[TaskReport] = Field(min_length=1, max_length=MAX_REPORTS)

    @field_validator("reports")
    @classmethod
    def _one_each(cls, reports: list[TaskReport]) -> list[TaskReport]:
        if len({report.id for report in reports}) < len(reports):
            raise ValueError("there may be one report of each task")
        return reports


class TaskOutcome(BaseModel):
    """What a single report of this task would have been answered."""

    id: UUID
    status: int = Field(description="200, or the `status` of the problem.")
    task: TaskResponse | None = None
    problem: ProblemDetail | None = None


class TaskReportsResponse(BaseModel):
    """The outcome of each report, in the order of the request."""

    outcomes: list[TaskOutcome]


class TaskQueryRequest(BaseModel):
    """Tasks that somebody waits for."""

    ids: list[UUID] = Field(min_length=1, max_length=MAX_PAGE)


class TaskQueryResponse(BaseModel):
    """Tasks in the order of the request, and ids of which there is none."""

    tasks: list[TaskResponse]
    missing: list[UUID] = []


class ProviderRegisterRequest(BaseModel):
    """A provider that a worker offers."""

    model_config = ConfigDict(populate_by_name=True)

    category: Name
    name: ProviderName
    schema_: JsonObject = Field(default={}, alias="schema")
    content_type: MediaType = "application/json"
    worker_id: UUID | None = None


class ProviderResponse(BaseModel):
    """A provider."""

    model_config = ConfigDict(populate_by_name=True)

    id: UUID
    room_id: str
    category: str
    name: str
    full_name: str
    schema_: JsonObject = Field(
        validation_alias=AliasChoices("schema", "schema_"), serialization_alias="schema"
    )
    content_type: str = "application/json"
    worker_id: UUID | None
    created_at: datetime
    abridged: bool = Field(
        default=False,
        description="Too large for a listing: `schema` is left out. `/info` tells it.",
    )
