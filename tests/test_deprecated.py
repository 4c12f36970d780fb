"""What hosts of 0.1.7 call: taken for one release, with a warning that says what to write."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import anyio
import pytest
from steps import silence
from taskiq import InMemoryBroker

import zndraw_joblib
from zndraw_joblib import dependencies, schemas
from zndraw_joblib.settings import JobLibSettings

SWEEPS = JobLibSettings(sweeper_interval_seconds=0.01)


@contextmanager
def told(new: str) -> Iterator[None]:
    with pytest.warns(DeprecationWarning, match=f"write .*{new}") as warned:
        yield
    assert warned[0].filename != zndraw_joblib.deprecated.__file__


class Cleanup:
    """What a host does in rooms whose frames came from a provider that went."""

    def __init__(self) -> None:
        self.rooms: list[set[str]] = []

    async def __call__(self, rooms: set[str]) -> None:
        self.rooms.append(rooms)


async def provide(user: Any, category: str, room: str = "lab") -> dict[str, Any]:
    body = {"category": category, "name": "mount", "schema": {}}
    answer = await user.put(f"/rooms/{room}/providers", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


class Echo:
    category = "modifiers"

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {}


async def run(extension: Any, payload: Any, room_id: str, task_id: str) -> None:
    raise NotImplementedError


async def test_internal_jobs_are_registered_with_a_session_factory(app, ada, session_maker):
    with told("session_maker="):
        await zndraw_joblib.register_internal_jobs(
            app, InMemoryBroker(), extensions=[Echo], executor=run, session_factory=session_maker
        )
    assert "@internal:modifiers:Echo" in app.state.internal_registry
    with told("session_maker="):
        await zndraw_joblib.ensure_internal_jobs([], session_factory=session_maker)
    listed = (await ada.get("/rooms/@internal/jobs")).json()["items"]
    assert [job["full_name"] for job in listed] == ["@internal:modifiers:Echo"]


@pytest.mark.parametrize("positional", [True, False])
async def test_the_sweeper_takes_a_generator_of_sessions_and_tells_rooms(
    ada, bob, app, session_maker, positional
):
    async def get_session():
        async with session_maker() as session:
            yield session

    gone = [await provide(ada, "frames"), await provide(bob, "files", "attic")]
    await silence(session_maker, *(provider["worker_id"] for provider in gone))
    cleanup, args = Cleanup(), (get_session,) if positional else ()
    kwargs = {} if positional else {"get_session": get_session}
    with told("session_maker="), told("on_providers_removed="):
        sweeping = zndraw_joblib.run_sweeper(
            *args, **kwargs, settings=SWEEPS, on_frame_rooms=cleanup
        )
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: sweeping)
        with anyio.fail_after(120):
            while (await ada.get("/rooms/attic/providers")).json()["items"]:
                await anyio.sleep(0.01)
            while not cleanup.rooms:
                await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    # of the other category nothing is told
    assert cleanup.rooms == [{"lab"}]


@pytest.mark.parametrize("coroutine", [True, False])
async def test_an_override_hears_of_the_rooms_of_providers_that_a_route_removes(
    app, ada, coroutine
):
    cleanup = Cleanup()

    async def override() -> Cleanup:
        return cleanup

    with told("app.state.on_providers_removed"):
        point = dependencies.get_frame_room_cleanup
    app.dependency_overrides[point] = override if coroutine else lambda: cleanup
    files, frames = await provide(ada, "files"), await provide(ada, "frames")
    await ada.delete(f"/providers/{files['id']}")
    assert cleanup.rooms == []
    await ada.delete(f"/workers/{frames['worker_id']}")
    assert cleanup.rooms == [{"lab"}]
    app.dependency_overrides[point] = lambda: None
    again = await provide(ada, "frames")
    assert (await ada.delete(f"/providers/{again['id']}")).status_code == 204
    assert cleanup.rooms == [{"lab"}]


@pytest.mark.parametrize("module", ["zndraw_joblib", "zndraw_joblib.dependencies"])
@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("JobLibSettingsDep", dependencies.get_joblib_settings),
        ("ResultBackendDep", dependencies.get_result_backend),
        ("WritableRoomDep", dependencies.verify_writable_room),
        ("FrameRoomCleanupDep", None),
    ],
)
def test_a_name_that_went_is_still_there(module: str, name: str, point: Any):
    with told("Annotated|on_providers_removed"):
        alias = getattr(importlib.import_module(module), name)
    _, depends = get_args(alias)
    if point is None:
        with told("on_providers_removed"):
            point = dependencies.get_frame_room_cleanup
    assert depends.dependency is point


def test_the_page_is_where_it_was():
    with told("zndraw_joblib.schemas.PaginatedResponse"):
        from zndraw_joblib import PaginatedResponse
    assert PaginatedResponse is schemas.PaginatedResponse


def test_no_alias_is_handed_on_by_a_star():
    assert not {*zndraw_joblib.__all__} & {*zndraw_joblib.deprecated._INSTEAD}
    with pytest.raises(AttributeError, match="'zndraw_joblib' has no attribute 'nil'"):
        zndraw_joblib.__getattr__("nil")
