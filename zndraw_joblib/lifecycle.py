"""What both sides of the wire agree on: states of tasks, full names, rooms, and fields."""

import re
import unicodedata
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

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

from zndraw_joblib.encoding import Json


class TaskStatus(StrEnum):
    """Where a task is in its life."""

    PENDING = "pending"
    """Waits for a worker, or (after a failed attempt) for its backoff to pass."""
    CLAIMED = "claimed"
    """A worker holds it, or (``@internal``) it was handed to the broker."""
    RUNNING = "running"
    """Its holder reported that it started."""
    COMPLETED = "completed"
    """Terminal: its holder reported success."""
    FAILED = "failed"
    """Terminal: no attempt is left; ``error`` says why."""
    CANCELLED = "cancelled"
    """Terminal: somebody entitled to it said stop."""


class ErrorType(StrEnum):
    """Why an attempt failed."""

    WORKER_LOST = "worker_lost"
    """Its worker was deleted, or fell silent."""
    TIMEOUT = "timeout"
    """It ran longer than the job's ``timeout_seconds``."""
    DISPATCH = "dispatch"
    """The broker did not take the message of an ``@internal`` task."""
    USER_ERROR = "user_error"
    """Its holder reported the failure."""
    CRASHED = "crashed"
    """The process that ran it died: ``error`` has the signal or the exit code."""


class WaitingFor(StrEnum):
    """Why a task is pending."""

    NO_WORKER = "no_worker"
    """No worker of its job is alive and takes tasks."""
    PAUSED = "paused"
    """Its job is paused."""
    DELAYED = "delayed"
    """Its time, ``available_at``, has not come."""
    BEHIND = "behind"
    """Others are before it, or its workers are at something."""


class WorkerState(StrEnum):
    """Whether a worker is to be given tasks."""

    ACTIVE = "active"
    """Claims are answered with tasks."""
    DRAINING = "draining"
    """It finishes what it holds and gets nothing new."""


HELD = frozenset({TaskStatus.CLAIMED, TaskStatus.RUNNING})
TERMINAL = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED})

#: Where a task comes from that was not there before.
UNBORN: frozenset[TaskStatus] = frozenset()


class Transition(NamedTuple):
    """A way on: what it is called, whence it comes, and where it leads.

    Attributes
    ----------
    name : str
        What happens.
    sources : frozenset of TaskStatus
        The states that the task may be in before.
    target : TaskStatus
        The state that it is in afterwards.
    reported : bool
        Whether a report can ask for it.
    """

    name: str
    sources: frozenset[TaskStatus]
    target: TaskStatus
    reported: bool = False


#: Every way there is. What is not here does not happen.
TRANSITIONS = (
    Transition("submit", UNBORN, TaskStatus.PENDING),
    Transition("submit, @internal", UNBORN, TaskStatus.CLAIMED),
    Transition("claim", frozenset({TaskStatus.PENDING}), TaskStatus.CLAIMED),
    # by a claim that asks for it
    Transition("claim and start", frozenset({TaskStatus.PENDING}), TaskStatus.RUNNING),
    # By a worker that goes, or because it was never started: no attempt is lost. A running
    # task only as its claim left it, which started it: nobody has said that its work began.
    Transition("hand back", HELD, TaskStatus.PENDING, reported=True),
    Transition("start", frozenset({TaskStatus.CLAIMED}), TaskStatus.RUNNING, reported=True),
    Transition("complete", frozenset({TaskStatus.RUNNING}), TaskStatus.COMPLETED, reported=True),
    # reported, or its worker is lost, or its time is over
    Transition("fail", HELD, TaskStatus.FAILED, reported=True),
    Transition("try again", HELD, TaskStatus.PENDING),
    Transition("cancel", HELD | {TaskStatus.PENDING}, TaskStatus.CANCELLED, reported=True),
    Transition("retry", TERMINAL, TaskStatus.PENDING),
    Transition("retry, @internal", TERMINAL, TaskStatus.CLAIMED),
)

#: For each state that a report can ask for: the states it may follow.
REPORTABLE = {way.target: way.sources for way in TRANSITIONS if way.reported}

MAX_ATTEMPTS = 100
MAX_PRIORITY = 1000
#: Of a checkpoint, as JSON without blanks.
MAX_CHECKPOINT_BYTES = 64 * 1024
#: Of what a heartbeat may bring of a task's log.
MAX_LOG_LINES = 100
MAX_LOG_BYTES = 64 * 1024
#: In characters.
MAX_LOG_LINE = 4000

WORKER_LOST_ERROR = "Worker disconnected"
INTERRUPTED_ERROR = "Interrupted too often"
TIMEOUT_ERROR = "Ran longer than the job allows"
INTERNAL_TIMEOUT_ERROR = "Internal task timed out"

GLOBAL_ROOM = "@global"
INTERNAL_ROOM = "@internal"
SPECIAL_ROOMS = frozenset({GLOBAL_ROOM, INTERNAL_ROOM})

MAX_LENGTH = 255
#: Of a full name in UTF-8: a row of an index of PostgreSQL has 2704 bytes at most.
MAX_BYTES = 2560

