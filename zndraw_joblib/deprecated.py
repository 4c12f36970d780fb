"""What hosts of 0.1.7 call and import, for one release; each use says what to write.

To be deleted as a whole, with the line of `__init__` that names it: the modules that those
hosts call know nothing of it, they are changed when they are imported.
"""

import sys
import warnings
from collections.abc import Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from inspect import isasyncgenfunction, isawaitable
from types import ModuleType
from typing import Annotated, Any

Function = Callable[..., Any]
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


def _warn(old: str, new: str) -> None:
    message = f"{old} goes with the next release of zndraw-joblib: write {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def _add_aliases(module: ModuleType) -> None:
    known = vars(module).get("__getattr__", _alias)

    def get(name: str) -> Any:
        if name not in _INSTEAD:
            return known(name)
        _warn(name, _INSTEAD[name])
        return _alias(name)

    vars(module)["__getattr__"] = get


def _alias(name: str) -> Any:
    if name not in _INSTEAD:
        raise AttributeError(f"zndraw_joblib.dependencies has no attribute {name!r}")
    # not before it is asked for: a worker loads none of it
    from fastapi import Depends

    from zndraw_joblib import dependencies, results, schemas, settings

    names = {
        "FrameRoomCleanup": FrameRoomCleanup,
        "FrameRoomCleanupDep": Annotated[FrameRoomCleanup | None, Depends(_get_frame_room_cleanup)],
        "JobLibSettingsDep": Annotated[
            settings.JobLibSettings, Depends(dependencies.get_joblib_settings)
        ],
        "PaginatedResponse": schemas.PaginatedResponse,
        "ResultBackendDep": Annotated[
            results.ResultBackend, Depends(dependencies.get_result_backend)
        ],
        "WritableRoomDep": Annotated[str, Depends(dependencies.verify_writable_room)],
        "get_frame_room_cleanup": _get_frame_room_cleanup,
    }
    return names[name]


async def _get_frame_room_cleanup() -> FrameRoomCleanup | None:
    return None


def _hearing_rooms(cleanup: FrameRoomCleanup) -> Callable[..., Awaitable[None]]:
    async def removed(names: Iterable[Any]) -> None:
        rooms = {name.room for name in names if name.category == "frames"}
        if rooms and isawaitable(cleaning := cleanup(rooms)):
            await cleaning

    return removed


def _for_removals(get_hook: Function) -> Function:
    """Let an override of ``get_frame_room_cleanup`` take the place of the hook."""

    @wraps(get_hook)
    async def get(request: Any) -> Any:
        override = request.app.dependency_overrides.get(_get_frame_room_cleanup)
        if override is None:
            return await get_hook(request)
        cleanup = override()
        if isawaitable(cleanup):
            cleanup = await cleanup
        return None if cleanup is None else _hearing_rooms(cleanup)

    return get


def _for_registry(function: Function) -> Function:
    """Let a function take ``session_factory`` for its ``session_maker``."""

    @wraps(function)
    def call(*args: Any, session_factory: Any = None, **kwargs: Any) -> Any:
        if session_factory is not None:
            _warn("session_factory=", "session_maker=")
            kwargs["session_maker"] = session_factory
        return function(*args, **kwargs)

    return call


def _for_sweeper(function: Function) -> Function:
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
            kwargs["on_providers_removed"] = _hearing_rooms(on_frame_rooms)
        return function(*args, **kwargs)

    return call


_CHANGED: dict[str, dict[str, Callable[[Function], Function]]] = {
    "dependencies": {"get_providers_removed": _for_removals},
    "registry": {"register_internal_jobs": _for_registry, "ensure_internal_jobs": _for_registry},
    "sweeper": {"run_sweeper": _for_sweeper},
}


class _Changing:
    """A finder of modules that changes some of them as soon as they are there."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, module_name = name.rpartition(".")
        if package != "zndraw_joblib" or module_name not in _CHANGED:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            for function, change in _CHANGED[module_name].items():
                setattr(module, function, change(getattr(module, function)))
            if module_name == "dependencies":
                _add_aliases(module)

        vars(spec.loader)["exec_module"] = execute_and_change
        return spec


_add_aliases(sys.modules["zndraw_joblib"])
sys.meta_path.insert(0, _Changing)
