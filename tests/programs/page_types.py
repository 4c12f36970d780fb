"""Check the types of the code blocks of README and docs; ``nox -s types`` runs it.

They are not strict, as the package and the example host are: who reads a page need not be
told of types.
"""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pages

TUTORIAL = pages.DOCS / "tutorial.md"


def module_of(page: Path) -> str:
    """Return the Python blocks of a page, each in its own lines, as one module."""
    lines: list[str] = []
    for block in pages.blocks(page, "python"):
        if not block.skipped:
            lines += [""] * (block.line - len(lines))
            lines += block.code.splitlines()
    text = "\n".join(lines)
    try:
        compile(text, page, "exec")
    except SyntaxError:
        # it awaits as a notebook does
        text = "async def page() -> None:" + textwrap.indent(text, "    ")
    return text + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for page in pages.PAGES:
            if page != TUTORIAL and pages.blocks(page, "python"):
                module = f"{page.stem.replace('-', '_').lower()}_md.py"
                (folder / module).write_text(module_of(page))
        for program, code in pages.programs(TUTORIAL):
            (folder / program).write_text(code)
        (folder / "pyrightconfig.json").write_text('{"reportPossiblyUnboundVariable": false}')
        mypy = "mypy --config-file= --ignore-missing-imports --check-untyped-defs"
        commands = [
            (*mypy.split(), "--allow-redefinition", *map(str, folder.glob("*.py"))),
            ("pyright", "--pythonpath", sys.executable, "-p", name),
        ]
        env = {**os.environ, "MYPYPATH": f"{folder}:{pages.DOCS}"}
        ran = [subprocess.run((sys.executable, "-m", *c), env=env) for c in commands]
        return max(process.returncode for process in ran)


if __name__ == "__main__":
    sys.exit(main())
