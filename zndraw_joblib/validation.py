"""Payloads against their job's schema, as far as that is cheap.

Schema and payload both come from strangers, and the event loop stands still while one
is held against the other. So a check has a budget of steps, none of which takes long.
A payload that needs more is admitted unchecked, and so is one that meets a keyword which
costs more than a look at each value. The worker, whose class it is, always checks.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple
from urllib.parse import unquote

import jsonschema_rs
from pydantic_core import from_json, to_json

from zndraw_joblib import exceptions
from zndraw_joblib.encoding import equal_json
from zndraw_joblib.exceptions import json_pointer, shortened
from zndraw_joblib.lifecycle import JsonObject

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SUBSCHEMAS = 5000
MAX_PATTERNS = 100
#: What all payloads of a request may cost together.
MAX_STEPS = 50_000
#: How deep schemas may be nested while they are held against one payload.
MAX_DEPTH = 150
MAX_PATTERN_LENGTH = 250
_PATTERN_BYTES = 8 * 1024
# Draft-07's alternatives are all told, each with what it looked at: 5 ms a KiB.
_MAX_EXPLAINED = 4096

DIALECTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "http://json-schema.org/draft-07/schema",
)
_ECMA = jsonschema_rs.Draft202012Validator({"format": "regex"}, validate_formats=True)
# Python has groups that ECMA-262 doesn't know, and flags: folding the case of a large
# class takes milliseconds.
_SPECIAL_GROUP = re.compile(r"\(\?(?!:)")

_NAMED_PARTS = frozenset(
    "properties patternProperties $defs definitions dependentSchemas dependencies".split()
)
_OTHER_PARTS = frozenset(
    "items prefixItems additionalItems unevaluatedItems contains additionalProperties"
    " unevaluatedProperties propertyNames allOf anyOf oneOf not if then else".split()
)
_UNCHECKED = frozenset(
    "patternProperties propertyNames dependentSchemas dependentRequired dependencies"
    " additionalItems contains unevaluatedItems unevaluatedProperties if"
    " $dynamicRef $recursiveRef".split()
)
_TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "object": (dict,),
        "array": (list,),
        "string": (str,),
        "boolean": (bool,),
        "null": (NoneType,),
        "number": (int, float),
        "integer": (int,),
    }
)
#: A key of a payload, None for the payload's part itself.
_Key = str | int | None


class _Unchecked(Exception):
    """The check would cost too much."""


# The latter are a schema's that is none: older releases took anything.
_CAN_NOT_TELL = (
    _Unchecked, ArithmeticError, AttributeError, LookupError, TypeError, ValueError
)  # fmt: skip


class _Misfit(NamedTuple):
    """The first keyword that a value doesn't fit; the way to it, from its end."""

    keyword: str
    argument: Any
    path: tuple[str | int, ...] = ()


def check_schema(schema: JsonObject) -> None:
    """Refuse what is no JSON Schema, in a dialect and of a size that are taken here.

    Raises
    ------
    ProblemException
        ``invalid-schema``.
    """
    pointer = ""
    try:
        _require_schema(schema)
    except jsonschema_rs.ValidationError as exc:
        detail, pointer = exc.message, json_pointer(exc.instance_path)
    except (ValueError, jsonschema_rs.ReferencingError) as exc:
        detail = str(exc)
    else:
        return
    where, detail = shortened(f"/body/schema{pointer}"), shortened(detail)
    raise exceptions.InvalidSchema.exception(
        f"not a JSON Schema: {where}: {detail}", errors=[{"pointer": where, "detail": detail}]
    )


