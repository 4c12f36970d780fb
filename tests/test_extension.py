"""What authors subclass: parameters and results that become JSON and come back the same."""

import contextlib
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

import ase
import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    SecretStr,
    WithJsonSchema,
    computed_field,
    field_serializer,
    field_validator,
    model_serializer,
)
from pydantic.alias_generators import to_camel

from zndraw_joblib.client_user import parameters_of
from zndraw_joblib.encoding import as_json
from zndraw_joblib.extension import Category, Extension, schema_of
from zndraw_joblib.lifecycle import FullName
from zndraw_joblib.provider import Provider, read_content


class Base(Extension):
    category: ClassVar[Category] = Category.ANALYSIS

    def run(self, vis: Any, **kwargs: Any) -> None: ...


class Alias(Base):
    angle: float = Field(90, alias="rotationAngle")


class Camel(Base):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)
    max_steps: int


class Validated(Base):
    cutoff: float = Field(6, validation_alias="rcut", serialization_alias="written")


class Choices(Base):
    cutoff: float = Field(6, validation_alias=AliasChoices(AliasPath("a", 0), "b"))


class Computed(Base):
    model_config = ConfigDict(extra="forbid")
    width: int = 2

    @computed_field
    @property
    def area(self) -> int:
        return self.width**2


class Excluded(Base):
    seed: int = Field(0, exclude=True)
    when: Decimal = Field(Decimal(0), exclude=True, alias="At")


class Text(Base):
    settings: Json[dict[str, int]]


class Inner(BaseModel):
    kept: int = Field(1, alias="Kept")
    path: Path = Path()


class Nested(Base):
    inner: list[Inner]
    by_id: dict[UUID, tuple[int, ...]] | None = None
    kind: Literal["a", "b"] | None = None


class Open(Base):
    model_config = ConfigDict(extra="allow")


class Opaque:
    def __init__(self, value: int) -> None:
        self.value = value


class Holding(Base):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    thing: Annotated[Opaque, WithJsonSchema({"type": "integer"})]

    @field_validator("thing", mode="before")
    @classmethod
    def read(cls, thing: Any) -> Any:
        return thing if isinstance(thing, Opaque) else Opaque(thing)

    @field_serializer("thing")
    def write(self, thing: Opaque) -> int:
        return thing.value


@pytest.mark.parametrize(
    "extension",
    [
        Alias(rotationAngle=45),
        Camel(max_steps=7),
        Validated(rcut=3.5),
        Choices(b=2),
        Computed(width=3),
        Excluded(seed=42, At="0.1"),
        Text(settings='{"a": 1}'),
        Nested(inner=[Inner(Kept=2, path="x")], by_id={UUID(int=1): (1, 2)}, kind="b"),
        Open(more={"a": [1]}),
        Holding(thing=3),
    ],
    ids=lambda extension: type(extension).__name__,
)
def test_parameters_come_back_as_they_were(extension: Extension):
    payload = json.loads(json.dumps(parameters_of(extension)))
    read = type(extension).model_validate_json(json.dumps(payload))
    for name in type(extension).model_fields:
        one, other = getattr(extension, name), getattr(read, name)
        assert getattr(one, "value", one) == getattr(other, "value", other)
    assert read.model_extra == extension.model_extra
    # by the names that the host compares with the schema
    known = schema_of(type(extension))["properties"]
    assert set(payload) <= set(known) or extension.model_extra


class Secret(Base):
    key: SecretStr = SecretStr("x")


class Degrees(Base):
    angle: float = 0

    @field_validator("angle")
    @classmethod
    def to_radians(cls, angle: float) -> float:
        return math.radians(angle)


class Rounded(Base):
    x: float = 0

    @field_serializer("x")
    def round(self, x: float) -> float:
        return round(x, 1)


class Silent(Base):
    n: int = 0

    @model_serializer
    def nothing(self) -> dict[str, Any]:
        return {}


class Hidden(BaseModel):
    seed: int = Field(0, exclude=True)


class HoldsHidden(Base):
    inner: Hidden


class Wider(Inner):
    more: int = 1


class Anything(Base):
    x: Any = None


