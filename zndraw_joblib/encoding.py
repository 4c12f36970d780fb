"""What tasks and providers return, in the types of JSON."""

import json
import math
import numbers
import sys
from collections.abc import Iterator
from typing import Any

import pydantic_core


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
