"""Schemas from strangers: what they may say, and what a check of theirs may cost."""

import json
import random
from collections import Counter
from typing import Any, Literal

import jsonschema_rs
import pytest
from pydantic import BaseModel, Field

from zndraw_joblib.exceptions import ProblemException
from zndraw_joblib.validation import DIALECTS, check_payloads, check_schema, differences

TYPES = ["object", "array", "string", "number", "integer", "boolean", "null"]
SCALARS = [None, True, False, 0, 1, 2, -1, 0.0, 1.0, 0.5, 1e300, "", "a", "ab", "bb"]


def some_value(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.random() if depth else 0
    if kind > 0.75:
        return {key: some_value(rng, depth - 1) for key in "abc" if rng.random() < 0.5}
    if kind > 0.5:
        return [some_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return rng.choice(SCALARS)


def some_schema(rng: random.Random, depth: int = 3) -> Any:
    def inner() -> Any:
        return some_schema(rng, depth - 1)

    def several() -> list[Any]:
        return [inner() for _ in range(rng.randrange(1, 4))]

    def named() -> dict[str, Any]:
        return {key: inner() for key in "abc" if rng.random() < 0.6}

    def number() -> Any:
        return rng.choice([-1, 0, 1, 2, 0.5])

    if not depth:
        return rng.choice([True, False, {}, *({"type": each} for each in TYPES)])
    leaves = {
        "type": lambda: rng.choice([rng.choice(TYPES), rng.sample(TYPES, 2)]),
        "const": lambda: some_value(rng, 1),
        "enum": lambda: [some_value(rng, 1) for _ in range(3)],
        "multipleOf": lambda: rng.choice([1, 2, 0.5, 0.1]),
        "pattern": lambda: rng.choice(["^a", "b$", "(a|b)+", "^$", "(?i)A"]),
        "uniqueItems": lambda: rng.random() < 0.8,
        "required": lambda: rng.sample("abc", rng.randrange(3)),
        "title": lambda: "type",
    }
    leaves |= dict.fromkeys(["minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"], number)
    sizes = [f"{m}{what}" for m in ("min", "max") for what in ("Length", "Items")]
    sizes += ["minProperties", "maxProperties"]
    leaves |= dict.fromkeys(sizes, lambda: rng.randrange(4))
    parts = {
        "properties": named,
        "prefixItems": several,
        "allOf": several,
        "anyOf": several,
        "oneOf": several,
        "patternProperties": lambda: {"^a": inner()},
        "$ref": lambda: rng.choice(["#/$defs/one", "#/$defs/two"]),
    }
    parts |= dict.fromkeys(["additionalProperties", "items", "not"], inner)
    rare = dict.fromkeys(["if", "then", "contains", "propertyNames"], inner)
    pool = {**leaves, **parts, **(rare if rng.random() < 0.1 else {})}
    return {key: pool[key]() for key in rng.sample(list(pool), rng.randrange(1, 5))}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_verdict_is_what_a_whole_validator_says(dialect):
    rng = random.Random(dialect)
    seen: Counter[str] = Counter()
    for _ in range(1500):
        defs = {"one": some_schema(rng, 2), "two": some_schema(rng, 1)}
        schema = {"$schema": dialect, "$defs": defs, **some_schema(rng)}
        try:
            check_schema(schema)
            validator = jsonschema_rs.validator_for(schema)
        except (ProblemException, jsonschema_rs.ValidationError):
            seen["refused"] += 1
            continue
        payload = {key: some_value(rng) for key in "abc"}
        fits = validator.is_valid(payload)
        try:
            checked = check_payloads(json.dumps(schema), {"/body/payload": payload})
        except ProblemException as refused:
            assert not fits, (schema, payload)
            (error,) = refused.problem.model_dump()["errors"]
            at: Any = payload
            for key in error["pointer"].removeprefix("/body/payload").split("/")[1:]:
                at = at[int(key) if isinstance(at, list) else key]
            # not all releases write the sign of an exponent
            shown = json.dumps(at, separators=",:").replace("e+", "e")[:50]
            assert error["detail"].replace("e+", "e").startswith(shown)
            seen["misfits"] += 1
        else:
            assert fits or not checked, (schema, payload)
            seen["fits" if checked else "unchecked"] += 1
    assert min(seen["misfits"], seen["fits"]) > 100, seen


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nope"}, "nope"),
        ({"properties": 5}, "5"),
        ({"properties": {"a": {"pattern": "("}}}, "no regular expression"),
        ({"patternProperties": {"[": {}}}, "no regular expression"),
        ({"$ref": "#/nowhere"}, "leads nowhere"),
        ({"$ref": "#anchor", "$defs": {"a": {"$anchor": "anchor"}}}, "form '#/...'"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "form '#/...'"),
        ({"items": {"anyOf": [{"$ref": "file:///etc/hostname"}]}}, "form '#/...'"),
        ({"$defs": {"a": {"$id": "http://127.0.0.1:9/a"}}}, "$id"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "draft-07"),
        ({"$schema": 7}, "draft-07"),
        ({"title": "x" * 65536}, "65536 bytes"),
        ({"$defs": {f"a{n}": {} for n in range(5001)}}, "5000 subschemas"),
        ({"anyOf": [{"pattern": "a"}] * 101}, "100 patterns"),
    ],
    ids=str,
)
def test_what_is_no_schema_here_is_refused_with_its_reason(schema, words):
    with pytest.raises(ProblemException) as refused:
        check_schema(schema)
    problem = refused.value.problem.model_dump()
    assert (problem["status"], problem["type"]) == (422, "/v1/problems/invalid-schema")
    (error,) = problem["errors"]
    assert words in error["detail"]
    assert error["pointer"] in problem["detail"]
    assert error["detail"] in problem["detail"]
    assert len(json.dumps(problem)) < 2000


