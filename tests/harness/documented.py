"""Whether an answer is what the OpenAPI document says that it can be."""

import json
import re
from functools import lru_cache
from typing import Any

import httpx
import jsonschema_rs
from fastapi import FastAPI

from zndraw_joblib import router

Document = dict[str, Any]


@lru_cache
def document() -> Document:
    app = FastAPI()
    app.include_router(router)
    return app.openapi()


@lru_cache
def _paths() -> list[tuple[re.Pattern[str], Document]]:
    return [
        # names may contain slashes, nothing else does
        (re.compile(re.sub(r"\\{(\w+_name)?.*?\\}", _parameter, re.escape(p))), o)
        for p, o in document()["paths"].items()
    ]


def _parameter(match: re.Match[str]) -> str:
    return ".+" if match[1] else "[^/]+"


def operation_of(method: str, path: str) -> Document | None:
    """Return what the document says of a request; None if it is none of ours."""
    for pattern, operations in _paths():
        if pattern.fullmatch(path) and method.lower() in operations:
            return operations[method.lower()]
    return None


def response_of(operation: Document, status: int) -> Document | None:
    responses = operation["responses"]
    return responses.get(str(status)) or responses.get(f"{status // 100}XX")


@lru_cache
def _validator(schema: str) -> Any:
    components = document()["components"]
    return jsonschema_rs.validator_for({**json.loads(schema), "components": components})


async def check(response: httpx.Response) -> None:
    """Fail unless status, media type and body are documented."""
    request = response.request
    operation = operation_of(request.method, request.url.path)
    if operation is None:
        return
    what = f"{request.method} {request.url.path}: {response.status_code}"
    documented = response_of(operation, response.status_code)
    assert documented, f"{what} is not documented"
    media_type = response.headers.get("content-type")
    content = documented.get("content", {})
    if media_type not in content:
        assert "*/*" in content or (media_type is None and not content), (
            f"{what} comes as {media_type}"
        )
        return
    schema = content[media_type]["schema"]
    if schema:
        await response.aread()
        _validator(json.dumps(schema)).validate(response.json())
