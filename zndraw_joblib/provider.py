"""What a worker's author subclasses to serve data on demand, and how it is read."""

import json
import logging
from typing import Any, ClassVar

import pydantic_core
from pydantic import BaseModel, ValidationError

from zndraw_joblib.encoding import unpack
from zndraw_joblib.exceptions import PROBLEM_JSON, ProviderExecutionFailed, describe, storable
from zndraw_joblib.telemetry import SafeLogger

log = SafeLogger(logging.getLogger(__name__))

#: A body, and the headers that go with it.
Content = tuple[bytes, dict[str, str]]


class Provider(BaseModel):
    """A source of data: its fields are the query's parameters.

    Attributes
    ----------
    category : str
        Set by every subclass.
    content_type : str
        Media type of what ``read`` returns.
    """

    category: ClassVar[str]
    content_type: ClassVar[str] = "application/json"

    def read(self, handler: Any) -> Any:
        """Return what these parameters ask for.

        Parameters
        ----------
        handler : object
            What was given at registration: a directory, a database, a simulation.

        Returns
        -------
        bytes, str, or for JSON content types anything that JSON can hold
            Bytes and strings are sent as they are, NumPy's arrays as lists.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define read()")


def answer(cls: type[Provider], handler: Any, params: str) -> Content:
    """Return what is sent to who asks for ``params``, which is JSON: data, or a problem."""
    try:
        content = read_content(cls, handler, json.loads(params))
    except BaseException as exc:
        # SystemExit and the like end this request, not the thread
        log.exception("%s could not be read", cls.__name__)
        return failure(describe(exc))
    return content, {"Content-Type": cls.content_type}


def failure(error: str) -> Content:
    """Return what is sent to who asked for what can't be had."""
    problem = ProviderExecutionFailed.create(detail=storable(error))
    body = problem.model_dump_json(exclude_none=True).encode()
    return body, {"Content-Type": PROBLEM_JSON, "X-Result-Status": "error"}


def read_content(cls: type[Provider], handler: Any, params: dict[str, Any]) -> bytes:
    """Read from a provider, and return the body of its answer.

    Raises
    ------
    pydantic.ValidationError
        When ``params`` don't fit the provider.
    TypeError
        When ``read`` returned something that its content type can't hold.
    """
    result = _query(cls, params).read(handler)
    if isinstance(result, bytes | bytearray | memoryview):
        return bytes(result)
    if isinstance(result, str):
        return result.encode()
    media_type = cls.content_type.partition(";")[0].strip().lower()
    if media_type.endswith(("/json", "+json")):
        # as JavaScript does: JSON knows no NaN, and a reader's parser would stop there
        return pydantic_core.to_json(result, inf_nan_mode="null", fallback=unpack)
    raise TypeError(
        f"{cls.__name__}.read() returned {type(result).__name__}, "
        f"but {cls.content_type} needs bytes or str"
    )


def _query(cls: type[Provider], params: dict[str, Any]) -> Provider:
    """Return the provider with these parameters, a list of one where only that is taken.

    A query string can't tell a list of one element from the element.
    """
    try:
        return cls.model_validate(params)
    except ValidationError as exc:
        refused = {name for error in exc.errors() for name in error["loc"][:1]}
        lists = {n: [v] for n, v in params.items() if n in refused and not isinstance(v, list)}
        try:
            return cls.model_validate(params | lists)
        except ValidationError:
            raise exc from None