@pytest.mark.parametrize(
    ("extension", "where"),
    [
        (Secret(key="s3cret"), "Secret.key"),
        (Degrees(angle=90), "Degrees.angle"),
        (Rounded(x=0.25), "Rounded.x"),
        (Rounded(x=math.inf), "Rounded.x"),
        (Silent(n=3), "Silent.n"),
        (HoldsHidden(inner=Hidden(seed=3)), "HoldsHidden.inner"),
        (Nested(inner=[Wider(more=2)]), "Nested.inner"),
        (Anything(x={1: 2}), "Anything.x"),
        (Anything(x={1: "a", "1": "b"}), "Anything.x"),
        (Anything(x=math.nan), "Anything.x"),
        (Anything(x=object()), "Anything.x"),
        (Anything(x="\ud800"), "Anything.x"),
        (Text.model_construct(settings="no"), "Text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_change_on_its_way_is_never_sent(extension: Extension, where: str):
    with pytest.raises(ValueError, match=f"^{where}") as refused:
        parameters_of(extension)
    assert "s3cret" not in str(refused.value)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.tuples(st.integers(0, 3))
    | st.sets(st.integers(0, 3)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


def as_lists(value: Any) -> Any:
    match value:
        case dict():
            return {key: as_lists(item) for key, item in value.items()}
        case list() | tuple():
            return [as_lists(item) for item in value]
    return value


@given(json_values)
def test_parameters_are_the_same_or_refused(value: Any):
    with contextlib.suppress(ValueError):
        payload = parameters_of(Anything(x=value))
        read = Anything.model_validate_json(json.dumps(payload)).x
        # a tuple is a list to JSON and to its reader
        assert repr(read) == repr(as_lists(value))


class Cutoff(Base):
    deep: list[Inner] = Field([])
    cutoff: float = math.inf


def test_a_schema_says_what_it_cannot_hold():
    with pytest.raises(ValueError, match=r"^Cutoff\.cutoff\.default: inf"):
        schema_of(Cutoff)


@pytest.mark.parametrize("room", ["", ".", "..", "a/b", "a:b", "@else"])
def test_a_room_that_no_url_reaches_is_none(room: str):
    with pytest.raises(ValueError, match="name"):
        FullName.of(room, "analysis", "Base")


def test_names_have_one_spelling():
    assert FullName.of("lab", "analysis", "A\u030a").name == "\u00c5"


@pytest.mark.parametrize(
    ("result", "plain"),
    [
        (np.float32(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.array([0.5], dtype=np.longdouble), [0.5]),
        (np.array(3), 3),
        ({np.int64(1): 2.0, "a": (1,)}, {"1": 2.0, "a": [1]}),
        (np.ma.masked_array([1, 2], mask=[0, 1]), [1, None]),
        (np.datetime64("2024-02-29T12:00:00.000000001"), "2024-02-29T12:00:00.000000001"),
        (Inner(Kept=3), {"Kept": 3, "path": "."}),
        pytest.param((n for n in range(2)), [0, 1], id="generator"),
        (np.clongdouble(1 + 2j), "1+2j"),
    ],
    ids=str,
)
def test_results_become_json(result: Any, plain: Any):
    assert as_json(result) == plain


WATER = ase.Atoms("OH2", positions=[[0, 0, 0], [0, 0, 1], [0, 1, 0]], info={"e": np.float64(-1.5)})
TIMES = pandas.to_datetime(["2026-02-10", None])
NAMED = pandas.Series([1, 2], index=pandas.Index(["Cu", "Au"], name="element"), name="count")


@pytest.mark.parametrize(
    ("result", "plain"),
    [
        (pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]}), {"a": [1, 2], "b": ["x", "y"]}),
        (NAMED, {"element": ["Cu", "Au"], "count": [1, 2]}),
        (pandas.Series([1.5, 2]), [1.5, 2.0]),
        ({"t": pandas.DataFrame({"at": TIMES})}, {"t": {"at": ["2026-02-10T00:00:00", None]}}),
        (pandas.Series([1, None], dtype="Int64"), [1, None]),
        ([math.nan, -math.inf, np.array([math.nan])], [None, None, [None]]),
        (
            [WATER],
            [
                {
                    "numbers": [8, 1, 1],
                    "positions": [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]],
                    "cell": [[0.0] * 3] * 3,
                    "pbc": [False] * 3,
                    "info": {"e": -1.5},
                }
            ],
        ),
    ],
    ids=["table", "index", "series", "times", "missing", "nan", "atoms"],
)
def test_what_people_compute_with_becomes_json(result: Any, plain: Any):
    assert as_json(result, nan_as_null=True) == plain


@pytest.mark.parametrize(
    ("result", "why"),
    [
        ({"e": {"x": [0.0, math.nan]}}, r"result\.e\.x\[1\] is nan"),
        (np.array([1, math.inf]), r"result\[1\] is inf"),
        ([{1: "a", "1": "b"}], "two keys of result become the same text"),
        ({"a": {np.int64(1): 1, "1": 2}}, r"two keys of result\['a'\]"),
        (range(3), "range is not JSON"),
        (np.longdouble("1e4000"), "inf"),
        ("\ud800", "surrogates"),
        ({"t": pandas.DataFrame({"at": TIMES})}, r"result\.t\.at\[1\] is nan"),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), "two columns of one name"),
    ],
    ids=str,
)
def test_what_is_no_json_is_refused_with_its_place(result: Any, why: str):
    with pytest.raises(ValueError, match=why):
        as_json(result)


class Frames(Provider):
    category: ClassVar[str] = "frames"
    frames: list[int] = Field([])
    tags: set[str] = Field(set(), alias="Tags")
    pair: tuple[float, ...] = ()
    maybe: list[int] | None = None
    inner: list[Inner] | tuple[int, ...] = ()
    either: int | list[int] = 0
    text: str = ""

    def read(self, handler: Any) -> Any:
        if handler is not None:
            return handler
        given = self.model_fields_set
        return {name: getattr(self, name) for name in given}


@pytest.mark.parametrize(
    ("params", "read"),
    [
        ({"frames": "3"}, {"frames": [3]}),
        ({"frames": ["1", "2"]}, {"frames": [1, 2]}),
        ({"Tags": "x"}, {"tags": ["x"]}),
        ({"pair": "1.5"}, {"pair": [1.5]}),
        ({"maybe": "4"}, {"maybe": [4]}),
        ({"inner": "4"}, {"inner": [4]}),
        ({"either": "4"}, {"either": 4}),
        ({"text": "x", "unknown": "y"}, {"text": "x"}),
    ],
)
def test_a_field_that_takes_a_list_gets_one(params: Any, read: Any):
    assert json.loads(read_content(Frames, None, params)) == read


def test_a_provider_may_return_what_a_task_may():
    content = read_content(Frames, {"r": np.arange(2), "nan": np.float32("nan")}, {})
    assert json.loads(content) == {"r": [0, 1], "nan": None}
