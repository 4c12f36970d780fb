"""What contributors and CI run: ``nox`` for every gate, ``nox -s demo`` for the demo.

One test under one session maker, in seconds::

    nox -R -s tests -- --maker postgres tests/test_tasks.py -k claim
"""

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "docs", "tests", "page", "soak"]

PYPROJECT = nox.project.load_toml("pyproject.toml")

# the versions of all that the groups install, but for one that asks for older ones
LOCK = "tests/constraints.txt"
UNLOCKED = {"zndraw"}
# of each subject something, in a minute
PART = (
    *("--maker", "plain"),
    *("tests/test_tasks.py", "tests/test_claims.py", "tests/test_testing.py"),
    *("tests/test_doctor.py", "tests/test_beneath.py", "tests/test_internal.py"),
    *("tests/test_results.py", "tests/test_validation.py"),
)
# what reads files beside the package
WHOLE = ("tests/test_house.py", "tests/test_docs.py", "tests/test_packaging.py")
# each process brings up a PostgreSQL and a Redis of its own
SPREAD = (
    *("--numprocesses=logical", "--maxprocesses=4"),
    *("--dist=loadfile", "--no-loadscope-reorder"),
)

# processes start by the hundred: none compiles what another one has compiled
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# the directories of the suite, as pytest has them
SUITE = os.pathsep.join(PYPROJECT["tool"]["pytest"]["ini_options"]["pythonpath"])

# nox would kill a process half a second after Ctrl-C: ours stop their own children first
PATIENT = {"interrupt_timeout": 20.0, "terminate_timeout": 10.0}


def install(session: nox.Session, *groups: str) -> None:
    """Install the package, and what the dependency groups name, as locked."""
    wanted = nox.project.dependency_groups(PYPROJECT, *groups)
    session.install(*wanted, "-e", ".", "-c", LOCK, "-b", LOCK)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, layout and types: of the package and the example host."""
    install(session, "lint", "test")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    host = ("docs/host.py", "docs/internal_jobs.py", "docs/monitoring.py")
    session.run("mypy", *host, env={"MYPYPATH": "docs"})
    session.run("pyright", "--pythonpath", f"{session.bin}/python")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of the code in README and docs."""
    install(session, "lint", "test")
    session.run("python", "tests/programs/page_types.py", env={"PYTHONPATH": SUITE})


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into build/site: each warning fails, links that lead nowhere too."""
    install(session, "docs")
    session.run(
        "python",
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-E",
        "-j",
        "auto",
        "-d",
        "build/doctrees",
        "docs",
        "build/site",
    )


@nox.session
def build(session: nox.Session) -> None:
    """Build wheel and sdist into dist."""
    install(session, "gates")
    session.run("python", "-m", "build", *session.posargs)


@nox.session
def pictures(session: nox.Session) -> None:
    """Draw the pictures of the docs anew: the state machine, and the example host's page."""
    install(session, "test", "page")
    session.run("python", "docs/states.py")
    drive_page(
        session, "-k", "people_see or runs_a_room", PICTURES=os.path.abspath("docs/pictures")
    )


@nox.session
def tests(session: nox.Session) -> None:
    """Run the suite over the session makers that a host may set, or ``-- --maker postgres``."""
    install(session, "test")
    session.run("pytest", *SPREAD, *session.posargs, **PATIENT)


@nox.session
@nox.parametrize("maker", ["plain", "postgres"], ids=["plain", "postgres"])
def fuzz(session: nox.Session, maker: str) -> None:
    """Make up requests from the OpenAPI document for minutes; posargs go to pytest."""
    install(session, "test")
    command = f"pytest --maker {maker} --timeout 0 -s tests/test_fuzz.py"
    session.run(*command.split(), *session.posargs, env={"FUZZ_EXAMPLES": "150"}, **PATIENT)


@nox.session
def replicas(session: nox.Session) -> None:
    """Compare three replicas with one, take away what they depend on, and kill them."""
    load(session, "60", "-k", "not grows")


