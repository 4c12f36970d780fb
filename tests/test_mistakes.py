"""What people do wrong, and what they are told to do next."""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar, NamedTuple

import httpx
import pytest
import servers
from anyio.to_thread import run_sync
from conftest import AUTH_SETTINGS, PASSWORD
from zndraw_auth import User
from zndraw_auth.users import get_jwt_strategy

from zndraw_joblib import Category, Extension, JobManager, Provider
from zndraw_joblib.client_api import HostApi


class Rotate(Extension):
    category: ClassVar[Category] = Category.MODIFIER
    angle: float = 90.0

    def run(self, vis: Any, **kwargs: Any) -> Any:
        return self.angle


class Stretch(Rotate):
    """A job that nobody offers."""


class Sideways(Rotate):
    category: ClassVar[str] = "sideways"


class Aimless(Rotate):
    category = None


class Tree(Provider):
    category: ClassVar[str] = "files"

    def read(self, handler: Any) -> Any:
        return handler


class World(NamedTuple):
    """A host with a job in one of its rooms, and who makes the mistake."""

    url: str
    ada: JobManager
    expired: str
    made: list[JobManager]

    def connected(self, url: str = "", **login: Any) -> JobManager:
        login = login or {"token": "a-token"}
        manager = JobManager.connect(url or self.url, max_startup_retries=0, **login)
        self.made.append(manager)
        return manager


class Mistake(NamedTuple):
    what: str
    make: Callable[[World], Any]
    error: type[Exception]
    told: tuple[str, ...]


MISTAKES = [
    Mistake(
        "no scheme",
        lambda world: world.connected("127.0.0.1:8000"),
        ValueError,
        ("'127.0.0.1:8000' is not the address", "begin with http:// or https://"),
    ),
    Mistake(
        "another scheme",
        lambda world: world.connected("ws://127.0.0.1:8000"),
        ValueError,
        ("'ws://127.0.0.1:8000'", "begin with http:// or https://"),
    ),
    Mistake(
        "a port where nobody listens",
        lambda world: world.connected("http://127.0.0.1:9").jobs("lab"),
        ConnectionError,
        ("http://127.0.0.1:9", "nothing listens there: is the port right?"),
    ),
    Mistake(
        "no such host",
        lambda world: world.connected("http://nowhere.invalid").jobs("lab"),
        ConnectionError,
        ("http://nowhere.invalid", "there is no host of this name"),
    ),
    Mistake(
        "https for http",
        lambda world: world.connected(world.url.replace("http:", "https:")).jobs("lab"),
        ConnectionError,
        ("that port speaks http, not https",),
    ),
    Mistake(
        "a path where no host is",
        lambda world: world.connected(f"{world.url}/elsewhere").jobs("lab"),
        ConnectionError,
        ("/elsewhere/v1/joblib", "isn't an answer of a host of zndraw-joblib"),
    ),
    Mistake(
        "no credentials",
        lambda world: JobManager.connect(world.url),
        ValueError,
        ("give a token, or a user and a password",),
    ),
    Mistake(
        "a wrong password",
        lambda world: world.connected(user="ada@example.org", password="x").jobs("lab"),
        PermissionError,
        ("refuses this user and password", "address that was registered there"),
    ),
    Mistake(
        "a name in place of the address",
        lambda world: world.connected(user="ada", password=PASSWORD).jobs("lab"),
        PermissionError,
        ("refuses this user and password", "address that was registered there"),
    ),
    Mistake(
        "an expired token",
        lambda world: world.connected(token=world.expired).jobs("lab"),
        PermissionError,
        ("the token may have expired", "connect with another one"),
    ),
    Mistake(
        "a token with its line break",
        lambda world: world.connected(token="abc\n").jobs("lab"),
        ValueError,
        ("the token has", "it has to be stripped"),
    ),
    Mistake(
        "a room that can't be one",
        lambda world: world.ada.submit(Rotate(), "a:b"),
        ValueError,
        ("must not contain a colon",),
    ),
    Mistake(
        "a room without the job",
        lambda world: world.ada.submit(Rotate(), "labb"),
        KeyError,
        ("job not found", "room 'labb' sees no job 'modifiers:Rotate'", "there is none"),
    ),
    Mistake(
        "a job that nobody offers",
        lambda world: world.ada.submit(Stretch(), "lab"),
        KeyError,
        ("sees no job 'modifiers:Stretch'", "'lab:modifiers:Rotate'"),
    ),
    Mistake(
        "a misspelled job",
        lambda world: world.ada.submit("lab:modifiers:Rotat", {}, "lab"),
        KeyError,
        ("'lab:modifiers:Rotat'", "did you mean 'lab:modifiers:Rotate'?"),
    ),
    Mistake(
        "a job by half of its name",
        lambda world: world.ada.submit("rotate", {}, "lab"),
        KeyError,
        ("did you mean 'lab:modifiers:Rotate'?",),
    ),
    Mistake(
        "a misspelled parameter",
        lambda world: Rotate(angel=3),
        ValueError,
        ("Rotate has no parameter 'angel'", "did you mean 'angle'?"),
    ),
    Mistake(
        "a misspelled parameter, by name",
        lambda world: world.ada.submit("lab:modifiers:Rotate", {"angel": 3}, "lab"),
        ValueError,
        ("lab:modifiers:Rotate has no parameter 'angel'", "did you mean 'angle'?"),
    ),
    Mistake(
        "a parameter of another type",
        lambda world: Rotate(angle="wide"),
        ValueError,
        ("Rotate\nangle\n", "should be a valid number"),
    ),
    Mistake(
        "a payload that doesn't fit",
        lambda world: world.ada.submit("lab:modifiers:Rotate", {"angle": "wide"}, "lab"),
        ValueError,
        ("angle", "number"),
    ),
    Mistake(
        "a parameter that is no JSON",
        lambda world: world.ada.submit(Rotate(angle=float("inf")), "lab"),
        ValueError,
        ("Rotate.angle", "can't be sent as JSON"),
    ),
    Mistake(
        "a class instead of an object",
        lambda world: world.ada.submit(Rotate, "lab"),
        TypeError,
        ("Rotate is a class", "Rotate(...)"),
    ),
    Mistake(
        "a dict without a name",
        lambda world: world.ada.submit({"angle": 3}, "lab"),
        TypeError,
        ("a dict doesn't say of which job", "submit('room:category:name', {...}, room)"),
    ),
    Mistake(
        "parameters that are no dict",
        lambda world: world.ada.submit("lab:modifiers:Rotate", [3], "lab"),
        TypeError,
        ("the parameters of 'lab:modifiers:Rotate' are to be a dict",),
    ),
    Mistake(
        "parameters beside an object",
        lambda world: world.ada.submit(Rotate(), {"angle": 3}, "lab"),
        TypeError,
        ("the parameters are those of the object",),
    ),
    Mistake(
        "no room",
        lambda world: world.ada.submit(Rotate()),
        TypeError,
        ("the room is missing", "submit(Rotate(angle=90), 'lab')"),
    ),
    Mistake(
        "a task that is not there",
        lambda world: world.ada.task("0" * 32).status,
        KeyError,
        ("task 00000000-0000-0000-0000-000000000000 not found",),
    ),
    Mistake(
        "a task that is no id",
        lambda world: world.ada.wait_all(["Rotate"]),
        ValueError,
        ("'Rotate' is not the id of a task",),
    ),
    Mistake(
        "data of a provider that is not there",
        lambda world: world.ada.read("lab:files:Tree"),
        KeyError,
        ("room 'lab' sees no provider 'lab:files:Tree'", "there is none"),
    ),
    Mistake(
        "a status that there is not",
        lambda world: world.ada.tasks("lab", status="done"),
        ValueError,
        ("status", "'completed'"),
    ),
    Mistake(
        "a worker without jobs",
        lambda world: world.connected().wait(),
        RuntimeError,
        ("register a job or a provider before wait()",),
    ),
    Mistake(
        "a job for all by somebody who may not",
        lambda world: world.ada.register(Rotate),
        PermissionError,
        ("registering in @global needs a superuser",),
    ),
    Mistake(
        "a category that the host has not",
        lambda world: world.ada.register(Sideways, room="lab"),
        ValueError,
        ("category 'sideways' is not one of ['modifiers', 'selections', 'analysis']",),
    ),
    Mistake(
        "no category",
        lambda world: world.ada.register(Aimless, room="lab"),
        TypeError,
        ("Aimless", "needs a ClassVar 'category'"),
    ),
]


