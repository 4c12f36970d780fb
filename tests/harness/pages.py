"""The code blocks of README and docs, and how they run."""

import ast
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

_BLOCK = re.compile(
    r"(?P<skip><!-- no-test -->\s*)?"
    r"^(?P<fence>`{3,})(?P<kind>\S*)[^\n]*\n(?P<code>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A code block: its language, its text, and the line that it begins in."""

    kind: str
    code: str
    line: int
    skipped: bool


def blocks(page: Path, kind: str | None = None) -> list[Block]:
    """Return the code blocks of a page, or those of one language."""
    text = page.read_text()
    found = [
        Block(
            match["kind"],
            match["code"],
            text.count("\n", 0, match.start("code")),
            bool(match["skip"]),
        )
        for match in _BLOCK.finditer(text)
    ]
    return [block for block in found if kind in (None, block.kind)]


def programs(page: Path) -> list[tuple[str, str]]:
    """Return the programs that a page has people save, each with its name."""
    return re.findall(r"as\s`(\w+\.py)`.*?```python\n(.*?)```", page.read_text(), re.DOTALL)


async def run(page: Path, **names: Any) -> dict[str, Any]:
    """Run the Python blocks of a page in their order, in one namespace, and return it."""
    namespace = {"__name__": "page", **names}
    for block in blocks(page, "python"):
        if not block.skipped:
            # blank lines in front, so that a traceback tells the page's own line
            source = "\n" * block.line + block.code
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            running = eval(compile(source, page, "exec", flags), namespace)
            if inspect.isawaitable(running):
                await running
    return namespace
