"""Jobs, workers and tasks for a FastAPI host; type checkers read ``__init__.pyi``."""

from importlib import import_module
from typing import Any

from zndraw_joblib import deprecated

# Names are handed on when they are first asked for: a worker's process imports the
# client and must load neither the web framework nor the database toolkit for it.
_NAMES = {
    "client": "JobManager TaskFailed TaskHandle as_completed gather",
    "dependencies": "get_joblib_settings get_result_backend get_room_access get_tsio request_hash"
    " validate_room_id verify_writable_room",
    "doctor": "check_host",
    "events": "Emission FrozenEvent JobsInvalidate JoinJobRoom JoinProviderRoom LeaveJobRoom"
    " LeaveProviderRoom ProviderRequest ProviderResultReady ProvidersInvalidate"
    " TaskAvailable TaskStatusEvent TasksInvalidate build_task_status_emission emit",
    "exceptions": "Forbidden InternalJobNotConfigured InvalidCategory InvalidRoomId"
    " InvalidTaskTransition JobNotFound NoWorkersAvailable ProblemException"
    " ProviderNotFound ProviderTimeoutError SchemaConflict TaskNotFound WorkerNotFound"
    " problem_exception_handler",
    "execution": "TaskLogHandler",
    "extension": "Category ClaimedTask Extension TaskCancelled",
    "lifecycle": "TaskStatus",
    "models": "Job ProviderRecord Task TaskLog Worker WorkerJobLink",
    "operations": "queue_stats",
    "problem_route": "webhooks",
    "provider": "Provider",
    "registry": "InternalExecutor InternalProviderExecutor InternalRegistry ensure_internal_jobs"
    " ensure_internal_providers register_internal_jobs register_internal_providers"
    " register_internal_tasks",
    "results": "MemoryResults RedisResults ResultBackend",
    "routes": "router",
    "schemas": "JobPolicy JobStats",
    "settings": "JobLibSettings",
    "sweeper": "cleanup_idle_jobs cleanup_overdue_attempts cleanup_stale_workers"
    " cleanup_stuck_internal_tasks cleanup_worker expel purge_jobs purge_tasks run_sweeper",
    "waiting": "PgWakeups RedisWakeups Wakeups",
    "workers": "Action",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        return deprecated.alias(__name__, name, stacklevel=4)
    return getattr(import_module(f"zndraw_joblib.{_MODULE_OF[name]}"), name)
