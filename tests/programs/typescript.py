"""A TypeScript client, generated, compiled and run against the example host.

``nox -s typescript`` runs it; its sources are in docs/typescript.
"""

import os
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from processes import hosting

pytestmark = [pytest.mark.makers("plain"), pytest.mark.timeout(600)]

SOURCES = Path(__file__).parents[2] / "docs" / "typescript"


async def test_a_task_lives_in_typescript(tmp_path: Path) -> None:
    client = shutil.copytree(SOURCES, tmp_path / "client")

    def run(*command: str, **env: str) -> str:
        ran = subprocess.run(
            command, cwd=client, env={**os.environ, **env}, capture_output=True, text=True
        )
        assert not ran.returncode, ran.stdout + ran.stderr
        return ran.stdout

    async with hosting(tmp_path) as host:
        async with httpx.AsyncClient(base_url=host.url) as http:
            document = await http.get("/openapi.json")
        (client / "openapi.json").write_text(document.raise_for_status().text)
        run("npm", "ci", "--no-audit", "--no-fund")
        run("npm", "run", "generate")
        run("npm", "run", "build")
        told = run("node", "built/life.js", URL=host.url, TOKEN=host.token)
    assert told.split() == [
        *("heard pending heard claimed heard running heard completed".split()),
        *("read completed 42".split()),
    ]
