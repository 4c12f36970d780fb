"""What the example host shows of itself: a page for people, numbers for Prometheus.

The page is ``page.html`` as it stands, and is told what its users are called. The numbers are
served where ``METRICS_TOKEN`` is set, to whoever brings it::

    scrape_configs:
      - job_name: zndraw-joblib
        authorization: {credentials: the token}
        static_configs: [{targets: ["localhost:8000"]}]
"""

import os
import secrets
from pathlib import Path
from typing import Annotated
from uuid import UUID

import sqlalchemy as sa
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from zndraw_auth import SessionDep, User, current_active_user

from zndraw_joblib import JobStats, queue_stats
from zndraw_joblib.settings import settings_of

USER = User.__table__.c
PAGE = Path(__file__).parent / "page.html"

router = APIRouter(include_in_schema=False)
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


@router.get("/")
async def page() -> FileResponse:
    """Show a room: its jobs, its workers, its tasks as they move."""
    return FileResponse(PAGE)


@router.get("/names", dependencies=[Depends(current_active_user)])
async def names(
    session: SessionDep, id: Annotated[list[UUID], Query(max_length=100)]
) -> dict[UUID, str]:
    """Tell what users are called: their addresses up to the ``@``."""
    found = await session.execute(sa.select(USER.id, USER.email).where(USER.id.in_(id)))
    return {row.id: row.email.partition("@")[0] for row in found}


async def scraper(bearer: Bearer) -> None:
    """Let Prometheus in, and nobody else."""
    token = os.environ.get("METRICS_TOKEN")
    given = bearer.credentials if bearer else ""
    if not token or not secrets.compare_digest(given.encode(), token.encode()):
        raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})


@router.get("/metrics", dependencies=[Depends(scraper)])
async def metrics(request: Request, session: SessionDep) -> Response:
    """Tell what goes on in each job; the same on every replica."""
    jobs = await queue_stats(session, settings_of(request.app))
    registry = CollectorRegistry()
    for name in JobStats.model_fields:
        if name == "job_name":
            continue
        gauge = Gauge(f"zndraw_joblib_{name}", name.replace("_", " "), ["job"], registry=registry)
        for job in jobs:
            if (value := getattr(job, name)) is not None:
                gauge.labels(job.job_name).set(value)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
