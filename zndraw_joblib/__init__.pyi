from zndraw_joblib.client import ClaimedTask as ClaimedTask
from zndraw_joblib.client import JobManager as JobManager
from zndraw_joblib.client import TaskCancelled as TaskCancelled
from zndraw_joblib.client import TaskFailed as TaskFailed
from zndraw_joblib.dependencies import get_joblib_settings as get_joblib_settings
from zndraw_joblib.dependencies import get_result_backend as get_result_backend
from zndraw_joblib.dependencies import get_room_access as get_room_access
from zndraw_joblib.dependencies import get_tsio as get_tsio
from zndraw_joblib.dependencies import request_hash as request_hash
from zndraw_joblib.dependencies import validate_room_id as validate_room_id
from zndraw_joblib.dependencies import verify_writable_room as verify_writable_room
from zndraw_joblib.events import Emission as Emission
from zndraw_joblib.events import FrozenEvent as FrozenEvent
from zndraw_joblib.events import JobsInvalidate as JobsInvalidate
from zndraw_joblib.events import JoinJobRoom as JoinJobRoom
from zndraw_joblib.events import JoinProviderRoom as JoinProviderRoom
from zndraw_joblib.events import LeaveJobRoom as LeaveJobRoom
from zndraw_joblib.events import LeaveProviderRoom as LeaveProviderRoom
from zndraw_joblib.events import ProviderRequest as ProviderRequest
from zndraw_joblib.events import ProviderResultReady as ProviderResultReady
from zndraw_joblib.events import ProvidersInvalidate as ProvidersInvalidate
from zndraw_joblib.events import TaskAvailable as TaskAvailable
from zndraw_joblib.events import TaskStatusEvent as TaskStatusEvent
from zndraw_joblib.events import (
    build_task_status_emission as build_task_status_emission,
)
from zndraw_joblib.events import emit as emit
from zndraw_joblib.exceptions import Forbidden as Forbidden
from zndraw_joblib.exceptions import (
    InternalJobNotConfigured as InternalJobNotConfigured,
)
from zndraw_joblib.exceptions import InvalidCategory as InvalidCategory
from zndraw_joblib.exceptions import InvalidRoomId as InvalidRoomId
from zndraw_joblib.exceptions import InvalidTaskTransition as InvalidTaskTransition
from zndraw_joblib.exceptions import JobNotFound as JobNotFound
from zndraw_joblib.exceptions import NoWorkersAvailable as NoWorkersAvailable
from zndraw_joblib.exceptions import ProblemException as ProblemException
from zndraw_joblib.exceptions import ProviderNotFound as ProviderNotFound
from zndraw_joblib.exceptions import ProviderTimeoutError as ProviderTimeoutError
from zndraw_joblib.exceptions import SchemaConflict as SchemaConflict
from zndraw_joblib.exceptions import TaskNotFound as TaskNotFound
from zndraw_joblib.exceptions import WorkerNotFound as WorkerNotFound
from zndraw_joblib.exceptions import (
    problem_exception_handler as problem_exception_handler,
)
from zndraw_joblib.extension import Category as Category
from zndraw_joblib.extension import Extension as Extension
from zndraw_joblib.lifecycle import TaskStatus as TaskStatus
from zndraw_joblib.models import Job as Job
from zndraw_joblib.models import ProviderRecord as ProviderRecord
from zndraw_joblib.models import Task as Task
from zndraw_joblib.models import Worker as Worker
from zndraw_joblib.models import WorkerJobLink as WorkerJobLink
from zndraw_joblib.provider import Provider as Provider
from zndraw_joblib.registry import InternalExecutor as InternalExecutor
from zndraw_joblib.registry import InternalProviderExecutor as InternalProviderExecutor
from zndraw_joblib.registry import InternalRegistry as InternalRegistry
from zndraw_joblib.registry import ensure_internal_jobs as ensure_internal_jobs
from zndraw_joblib.registry import (
    ensure_internal_providers as ensure_internal_providers,
)
from zndraw_joblib.registry import register_internal_jobs as register_internal_jobs
from zndraw_joblib.registry import (
    register_internal_providers as register_internal_providers,
)
from zndraw_joblib.registry import register_internal_tasks as register_internal_tasks
from zndraw_joblib.results import MemoryResults as MemoryResults
from zndraw_joblib.results import RedisResults as RedisResults
from zndraw_joblib.results import ResultBackend as ResultBackend
from zndraw_joblib.routes import router as router
from zndraw_joblib.schemas import JobPolicy as JobPolicy
from zndraw_joblib.schemas import JobStats as JobStats
from zndraw_joblib.settings import JobLibSettings as JobLibSettings
from zndraw_joblib.stats import queue_stats as queue_stats
from zndraw_joblib.sweeper import cleanup_idle_jobs as cleanup_idle_jobs
from zndraw_joblib.sweeper import cleanup_overdue_attempts as cleanup_overdue_attempts
from zndraw_joblib.sweeper import cleanup_stale_workers as cleanup_stale_workers
from zndraw_joblib.sweeper import (
    cleanup_stuck_internal_tasks as cleanup_stuck_internal_tasks,
)
from zndraw_joblib.sweeper import cleanup_worker as cleanup_worker
from zndraw_joblib.sweeper import expel as expel
from zndraw_joblib.sweeper import purge_jobs as purge_jobs
from zndraw_joblib.sweeper import purge_tasks as purge_tasks
from zndraw_joblib.sweeper import run_sweeper as run_sweeper
from zndraw_joblib.waiting import RedisWakeups as RedisWakeups
from zndraw_joblib.waiting import Wakeups as Wakeups

__all__: list[str]
from zndraw_joblib.workers import Action as Action