@nox.session
def soak(session: nox.Session) -> None:
    """Load three replicas, and see that nothing grows."""
    load(session, "30", "-k", "grows")


def load(session: nox.Session, seconds: str, *options: str) -> None:
    """Run the tests of replicas under a longer load; ``-- --seconds 600`` says how long."""
    install(session, "test")
    patience = ("-s", "--timeout", "7200", "--seconds", seconds)
    tests = ("tests/test_replicas.py", *options, *patience, *session.posargs)
    session.run("pytest", *tests, **PATIENT)


@nox.session
def demo(session: nox.Session) -> None:
    """Run real structures through a host and a worker."""
    install(session, "host", "demo")
    session.run("python", "docs/demo.py", *session.posargs, **PATIENT)


@nox.session
def host(session: nox.Session) -> None:
    """Run the example host; the environment configures it, as docs/mount.md says."""
    install(session, "host")
    session.run("python", "docs/host.py", *session.posargs, **PATIENT)


@nox.session
def history(session: nox.Session) -> None:
    """Kill replicas and workers for minutes, and judge what all of them tell of it."""
    install(session, "test")
    env = {"PYTHONPATH": SUITE}
    session.run("python", "tests/programs/history_run.py", *session.posargs, env=env, **PATIENT)


@nox.session
def deaths(session: nox.Session) -> None:
    """Kill workers in ten ways, and write what becomes of their tasks into docs/deaths.md."""
    install(session, "test")
    env = {"PYTHONPATH": SUITE}
    session.run("python", "tests/programs/deaths.py", "--write", env=env, **PATIENT)


@nox.session
def sweep(session: nox.Session) -> None:
    """Measure heartbeats while the sweeper ends what 10,000 silent workers held."""
    install(session, "test")
    session.run(
        "pytest", "-s", "--maker", "locked", "tests/programs/sweep_load.py", *session.posargs
    )


@nox.session
def bench(session: nox.Session) -> None:
    """Compare costs with the floor and the published release: ``-- --quick``."""
    install(session, "test", "bench")
    session.run(
        "python", "tests/bench/bench.py", *session.posargs, env={"PYTHONPATH": SUITE}, **PATIENT
    )


@nox.session
def pinned(session: nox.Session) -> None:
    """Measure claims while a reader holds a snapshot open: ``-- --tasks 100000``."""
    install(session, "test")
    env = {"PYTHONPATH": os.pathsep.join([SUITE, "tests/bench"])}
    session.run("python", "tests/bench/bench_pinned.py", *session.posargs, env=env, **PATIENT)


@nox.session
def sqlite(session: nox.Session) -> None:
    """Measure what SQLite writes in a second, as it comes and as it should be set."""
    install(session, "test")
    session.run("python", "tests/programs/sqlite_speed.py", **PATIENT)


@nox.session
def mutants(session: nox.Session) -> None:
    """Put wrongs into the package and tell which the suite notices: ``-- --count 20``."""
    install(session, "test")
    session.run("python", "tests/programs/mutants.py", *session.posargs, **PATIENT)


@nox.session
def waiting(session: nox.Session) -> None:
    """Hold a thousand requests that wait against the heartbeats of others."""
    install(session, "test")
    env = {"PYTHONPATH": SUITE}
    session.run("python", "tests/programs/waiting_load.py", *session.posargs, env=env, **PATIENT)


@nox.session
def compat(session: nox.Session) -> None:
    """Run programs of 0.1.7 at our host, and ours at a host of 0.1.7."""
    install(session, "test", "gates")
    # an environment of its own: it is the same package
    old = Path(session.create_tmp()).resolve() / "old"
    uv = ("python", "-m", "uv")
    session.run(*uv, "venv", "-q", "--clear", old)
    python = str(old / ("Scripts" if os.name == "nt" else "bin") / "python")
    packages = ("zndraw-joblib==0.1.7", "aiosqlite", "uvicorn", "websockets")
    client = "python-socketio[client]"
    into = ("pip", "install", "-q", "--python", python, "-c", LOCK)
    session.run(*uv, *into, *packages, client)
    env = {"OLD_PYTHON": python}
    session.run("pytest", "tests/programs/compat.py", *session.posargs, env=env, **PATIENT)


