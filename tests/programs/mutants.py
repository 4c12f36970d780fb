"""Puts small wrongs into the package, one at a time, and tells which the suite notices.

::

    nox -s mutants -- --count 100 --seed 1
    nox -s mutants -- --modules claims,attempts --count 20

A mutant is one change to one expression: a comparison turned around, a condition or an
argument of ``where`` left out, ``and`` in the place of ``or``, two arguments swapped, a value
that a statement no longer sets, a number off by one, a call or a ``raise`` that does not
happen, an exception that is not caught. It is run in a copy of the tree, against
the tests that are about its module, first over SQLite and then over PostgreSQL. What
nobody noticed is printed as a diff: it is either a test that is missing or a line that
could go.
"""

import argparse
import ast
import copy
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = "zndraw_joblib"
#: seconds after which the tests of one mutant count as hung, which is noticed too
PATIENCE = 900
#: for each module the tests that are about it, those that notice soonest first
TESTS = {
    "attempts": "mixed_sweeps internal reports sweeper batches races",
    "claims": "claims turns batches workers watch races",
    "database": "tasks faults sweeper plans pages",
    "delivery": "delivery internal tasks waiting telemetry faults",
    "dependencies": "access jobs providers pages limits waiting bad_input deprecated",
    "doctor": "doctor",
    "events": "claims internal delivery reports relay watch providers telemetry",
    "encoding": "bad_input extension client",
    "extension": "extension client client_alone",
    "heartbeats": "workers claims races",
    "jobs": "jobs access limits internal sweeper stats mixed_sweeps races",
    "lifecycle": "reports bad_input jobs providers purge extension",
    "long_polls": "waiting watch claims delivery batches",
    "models": "tasks reports workers claims mixed_sweeps",
    "problem_route": "bad_input faults openapi attacks",
    "providers": "providers relay results access limits",
    "registry": "internal providers",
    "reports": "reports batches tasks access internal races",
    "results": "results relay",
    "routes": "jobs workers access waiting limits providers relay watch",
    "routes_tasks": "tasks batches waiting access limits pages claims reports",
    "submissions": "limits turns tasks batches reports positions access races",
    "sweeper": "mixed_sweeps sweeper purge internal access providers watch",
    "tasks": "tasks pages turns reports positions purge batches internal mixed_sweeps access waiting",
    "telemetry": "telemetry client",
    "testing": "testing examples",
    "validation": "validation bad_input jobs",
    "waiting": "waiting watch delivery",
    "workers": "workers limits access sweeper jobs providers claims races",
    "client_claims": "client client_alone",
    "client_heartbeat": "client client_alone leaving isolation",
    "client_hands": "client client_alone isolation",
    "client_isolation": "isolation",
    "execution": "client isolation",
    "client_api": "client client_alone",
    "client_transport": "client client_alone",
    "client_user": "client client_alone",
    "client_worker": "client client_alone",
}
#: what notices nearly all, and takes longest: asked when nothing else has noticed
LAST = ("lifecycle",)
SWAPS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
#: calls whose arguments are conditions, each of which can be left out
CONDITIONS = {"where", "and_", "or_"}
#: calls that can be left out of a statement
SUFFIXES = {"order_by", "with_for_update", "where", "limit", "correlate"}


class Mutant(NamedTuple):
    """One change: where it is, what it does, and the module's text with it."""

    module: str
    line: int
    what: str
    text: str