@pytest.fixture
async def world(app: Any, ada: Any) -> AsyncIterator[World]:
    late = AUTH_SETTINGS.model_copy(update={"token_lifetime_seconds": -1})
    expired = await get_jwt_strategy(late).write_token(User(id=ada.id))
    async with servers.serve(app) as url:
        manager = JobManager.connect(url, token=ada.token)
        await run_sync(lambda: manager.register(Rotate, room="lab"))
        world = World(url, manager, expired, [manager])
        yield world
        for manager in world.made:
            await run_sync(manager.disconnect)


@pytest.mark.makers("plain")
async def test_a_mistake_is_told_with_what_to_do_next(world: World):
    for mistake in MISTAKES:
        with pytest.raises(mistake.error) as caught:
            await run_sync(mistake.make, world)
        wrong = [part for part in mistake.told if part not in str(caught.value)]
        assert not wrong, f"{mistake.what}: {caught.value}"


async def test_who_waits_hears_that_the_host_is_away_and_back(caplog: Any):
    answers = iter([502, 502, 502, 200, 502, 502, 502, 200])
    transport = httpx.MockTransport(
        lambda request: httpx.Response(next(answers), json={"items": [], "total": 0})
    )
    api = HostApi("http://host", token="x")
    api.http.close()
    api._http = httpx.Client(transport=transport)
    manager = JobManager(api, max_unreachable_seconds=2)
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert manager.jobs("lab") == []
    told = [record.getMessage() for record in caplog.records]
    assert ["away for" in told[n] and "giving up at 2 s" in told[n] for n in (0, 2)] == [True] * 2
    assert ["host back after" in told[n] for n in (1, 3)] == [True] * 2
    assert len(told) == 4
    api.close()
