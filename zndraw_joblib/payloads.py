"""Payloads against their job's schema, at a cost that is bounded beforehand.

A schema comes from a stranger. Its patterns run on a linear-time engine, its references
stay inside it, and how often its parts would look at a payload is known before one
does: a few kilobytes of nested alternatives can ask for more than the age of the
universe.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import unquote

import jsonschema_rs

from zndraw_joblib.exceptions import (
    InvalidPayload,
    InvalidSchema,
    PayloadTooLarge,
    ProblemException,
    json_pointer,
)
from zndraw_joblib.schemas import JsonObject

MAX_ERRORS = 10
MAX_DETAIL = 300
# About half a second of the validator's time.
MAX_LOOKS = 5_000_000
# A payload of the default size has no more values than this.
_MANY_VALUES = 2**19
# Looks that take as long as one step in Python.
_STEP = 16
# Bytes that the validator may copy to tell of all errors, or of one: each alternative
# that didn't fit brings its own, and its own copy of what it looked at.
_TELL_ALL = 200_000
_TELL_ONE = 20_000_000
# Comparisons with an `enum` or with `required` names that cost as much as one look.
_CHEAP = 16

_ONE_IN_PLACE = ("not", "if", "then", "else")
_LIST_IN_PLACE = ("allOf", "anyOf", "oneOf")
_MAP_IN_PLACE = ("dependentSchemas", "dependencies")
_MAP_BELOW = ("properties", "patternProperties")
_ANY_BELOW = (
    "additionalProperties",
    "unevaluatedProperties",
    "propertyNames",
    "items",
    "prefixItems",
    "additionalItems",
    "unevaluatedItems",
    "contains",
)
_UNBOUNDED = ("$dynamicRef", "$recursiveRef")


class _Part:
    """A subschema, told from others by what it is, not by what it says."""

    def __init__(self, schema: Any) -> None:
        self.schema = schema

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Part) and self.schema is other.schema

    def __hash__(self) -> int:
        return id(self.schema)


class _Looks(NamedTuple):
    """What one look of a subschema at a value leads to.

    Attributes
    ----------
    here : int
        Looks at the same value.
    below : int
        Looks at each of the value's members, at most.
    parts : Counter
        The subschemas that look at the same value, and how often.
    """

    here: int
    below: int
    parts: "Counter[_Part]"


#: Subschemas that look at a value, and how often each does.
_Lookers = tuple[tuple[_Part, int], ...]
#: Where a value's member is; None stands for an object's keys themselves.
_Key = str | int | None


class _Checker(NamedTuple):
    validator: jsonschema_rs.Validator
    looks: Callable[[Any], _Looks]
    schema: JsonObject
    parts: int
    harmless: bool


def _subschemas(value: Any) -> list[Any]:
    return [v for v in (value if isinstance(value, list) else [value]) if v is not None]


def _in_place(schema: JsonObject, root: Any) -> Iterator[Any]:
    if "$ref" in schema:
        yield _resolve(schema["$ref"], root)
    for key in _ONE_IN_PLACE + _LIST_IN_PLACE:
        yield from _subschemas(schema.get(key))
    for key in _MAP_IN_PLACE:
        yield from schema.get(key, {}).values()


def _resolve(ref: str, root: Any) -> Any:
    if ref != "#" and not ref.startswith("#/"):
        raise ValueError(f"the reference {ref!r} is not of the form '#/...'")
    found = root
    for part in unquote(ref[2:]).split("/") if len(ref) > 1 else ():
        key = part.replace("~1", "/").replace("~0", "~")
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def _looks(schema: Any, root: Any, known: dict[int, _Looks | None]) -> _Looks:
    if not isinstance(schema, dict):
        return _Looks(1, 0, Counter())
    if id(schema) in known:
        looks = known[id(schema)]
        if looks is None:
            raise ValueError("the schema refers to itself without an end")
        return looks
    if schema is not root and "$id" in schema:
        raise ValueError("only the schema as a whole can have an $id")
    if any(key in schema for key in _UNBOUNDED):
        raise ValueError(f"{' and '.join(_UNBOUNDED)} are not supported")
    known[id(schema)] = None
    inside = [_looks(part, root, known) for part in _in_place(schema, root)]
    parts = Counter({_Part(schema): 1})
    for looks in inside:
        parts.update(looks.parts)
    listed = len(schema.get("enum", ())) + len(schema.get("required", ()))
    members = bool(schema.keys() & {"properties", *_ANY_BELOW})
    below = members + len(schema.get("patternProperties", ()))
    below += ("contains" in schema) + ("unevaluatedItems" in schema)
    known[id(schema)] = looks = _Looks(
        1 + listed // _CHEAP + sum(looks.here for looks in inside),
        below + sum(looks.below for looks in inside),
        parts,
    )
    return looks


def _all_subschemas(schema: Any) -> Iterator[Any]:
    if not isinstance(schema, dict):
        return
    yield schema
    keys = (*_ONE_IN_PLACE, *_LIST_IN_PLACE, *_ANY_BELOW)
    for key in keys:
        for part in _subschemas(schema.get(key)):
            yield from _all_subschemas(part)
    for key in (*_MAP_IN_PLACE, *_MAP_BELOW, "$defs", "definitions"):
        for part in schema.get(key, {}).values():
            yield from _all_subschemas(part)


@lru_cache(maxsize=512)
def _checker(encoded: str) -> _Checker:
    schema = json.loads(encoded)
    validator = jsonschema_rs.validator_for(
        encoded, offline=True, pattern_options=jsonschema_rs.RegexOptions()
    )
    known: dict[int, _Looks | None] = {}
    looks = partial(_looks, root=schema, known=known)
    try:
        everywhere = [looks(part) for part in _all_subschemas(schema)]
    except RecursionError:
        raise ValueError("the schema's references nest too deep") from None
    except (KeyError, IndexError, TypeError):
        raise ValueError("a reference leads nowhere") from None
    # each value is looked at once, and by few: then so is any payload
    harmless = all(
        each.below <= 1 and each.here * _MANY_VALUES < MAX_LOOKS for each in everywhere
    )
    return _Checker(validator, looks, schema, len(everywhere), harmless)


def check_schema(schema: JsonObject) -> None:
    """Refuse what is no JSON Schema, or none whose cost can be told.

    Raises
    ------
    ProblemException
        ``invalid-schema``.
    """
    try:
        _checker(json.dumps(schema))
    except (jsonschema_rs.ValidationError, ValueError) as exc:
        where = getattr(exc, "instance_path", [])
        error = _error("/body/schema", where, getattr(exc, "message", str(exc)))
        raise InvalidSchema.exception(error["detail"], errors=[error]) from None


def check_payload(schema: str, payload: JsonObject) -> None:
    """Refuse a payload that doesn't fit the job's schema, which is given as JSON.

    Raises
    ------
    ProblemException
        ``invalid-payload``, with at most ten ``errors``.
    """
    checker = _checker(schema)
    if _cost(payload, checker) > MAX_LOOKS:
        raise _too_deep("/body/payload")
    if not checker.validator.is_valid(payload):
        raise InvalidPayload.exception(
            errors=_misfits(payload, checker, "/body/payload")
        )


def check_payloads(schema: str, payloads: Sequence[JsonObject]) -> None:
    """Refuse a batch if one of its payloads doesn't fit the job's schema.

    Together they may cost as much as a single payload may: the event loop stands still
    meanwhile.

    Raises
    ------
    ProblemException
        ``invalid-payload``, with at most ten ``errors``, or ``payload-too-large`` for
        payloads that fit one by one, and take too long together.
    """
    checker = _checker(schema)
    errors: list[dict[str, str]] = []
    total = 0
    for n, payload in enumerate(payloads):
        where = f"/body/tasks/{n}/payload"
        cost = _cost(payload, checker)
        if cost > MAX_LOOKS:
            raise _too_deep(where)
        total += cost
        if total > MAX_LOOKS:
            raise PayloadTooLarge.exception(
                "the payloads take too long to check: submit fewer tasks at once"
            )
        if not checker.validator.is_valid(payload):
            # the first one as in a request of its own, the others if it costs little
            most = _TELL_ALL if errors else _TELL_ONE
            errors += _misfits(payload, checker, where, most)
            if len(errors) >= MAX_ERRORS:
                break
    if errors:
        raise InvalidPayload.exception(errors=errors[:MAX_ERRORS])


def _too_deep(where: str) -> ProblemException:
    detail = "nested too deep for the alternatives in the job's schema"
    return InvalidPayload.exception(
        detail, errors=[{"pointer": where, "detail": detail}]
    )


def _error(where: str, path: list[str | int], detail: str) -> dict[str, str]:
    # both may hold what was sent, which is as long as its sender likes
    pointer = json_pointer(path)
    if len(detail) > MAX_DETAIL:
        detail = f"{detail[:MAX_DETAIL]}..."
    return {
        "pointer": where + (pointer if len(pointer) < MAX_DETAIL else ""),
        "detail": detail,
    }


def _misfits(
    payload: JsonObject, checker: _Checker, where: str, most: int = _TELL_ONE
) -> list[dict[str, str]]:
    copied = len(json.dumps(payload)) * checker.parts
    found: list[jsonschema_rs.ValidationError] = []
    if copied <= _TELL_ALL:
        found = list(islice(checker.validator.iter_errors(payload), MAX_ERRORS))
    elif copied <= most:
        try:
            checker.validator.validate(payload)
        except jsonschema_rs.ValidationError as exc:
            found = [exc]
    return [_error(where, e.instance_path, e.message) for e in found] or [
        _error(where, [], "too large to tell where it doesn't fit the schema")
    ]


def _cost(payload: JsonObject, checker: _Checker) -> int:
    """Return how many looks a payload costs, counted to a little beyond the most."""
    if checker.harmless:
        return 0
    # Level by level, the values that the same subschemas look at equally often go
    # together: so an array of a million numbers is one step.
    level: dict[_Lookers, list[Any]] = {((_Part(checker.schema), 1),): [payload]}
    total = 0
    while level:
        deeper: defaultdict[_Lookers, list[Any]] = defaultdict(list)
        for lookers, values in level.items():
            looks = [(times, checker.looks(part.schema)) for part, times in lookers]
            total += len(values) * sum(times * each.here for times, each in looks)
            steps = sum(len(each.parts) for _, each in looks)
            for key, members in _by_key(values).items():
                below = _below(checker.looks, lookers, key)
                deeper[below] += members
                total += (steps + len(below)) * _STEP
                if total > MAX_LOOKS:
                    return total
        level = {lookers: values for lookers, values in deeper.items() if lookers}
    return total


def _by_key(values: list[Any]) -> dict[_Key, list[Any]]:
    members: defaultdict[_Key, list[Any]] = defaultdict(list)
    for value in values:
        if isinstance(value, dict):
            members[None] += value
            for key, member in value.items():
                members[key].append(member)
        elif isinstance(value, list):
            for index, member in enumerate(value):
                members[min(index, _PREFIX)].append(member)
    return members


# Array positions that `prefixItems` tells apart here; those after share a schema.
_PREFIX = 16


def _below(looks: Callable[[Any], _Looks], lookers: _Lookers, key: _Key) -> _Lookers:
    """Return who looks at a member of the value that ``lookers`` look at."""
    found: Counter[_Part] = Counter()
    for looker, times in lookers:
        for part, again in looks(looker.schema).parts.items():
            for sub in _members(part.schema, key):
                found[_Part(sub)] += times * again
    return tuple(found.items())


def _members(schema: JsonObject, key: _Key) -> Iterator[Any]:
    if key is None:
        yield from _subschemas(schema.get("propertyNames"))
        return
    if isinstance(key, str):
        named = schema.get("properties", {})
        if key in named:
            yield named[key]
        elif "additionalProperties" in schema:
            yield schema["additionalProperties"]
        yield from schema.get("patternProperties", {}).values()
        yield from _subschemas(schema.get("unevaluatedProperties"))
        return
    for word in ("prefixItems", "items"):
        listed = schema.get(word)
        if isinstance(listed, list):
            yield from listed[key : key + 1]
        elif listed is not None:
            yield listed
    for word in ("additionalItems", "unevaluatedItems", "contains"):
        yield from _subschemas(schema.get(word))