def _require_schema(schema: JsonObject) -> None:
    size = len(to_json(schema))
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"a schema is limited to {MAX_SCHEMA_BYTES} bytes")
    written_in = schema.get("$schema", DIALECTS[0])
    if not isinstance(written_in, str) or written_in.rstrip("#") not in DIALECTS:
        raise ValueError(f"the dialects taken here are {' and '.join(DIALECTS)}")
    if not jsonschema_rs.meta.is_valid(schema):
        if written_in != DIALECTS[0] and size > _MAX_EXPLAINED:
            raise ValueError("it does not fit its meta-schema")
        jsonschema_rs.meta.validate(schema)
    check = _Check(schema)
    parts = list(_subschemas(schema))
    patterns = [part["pattern"] for part in parts if "pattern" in part]
    for part in parts:
        patterns += part.get("patternProperties", ())
        if "$ref" in part:
            check.resolve(part["$ref"])
        if part is not schema and "$id" in part:
            raise ValueError("only the schema as a whole can have an $id")
    if len(parts) > MAX_SUBSCHEMAS or len(patterns) > MAX_PATTERNS:
        limits = f"{MAX_SUBSCHEMAS} subschemas and {MAX_PATTERNS} patterns"
        raise ValueError(f"a schema is limited to {limits}")
    for pattern in patterns:
        if not _SPECIAL_GROUP.search(pattern) and not _ECMA.is_valid(pattern):
            raise ValueError(f"{pattern!r} is no regular expression")


def _subschemas(root: JsonObject) -> Iterator[JsonObject]:
    waiting: list[Any] = [root]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, list):
            waiting += schema
        elif isinstance(schema, dict):
            yield schema
            for keyword, value in schema.items():
                if keyword in _NAMED_PARTS:
                    waiting += value.values()
                elif keyword in _OTHER_PARTS:
                    waiting.append(value)


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Yield the JSON pointers of the places where two schemas differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            below = where + json_pointer([key])
            if key in one and key in other:
                yield from differences(one[key], other[key], below)
            else:
                yield shortened(below)
    elif not equal_json(one, other):
        yield shortened(where or "/")


def check_payloads(schema: str, payloads: Mapping[str, JsonObject]) -> bool:
    """Refuse payloads if one of them is seen not to fit their job's schema.

    Parameters
    ----------
    schema : str
        As JSON.
    payloads : mapping of str to dict
        Each under the JSON pointer that says where it stands in the request.

    Returns
    -------
    bool
        Whether all of them were checked to their ends.

    Raises
    ------
    ProblemException
        ``payload-mismatch``, with the first error of each payload, ten at most.
    """
    if len(schema) > MAX_SCHEMA_BYTES:
        return False
    check = _Check(from_json(schema))
    checked = True
    errors: list[dict[str, str]] = []
    for where, payload in payloads.items():
        try:
            misfit = check.misfit(check.root, payload)
        except _CAN_NOT_TELL:
            checked = False
            continue
        if misfit and len(errors) < exceptions.MAX_ERRORS:
            errors.append(_error(where, payload, misfit))
    if errors:
        first = errors[0]
        raise exceptions.PayloadMismatch.exception(
            f"schema mismatch: {first['pointer']}: {first['detail']}", errors=errors
        )
    return checked


def _error(where: str, payload: JsonObject, misfit: _Misfit) -> dict[str, str]:
    path = misfit.path[::-1]
    value: Any = payload
    for key in path:
        value = value[key]
    value, argument = (to_json(v).decode() for v in (value, misfit.argument))
    rule = f"{misfit.keyword}: {shortened(argument, 200)}"
    return {
        "pointer": shortened(where + json_pointer(path)),
        "detail": f"{shortened(value, 60)} does not fit {rule}",
    }


