"""Configuration, from the environment (prefix ``ZNDRAW_JOBLIB_``) or from the host."""

from functools import lru_cache
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from zndraw_joblib.lifecycle import TERMINAL, TaskStatus


class JobLibSettings(BaseSettings):
    """What a host can tune; every time is in seconds, every size in bytes.

    Names that older releases knew and this one doesn't are ignored.
    """

    # ignored, not refused: a host that still sets what is gone must not fail
    model_config = SettingsConfigDict(
        env_prefix="ZNDRAW_JOBLIB_", extra="ignore", use_attribute_docstrings=True
    )

    allowed_categories: list[str] = ["modifiers", "selections", "analysis"]
    """Categories that a job may be registered under."""
    worker_timeout_seconds: PositiveFloat = 60
    """Silence after which a worker counts as lost."""
    sweeper_interval_seconds: PositiveFloat = 30
    """Pause between two passes of the sweeper."""
    long_poll_max_wait_seconds: PositiveFloat = 60
    """Upper bound of ``Prefer: wait`` on tasks and claims."""
    internal_task_timeout_seconds: PositiveFloat = 3600
    """Longest life of an `@internal` attempt."""
    internal_redispatch_seconds: PositiveFloat = 300
    """After this an `@internal` task that nobody started is sent again."""
    dispatch_timeout_seconds: PositiveFloat = 5
    """Longest wait for Socket.IO or the broker to take one message."""
    recheck_seconds: PositiveFloat = 1
    """How often a process looks, for all requests that wait in it at once, what other processes
    did."""
    max_waiting_per_user: PositiveInt = 2000
    """Requests of one user that may wait in a process (429 beyond)."""
    max_waiting: PositiveInt = 10_000
    """Requests that may wait in a process (503 beyond)."""
    queue_position_max: PositiveInt = 1000
    """`queue_position` counts exactly up to here."""
    max_payload_bytes: PositiveInt = 1024 * 1024
    """Largest JSON body of a request (413 beyond)."""
    max_result_bytes: PositiveInt = 16 * 1024 * 1024
    """Largest report of one task, with its result (413 beyond)."""
    max_log_bytes: NonNegativeInt = 256 * 1024
    """What is kept of a task's log: its first half, and its last. 0 keeps none."""
    max_workers_per_user: PositiveInt = 10_000
    """Workers that one user may have (429 beyond)."""
    max_jobs_per_user: PositiveInt = 10_000
    """Jobs that the workers of one user may serve (429 beyond, for a new job)."""
    max_providers_per_user: PositiveInt = 10_000
    """Providers of one user (429 beyond)."""
    max_internal_tasks_per_user: PositiveInt = 10_000
    """`@internal` tasks of one user that may be under way (429 beyond)."""
    accept_without_workers: bool = True
    """Whether tasks are taken for jobs none of whose workers is alive (else 409)."""
    max_pending_tasks_per_user: PositiveInt = 2_000_000
    """Tasks of one user that may wait for a worker (429 beyond). More than 10,000 are counted now
    and then: in each queue some 5 % more may come through."""
    max_page_bytes: PositiveInt = 1024 * 1024
    """What the contents on a page of a listing may take; a row that takes more than its share
    comes `abridged`."""
    max_query_bytes: PositiveInt = 2 * 1024 * 1024
    """What the contents of tasks that are asked for by their ids may take together; the rest
    comes `abridged`."""
    retry_delay_max_seconds: PositiveFloat = 3600
    """Cap of the doubling backoff between attempts."""
    task_retention_seconds: dict[TaskStatus, PositiveFloat] = {}
    """How long ended tasks are kept, by state, as JSON; else for ever."""
    allowed_provider_categories: list[str] | None = None
    """Categories of providers; `None` admits any."""
    # whole: a host's own result backend may hand them to Redis as they are
    provider_result_ttl_seconds: PositiveInt = 300
    """How long a provider's result is kept."""
    provider_inflight_ttl_seconds: PositiveInt = 30
    """How long one dispatched read holds back a second one."""
    provider_result_max_bytes: PositiveInt = 64 * 1024 * 1024
    """Largest result (413 beyond)."""
    max_requests_per_provider: PositiveInt = 1000
    """Requests that a process sends to a provider before it has answers (503 beyond)."""
    provider_long_poll_default_seconds: NonNegativeFloat = 5
    """Wait of a provider read without ``Prefer: wait``."""
    provider_long_poll_max_seconds: PositiveFloat = 30
    """Upper bound of ``Prefer: wait`` on provider reads."""

    @field_validator("task_retention_seconds")
    @classmethod
    def _only_ended(cls, kept: dict[TaskStatus, float]) -> dict[TaskStatus, float]:
        if alive := kept.keys() - TERMINAL:
            raise ValueError(f"only ended tasks are purged, not {sorted(alive)}")
        return kept


@lru_cache
def get_settings() -> JobLibSettings:
    """Return the settings of the environment, read once for the process."""
    return JobLibSettings()


def settings_of(app: Any) -> JobLibSettings:
    """Return the ``state.joblib_settings`` of a host, or those of the environment."""
    return getattr(app.state, "joblib_settings", None) or get_settings()
