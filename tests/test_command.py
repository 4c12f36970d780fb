"""The command, against a host and with workers in processes of their own."""

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pages
import psutil
import pytest
from anyio import run_process
from anyio.to_thread import run_sync
from processes import HANG, Host, Process, hosting, running, start

from zndraw_joblib import __main__ as command

# a host in a process of its own has a database of its own
pytestmark = pytest.mark.makers("plain")

JOBS = """
import time
from typing import ClassVar
from zndraw_joblib import Category, Extension

class Turn(Extension):
    category: ClassVar[Category] = Category.ANALYSIS
    angle: float = 90.0
    seconds: float = 0.0

    def run(self, vis, *, task, loaded="nothing", **kwargs):
        if self.angle > 360:
            raise ValueError("more than once round")
        time.sleep(self.seconds)
        return {"turned": self.angle, "loaded": loaded}

def load():
    return {"loaded": "a model"}
"""
JOB = "lab:analysis:Turn"


@pytest.fixture(scope="module")
async def hosted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with hosting(tmp_path_factory.mktemp("host")) as host:
        yield host


@pytest.fixture
def environment(hosted: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set where the host is and who asks, in a directory with jobs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.py").write_text(JOBS)
    monkeypatch.setenv(command.URL, hosted.url)
    monkeypatch.setenv(command.TOKEN, hosted.token)


@pytest.fixture
async def worker(environment: None, tmp_path: Path) -> AsyncIterator[Process]:
    work = ("-m", "zndraw_joblib", "work", "jobs:Turn", "--room", "lab")
    async with running(*work, log=tmp_path / "worker.log") as process:
        await process.writes(f"offers {JOB}")
        yield process
        await leave(process)


async def leave(worker: Process) -> None:
    """Let a worker go, so that the next test sees no other than its own."""
    worker.popen.terminate()
    await worker.ends()


Ran = tuple[int, str, str]
Run = Callable[..., Any]


@pytest.fixture
def run(environment: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in a thread; return its exit code, what it wrote, and what on stderr."""

    async def run(*argv: str) -> Ran:
        code = await run_sync(command.main, [str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


async def test_from_a_submission_to_its_result(worker: Process, run: Run, tmp_path: Path):
    submit = ("submit", JOB, "--room", "lab")
    code, out, _ = await run(*submit, "angle=45", "--wait", "--timeout", str(HANG))
    assert (code, json.loads(out)) == (0, {"turned": 45.0, "loaded": "nothing"})

    (tmp_path / "parameters.json").write_text('{"angle": 400}')
    code, task_id, _ = await run(*submit, "--file", "parameters.json")
    assert code == 0
    code, out, _ = await run("wait", task_id.strip(), "--timeout", str(HANG))
    assert code == 1
    headings, shown = out.splitlines()
    assert headings.split() == ["ID", "STATUS", "PROGRESS", "JOB_NAME", "CREATED_AT", "ERROR"]
    assert shown.split()[:2] == [task_id.strip(), "failed"]
    assert "ValueError: more than once round" in out
    code, out, _ = await run("log", task_id.strip(), "--follow")
    assert code == 0
    assert out.startswith("Traceback (most recent call last):\n")
    assert out.endswith("\nValueError: more than once round\n")
    code, out, _ = await run("log", task_id.strip(), "--json")
    assert json.loads(out.splitlines()[0])["number"] == 1
    code, _, err = await run("log", JOB)
    assert (code, err) == (4, f"zndraw-joblib: {JOB!r} is not the id of a task\n")
    code, out, _ = await run("retry", "--json", task_id.strip())
    assert (code, json.loads(out)["id"]) == (0, task_id.strip())
    code, _, err = await run(*submit, "angle=500", "--wait")
    assert code == 1
    assert "failed: ValueError: more than once round" in err

    code, out, _ = await run("jobs", "--room", "lab", "--json")
    assert [json.loads(line)["workers_alive"] for line in out.splitlines()] == [1, 0]
    code, out, _ = await run("tasks", "--room", "lab", "--status", "completed", "--json")
    assert [json.loads(line)["result"]["turned"] for line in out.splitlines()] == [45]


async def test_a_drained_worker_gets_nothing_more(worker: Process, run: Run):
    _, out, _ = await run("workers", "--room", "lab", "--json")
    (shown,) = map(json.loads, out.splitlines())
    code, out, _ = await run("drain", shown["id"])
    assert code == 0
    assert "draining" in out
    _, task_id, _ = await run("submit", JOB, "--room", "lab")
    code, out, err = await run("wait", task_id.strip(), "--timeout", "1")
    assert (code, out) == (5, "")
    assert err == f"zndraw-joblib: task {task_id.strip()} is still pending\n"
    code, out, _ = await run("cancel", task_id.strip(), "--json")
    assert (code, json.loads(out)["status"]) == (0, "cancelled")
    # another time it is as it was


@pytest.mark.parametrize(
    ("signums", "code", "status"),
    [((signal.SIGINT,), 0, "completed"), ((signal.SIGTERM, signal.SIGTERM), 1, "pending")],
)
async def test_a_worker_says_what_a_signal_does(
    worker: Process, run: Run, signums: tuple[int, ...], code: int, status: str
):
    seconds = 1 if status == "completed" else 60
    _, task_id, _ = await run("submit", JOB, f"seconds={seconds}", "--room", "lab")
    await worker.writes(f"{task_id.strip()} of {JOB} started")
    again = "Ctrl-C again" if signums[0] == signal.SIGINT else "a second signal"
    for signum in signums:
        worker.popen.send_signal(signum)
        await worker.writes(f"finishing 1 task, {again} to stop it now")
    assert await worker.ends() == code
    _, out, _ = await run("tasks", "--room", "lab", "--json")
    task = next(json.loads(line) for line in out.splitlines() if task_id.strip() in line)
    assert (task["status"], task["interruptions"]) == (status, code)


async def test_isolated_tasks_have_what_is_set_up(environment: None, run: Run, tmp_path: Path):
    work = ("-m", "zndraw_joblib", "work", "jobs:Turn", "--room", "apart", "--isolate")
    options = ("--setup", "jobs:load", "--policy", "max_attempts=2")
    async with running(*work, *options, log=tmp_path / "worker.log") as worker:
        await worker.writes("offers")
        submit = ("submit", "apart:analysis:Turn", "--room", "apart", "--wait")
        code, out, _ = await run(*submit, "--timeout", str(HANG))
        assert (code, json.loads(out)["loaded"]) == (0, "a model")
        code, out, _ = await run(*submit, "angle=500", "--json")
        assert (code, json.loads(out)["max_attempts"]) == (1, 2)
        await leave(worker)


async def test_the_script_for_a_cluster_works_as_it_stands(
    environment: None, hosted: Host, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script, login = (block.code for block in pages.blocks(pages.DOCS / "clusters.md", "sh"))
    login = login.replace("https://host.example.org", hosted.url).replace("...", hosted.token)
    files = {
        "worker.sh": script,
        ".config/zndraw-joblib.env": login,
        "structures.py": JOBS.replace("Turn", "Relax"),
        # what Slurm adds is where it runs
        "bin/srun": '#!/bin/sh\nshift\nexec "$@"\n',
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(0o700)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    log = tmp_path / "worker.log"
    worker = start("worker.sh", log=log, python="bash")
    with worker.popen:
        await worker.writes("offers lab:analysis:Relax")
        submit = ("submit", "lab:analysis:Relax", "--room", "lab", "--wait")
        code, out, _ = await run(*submit, "--timeout", str(HANG))
        assert (code, json.loads(out)["turned"]) == (0, 90.0)
        # to what `srun` began, and not to the script
        psutil.Process(worker.popen.pid).children()[0].terminate()
        assert await worker.ends() == 0, worker.written()


MISTAKES = {
    "jobs --room lab --token wrong": (3, "the host refuses this login"),
    "jobs --room lab --url http://127.0.0.1:9": (6, "nothing listens there"),
    "jobs --room lab --url nowhere": (4, "'nowhere' is not the address of a host"),
    "submit lab:analysis:Tern --room lab": (4, "job not found: room 'lab' sees no job"),
    "submit lab:analysis:Turn angle --room lab": (4, "'angle' is not of the form name=value"),
    "submit lab:analysis:Turn --file nowhere --room lab": (4, "No such file"),
    "cancel 7": (4, "'7' is not the id of a task"),
    "drain 7": (4, ""),
    "work jobs:Tern": (4, "jobs has no 'Tern'; did you mean 'Turn'?"),
    "work jobs:load": (4, "jobs:load is no subclass of Extension"),
    "work nowhere:Turn": (4, "'nowhere:Turn' is not module:name: ModuleNotFoundError"),
    "work jobs:Turn --setup jobs:load": (4, "setup is called in child processes"),
    "work jobs:Turn --policy max_attempts=0": (4, "max_attempts"),
}


@pytest.mark.parametrize("line", MISTAKES)
async def test_mistakes_have_a_sentence_and_an_exit_code(
    line: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    # what `work` adds, and what it imports
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "jobs", raising=False)
    monkeypatch.setattr("zndraw_joblib.client_transport.FIRST_DELAY_SECONDS", 0.01)
    code, told = MISTAKES[line]
    ended, out, err = await run(*line.split())
    assert (ended, out) == (code, "")
    assert told in err


@pytest.mark.parametrize(
    ("variable", "told"), [(command.URL, "which host"), (command.TOKEN, "who")]
)
async def test_without_host_or_user(
    variable: str, told: str, environment: None, monkeypatch: Any, capsys: Any
):
    monkeypatch.delenv(variable)
    with pytest.raises(SystemExit, match="2"):
        command.main(["jobs", "--room", "lab"])
    assert told in capsys.readouterr().err


async def test_who_reads_no_further_ends_it_in_peace(environment: None):
    jobs = f"{sys.executable} -m zndraw_joblib jobs --room lab"
    ran = await run_process(["sh", "-c", f"{{ {jobs}; echo $? >&2; }} | true"])
    assert ran.stderr == b"1\n"


def test_it_is_installed():
    (installed,) = entry_points(group="console_scripts", name="zndraw-joblib")
    assert installed.load() is command.main
