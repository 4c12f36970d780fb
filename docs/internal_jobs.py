"""What the example host runs itself, as ``@internal``, in its own process or beside it.

With Redis, TaskIQ workers run it: they need ``REDIS_URL``, ``HOST_URL`` and the host's
``ZNDRAW_AUTH_SECRET_KEY``, and have neither app nor database::

    taskiq worker --app-dir docs internal_jobs:worker_broker
"""

import asyncio
import os
from collections import Counter
from typing import Any, ClassVar
from uuid import UUID, uuid4, uuid5

import httpx
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from taskiq import AsyncBroker
from taskiq_redis import ListQueueBroker
from zndraw_auth import AuthSettings, User
from zndraw_auth.users import get_jwt_strategy

from zndraw_joblib import (
    Category,
    Extension,
    InternalExecutor,
    register_internal_tasks,
)

#: Whom ``@internal`` tasks report as: a superuser whose password nobody knows.
SERVICE_ID = uuid5(UUID(int=0), "zndraw-joblib:internal")


class Composition(Extension):
    """How many atoms of each element there are."""

    category: ClassVar[Category] = Category.ANALYSIS
    symbols: list[str]

    def run(self, vis: Any, **kwargs: Any) -> dict[str, int]:
        return Counter(self.symbols)


EXTENSIONS = [Composition]


def make_executor(http: httpx.AsyncClient, settings: AuthSettings) -> InternalExecutor:
    """Return what runs an ``@internal`` task and reports on it over REST.

    Parameters
    ----------
    http : httpx.AsyncClient
        A client of the host.
    settings : AuthSettings
        The host's: their secret signs the reports' tokens.
    """
    strategy = get_jwt_strategy(settings)

    async def execute(
        extension: type[Any], payload: dict[str, Any], room_id: str, task_id: str
    ) -> None:
        # one key a delivery: of two deliveries of one task, one may start it
        delivery = str(uuid4())

        async def report(**body: Any) -> httpx.Response:
            token = await strategy.write_token(User(id=SERVICE_ID))
            return await http.patch(
                f"/v1/joblib/tasks/{task_id}",
                json=body,
                headers={
                    "Authorization": f"Bearer {token}",
                    "Idempotency-Key": delivery,
                },
            )

        started = await report(status="running")
        if started.status_code == 409:
            return  # cancelled meanwhile, or delivered twice
        started.raise_for_status()
        try:
            result = await asyncio.to_thread(extension(**payload).run, None)
            (await report(status="completed", result=result)).raise_for_status()
        except Exception as exc:
            await report(status="failed", error=f"{type(exc).__name__}: {exc}")

    return execute


def worker_broker() -> AsyncBroker:
    """Return the broker of a TaskIQ worker."""
    broker = ListQueueBroker(
        os.environ["REDIS_URL"],
        # it waits for messages as long as none comes; redis-py 8 would give up after 5 s
        socket_timeout=None,
        # nor does it end when Redis is away for a while
        retry=Retry(ConstantBackoff(1), retries=-1),
    )
    http = httpx.AsyncClient(base_url=os.environ["HOST_URL"])
    register_internal_tasks(broker, EXTENSIONS, make_executor(http, AuthSettings()))
    return broker
