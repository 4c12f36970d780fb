"""Jobs, workers and tasks for a FastAPI host; type checkers read ``__init__.pyi``."""

from importlib import import_module
from typing import Any

# Names are handed on when they are first asked for: a worker's process imports the
# client and must load neither the web framework nor the database toolkit for it.
_MODULE_OF = {
    "Category": "extension",
    "ClaimedTask": "client",
    "Emission": "events",
    "Extension": "extension",
    "Forbidden": "exceptions",
    "FrozenEvent": "events",
    "InternalExecutor": "registry",
    "InternalJobNotConfigured": "exceptions",
    "InternalProviderExecutor": "registry",
    "InternalRegistry": "registry",
    "InvalidCategory": "exceptions",
    "InvalidRoomId": "exceptions",
    "InvalidTaskTransition": "exceptions",
    "Job": "models",
    "JobLibSettings": "settings",
    "JobManager": "client",
    "JobNotFound": "exceptions",
    "JobPolicy": "schemas",
    "JobStats": "schemas",
    "JobsInvalidate": "events",
    "JoinJobRoom": "events",
    "JoinProviderRoom": "events",
    "LeaveJobRoom": "events",
    "LeaveProviderRoom": "events",
    "MemoryResults": "results",
    "ProblemException": "exceptions",
    "Provider": "provider",
    "ProviderNotFound": "exceptions",
    "ProviderRecord": "models",
    "ProviderRequest": "events",
    "ProviderResultReady": "events",
    "ProviderTimeoutError": "exceptions",
    "ProvidersInvalidate": "events",
    "RedisResults": "results",
    "RedisWakeups": "wakeups",
    "ResultBackend": "results",
    "SchemaConflict": "exceptions",
    "Task": "models",
    "TaskAvailable": "events",
    "TaskCancelled": "client",
    "TaskFailed": "client",
    "TaskNotFound": "exceptions",
    "TaskStatus": "lifecycle",
    "TaskStatusEvent": "events",
    "Wakeups": "wakeups",
    "Worker": "models",
    "WorkerJobLink": "models",
    "WorkerNotFound": "exceptions",
    "build_task_status_emission": "events",
    "cleanup_idle_jobs": "sweeper",
    "cleanup_overdue_attempts": "sweeper",
    "cleanup_stale_workers": "sweeper",
    "cleanup_stuck_internal_tasks": "sweeper",
    "cleanup_worker": "sweeper",
    "emit": "events",
    "ensure_internal_jobs": "registry",
    "ensure_internal_providers": "registry",
    "get_joblib_settings": "dependencies",
    "get_result_backend": "dependencies",
    "get_room_access": "dependencies",
    "get_tsio": "dependencies",
    "problem_exception_handler": "exceptions",
    "purge_tasks": "sweeper",
    "queue_stats": "stats",
    "register_internal_jobs": "registry",
    "register_internal_providers": "registry",
    "register_internal_tasks": "registry",
    "request_hash": "dependencies",
    "router": "routes",
    "run_sweeper": "sweeper",
    "validate_room_id": "dependencies",
    "verify_writable_room": "dependencies",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    try:
        module = import_module(f"zndraw_joblib.{_MODULE_OF[name]}")
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(module, name)
