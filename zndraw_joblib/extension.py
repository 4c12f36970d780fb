"""What a worker's author subclasses to offer a job, and is given to run it: a claimed task."""

import json
import math
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, ClassVar, Generic

import pydantic_core
from pydantic import AliasChoices, AliasPath, BaseModel
from pydantic.fields import FieldInfo
from typing_extensions import TypeVar

from zndraw_joblib.encoding import as_json, unfit
from zndraw_joblib.lifecycle import MAX_CHECKPOINT_BYTES, MAX_LOG_LINES, UNPRINTABLE, as_line

MAX_MESSAGE = 1000
PROGRESS_SECONDS = 1.0
# what may wait for heartbeats; beyond, the oldest lines are left out
MAX_UNSENT_LINES = 2000
MAX_UNSENT_CHARACTERS = 256 * 1024
# half of what a host takes of a task at once
BYTES_A_BEAT = 32 * 1024
#: What sets colours, and moves the cursor.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")

E = TypeVar("E", bound="Extension", default=Any)


class Category(StrEnum):
    """Where a host's menus show a job."""

    MODIFIER = "modifiers"
    """Changes the structure, or adds to it."""
    SELECTION = "selections"
    """Chooses atoms."""
    ANALYSIS = "analysis"
    """Computes something from the structure and leaves it alone."""


