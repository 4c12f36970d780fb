"""How the code is laid out, held by reading the package's own syntax trees."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import zndraw_joblib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "zndraw_joblib"
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

#: imports go down; on a floor they go leftward
FLOORS = [
    ["encoding", "lifecycle", "settings", "exceptions"],
    ["schemas_workers", "schemas", "validation"],
    ["telemetry", "events", "waiting", "results"],
    ["database", "models"],
    [
        "workers", "tasks", "jobs", "submissions", "attempts", "reports", "operations",
        "claims", "heartbeats",
    ],
    ["delivery", "providers", "registry", "sweeper"],
    ["dependencies", "problem_route", "long_polls"],
    ["routes_tasks", "routes"],
    ["doctor"],
]  # fmt: skip
#: the worker's side, beside the house: it stands on the floors 0 to 2
CLIENT = [
    "extension",
    "provider",
    "execution",
    "client_api",
    "client_transport",
    "client_handles",
    "client_user",
    "client_worker",
    "client_claims",
    "client_heartbeat",
    "client_isolation",
    "client_hands",
    "client",
    "__main__",
]
MAX_FUNCTION_LINES = 50
MAX_IMPORT_LINES = 40

Rule = Callable[[ast.AST], bool]


def name_of(node: ast.AST) -> str:
    """Return the last part of a dotted name, or nothing."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
            return name.rpartition(".")[2]
    return ""


def names_in(node: ast.AST | None) -> set[str]:
    return {name_of(n) for n in ast.walk(node)} if node else set()


def is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def provides_sessions(node: ast.AST) -> bool:
    """Sessions, makers of sessions and their dependencies come from the host alone."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            yields = any(isinstance(n, ast.Yield) for n in ast.walk(node))
            hands_out = yields and "AsyncSession" in names_in(node.returns)
            return hands_out or bool(re.search(r"session(_?maker|_factory)?$", name))
        case ast.Call(func=func) if name_of(func) == "Depends":
            return any("session" in a.lower() for a in names_in(node)) and not (
                names_in(node) & {"get_session_maker", "current_user_scoped_session"}
            )
        case ast.Call(func=func):
            return name_of(func) in {
                "AsyncSession", "Session", "async_sessionmaker", "sessionmaker",
                "async_scoped_session", "create_async_engine", "create_engine",
                "create_engine_for_url",
            }  # fmt: skip
        case ast.ImportFrom(module=module, names=aliases):
            ours = {"SessionDep", "get_session", "get_session_maker"}
            return bool(ours & {a.name for a in aliases}) and (
                not str(module).startswith("zndraw_auth")
            )
    return False


def locks(node: ast.AST) -> bool:
    """Two requests can't both win because of a statement, not because of a lock."""
    # a CapacityLimiter says how many are at work, and guards nothing
    return name_of(node) in {"Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition"}


def sleeps(node: ast.AST) -> bool:
    """A guarded statement needs no second try."""
    return isinstance(node, ast.Call) and name_of(node.func) == "sleep"


def asks_for_the_database(node: ast.AST) -> bool:
    """Which database it is, SQLAlchemy's compiler knows; nobody else asks."""

    def is_kind(constant: ast.AST | None) -> bool:
        return isinstance(constant, ast.Constant) and bool(
            re.match(r"sqlite|postgres|aiosqlite|asyncpg|mysql", str(constant.value))
        )

    match node:
        case ast.Name(id="dialect", ctx=ast.Load()):
            return True
        case ast.Attribute(attr="dialect" | "drivername" | "get_bind"):
            return True
        case ast.Attribute(attr="url", value=value):
            return "engine" in name_of(value)
        case ast.Compare():
            return any(map(is_kind, ast.walk(node)))
        case ast.Call(func=ast.Attribute(attr="startswith" | "endswith")):
            return any(map(is_kind, node.args))
        case ast.MatchValue(value=value):
            return is_kind(value)
        case ast.Dict(keys=keys):
            return any(map(is_kind, keys))
    return False


def makes_sessions_warn(node: ast.AST) -> bool:
    """SQLModel's sessions warn of what goes through their own `execute`."""
    match node:
        case ast.Attribute(
            attr="execute" | "scalars" | "stream" | "stream_scalars" | "query", value=value
        ):
            return "session" in name_of(value).lower()
    return False


RULES: list[Rule] = [provides_sessions, locks, sleeps, asks_for_the_database, makes_sessions_warn]

#: where a rule does not hold: the worker's side has threads, the sweeper has an interval
EXEMPT = {
    # `testing` is a host, and what a task says comes from threads
    "locks": {*CLIENT, "testing._one_at_a_time"},
    "provides_sessions": {"testing.__init__", "testing._one_at_a_time"},
    "asks_for_the_database": {"doctor._database"},
    "sleeps": {*CLIENT, "sweeper._forever"},
    # SQLAlchemy's own method, whatever the session's class
    "makes_sessions_warn": {"database.execute"},
}