class _Check:
    """What a schema says of payloads, at the cost of so many steps."""

    def __init__(self, root: JsonObject) -> None:
        self.root = root
        self._is_draft_7 = "draft-07" in str(root.get("$schema"))
        self._steps = MAX_STEPS
        self._patterns: dict[str, jsonschema_rs.Draft202012Validator] = {}
        self._targets: dict[str, Any] = {}

    def spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise _Unchecked

    def misfit(self, schema: Any, value: Any, depth: int = 0) -> _Misfit | None:
        """Return the first thing in ``value`` that doesn't fit, or None."""
        self.spend(2)
        if isinstance(schema, bool):
            return None if schema else _Misfit("schema", False)
        self.spend(2 * len(schema))
        if depth > MAX_DEPTH or not schema.keys().isdisjoint(_UNCHECKED):
            raise _Unchecked
        # draft-07 ignores what stands beside a reference
        alone = self._is_draft_7 and "$ref" in schema
        for keyword in ("$ref",) if alone else schema:
            argument = schema[keyword]
            found = None
            if keyword in ("anyOf", "oneOf", "not"):
                found = self._alternatives(keyword, argument, value, depth)
            elif keyword not in _RULES:
                for key, part, item in self._parts(keyword, schema, value):
                    if found := self.misfit(part, item, depth + 1):
                        if key is not None:
                            found = found._replace(path=(*found.path, key))
                        break
            elif not self._fits(keyword, argument, value):
                found = _Misfit(keyword, argument)
            if found:
                return found
        return None

    def _alternatives(self, keyword: str, argument: Any, value: Any, depth: int) -> _Misfit | None:
        parts = [argument] if keyword == "not" else argument
        misfits: list[_Misfit] = []
        for part in parts:
            if found := self.misfit(part, value, depth + 1):
                misfits.append(found)
            elif keyword == "anyOf":
                return None
        fits = len(parts) - len(misfits)
        if fits == {"not": 0, "oneOf": 1}.get(keyword):
            return None
        if fits or keyword == "not":
            return _Misfit(keyword, argument)
        # the alternative that was meant: a `const` tells others apart
        deepest = max(misfits, key=lambda found: (len(found.path), found.keyword != "const"))
        return deepest if deepest.path else _Misfit(keyword, argument)

    def _fits(self, keyword: str, argument: Any, value: Any) -> bool:
        kinds, rule = _RULES[keyword]
        if kinds and type(value) not in kinds:
            return True
        if keyword == "pattern":
            return self._matches(argument, value)
        if isinstance(argument, list):
            self.spend(len(argument) // 4)
        if keyword == "uniqueItems":
            self.spend(len(value))
        if keyword == "multipleOf":
            self.spend(100)
        return rule(value, argument)

    def _parts(
        self, keyword: str, schema: JsonObject, value: Any
    ) -> Iterator[tuple[_Key, Any, Any]]:
        """Yield which subschemas have to fit which of the value's members."""
        argument = schema[keyword]
        match keyword, value:
            case "$ref", _:
                yield None, self.resolve(argument), value
            case "allOf", _:
                for part in argument:
                    yield None, part, value
            case "properties", dict():
                self.spend(len(value) // 4)
                for key in value:
                    if key in argument:
                        yield key, argument[key], value[key]
            case "additionalProperties", dict():
                self.spend(len(value) // 4)
                known = schema.get("properties", ())
                for key in value:
                    if key not in known:
                        yield key, argument, value[key]
            case "items" | "prefixItems", list():
                yield from self._items(keyword, schema, value)

    def _items(
        self, keyword: str, schema: JsonObject, value: list[Any]
    ) -> Iterator[tuple[_Key, Any, Any]]:
        argument = schema[keyword]
        if isinstance(argument, list):
            # tuples are said by one keyword in each dialect
            if self._is_draft_7 != (keyword == "items"):
                raise _Unchecked
            for n, (part, item) in enumerate(zip(argument, value, strict=False)):
                yield n, part, item
            return
        rest = value[len(schema.get("prefixItems", ())) :]
        self.spend(2 + len(rest) // 16)
        if _fit_at_once(argument, rest):
            return
        for n, item in enumerate(rest, len(value) - len(rest)):
            yield n, argument, item

    def resolve(self, ref: str) -> Any:
        """Return the subschema that a reference leads to.

        Raises
        ------
        ValueError
            When it leads nowhere, or out of the schema.
        """
        if ref not in self._targets:
            if ref != "#" and not ref.startswith("#/"):
                raise ValueError(f"the reference {ref!r} is not of the form '#/...'")
            self.spend(len(ref) // 8)
            found: Any = self.root
            for part in unquote(ref[2:]).split("/") if len(ref) > 1 else ():
                key = part.replace("~1", "/").replace("~0", "~")
                try:
                    found = found[int(key)] if isinstance(found, list) else found[key]
                except (LookupError, TypeError, ValueError):
                    raise ValueError(f"the reference {ref!r} leads nowhere") from None
            self._targets[ref] = found
        return self._targets[ref]

    def _matches(self, pattern: str, text: str) -> bool:
        self.spend(len(text))
        if pattern not in self._patterns:
            if len(pattern) > MAX_PATTERN_LENGTH or _SPECIAL_GROUP.search(pattern):
                raise _Unchecked
            # to compile it takes time with the square of its escapes
            self.spend(200 + 10 * len(pattern) + 30 * pattern.count("\\") ** 2)
            limits = jsonschema_rs.RegexOptions(_PATTERN_BYTES, _PATTERN_BYTES)
            try:
                self._patterns[pattern] = jsonschema_rs.Draft202012Validator(
                    {"pattern": pattern}, pattern_options=limits
                )
            except jsonschema_rs.ValidationError:
                raise _Unchecked from None
        return self._patterns[pattern].is_valid(text)


def _fit_at_once(schema: Any, items: list[Any]) -> bool:
    """Tell whether items fit a schema that says their type at most; False if not known."""
    if isinstance(schema, bool):
        return schema
    wanted = schema.get("type", list(_TYPES))
    names = [wanted] if isinstance(wanted, str) else wanted
    types = {type_ for name in names for type_ in _TYPES[name]}
    return schema.keys() <= {"type", "title"} and set(map(type, items)) <= types


def _has_type(value: Any, wanted: str | list[str]) -> bool:
    names = [wanted] if isinstance(wanted, str) else wanted
    return any(
        type(value) in _TYPES[name]
        or (name == "integer" and type(value) is float and value.is_integer())
        for name in names
    )


def _equals(value: Any, option: Any) -> bool:
    if isinstance(value, (dict, list)) and isinstance(option, (dict, list)):
        raise _Unchecked
    return value == option and isinstance(value, bool) == isinstance(option, bool)


def _is_multiple(value: float, of: float) -> bool:
    return Fraction(repr(value)) % Fraction(repr(of)) == 0


def _are_unique(items: list[Any], unique: bool) -> bool:
    # lists and objects are not hashable: a TypeError
    return not unique or len({(isinstance(v, bool), v) for v in items}) == len(items)


_NUMBER = (int, float)
#: Keywords that look at a value alone: the types that they speak of, and what fits them.
_RULES: Mapping[str, tuple[tuple[type, ...], Callable[[Any, Any], bool]]] = MappingProxyType(
    {
        "type": ((), _has_type),
        "const": ((), _equals),
        "enum": ((), lambda v, options: any(_equals(v, o) for o in options)),
        "minimum": (_NUMBER, operator.ge),
        "maximum": (_NUMBER, operator.le),
        "exclusiveMinimum": (_NUMBER, operator.gt),
        "exclusiveMaximum": (_NUMBER, operator.lt),
        "multipleOf": (_NUMBER, _is_multiple),
        "minLength": ((str,), lambda v, least: len(v) >= least),
        "maxLength": ((str,), lambda v, most: len(v) <= most),
        "pattern": ((str,), lambda v, _: bool(v)),
        "minItems": ((list,), lambda v, least: len(v) >= least),
        "maxItems": ((list,), lambda v, most: len(v) <= most),
        "uniqueItems": ((list,), _are_unique),
        "minProperties": ((dict,), lambda v, least: len(v) >= least),
        "maxProperties": ((dict,), lambda v, most: len(v) <= most),
        "required": ((dict,), lambda v, names: v.keys() >= set(names)),
    }
)