# Controls and lone surrogates can't be shown, logged or (NUL, surrogates) stored.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_AS_BLANKS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)], " ")
# What has no shape of its own, or turns others around. The joiners are part of words and
# of emoji.
_UNSEEN = frozenset({"Cf", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"
# Parts of a path that clients resolve before they send it.
_DOTS = frozenset({".", ".."})


class FullName(NamedTuple):
    """What a job or provider is called: ``room:category:name``."""

    room: str
    category: str
    name: str

    def __str__(self) -> str:
        return ":".join(self)

    @classmethod
    def of(cls, room: str, category: str, name: str) -> "FullName":
        """Return a full name as it is stored, from its parts as they were given.

        Raises
        ------
        ValueError
            When one of them can't be one, or all of them are too long together.
        """
        try:
            return cls(check_room(room), check_name(category), check_name(name)).bounded()
        except ValueError as exc:
            raise ValueError(f"{room}:{category}:{name} can't be a name: {exc}") from None

    def bounded(self) -> "FullName":
        """Return the name itself, if it isn't too long for an index.

        Raises
        ------
        ValueError
            When it has more than 2560 bytes in UTF-8.
        """
        if len(str(self).encode()) > MAX_BYTES:
            raise ValueError(f"must have at most {MAX_BYTES} bytes together, in UTF-8")
        return self


def split_full_name(full_name: str) -> FullName:
    """Split a full name at its first two colons.

    Raises
    ------
    ValueError
        When there are fewer than two colons, or control characters.
    """
    parts = full_name.split(":", 2)
    if len(parts) != 3 or UNPRINTABLE.search(full_name):
        raise ValueError(f"{full_name!r} is not of the form room:category:name")
    room, *names = parts
    return FullName(room, *(unicodedata.normalize("NFC", name) for name in names))


def _check_part(part: str) -> None:
    if not 0 < len(part) <= MAX_LENGTH:
        raise ValueError(f"must have 1 to {MAX_LENGTH} characters")
    if ":" in part:
        raise ValueError("must not contain a colon")
    if UNPRINTABLE.search(part):
        raise ValueError("must not contain control characters or lone surrogates")


def check_name(name: str) -> str:
    """Return ``name``, in its composed form (NFC), if it can be part of a full name.

    Of two spellings of one name one is stored, and both find it.

    Raises
    ------
    ValueError
        When it is empty, longer than 255 characters, holds a colon or a control
        character, or ``/`` with ``.`` or ``..`` behind it, which a client would resolve
        as it resolves paths.
    """
    # normalizing what can't be encoded makes nothing of it
    name = unicodedata.normalize("NFC", name)
    _check_part(name)
    if _DOTS.intersection(name.split("/")[1:]):
        raise ValueError("must not contain '/.' or '/..' as part of a path")
    return name


def check_job_name(name: str) -> str:
    """Return ``name``, in its composed form (NFC), if a job can be called so.

    Raises
    ------
    ValueError
        As :func:`check_name`; and when it ends in ``/tasks``, which is the path of a
        job's tasks, or holds characters that can't be seen.
    """
    name = check_name(name)
    if name.endswith("/tasks"):
        raise ValueError("must not end in '/tasks'")
    if any(unicodedata.category(c) in _UNSEEN and c not in _JOINERS for c in name):
        raise ValueError("must not contain invisible characters")
    return name


def check_provider_name(name: str) -> str:
    """Return ``name``, in its composed form (NFC), if a provider can be called so.

    Raises
    ------
    ValueError
        As :func:`check_name`; and when it ends in ``/info``, which is the path of what
        is known of a provider.
    """
    name = check_name(name)
    if name.endswith("/info"):
        raise ValueError("must not end in '/info'")
    return name


def check_room(room: str) -> str:
    """Return ``room`` if it is ``@global``, ``@internal`` or an ordinary room id.

    Rooms are the host's: they are taken as they are written.

    Raises
    ------
    ValueError
        When it is none of them: empty, ``.``, ``..``, longer than 255 characters, or
        holding ``@``, ``:``, ``/`` or a control character.
    """
    if room in SPECIAL_ROOMS:
        return room
    if "@" in room:
        raise ValueError("must not contain '@'")
    if "/" in room or room in _DOTS:
        raise ValueError("must not be '.' or '..', or contain '/': no URL would reach it")
    _check_part(room)
    return room


def visible_rooms(room: str) -> tuple[str, ...]:
    """Return the rooms whose jobs and providers ``room`` sees, itself first."""
    return (room,) if room in SPECIAL_ROOMS else (room, GLOBAL_ROOM, INTERNAL_ROOM)


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


def as_line(text: str) -> str:
    """Return ``text`` as a line of a log: cut, and cleaned of what can't be shown."""
    if len(text) > MAX_LOG_LINE:
        # with what it says of it, not longer than what is not cut again
        kept = MAX_LOG_LINE - 50
        text = f"{text[:kept]}... ({len(text) - kept} characters left out)"
    # this way a mebibyte of controls takes milliseconds
    return text if text.isprintable() else text.translate(_AS_BLANKS)


# --- which values fields take ---

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