@nox.session
def typescript(session: nox.Session) -> None:
    """Generate a TypeScript client, compile it, and run a life of a task with it in Node."""
    install(session, "test")
    session.run("pytest", "tests/programs/typescript.py", *session.posargs, **PATIENT)


@nox.session
def newest(session: nox.Session) -> None:
    """Run the suite on the newest of everything, whatever is locked."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "test"), "-e", ".")
    session.run("pytest", *SPREAD, *session.posargs, **PATIENT)


@nox.session
def oldest(session: nox.Session) -> None:
    """Run a part of the suite on the oldest of every direct dependency."""
    package = ".[redis,worker,testing]"
    session.install("--resolution", "lowest-direct", "-e", package)
    # these would bring newer ones along, and stand only in tests that are not run here
    newer = ("schemathesis", "zndraw-socketio")
    wanted = nox.project.dependency_groups(PYPROJECT, "test")
    session.install(*(one for one in wanted if not one.startswith(newer)), "-e", package)
    # threads of older aiosqlite outlive the event loop of whoever was cancelled
    late = "ignore::pytest.PytestUnhandledThreadExceptionWarning"
    session.run("pytest", "-W", late, *(session.posargs or PART), **PATIENT)


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def pythons(session: nox.Session) -> None:
    """Run a part of the suite on each Python that is there: ``nox -s pythons-3.13``."""
    install(session, "test")
    # from 3.13 on SQLite tells of connections that are left to the garbage collector, as by
    # a host that could not start
    left = "ignore:unclosed database:ResourceWarning"
    session.run("pytest", "-W", left, *(session.posargs or PART), **PATIENT)


@nox.session
def sdist(session: nox.Session) -> None:
    """Build the sdist, and run a part of its suite where nothing else of ours is."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "gates"), "-c", LOCK, "-b", LOCK)
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder)
    session.run("python", "-m", "build", "--sdist", f"--outdir={folder}")
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder, filter="data")
    session.chdir(folder / archive.name.removesuffix(".tar.gz"))
    # as those who package it: the package that is tested is built from what was unpacked
    unpacked = nox.project.load_toml("pyproject.toml")
    session.install(*nox.project.dependency_groups(unpacked, "test"), ".", "-c", LOCK, "-b", LOCK)
    session.run("pytest", *(session.posargs or (*PART, *WHOLE)), **PATIENT)


@nox.session
def lock(session: nox.Session) -> None:
    """Lock the newest version of all that is installed here."""
    install(session, "gates")
    groups = [g for g in PYPROJECT["dependency-groups"] if g not in UNLOCKED]
    options = "--universal --python-version 3.11 --upgrade --all-extras --no-annotate"
    session.run(
        *f"python -m uv pip compile -q {options} pyproject.toml -o {LOCK}".split(),
        *("--custom-compile-command", "nox -s lock"),
        *(f"--group={group}" for group in groups),
    )


@nox.session
def zndraw(session: nox.Session) -> None:
    """Run a released ZnDraw, unchanged, and drive it with its own client."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "zndraw"), "-e", ".")
    session.run("python", "tests/programs/zndraw_host.py", env={"PYTHONPATH": SUITE}, **PATIENT)


@nox.session
def page(session: nox.Session) -> None:
    """Drive the example host's page in a real Chromium, installed with apt if need be."""
    install(session, "test", "page")
    drive_page(session)


def drive_page(session: nox.Session, *options: str, **env: str) -> None:
    """Run the page's tests; they are skipped where there is no Chromium: here they must not be."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not any(map(shutil.which, names)):
        session.run("apt-get", "update", external=True)
        packages = ("-y", "--no-install-recommends", "chromium")
        session.run("apt-get", "install", *packages, external=True)
    env["CHROMIUM"] = next(filter(None, map(shutil.which, names)), "")
    command = ("pytest", "tests/test_page.py", *options, *session.posargs)
    session.run(*command, env=env, **PATIENT)
