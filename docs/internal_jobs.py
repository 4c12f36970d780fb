"""What the example host runs itself, as ``@internal``, in its own process or beside it.

With Redis, TaskIQ workers run it: they need ``REDIS_URL`` and ``HOST_URL``, and have
neither app nor database nor a secret: each message brings a token::

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

from zndraw_joblib import Category, Extension, InternalExecutor, register_internal_tasks
from zndraw_joblib.exceptions import describe
from zndraw_joblib.registry import MintToken

#: Whom ``@internal`` tasks report as: a superuser whose password nobody knows.
SERVICE_ID = uuid5(UUID(int=0), "zndraw-joblib:internal")


class Composition(Extension):
    """How many atoms of each element there are."""

    category: ClassVar[Category] = Category.ANALYSIS
    symbols: list[str]

    def run(self, vis: Any, **kwargs: Any) -> dict[str, int]:
        return Counter(self.symbols)


EXTENSIONS = [Composition]


def make_mint_token(settings: AuthSettings) -> MintToken:
    """Return what makes the token that goes with a task.

    Parameters
    ----------
    settings : AuthSettings
        The host's: their secret signs the token.
    """
    strategy = get_jwt_strategy(settings)
    # as long as a task may wait in the broker, and then run
    strategy.lifetime_seconds = 2 * 3600

    async def mint_token(task: Any) -> str:
        return await strategy.write_token(User(id=SERVICE_ID))

    return mint_token


def run(extension: type[Any], payload: dict[str, Any]) -> tuple[Any, BaseException | None]:
    """Run a task, and return its result, and what ended it instead, whatever that is."""
    try:
        return extension(**payload).run(None), None
    except BaseException as exc:
        # sys.exit ends the task, not the process
        return None, exc


def make_executor(
    http: httpx.AsyncClient, settings: AuthSettings | None = None
) -> InternalExecutor:
    """Return what runs an ``@internal`` task and reports on it over REST.

    Parameters
    ----------
    http : httpx.AsyncClient
        A client of the host.
    settings : AuthSettings, optional
        The host's, in its own process, where a message may bring no token.
    """
    mint_token = make_mint_token(settings) if settings else None

    async def execute(
        extension: type[Any],
        payload: dict[str, Any],
        room_id: str,
        task_id: str,
        *,
        attempt: int | None,
        token: str | None,
    ) -> None:
        if token is None and mint_token is not None:
            token = await mint_token(None)
        headers = {
            "Authorization": f"Bearer {token}",
            # one key a delivery: of two deliveries of one attempt, one may start it
            "Idempotency-Key": str(uuid4()),
        }

        async def report(**body: Any) -> httpx.Response:
            # the number of the attempt: what comes late is not taken for the next one's
            body = {"attempt": attempt, **body}
            return await http.patch(f"/v1/joblib/tasks/{task_id}", json=body, headers=headers)

        started = await report(status="running")
        if started.status_code == 409:
            return  # cancelled meanwhile, or delivered twice
        started.raise_for_status()
        result, failure = await asyncio.to_thread(run, extension, payload)
        if failure is not None:
            if settings is None:
                await report(status="failed", error=describe(failure))
            # the host fails the task, and keeps the traceback in its log
            raise failure
        try:
            (await report(status="completed", result=result)).raise_for_status()
        except (TypeError, ValueError, httpx.HTTPStatusError) as exc:
            # a result that can't be told
            await report(status="failed", error=describe(exc))

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
    register_internal_tasks(broker, EXTENSIONS, make_executor(http))
    return broker