def test_what_only_looks_like_a_schema_is_data():
    looks = {"$ref": "http://x", "pattern": "(", "$id": "y", "type": "nope"}
    schema = {
        "properties": {"$ref": {"type": "string"}, "pattern": {"default": looks}},
        "examples": [looks],
        "const": looks,
        "x-units": looks,
    }
    check_schema(schema)


class Number(BaseModel):
    value: float


class Sum(BaseModel):
    kind: Literal["sum"] = "sum"
    left: "Expression"
    right: "Expression"


class Product(BaseModel):
    kind: Literal["product"] = "product"
    left: "Expression"
    right: "Expression"


Expression = Number | Sum | Product


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(9, ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    breed: str = Field("", max_length=10, pattern=r"^[a-z]*$")


class Structure(BaseModel):
    """What a worker's author may write."""

    energy: Expression | None = None
    positions: list[tuple[float, float, float]] = Field([])
    numbers: set[int] = Field(set())
    pet: Cat | Dog | None = Field(None, discriminator="kind")
    charges: dict[str, float] = Field({})
    step: float = Field(1, gt=0, multiple_of=0.5)
    mode: Literal["fast", "slow"] = "fast"
    notes: list[Any] = Field([])
    tags: tuple[str | None, ...] = Field(())
    extra: dict[str, Any] = Field({})


def check(payload: dict[str, Any]) -> bool:
    schema = Structure.model_json_schema()
    check_schema(schema)
    return check_payloads(json.dumps(schema), {"/body/payload": payload})


@pytest.mark.parametrize(
    ("payload", "pointer"),
    [
        ({"positions": [[0.0, 0.5, 1.0]] * 1000}, None),
        ({"positions": [[0.0, "x", 1.0]] * 100_000}, "/positions/0/1"),
        ({"positions": [[0, 0, 0], [0, 0]]}, "/positions/1"),
        ({"numbers": [1, 2, 3]}, None),
        ({"numbers": [1, 2, 1]}, "/numbers"),
        ({"numbers": [*range(2000), "x"]}, "/numbers/2000"),
        ({"pet": {"kind": "cat", "lives": 7}}, None),
        ({"pet": {"kind": "cat", "lives": 10}}, "/pet/lives"),
        ({"pet": {"kind": "dog", "breed": "Pug"}}, "/pet/breed"),
        ({"pet": {"kind": "cow"}}, "/pet/kind"),
        ({"charges": {"a/b": 1, "c": None}}, "/charges/c"),
        ({"charges": {"a/b": None}}, "/charges/a~1b"),
        ({"step": 0.75}, "/step"),
        ({"step": True}, "/step"),
        ({"mode": "medium"}, "/mode"),
        ({"notes": [1, "a", [None]] * 100_000, "extra": {"a": [1]}}, None),
        ({"notes": 5}, "/notes"),
        ({"notes": [5], "mode": "medium"}, "/mode"),
        ({"tags": ["a", None, "b"]}, None),
        ({"tags": ["a", 5]}, "/tags/1"),
        ({"energy": {"left": {"value": 1}, "right": {"value": "x"}}}, "/energy/"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_pydantic_writes_is_checked(payload, pointer):
    if pointer is None:
        assert check(payload)
        return
    with pytest.raises(ProblemException) as refused:
        check(payload)
    problem = refused.value.problem.model_dump()
    (error,) = problem["errors"]
    assert (error["pointer"] + "/").startswith(f"/body/payload{pointer}".rstrip("/"))
    assert problem["detail"] == f"schema mismatch: {error['pointer']}: {error['detail']}"


#: twice the looks with each level of the payload
DOUBLING = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]},
        "a": {"properties": {"x": {"$ref": "#/$defs/node"}}, "required": ["a"]},
        "b": {"properties": {"x": {"$ref": "#/$defs/node"}}, "required": ["b"]},
    },
}


