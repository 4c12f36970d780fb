"""What a worker's author subclasses to serve data on demand, and how it is read."""

import json
import logging
from typing import Any, ClassVar

import pydantic_core
from pydantic import BaseModel

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
    result = cls.model_validate(_with_lists(cls, params)).read(handler)
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


def _with_lists(cls: type[Provider], params: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters, a list of one wherever a field takes only lists.

    A query string can't tell a list of one element from the element.
    """
    schema = cls.model_json_schema()
    fields, shared = schema.get("properties", {}), schema.get("$defs", {})

    def takes_lists(field: dict[str, Any]) -> bool:
        field = shared.get(field.get("$ref", "").rpartition("/")[2], field)
        kinds = [k for k in field.get("anyOf", ()) if k.get("type") != "null"]
        return field.get("type") == "array" or (bool(kinds) and all(map(takes_lists, kinds)))

    return {
        name: [value]
        if not isinstance(value, list) and takes_lists(fields.get(name, {}))
        else value
        for name, value in params.items()
    }
