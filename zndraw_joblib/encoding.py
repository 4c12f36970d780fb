"""JSON: what is taken from the wire, and what tasks and providers return as such."""

import gc
import json
import math
import numbers
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pydantic_core

Json = Any


class Written(str):
    """JSON that is written already, and was not parsed here."""


MAX_INT = 2**63 - 1
#: Lists and objects in one JSON body: an atom's three coordinates are one of them.
MAX_CONTAINERS = 200_000

# What the parser lets through but no database or second parser would is looked for in
# the bytes: a walk through the values would take longer than everything else.
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
# All digits, and both signs of an exponent, are alike: a regular expression takes thirty
# times as long to find none of these.
_ALIKE = bytes.maketrans(b"123456789E", b"000000000e")
_LARGE = (b"0" * 19, b"e000", b"e+000")
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
        value = pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="keys")
    if b"\\u0000" in body and _NUL.search(body):
        raise ValueError("NUL characters can't be stored")
    alike = body.translate(_ALIKE)
    if any(large in alike for large in _LARGE):
        _require_storable(value, _outside_strings(body))
    return value


def take_result(body: bytes) -> tuple[bytes, Written]:
    """Return an object in JSON without its ``result``, and that as it was written.

    Raises
    ------
    ValueError
        When it is no JSON, or holds NUL characters.
    """
    # a worker reads none
    import msgspec

    if b"\0" in body or b"\\u0000" in body:
        raise ValueError("NUL characters can't be stored")
    try:
        # makes no values, which would take thirty times as much memory
        parts = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return body, Written("null")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    result = Written(parts.pop("result", b"null"), "utf-8")
    return msgspec.json.encode(parts), result


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


def _require_storable(value: Json, numbers: bytes) -> None:
    for digits in _INTEGER.findall(numbers):
        if len(digits) > 20 or not -MAX_INT - 1 <= int(digits) <= MAX_INT:
            raise ValueError("integers are limited to 64 bit")
    # the parser makes Infinity of what overflows, which only one of these writes as null
    written = (pydantic_core.to_json(value, inf_nan_mode=mode) for mode in ("constants", "null"))
    if len(set(written)) > 1:
        raise ValueError("numbers are limited to the range of a double")


# --- what is returned ---


def as_json(value: Any, what: str = "result", *, nan_as_null: bool = False) -> Any:
    """Return a value in the types of JSON; what NumPy, pandas and ASE have is unpacked.

    Parameters
    ----------
    value : object
        What a task or a provider returned.
    what : str
        What it is called where it can't be kept.
    nan_as_null : bool
        Whether NaN and Infinity become null.

    Raises
    ------
    ValueError
        When it holds something that JSON has no notation for: NaN and Infinity, lone
        surrogates, keys that become the same text, itself. The message says where.
    """
    try:
        _check_keys(value, what)
        plain = pydantic_core.to_jsonable_python(
            value, fallback=unpack, inf_nan_mode="null" if nan_as_null else "constants"
        )
        for where, wrong in unfit(plain, what):
            raise TypeError(f"{where} is {wrong}")
        # as it will be sent
        encode(plain)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ValueError(f"the {what} can't be kept as JSON: {exc}") from exc
    return plain


def unpack(value: Any) -> Any:
    """Return what NumPy, pandas or ASE has, or what is like it, as Python's own."""
    if (table := _table_of(value)) is not None:
        return table
    # as `ase.Atoms` has it
    if callable(getattr(value, "todict", None)):
        return value.todict()
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} is not JSON")
    plain = value.tolist()
    if type(plain) is not type(value):
        kind = getattr(getattr(value, "dtype", None), "kind", "")
        # nanoseconds would become a bare number
        return str(value) if kind == "M" and isinstance(plain, int) else plain
    # wider than Python's own numbers
    if isinstance(plain, numbers.Real):
        return float(plain)
    if isinstance(plain, numbers.Complex):
        return complex(plain)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _table_of(value: Any) -> Any:
    """Return a table of pandas as a dict of its columns, None for anything else."""
    # who hasn't imported it has none
    pandas = sys.modules.get("pandas")
    if pandas is None:
        return None
    if value is pandas.NA:
        return math.nan
    if isinstance(value, pandas.Series) and not isinstance(value.index, pandas.RangeIndex):
        value = value.to_frame()
    if not isinstance(value, pandas.DataFrame):
        return None
    if not isinstance(value.index, pandas.RangeIndex):
        value = value.reset_index()
    names = list(value.columns)
    if len(set(map(str, names))) < len(names):
        raise TypeError("a table has two columns of one name")
    columns = value.to_dict(orient="list").items()
    return {n: [math.nan if cell is pandas.NaT else cell for cell in c] for n, c in columns}


def _check_keys(value: Any, where: str) -> None:
    if isinstance(value, dict):
        keys = pydantic_core.to_jsonable_python(dict.fromkeys(value), fallback=unpack)
        if len(keys) < len(value):
            raise TypeError(f"two keys of {where} become the same text")
        for key, item in value.items():
            _check_keys(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, (dict, list, tuple)):
                _check_keys(item, where)


def unfit(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield where something stands that JSON has no notation for, and what."""
    if isinstance(value, float):
        if not math.isfinite(value):
            yield where, str(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, (float, dict, list)):
                yield from unfit(item, f"{where}.{key}")
    elif isinstance(value, list):
        for n, item in enumerate(value):
            if isinstance(item, (float, dict, list)):
                yield from unfit(item, f"{where}[{n}]")


def encode(value: Any) -> bytes:
    """Return what is JSON already as it is sent; raise for what isn't."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