def test_what_costs_too_much_is_left_to_the_worker():
    energy: dict[str, Any] = {"value": 1}
    payload: dict[str, Any] = {"a": 1}
    for _ in range(40):
        energy = {"kind": "sum", "left": energy, "right": {"value": 2}}
        payload = {"x": payload, "b": 1}
    assert check({"energy": energy})
    assert not check({"positions": [[0.0, 0.5, 1.0]] * 50_000})
    assert not check_payloads(json.dumps(DOUBLING), {"": payload | {"b": None}})


@pytest.mark.parametrize("items", [{"prefixItems": [True] * 9000}, {"allOf": [True] * 9000}])
def test_what_says_nothing_costs_nevertheless(items):
    schema = json.dumps({"properties": {"a": {"items": items}}})
    assert check_payloads(schema, {"": {"a": [[1] * 9000]}})
    assert not check_payloads(schema, {"": {"a": [[1] * 9000] * 50}})


def test_payloads_of_one_request_share_what_they_may_cost():
    schema = json.dumps({"properties": {"a": {"items": {"enum": [1, 2]}}}})
    payloads = {str(n): {"a": [1] * 4000} for n in range(5)}
    assert check_payloads(schema, {"0": payloads["0"]})
    assert not check_payloads(schema, payloads)
    wrong = {"first": {"a": [3]}, **payloads}
    with pytest.raises(ProblemException):
        check_payloads(schema, wrong)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nope"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
        {"$ref": 5},
        {"items": 5, "properties": 5},
        {"pattern": "(", "properties": {"a": {"pattern": "("}}},
        {"$ref": "#/default", "default": {"minimum": "x", "required": 5, "type": 5}},
        {"allOf": [{"$ref": "#/allOf/0"}]},
        {"properties": {"a": {"pattern": r"\p{L}{200}0"}}},
        {"properties": {"a": {"pattern": r"(?i)a"}}},
        {"properties": {"a": {"pattern": r"(a)\1"}}},
        {"title": "x" * 100_000},
    ],
    ids=lambda schema: str(schema)[:40],
)
def test_a_schema_that_can_not_be_followed_admits_unchecked(schema):
    payloads = {"/body/payload": {"a": "a", "b": [1]}}
    assert check_payloads(json.dumps(schema), payloads) is False


def test_schemas_that_differ_are_told_apart_by_place():
    one = {"properties": {"a": {"type": "number"}, "b": {}}, "title": "x"}
    other = {"properties": {"a": {"type": "integer"}, "c/d": {}}, "title": "x"}
    places = ["/properties/a/type", "/properties/b", "/properties/c~1d"]
    assert list(differences(one, other)) == places
    assert list(differences(one, dict(reversed(one.items())))) == []
    assert list(differences({"const": 1}, {"const": True})) == ["/const"]