def called(node: ast.AST) -> str:
    """Return the last part of the name of what a call calls."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Yield what can be put in a node's place; None deletes a statement."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            changed = copy.deepcopy(node)
            changed.ops = [SWAPS[type(op)]()]
            yield f"{type(op).__name__} turned around", changed
        case ast.BoolOp(op=op, values=values):
            other = copy.deepcopy(node)
            other.op = ast.And() if isinstance(op, ast.Or) else ast.Or()
            yield "and for or, or for and", other
            for n in range(len(values)):
                changed = copy.deepcopy(node)
                del changed.values[n]
                left = changed if len(values) > 2 else changed.values[0]
                yield f"condition {n} left out", left
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            yield "negation left out", operand
        case ast.IfExp(body=body, orelse=orelse):
            yield "always the first of two", body
            yield "always the second of two", orelse
        case ast.Constant(value=bool(value)):
            yield "truth turned around", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "number off by one", ast.Constant(value + 1)
        case ast.Call(func=ast.Attribute(value=inner)) if called(node) in SUFFIXES:
            yield f"{called(node)} left out", inner
        case ast.Try(handlers=[_, *_]):
            for n, handler in enumerate(node.handlers):
                changed = copy.deepcopy(node)
                changed.handlers[n].type = ast.Tuple([], ast.Load())
                yield f"except {ast.unparse(handler.type or handler)} catches nothing", changed
        case ast.Call(func=ast.Name(), args=[_, _, *_], keywords=[]):
            changed = copy.deepcopy(node)
            changed.args[-2:] = reversed(node.args[-2:])
            yield "the last two arguments swapped", changed
        case ast.Raise() | ast.Expr(value=ast.Await() | ast.Call()):
            yield "does not happen", None
        case ast.Dict(keys=keys) if keys and all(isinstance(key, ast.Attribute) for key in keys):
            for n, key in enumerate(keys):
                changed = copy.deepcopy(node)
                del changed.keys[n], changed.values[n]
                yield f"{ast.unparse(key or node)} not set", changed
    if called(node) in CONDITIONS and len(getattr(node, "args", [])) > 1:
        assert isinstance(node, ast.Call)
        for n in range(len(node.args)):
            changed = copy.deepcopy(node)
            del changed.args[n]
            yield f"argument {n} of {called(node)} left out", changed


def places(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes of what runs: no annotations, docstrings or defaults of classes."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in function.body:
                yield from ast.walk(statement)


class Put(ast.NodeTransformer):
    """Puts something else in the place of one node."""

    def __init__(self, old: ast.AST, new: ast.AST | None) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            return ast.Pass() if self.new is None else self.new
        return self.generic_visit(node)


def mutants(module: str) -> list[Mutant]:
    """Return every mutant of a module."""
    source = (ROOT / PACKAGE / f"{module}.py").read_text()
    found: dict[str, Mutant] = {}
    kinds = [[what for what, _ in changes(n)] for n in places(ast.parse(source))]
    for n, whats in enumerate(kinds):
        for m, what in enumerate(whats):
            tree = ast.parse(source)
            node = list(places(tree))[n]
            new = list(changes(node))[m][1]
            text = ast.unparse(ast.fix_missing_locations(Put(node, new).visit(tree)))
            line = getattr(node, "lineno", 0)
            found.setdefault(text, Mutant(module, line, what, text))
    return list(found.values())


def noticed(mutant: Mutant, makers: list[str], last: tuple[str, ...]) -> bool:
    """Run the tests of the mutant's module in a copy of the tree with the mutant in it."""
    directory = Path(tempfile.mkdtemp(prefix="mutant"))
    try:
        for name in (PACKAGE, "tests", "docs"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, directory / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md", "noxfile.py", "CHANGELOG.md"):
            shutil.copy(ROOT / name, directory)
        (directory / PACKAGE / f"{mutant.module}.py").write_text(mutant.text)
        files = [
            name
            for stem in (*TESTS[mutant.module].split(), *last)
            if (directory / (name := f"tests/test_{stem}.py")).exists()
        ]
        options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-W", "error"]
        # before the tree that is installed
        env = os.environ | {"PYTHONPATH": str(directory)}
        for maker in makers:
            command = [sys.executable, "-m", "pytest", *options, "--maker", maker]
            try:
                run = subprocess.run(
                    [*command, *files],
                    cwd=directory,
                    env=env,
                    timeout=PATIENCE,
                    capture_output=True,
                )
            except subprocess.TimeoutExpired:
                return True
            if run.returncode:
                return True
        return False
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def diff(mutant: Mutant) -> str:
    """Return what the mutant changes."""
    source = (ROOT / PACKAGE / f"{mutant.module}.py").read_text()
    before = ast.unparse(ast.parse(source)).splitlines()
    lines = difflib.unified_diff(before, mutant.text.splitlines(), lineterm="", n=1)
    return "\n".join("    " + line for line in [*lines][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", help="default: all that the table names")
    parser.add_argument("--makers", default="plain,postgres")
    parser.add_argument("--at-once", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="without the long walk")
    options = parser.parse_args()
    names = options.modules.split(",") if options.modules else list(TESTS)
    draw = random.Random(options.seed)
    pool = {
        name: draw.sample(every, len(every))
        for name in names
        if (ROOT / PACKAGE / f"{name}.py").exists()
        for every in [mutants(name)]
    }
    chosen: list[Mutant] = []
    # as many of each module, until there are enough
    while len(chosen) < options.count and any(pool.values()):
        for left in pool.values():
            if left and len(chosen) < options.count:
                chosen.append(left.pop())
    makers = options.makers.split(",")
    last = () if options.quick else LAST
    count = 0
    with ThreadPoolExecutor(options.at_once) as runners:
        judged = runners.map(lambda mutant: noticed(mutant, makers, last), chosen)
        for n, (mutant, seen) in enumerate(zip(chosen, judged, strict=True), 1):
            count += seen
            verdict = "noticed" if seen else "NOT NOTICED"
            where = f"{mutant.module}:{mutant.line}: {mutant.what}"
            print(f"{n:4} {verdict:12}{where}", flush=True)
            if not seen:
                print(diff(mutant), flush=True)
    print(f"{count} of {len(chosen)} noticed (seed {options.seed})")


if __name__ == "__main__":
    main()
