"""What hosts of 0.1.7 call and import, for one release; each use says what to write.

To be deleted as a whole, with the lines that name it: decorators in `registry`, `sweeper`
and `dependencies`, and what these and `__init__` do for names that they haven't.
"""

import warnings
from collections.abc import Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import wraps
from inspect import isasyncgenfunction, isawaitable
from typing import Annotated, Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
FrameRoomCleanup = Callable[[set[str]], Any]

_INSTEAD = {
    "FrameRoomCleanup": "zndraw_joblib.delivery.ProvidersRemoved",
    "FrameRoomCleanupDep": "app.state.on_providers_removed",
    "JobLibSettingsDep": "Annotated[JobLibSettings, Depends(get_joblib_settings)]",
    "PaginatedResponse": "zndraw_joblib.schemas.PaginatedResponse",
    "ResultBackendDep": "Annotated[ResultBackend, Depends(get_result_backend)]",
    "WritableRoomDep": "Annotated[str, Depends(verify_writable_room)]",
    "get_frame_room_cleanup": "app.state.on_providers_removed",
}


def _warn(old: str, new: str, stacklevel: int = 3) -> None:
    message = f"{old} goes with the next release of zndraw-joblib: write {new}"
    warnings.warn(message, DeprecationWarning, stacklevel)


def alias(module: str, name: str, stacklevel: int = 3) -> Any:
    """Return what a name of 0.1.7 stands for, that a module is asked for."""
    if name not in _INSTEAD:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    _warn(name, _INSTEAD[name], stacklevel)
    # not before it is asked for: a worker loads none of it
    from fastapi import Depends

    from zndraw_joblib import dependencies, schemas

    known = {
        "FrameRoomCleanup": FrameRoomCleanup,
        "FrameRoomCleanupDep": Annotated[Any, Depends(_get_frame_room_cleanup)],
        "JobLibSettingsDep": Annotated[Any, Depends(dependencies.get_joblib_settings)],
        "PaginatedResponse": schemas.PaginatedResponse,
        "ResultBackendDep": Annotated[Any, Depends(dependencies.get_result_backend)],
        "WritableRoomDep": Annotated[Any, Depends(dependencies.verify_writable_room)],
        "get_frame_room_cleanup": _get_frame_room_cleanup,
    }
    return known[name]


async def _get_frame_room_cleanup() -> FrameRoomCleanup | None:
    return None


def _with_rooms(cleanup: FrameRoomCleanup) -> Callable[..., Awaitable[None]]:
    async def removed(names: Iterable[Any]) -> None:
        rooms = {name.room for name in names if name.category == "frames"}
        if rooms and isawaitable(cleaning := cleanup(rooms)):
            await cleaning

    return removed


def old_cleanup_override(get_hook: F) -> F:
    """Let an override of ``get_frame_room_cleanup`` take the place of the hook."""

    @wraps(get_hook)
    async def get(request: Any) -> Any:
        override = request.app.dependency_overrides.get(_get_frame_room_cleanup)
        if override is None:
            return await get_hook(request)
        cleanup = override()
        if isawaitable(cleanup):
            cleanup = await cleanup
        return None if cleanup is None else _with_rooms(cleanup)

    return cast(F, get)


def old_registry_arguments(function: F) -> F:
    """Let a function take ``session_factory`` for its ``session_maker``."""

    @wraps(function)
    def call(*args: Any, session_factory: Any = None, **kwargs: Any) -> Any:
        if session_factory is not None:
            _warn("session_factory=", "session_maker=")
            kwargs["session_maker"] = session_factory
        return function(*args, **kwargs)

    return cast(F, call)


def old_sweeper_arguments(function: F) -> F:
    """Let the sweeper take ``get_session`` and ``on_frame_rooms``."""

    @wraps(function)
    def call(*args: Any, get_session: Any = None, on_frame_rooms: Any = None, **kwargs: Any) -> Any:
        if get_session is None and args and isasyncgenfunction(args[0]):
            get_session, args = args[0], args[1:]
        if get_session is not None:
            _warn("get_session=", "session_maker=")
            args = (asynccontextmanager(get_session), *args)
        if on_frame_rooms is not None:
            _warn("on_frame_rooms=", "on_providers_removed=")
            kwargs["on_providers_removed"] = _with_rooms(on_frame_rooms)
        return function(*args, **kwargs)

    return cast(F, call)
