"""The page of statements shows what is run: ``pytest --renew`` writes it anew."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pages
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from steps import JOB, claim, offer, report, silence, submit

from zndraw_joblib.sweeper import cleanup_stale_workers

pytestmark = pytest.mark.makers("plain", "postgres")

PAGE = pages.DOCS / "statements.md"
NAMES = {"plain": "SQLite", "postgres": "PostgreSQL"}
WIDTH = 92
CLAUSES = (
    "SELECT|FROM|WHERE|SET|VALUES|RETURNING|ORDER BY|GROUP BY|LIMIT|ON CONFLICT"
    "|(?:LEFT OUTER |CROSS )?JOIN|FOR (?:NO KEY )?(?:UPDATE|(?:KEY )?SHARE)|UNION ALL"
)
_TOKEN = re.compile(rf"'[^']*'|\(|\)|\b(?:{CLAUSES})\b|[^'()\s]+")


def laid_out(sql: str) -> str:
    """Return a statement with a line for each clause, indented by its subqueries."""
    lines: list[str] = []
    line, depth, queries = "", 0, [0]

    def flush() -> None:
        nonlocal line
        if line.strip():
            lines.append(line.rstrip())
        line = "    " * (len(queries) - 1)

    for gap, token in re.findall(rf"(\s*)({_TOKEN.pattern})", sql):
        if re.fullmatch(CLAUSES, token):
            if token == "SELECT" and line.endswith("("):
                queries.append(depth)
            flush()
        elif token == "(":
            depth += 1
        elif token == ")":
            if len(queries) > 1 and queries[-1] == depth:
                queries.pop()
            depth -= 1
        if len(line) + len(token) > WIDTH and gap:
            indent = "    " * len(queries)
            flush()
            line = indent
        line += (" " if gap and line.strip() else "") + token
    flush()
    return "\n".join(lines)


@contextmanager
def recorded(engine: AsyncEngine) -> Iterator[list[str]]:
    """Collect the statements that are run, but for the look-up of the user."""
    seen: list[str] = []

    def note(connection, cursor, statement, parameters, context, many):
        if not re.search(r'^SELECT.*FROM "?user"? ', statement, re.DOTALL):
            seen.append(laid_out(statement))

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine.sync_engine, "before_cursor_execute", note)


async def test_the_page_shows_what_is_run(app, ada, engine, session_maker, maker, pytestconfig):
    # within a sixtieth of it no claim writes a heartbeat
    app.state.joblib_settings.worker_timeout_seconds = 6000
    worker = await offer(ada)
    waiting = [await submit(ada) for _ in range(4)]
    held = await claim(ada, worker, max_tasks=2)
    await report(ada, held[0], "running")
    beat = {"tasks": [{"id": held[0]["id"], "attempt": 1, "progress": 0.5}]}
    line = {"id": held[0]["id"], "attempt": 1, "log": {"first": 1, "lines": ["step 1"]}}
    saying = {"tasks": [line]}
    claiming, key = {"json": {"worker_id": worker}}, {"Idempotency-Key": "k"}

    async def sweep():
        await silence(session_maker, worker)
        sweeping.clear()
        await cleanup_stale_workers(session_maker)

    asked = {
        "Submit": lambda: ada.post(f"/rooms/lab/tasks/{JOB}", json={}),
        "Claim": lambda: ada.post("/tasks/claim", **claiming),
        "Claim with a key": lambda: ada.post("/tasks/claim", **claiming, headers=key),
        "Report": lambda: report(ada, held[0], "completed"),
        "Heartbeat": lambda: ada.patch(f"/workers/{worker}"),
        "Heartbeat with progress": lambda: ada.patch(f"/workers/{worker}", json=beat),
        "Heartbeat with a log": lambda: ada.patch(f"/workers/{worker}", json=saying),
        "Read": lambda: ada.get(f"/tasks/{waiting[3]['id']}"),
        "List": lambda: ada.get("/rooms/lab/tasks"),
        "Sweep": sweep,
    }
    beat["tasks"][0]["id"] = line["id"] = held[1]["id"]
    old = text = PAGE.read_text()
    for name, ask in asked.items():
        with recorded(engine) as sweeping:
            await ask()
        shown = ";\n\n".join(sweeping)
        block = re.compile(
            rf"(^## {name}\n(?:(?!^## ).)*?^### {NAMES[maker]}\n\n```(?:postgre)?sql\n).*?^```$",
            re.DOTALL | re.MULTILINE,
        )
        assert block.search(text), f"the page has no {NAMES[maker]} of {name!r}"
        text = block.sub(lambda m, shown=shown: f"{m[1]}{shown};\n```", text)
    if pytestconfig.option.renew:
        PAGE.write_text(text)
    else:
        assert text == old, "`pytest --renew` brings the page up to date"
