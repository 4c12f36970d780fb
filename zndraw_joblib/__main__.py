"""The command: ``zndraw-joblib``, or ``python -m zndraw_joblib``."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from getpass import getpass
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from zndraw_joblib.client import Extension, JobManager, TaskFailed
from zndraw_joblib.client_handles import shown_lines
from zndraw_joblib.client_transport import Transport
from zndraw_joblib.client_user import Rooms, Submitting
from zndraw_joblib.exceptions import describe
from zndraw_joblib.execution import run_extension
from zndraw_joblib.extension import nearest
from zndraw_joblib.lifecycle import GLOBAL_ROOM, TaskStatus
from zndraw_joblib.schemas import JobPolicy, TaskResponse

URL, TOKEN, PASSWORD = "ZNDRAW_JOBLIB_URL", "ZNDRAW_JOBLIB_TOKEN", "ZNDRAW_JOBLIB_PASSWORD"
DONE, NOT_ALL = 0, 1
#: What it ends with when something was raised; the first that fits counts.
EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (TaskFailed, NOT_ALL),
    (PermissionError, 3),
    (TimeoutError, 5),
    (ConnectionError, 6),
    (KeyboardInterrupt, 130),
    # there is no such thing, or the host or this machine can't do that
    *((kind, 4) for kind in (LookupError, ValueError, TypeError, RuntimeError, OSError)),
)
TASK_COLUMNS = ("id", "status", "progress", "job_name", "created_at", "error")
CELL_CHARACTERS = 100
#: Options of a `JobManager` that are named alike here.
WORKER_OPTIONS = ("concurrency", "isolate", "grace_seconds", "until", "idle_seconds")

log = logging.getLogger("zndraw_joblib.command")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; by default those of the process.
    """
    parser = make_parser()
    options, others = parser.parse_known_args(argv)
    if options.run is _submit:
        # argparse takes no more positional arguments after an option
        options.parameters += [word for word in others if not word.startswith("-")]
        others = [word for word in others if word.startswith("-")]
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if not options.url:
        parser.error(f"which host? give --url, or set {URL}")
    if not (options.user or options.token):
        parser.error(f"who are you? set {TOKEN}, or give --token or --user")
    try:
        how = _worker_options(options) if options.run is _work else {}
        with JobManager.connect(options.url, **_login(options), **how) as manager:
            code = options.run(manager, options)
        sys.stdout.flush()
        return code or DONE
    except BrokenPipeError:
        # as `| head` leaves it: nothing can be written any more, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_ALL
    except tuple(kind for kind, _ in EXIT_CODES) as exc:
        # the text of a KeyError is quoted
        reason = exc.args[0] if isinstance(exc, KeyError) and exc.args else exc
        print(f"zndraw-joblib: {str(reason) or type(exc).__name__}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES if isinstance(exc, kind))


def make_parser() -> argparse.ArgumentParser:
    """Return what reads the arguments."""
    parser = argparse.ArgumentParser("zndraw-joblib", description="Work for a host, and ask it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_work(commands)
    for run, text in ((_jobs, "List the jobs"), (_workers, "List the workers")):
        _add(commands, run, f"{text} that a room sees.").add_argument("--room", required=True)
    tasks = _add(commands, _tasks, "List the latest tasks of a room.")
    tasks.add_argument("--room", required=True)
    tasks.add_argument("--status", choices=[status.value for status in TaskStatus])
    tasks.add_argument("--job", help="its full name, room:category:name")
    tasks.add_argument("--limit", type=int, default=50, help="how many; %(default)s")
    _add_submit(commands)
    wait = _add(commands, _wait, "Wait until tasks have ended, and list them.", "id")
    _add_seconds(wait, "--timeout", "for all of them together")
    log = _add(commands, _log, "Print what a task has logged.")
    log.add_argument("id")
    log.add_argument("--follow", action="store_true", help="and what it logs, until it has ended")
    _add(commands, _cancel, "Cancel tasks.", "id")
    _add(commands, _retry, "Set tasks going again that have ended.", "id")
    _add(commands, _drain, "Let workers finish, and get nothing more.", "worker-id")
    return parser


def _add(
    commands: Any, run: Callable[[JobManager, Any], int | None], text: str, ids: str = ""
) -> argparse.ArgumentParser:
    name = run.__name__.strip("_")
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("--url", default=os.environ.get(URL), help=f"the host; else ${URL}")
    command.add_argument("--token", default=os.environ.get(TOKEN), help=f"else ${TOKEN}")
    command.add_argument("--user", help=f"log in with the password of ${PASSWORD}, or asked for")
    if run is not _work:
        command.add_argument("--json", action="store_true", help="a JSON object a line")
    if ids:
        command.add_argument("ids", nargs="+", metavar=ids)
    return command


def _add_seconds(command: argparse.ArgumentParser, name: str, text: str, **options: Any) -> None:
    command.add_argument(name, type=float, metavar="SECONDS", help=text, **options)


def _login(options: argparse.Namespace) -> dict[str, Any]:
    if not options.user:
        return {"token": options.token}
    password = os.environ.get(PASSWORD) or getpass(f"password of {options.user}: ")
    return {"user": options.user, "password": password}


# --- a worker ---


def _add_work(commands: Any) -> None:
    work = _add(commands, _work, "Run the tasks of some jobs, until Ctrl-C or SIGTERM.")
    work.add_argument("classes", nargs="+", metavar="module:Class")
    work.add_argument("--room", default=GLOBAL_ROOM, help="who sees the jobs; %(default)s")
    work.add_argument("--concurrency", type=int, default=1, help="tasks at a time; %(default)s")
    work.add_argument("--isolate", action="store_true", help="each task in a child process")
    work.add_argument("--setup", metavar="module:function", help="called once in each child")
    grace = "how long tasks may go on when the worker is to end; %(default)s"
    _add_seconds(work, "--grace", grace, default=30, dest="grace_seconds")
    until = "when it leaves by itself: in so many seconds, or at 2030-01-31T18:00"
    work.add_argument("--until", type=_moment, metavar="SECONDS|TIME", help=until)
    _add_seconds(work, "--idle-seconds", "without a task, until it leaves")
    policy = "how the tasks are tried, as max_attempts=3"
    work.add_argument("--policy", action="append", default=[], metavar="name=value", help=policy)


def _moment(given: str) -> float | datetime:
    try:
        return float(given)
    except ValueError:
        return datetime.fromisoformat(given).astimezone()


def _worker_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return how the worker works, before it is made; its log is begun."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # where `python -m` looks first, and an installed command doesn't
    sys.path.insert(0, os.getcwd())
    return {
        "execute": run_extension,
        "setup": _imported(options.setup) if options.setup else None,
        **{name: getattr(options, name) for name in WORKER_OPTIONS},
    }


def _work(manager: JobManager, options: argparse.Namespace) -> int:
    policy = JobPolicy.model_validate(_named_values(options.policy))
    for place in options.classes:
        cls = _imported(place)
        if not (isinstance(cls, type) and issubclass(cls, Extension)):
            raise TypeError(f"{place} is no subclass of Extension")
        manager.register(cls, room=options.room, policy=policy)
    log.info("offers %s", ", ".join(manager))
    return DONE if manager.wait() else NOT_ALL


def _imported(place: str) -> Any:
    module_name, _, name = place.partition(":")
    try:
        module = import_module(module_name)
    except Exception as exc:
        if not isinstance(exc, ModuleNotFoundError):
            log.exception("%s can't be imported", module_name)
        raise ValueError(f"{place!r} is not module:name: {describe(exc)}") from None
    if not hasattr(module, name):
        raise ValueError(f"{module_name} has no {name!r}; {nearest(name, vars(module))}")
    return getattr(module, name)


# --- what is there ---


def _jobs(manager: JobManager, options: argparse.Namespace) -> None:
    _show(manager.jobs(options.room), options, "full_name", "workers_alive")


def _workers(manager: JobManager, options: argparse.Namespace) -> None:
    columns = ("id", "name", "state", "alive", "job_count", "held", "last_heartbeat")
    _show(manager.workers(options.room), options, *columns)


def _tasks(manager: JobManager, options: argparse.Namespace) -> None:
    found = manager.tasks(options.room, status=options.status, job=options.job, limit=options.limit)
    _show(found, options, *TASK_COLUMNS)


# --- tasks ---


def _add_submit(commands: Any) -> None:
    submit = _add(commands, _submit, "Submit a task, and print its id.")
    submit.add_argument("job", help="its full name, room:category:name")
    submit.add_argument("parameters", nargs="*", metavar="name=value", help="of JSON, else text")
    submit.add_argument("--file", type=Path, help="a JSON object of parameters; - is the input")
    submit.add_argument("--room", required=True)
    submit.add_argument("--priority", type=int, default=0)
    _add_seconds(submit, "--delay", "until a worker may have it", default=0)
    submit.add_argument("--wait", action="store_true", help="print its result instead")
    _add_seconds(submit, "--timeout", "of --wait")


def _submit(manager: JobManager, options: argparse.Namespace) -> int:
    parameters = _named_values(options.parameters)
    if options.file is not None:
        text = sys.stdin.read() if str(options.file) == "-" else options.file.read_text()
        parameters = {**json.loads(text), **parameters}
    how: Submitting = {"priority": options.priority, "delay_seconds": options.delay}
    task = manager.submit(options.job, parameters, options.room, **how)
    if not options.wait:
        print(json.dumps({"id": task}) if options.json else task)
        return DONE
    (ended,) = _ended(manager, [task], options)
    if options.json:
        print(ended.model_dump_json())
    elif ended.status == TaskStatus.COMPLETED:
        print(json.dumps(ended.result))
    else:
        raise TaskFailed(ended)
    return _all_completed([ended])


def _named_values(given: Iterable[str]) -> dict[str, Any]:
    """Return what ``name=value`` says; a value is JSON, or else text."""
    values: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise ValueError(f"{one!r} is not of the form name=value")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def _wait(manager: JobManager, options: argparse.Namespace) -> int:
    tasks = _ended(manager, options.ids, options)
    _show(tasks, options, *TASK_COLUMNS)
    return _all_completed(tasks)


def _ended(
    manager: JobManager, ids: Iterable[str], options: argparse.Namespace
) -> list[TaskResponse]:
    return manager.wait_all(ids, options.timeout, progress=sys.stderr.isatty())


def _all_completed(tasks: Iterable[TaskResponse]) -> int:
    return DONE if all(task.status == TaskStatus.COMPLETED for task in tasks) else NOT_ALL


def _log(manager: JobManager, options: argparse.Namespace) -> None:
    lines = manager.task(options.id).view.log(options.id, options.follow)
    for shown in (x.model_dump_json() for x in lines) if options.json else shown_lines(lines):
        print(shown, flush=True)


def _cancel(manager: JobManager, options: argparse.Namespace) -> int:
    tasks = [manager.task(task_id) for task_id in options.ids]
    cancelled = [task.cancel() for task in tasks]
    _show([task.refresh() for task in tasks], options, *TASK_COLUMNS)
    return DONE if all(cancelled) else NOT_ALL


def _retry(manager: JobManager, options: argparse.Namespace) -> None:
    tasks = [manager.task(task_id) for task_id in options.ids]
    _show([task.retry().refresh() for task in tasks], options, *TASK_COLUMNS)


def _drain(manager: JobManager, options: argparse.Namespace) -> None:
    rooms = Rooms(Transport(manager.api))
    workers = [rooms.drain(worker_id) for worker_id in options.ids]
    _show(workers, options, "id", "state", "last_heartbeat")


def _show(rows: Iterable[BaseModel], options: argparse.Namespace, *columns: str) -> None:
    if options.json:
        for row in rows:
            print(row.model_dump_json())
        return
    lines = [[_cell(getattr(row, name)) for name in columns] for row in rows]
    lines.insert(0, [name.upper() for name in columns])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def _cell(value: Any) -> str:
    return "" if value is None else str(value).partition("\n")[0][:CELL_CHARACTERS]


if __name__ == "__main__":
    sys.exit(main())