#: what each rule must catch; a gate that lets everything through would never be noticed
CAUGHT = {
    "provides_sessions": [
        "async def get_locked_async_session(maker): ...",
        "async def rows() -> AsyncIterator[AsyncSession]:\n    yield 1",
        "maker = async_sessionmaker(engine)",
        "Dep = Annotated[AsyncSession, Depends(get_locked_session)]",
        "from zndraw_joblib.dependencies import SessionDep",
    ],
    "locks": ["lock = asyncio.Lock()", "from threading import Semaphore"],
    "makes_sessions_warn": [
        "rows = await session.execute(statement)",
        "ids = (await session.scalars(statement)).all()",
    ],
    "sleeps": ["await asyncio.sleep(1)", "time.sleep(1)", "await sleep(0.1)"],
    "asks_for_the_database": [
        "if session.bind.dialect.name == 'x': ...",
        "if url.startswith('sqlite'): ...",
        "if kind == 'postgresql': ...",
        "x = engine.url",
        "match kind:\n    case 'sqlite': ...",
        "statement = {'sqlite': a, 'postgresql': b}[kind]",
    ],
}


def offenders(rule: Rule, tree: ast.AST, scope: str) -> Iterator[str]:
    """Yield where in ``tree`` the rule is broken, unless the scope is exempt."""
    if scope in EXEMPT.get(rule.__name__, ()):
        return
    for node in ast.iter_child_nodes(tree):
        if rule(node):
            yield f"{scope}:{getattr(node, 'lineno', 0)}: {ast.unparse(node)[:80]}"
        inner = f"{scope}.{node.name}" if is_function(node) else scope
        yield from offenders(rule, node, inner)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_doctrine(rule: Rule):
    for code in CAUGHT[rule.__name__]:
        assert list(offenders(rule, ast.parse(code), "module")), f"missed: {code}"
    found = [o for name, tree in TREES.items() for o in offenders(rule, tree, name)]
    assert not found, "\n".join([str(rule.__doc__), *found])


def imported_modules(tree: ast.AST) -> set[str]:
    """Return the package's modules that a module imports, wherever in its code."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="zndraw_joblib", names=aliases):
                found |= {a.name if a.name in MODULES else "__init__" for a in aliases}
            case ast.ImportFrom(module=str(module)) if module.startswith("zndraw_joblib."):
                found.add(module.split(".")[1])
            case ast.ImportFrom(level=level) if level:
                found.add("(relative)")
            case ast.Import(names=aliases):
                for alias in aliases:
                    package, _, module = alias.name.partition(".")
                    if package == "zndraw_joblib":
                        found.add(module or "__init__")
    return found


def test_imports_go_down():
    order = [name for floor in FLOORS for name in floor]
    ground = {name for floor in FLOORS[:3] for name in floor}
    allowed = {name: set(order[:at]) for at, name in enumerate(order)}
    allowed |= {name: ground | set(CLIENT[:at]) for at, name in enumerate(CLIENT)}
    # beside it too: it looks at anything, and nothing at it
    allowed["testing"] = set(MODULES)
    # for one release: it looks at nothing before it is called
    allowed = {name: under | {"deprecated"} for name, under in allowed.items()}
    allowed["deprecated"] = set(MODULES)
    homeless = set(MODULES) - set(allowed) - {"__init__"}
    assert not homeless, "give it a floor"
    wrong = {
        name: upward
        for name, tree in TREES.items()
        if name != "__init__" and (upward := imported_modules(tree) - allowed[name])
    }
    assert not wrong


def test_the_package_is_flat():
    assert [p.name for p in PACKAGE.iterdir() if p.is_dir()] in ([], ["__pycache__"])
    assert (PACKAGE / "py.typed").exists()


def lines_of(*nodes: ast.stmt) -> int:
    """Return how many lines there are from the first node to the end of the last."""
    return nodes[-1].end_lineno - nodes[0].lineno + 1


def test_functions_are_short():
    long = {
        f"{name}.{node.name}": lines
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if is_function(node) and (lines := lines_of(node)) > MAX_FUNCTION_LINES
    }
    assert not long


def test_modules_begin_soon():
    for name, tree in TREES.items():
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not imports or lines_of(*imports) <= MAX_IMPORT_LINES, name


@pytest.mark.parametrize("name", MODULES)
def test_all_is_sorted_and_there(name: str):
    module = importlib.import_module(f"zndraw_joblib.{name}".removesuffix(".__init__"))
    handed_on = getattr(module, "__all__", [])
    assert list(handed_on) == sorted(set(handed_on))
    missing = [n for n in handed_on if not hasattr(module, n)]
    assert not missing


def test_a_worker_loads_no_web_server_and_no_orm():
    probe = (
        "import sys, zndraw_joblib, zndraw_joblib.client, zndraw_joblib.provider\n"
        "others = {'sqlalchemy', 'fastapi', 'sqlmodel', 'taskiq', 'numpy', 'pandas', 'sqlite3'}\n"
        "print(others & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "set()\n"), ran.stderr


def test_type_checkers_see_what_is_handed_on():
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    seen = {
        (node.module, name.asname)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    handed_on = zndraw_joblib._MODULE_OF
    assert seen == {(f"zndraw_joblib.{m}", n) for n, m in handed_on.items()}
