"""What one app remembers between its requests."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Runtime:
    """The memory of one app, made once for it and handed on like its session maker.

    Each part belongs to the module that uses it. Two apps in one process share nothing.
    """


def runtime_of(app: Any) -> Runtime:
    """Return the runtime of an app, kept in ``app.state.joblib_runtime``."""
    runtime: Runtime | None = getattr(app.state, "joblib_runtime", None)
    if runtime is None:
        runtime = app.state.joblib_runtime = Runtime()
    return runtime