class Extension(BaseModel, ABC):
    """A job: its fields are the parameters, its JSON schema is the job's schema.

    A parameter that it doesn't have is refused, unless its ``model_config`` says what becomes
    of ``extra`` ones; in what comes over the wire it is left out.

    Attributes
    ----------
    category : Category
        Set by every subclass. A host may allow other categories, as plain strings.
    nan_as_null : bool
        Whether NaN and Infinity in a result become null; else it is refused, and the error
        says where they stand.

    Examples
    --------
    >>> class Rotate(Extension):
    ...     category: ClassVar[Category] = Category.MODIFIER
    ...     angle: float = 90.0
    ...
    ...     def run(self, vis, **kwargs):
    ...         vis.atoms.rotate(self.angle, "z")
    """

    category: ClassVar[Category]
    nan_as_null: ClassVar[bool] = False

    @abstractmethod
    def run(self, vis: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Do the work on ``vis``; ``kwargs`` are those given at registration.

        What overrides it takes of these what it needs: ``run(self, vis, *, task)``.
        """

    def __init__(self, **parameters: Any) -> None:
        cls = type(self)
        if "extra" not in cls.model_config:
            fields = cls.model_fields.items()
            check_parameters(cls.__name__, parameters, {n for f in fields for n in _names(*f)})
        super().__init__(**parameters)

    # what is validated doesn't come this way: another release of the class may have sent it
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class TaskCancelled(Exception):
    """The host wants this task to stop, or has given it to another worker."""


class TaskLog:
    """The lines of a task's attempt that the host does not have yet; for any thread."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._characters = 0
        self._omitted = 0
        self._first = 1
        #: what is under way, as long as the host has not answered
        self._sent: dict[str, Any] | None = None
        self._lock = threading.Lock()

    def add(self, text: str) -> None:
        """Add one line, or several."""
        lines = [as_line(_as_shown(line)) for line in text.split("\n")]
        with self._lock:
            self._lines += lines
            self._characters += sum(map(len, lines))
            while len(self._lines) > MAX_UNSENT_LINES or self._characters > MAX_UNSENT_CHARACTERS:
                self._take()
                self._omitted += 1

    def unsent(self) -> dict[str, Any] | None:
        """Return what a heartbeat is to carry, the same until it is kept."""
        with self._lock:
            if self._sent is None and self._lines:
                lines = []
                if self._omitted:
                    lines.append(f"... {self._omitted} lines left out ...")
                    self._omitted = 0
                size = 0
                while self._lines and len(lines) < MAX_LOG_LINES:
                    size += len(self._lines[0].encode()) + 1
                    if size > BYTES_A_BEAT:
                        break
                    lines.append(self._take())
                self._sent = {"first": self._first, "lines": lines}
                self._first += len(lines)
            return self._sent

    def keep(self, sent: dict[str, Any]) -> None:
        """Note what the host has, or won't have."""
        with self._lock:
            if self._sent is sent:
                self._sent = None

    def _take(self) -> str:
        line = self._lines.popleft()
        self._characters -= len(line)
        return line


def _as_shown(line: str) -> str:
    """Return what of a line a terminal shows in the end, without colours."""
    return _ESCAPES.sub("", line.rstrip("\r").rpartition("\r")[2])


class ClaimedTask(Generic[E]):
    """A task that this process is to run.

    Parameters
    ----------
    task_id : str
        Its id.
    job_name : str
        The full name of its job.
    room_id : str
        The room that it was submitted in.
    extension : Extension
        The job with this task's parameters.
    run_kwargs : dict, optional
        What was given at the job's registration.
    attempt : int, optional
        Which attempt this is; None when the host doesn't count them.
    traceparent : str, optional
        The trace that it was submitted in (W3C Trace Context).
    saved : object, optional
        What an earlier attempt saved.
    log : callable, optional
        Given what the task logs; by default heartbeats take it to the host.
    """

    def __init__(
        self,
        task_id: str,
        job_name: str,
        room_id: str,
        extension: E,
        run_kwargs: dict[str, Any] | None = None,
        attempt: int | None = None,
        traceparent: str | None = None,
        saved: Any = None,
        log: Callable[[str], object] | None = None,
    ) -> None:
        self.task_id = task_id
        self.job_name = job_name
        self.room_id = room_id
        self.extension = extension
        self.run_kwargs = run_kwargs or {}
        self.attempt = attempt
        self.traceparent = traceparent
        #: whether there is no use in going on: nobody will take the result
        self.cancelled = False
        #: whether the host has ended this attempt: there is nothing more to report
        self.ended = False
        self._progress: tuple[float, str | None] | None = None
        self._sent: tuple[float, str | None] | None = None
        self._sent_at = 0.0
        # as JSON: what was saved may change afterwards
        self._checkpoint = self._kept_checkpoint = json.dumps(saved)
        #: what it logged and the host has not
        self.unsent_log = TaskLog()
        self._add_to_log = log or self.unsent_log.add

    def __repr__(self) -> str:
        return f"ClaimedTask({self.task_id!r}, {self.job_name!r}, {self.room_id!r})"

    def raise_if_cancelled(self) -> None:
        """Stop here when there is no use in going on.

        Raises
        ------
        TaskCancelled
            When the task was cancelled, timed out or given to another worker.
        """
        if self.cancelled:
            raise TaskCancelled(f"task {self.task_id} is to stop")

    def progress(self, fraction: float, message: str | None = None) -> None:
        """Note how far the task is: sent about once a second.

        Parameters
        ----------
        fraction : float
            From 0 to 1.
        message : str, optional
            A line for the people in the room, of at most 1000 characters.
        """
        # nothing else: it is called in tight loops
        self._progress = (float(fraction), message)

    def log(self, line: str) -> None:
        """Add a line to the task's log, which people read while it runs and afterwards.

        It goes with the next heartbeat: up to 100 lines of at most 4000 characters, in half a
        second. A text of several lines is taken as such. See also `TaskLogHandler`.
        """
        self._add_to_log(str(line).removesuffix("\n"))

    @property
    def saved(self) -> Any:
        """What was saved last, in this attempt or an earlier one; None if nothing was."""
        return json.loads(self._checkpoint)

    def save(self, state: Any) -> None:
        """Keep where the task is: if this attempt ends early, the next one finds it in `saved`.

        It is sent with the next heartbeat. The task shows it, as `checkpoint`.

        Parameters
        ----------
        state : object
            What JSON can hold, NumPy's arrays included, in at most 64 KiB of it.

        Raises
        ------
        ValueError
            When it is too large, None, or nothing that JSON has a notation for.
        """
        plain = as_json(state, "checkpoint")
        if plain is None:
            raise ValueError("None can't be a checkpoint: it says that nothing was saved")
        if (size := len(pydantic_core.to_json(plain))) > MAX_CHECKPOINT_BYTES:
            raise ValueError(
                f"the checkpoint has {size} bytes as JSON, and may have {MAX_CHECKPOINT_BYTES}:"
                " save what is large in a file, and here where it is"
            )
        self._checkpoint = json.dumps(plain)

    def unsent_checkpoint(self) -> str | None:
        """Return what was saved and the host has not, as JSON."""
        checkpoint = self._checkpoint
        return None if checkpoint is self._kept_checkpoint else checkpoint

    def keep_checkpoint(self, checkpoint: str) -> None:
        """Note what the host has, or won't have."""
        self._kept_checkpoint = checkpoint

    def cancel(self) -> None:
        """Make `cancelled` true; a run that stops for it ends the task as cancelled."""
        self.cancelled = True

    def end(self) -> None:
        """Make `ended` true, and `cancelled` with it."""
        # `ended` first: who stops for the other one looks at it
        self.ended = True
        self.cancelled = True

    def unsent_progress(self) -> dict[str, Any]:
        """Return what a heartbeat is to carry; within the bounds that the host checks.

        One value out of bounds, and the host would refuse the whole heartbeat.
        """
        progress = self._progress
        now = time.monotonic()
        if progress is None or progress == self._sent or now - self._sent_at < PROGRESS_SECONDS:
            return {}
        self._sent, self._sent_at = progress, now
        fraction, message = progress
        fields: dict[str, Any] = {}
        if not math.isnan(fraction):
            fields["progress"] = min(max(fraction, 0.0), 1.0)
        if message is not None:
            fields["message"] = UNPRINTABLE.sub(" ", str(message))[:MAX_MESSAGE]
        return fields


def category_of(cls: Any) -> str:
    """Return the category of an extension or provider as a plain string.

    Raises
    ------
    TypeError
        When it has none.
    """
    category = getattr(cls, "category", None)
    if not isinstance(category, str):
        raise TypeError(f"{cls} needs a ClassVar 'category'")
    # an enum that is not a StrEnum says its name otherwise
    return str.__str__(category)


def schema_of(cls: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of an extension or provider.

    Raises
    ------
    ValueError
        When it holds what JSON has no notation for, an infinite default for example;
        the message names class and field.
    """
    schema = cls.model_json_schema()
    for where, wrong in unfit(schema, cls.__name__):
        where = where.replace(".properties.", ".")
        raise ValueError(f"{where}: {wrong} can't be written in a JSON schema")
    return schema


# --- parameters ---


def nearest(name: str, names: Iterable[str]) -> str:
    """Return which of the names may be meant, as the end of a message, or what there is."""
    known = sorted(names)
    close = [one for one in known if name.lower() in one.lower()]
    if close := close or get_close_matches(name, known, cutoff=0.5):
        return f"did you mean {' or '.join(map(repr, close[:3]))}?"
    return f"there is {', '.join(map(repr, known[:10]))}" if known else "there is none"


def check_parameters(job: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a parameter that a job doesn't have.

    Raises
    ------
    ValueError
        When there is one; the message names the one that may be meant.
    """
    for name in given:
        if name not in known:
            raise ValueError(f"{job} has no parameter {name!r}; {nearest(name, known)}")


def _names(name: str, field: FieldInfo) -> Iterator[str]:
    """Yield the names under which a class takes a field's value."""
    yield name
    alias = field.validation_alias
    for one in alias.choices if isinstance(alias, AliasChoices) else [alias]:
        # of a path into the values, the first part
        first = one.path[0] if isinstance(one, AliasPath) else one
        if isinstance(first, str):
            yield first
