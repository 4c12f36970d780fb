"""Schemas from strangers: what they may say, and what they may cost."""

import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from zndraw_joblib.exceptions import ProblemException
from zndraw_joblib.payloads import check_payload, check_schema

#: 2**40 looks at any payload
DOUBLING = {
    "$ref": "#/$defs/a0",
    "$defs": {
        f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)
    }
    | {"a40": {}},
}
#: twice as many with each level of the payload
ALTERNATIVES = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]},
        "a": {"properties": {"x": {"$ref": "#/$defs/node"}}, "required": ["a"]},
        "b": {"properties": {"x": {"$ref": "#/$defs/node"}}, "required": ["b"]},
    },
}
#: a thousand subschemas have a look at each of a thousand keys
MANY_PARTS = {"allOf": [{"properties": {f"x{n}": {}}} for n in range(1000)]}
MANY_PATTERNS = {"patternProperties": {f"^x{n}": {} for n in range(1000)}}
#: a thousand ways not to fit, of which each is told with all that it looked at
MANY_MISFITS = {
    "propertyNames": {"anyOf": [{"pattern": f"^x{n}"} for n in range(1000)]}
}
BIG_MISFITS = {"anyOf": [{"properties": {"k0": {"type": "integer"}}}] * 1000}
MANY_KEYS = {f"k{n}": "" for n in range(90_000)}
BACKTRACKING = {"properties": {"x": {"pattern": "^(a+)+$"}}}


def nested(depth: int) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    for _ in range(depth):
        payload = {"x": payload}
    return payload


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("schema", "payload"),
    [
        (DOUBLING, {}),
        (ALTERNATIVES, nested(60)),
        (MANY_PARTS, MANY_KEYS),
        (MANY_PATTERNS, MANY_KEYS),
        (MANY_MISFITS, MANY_KEYS),
        (BIG_MISFITS, {"k0": "x" * 900_000}),
        (BACKTRACKING, {"x": "a" * 100_000 + "b"}),
    ],
)
def test_no_payload_costs_more_than_it_may(schema, payload):
    check_schema(schema)
    with pytest.raises(ProblemException) as refused:
        check_payload(json.dumps(schema), payload)
    assert refused.value.problem.status == 422
    assert len(refused.value.problem.model_dump_json()) < 2000


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nope"},
        {"properties": 5},
        {"$ref": "#"},
        {"allOf": [{"$ref": "#/allOf/0"}]},
        {"$ref": "#/nowhere"},
        {"$ref": "http://127.0.0.1:9/schema"},
        {"$ref": "file:///etc/hostname"},
        {"$dynamicRef": "#"},
        {"$defs": {"a": {"$id": "http://127.0.0.1:9/a"}}},
    ],
)
def test_what_is_no_schema_of_ours_is_refused(schema):
    with pytest.raises(ProblemException) as refused:
        check_schema(schema)
    assert refused.value.problem.status == 422


class Number(BaseModel):
    value: float


class Sum(BaseModel):
    kind: Literal["sum"]
    left: "Expression"
    right: "Expression"


class Product(BaseModel):
    kind: Literal["product"]
    left: "Expression"
    right: "Expression"


Expression = Number | Sum | Product


class Structure(BaseModel):
    energy: Expression
    positions: list[tuple[float, float, float]] = []


def test_recursive_unions_and_long_arrays_are_welcome():
    schema = Structure.model_json_schema()
    energy: dict[str, Any] = {"value": 1}
    for _ in range(5):
        energy = {"kind": "sum", "left": energy, "right": {"value": 2}}
    check_schema(schema)
    check_payload(
        json.dumps(schema), {"energy": energy, "positions": [[0.0, 0.5, 1.0]] * 20_000}
    )
    with pytest.raises(ProblemException) as refused:
        check_payload(
            json.dumps(schema), {"energy": energy, "positions": [[0.0, "x", 1.0]]}
        )
    (error,) = refused.value.problem.model_dump()["errors"]
    assert error["pointer"] == "/body/payload/positions/0/1"
