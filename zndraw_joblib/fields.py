"""Which values the fields of requests take, and of answers."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    StringConstraints,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from zndraw_joblib.lifecycle import (
    MAX_CHECKPOINT_BYTES,
    MAX_LENGTH,
    MAX_LOG_BYTES,
    MAX_LOG_LINES,
    ErrorType,
    Json,
    TaskStatus,
    WaitingFor,
    WorkerState,
    as_line,
    check_job_name,
    check_name,
    check_printable,
    check_provider_name,
)

MAX_SECONDS = 10 * 365 * 86400
MIN_LIMIT = 0.1

# what was parsed is not gone through again
JsonObject = InstanceOf[dict[str, Any]]

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
Label = Annotated[str, StringConstraints(max_length=MAX_LENGTH), AfterValidator(check_printable)]
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


def _of_checkpoint_size(value: Json) -> Json:
    size = len(pydantic_core.to_json(value))
    if size > MAX_CHECKPOINT_BYTES:
        raise ValueError(f"has {size} bytes: a checkpoint may have {MAX_CHECKPOINT_BYTES}")
    return value


Checkpoint = Annotated[Json, AfterValidator(_of_checkpoint_size)]


def _of_log_size(lines: list[str]) -> list[str]:
    size = sum(len(line.encode()) + 1 for line in lines)
    if size > MAX_LOG_BYTES:
        raise ValueError(f"have {size} bytes: of a task, a heartbeat may bring {MAX_LOG_BYTES}")
    return lines


LogLines = Annotated[
    list[Annotated[str, AfterValidator(as_line)]],
    Field(min_length=1, max_length=MAX_LOG_LINES),
    AfterValidator(_of_log_size),
]


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
AnyWaitingFor = Annotated[WaitingFor, _open(WaitingFor)]
AnyState = Annotated[WorkerState, _open(WorkerState)]


def _moment(value: Any) -> datetime:
    # Pydantic would take numbers too, whose unit is guessed
    if not isinstance(value, (str, datetime)):
        raise ValueError("must be a date and time of ISO 8601")
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    if moment.tzinfo is None:
        raise ValueError("must have a time zone")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be between the years 1 and 9999 in UTC") from None


Moment = Annotated[datetime, BeforeValidator(_moment)]


class Model(BaseModel):
    """What goes over the wire."""

    model_config = ConfigDict(populate_by_name=True, use_attribute_docstrings=True)


def example(**members: Any) -> ConfigDict:
    """Return the configuration of a model that OpenAPI shows an example of."""
    return ConfigDict(json_schema_extra={"examples": [members]})
