"""Requests made up from the OpenAPI document, its links included.

Schemathesis sends them over TCP and holds the answers to the document: no 5xx but what is
documented, no status, media type, header or body that isn't, nothing malformed accepted,
nothing answered without a token. ``nox -s fuzz`` is the long form of this test.
"""

import os
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from fastapi import FastAPI
from steps import offer

from zndraw_joblib.settings import JobLibSettings

HARNESS = Path(__file__).parent / "harness"
EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
EFFORT = (
    ["--max-examples", EXAMPLES]
    if EXAMPLES
    else ["--max-examples", "2", "--phases", "fuzzing,stateful", "--seed", "1"]
)

pytestmark = pytest.mark.makers("plain", *["postgres"] * bool(EXAMPLES))


async def test_every_answer_is_documented(app: FastAPI, server, ada, admin, tmp_path):
    app.state.joblib_settings = JobLibSettings(
        long_poll_max_wait_seconds=0.2,
        provider_long_poll_default_seconds=0.05,
        provider_long_poll_max_seconds=0.1,
    )
    # nobody's alone: what is made up reaches it, and what it leads to
    await offer(ada)
    command = [
        *(sys.executable, "-m", "schemathesis.cli"),
        *("--config-file", str(HARNESS / "fuzz.toml")),
        *("run", f"{server}/openapi.json", "--include-path-regex", "^/v1/joblib"),
        *EFFORT,
    ]
    env = {
        "SCHEMATHESIS_HOOKS": "fuzz",
        "FUZZ_TOKENS": f"{ada.token} {admin.token}",
        "PYTHONPATH": os.pathsep.join([str(HARNESS), os.environ.get("PYTHONPATH", "")]),
    }
    ran = await anyio.run_process(
        command, check=False, cwd=tmp_path, env=os.environ | env, stderr=subprocess.STDOUT
    )
    told = ran.stdout.decode()
    if EXAMPLES:
        sys.stdout.write(told)
    assert ran.returncode == 0, told
