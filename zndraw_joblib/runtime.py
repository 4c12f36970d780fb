"""What one app remembers between its requests."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from zndraw_joblib.delivery import Delivery
from zndraw_joblib.long_polls import Subscriptions
from zndraw_joblib.provider_reads import InFlight
from zndraw_joblib.settings import settings_of
from zndraw_joblib.waiting import Waiters


@dataclass
class Runtime:
    """The memory of one app, made once for it and handed on like its session maker.

    Each part belongs to the module that uses it. Two apps in one process share nothing.

    Attributes
    ----------
    waiters : Waiters
        The requests that wait.
    delivery : Delivery
        The queue of committed changes.
    polls : dict of AbstractEventLoop to Subscriptions
        What the requests of each event loop wait for.
    reads : InFlight
        The requests to providers that have no answers.
    sweeper : asyncio.Task, optional
        The task that runs, or ran, the sweeper.
    """

    waiters: Waiters = field(default_factory=Waiters)
    delivery: Delivery = field(init=False)
    polls: dict[asyncio.AbstractEventLoop, Subscriptions] = field(default_factory=dict)
    reads: InFlight = field(default_factory=InFlight)
    sweeper: asyncio.Task[Any] | None = None

    def __post_init__(self) -> None:
        self.delivery = Delivery(self.waiters)

    @property
    def subscriptions(self) -> Subscriptions:
        """What the requests of the running event loop wait for."""
        loop = asyncio.get_running_loop()
        if loop not in self.polls:
            self.polls = {k: v for k, v in self.polls.items() if not k.is_closed()}
            self.polls[loop] = Subscriptions()
        return self.polls[loop]


def runtime_of(app: Any) -> Runtime:
    """Return the runtime of an app, kept in ``app.state.joblib_runtime``."""
    runtime: Runtime | None = getattr(app.state, "joblib_runtime", None)
    if runtime is None:
        runtime = app.state.joblib_runtime = Runtime()
    return runtime


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """Let what was published leave before the host takes down what carries it.

    Raises
    ------
    pydantic.ValidationError, pydantic_settings.SettingsError
        At the start, when the environment's settings can't be read.
    """
    patience = 2 * settings_of(app).dispatch_timeout_seconds
    yield
    await runtime_of(app).delivery.drain(patience)
