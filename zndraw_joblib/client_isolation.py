"""Tasks in child processes: whatever their code does there, the worker goes on.

Each hand has one, which lasts: it runs one task after another. Parameters and reports cross
a pipe as JSON; what a child prints crosses another one, and is its task's log.
"""

import atexit
import codecs
import faulthandler
import json
import logging
import math
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, TextIO

from zndraw_joblib import execution
from zndraw_joblib.exceptions import describe
from zndraw_joblib.execution import Execute, Hands, Report, perform, report_of
from zndraw_joblib.extension import ClaimedTask
from zndraw_joblib.lifecycle import MAX_LOG_LINE, ErrorType, TaskStatus
from zndraw_joblib.telemetry import SafeLogger

if TYPE_CHECKING:
    # a child loads nothing that it doesn't need
    from zndraw_joblib.client_worker import Life, Offered

if sys.platform == "win32":
    raise ImportError("isolate=True needs POSIX signals; on Windows, start several workers")

# how soon a cancel is passed on, a death noticed, and progress asked for
TICK_SECONDS = 0.1
# between SIGTERM and SIGKILL
TERM_SECONDS = 2.0
# what is read of a child's output at once
READ_BYTES, READS = 64 * 1024, 64
# how long a child may take to end with its worker
CLOSE_SECONDS = 1.0
#: What crosses the pipe of a task, beside class, ``run_kwargs`` and parameters.
ABOUT = ("task_id", "job_name", "room_id", "attempt", "traceparent", "saved")

log = SafeLogger(logging.getLogger(__name__))


class Processes:
    """Executes tasks in child processes, one for each hand.

    Parameters
    ----------
    life : Life
        The worker's.
    execute : callable
        Given each task, in the child.
    setup : callable, optional
        Called once in each child. A dict that it returns is added to ``run_kwargs``.
    kill_after : float
        How many seconds a task may go on when it is to stop.

    Raises
    ------
    ValueError
        When a child could not import ``execute`` or ``setup``.
    RuntimeError
        When this process is a child that imports its worker's script.
    """

    reads_parameters = False

    def __init__(
        self, life: "Life", execute: Execute, setup: Callable[[], Any] | None, kill_after: float
    ) -> None:
        # what multiprocessing itself looks at before it starts a process
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(
                "a child process imports this script, to find there what it is to run, and would"
                " start a worker of its own: put the lines that start the worker beneath"
                " `if __name__ == '__main__':`"
            )
        self._life = life
        self._code = _pickled("execute or setup", (execute, setup))
        self._kill_after = kill_after
        self._close_by = math.inf
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()

    def check(self, offered: "Offered") -> None:
        """Raise ValueError when a child could not import a job's class or its run_kwargs."""
        _pickled(f"{offered.name} or its run_kwargs", (offered.cls, offered.given))

    def start(self, hands: Hands) -> None:
        """Start the children; each opens a hand when it is ready."""
        self._hands = hands
        for _ in range(hands.concurrency):
            hands.submit(self._add_child)

    def close(self) -> None:
        """End the children: those at work when their tasks had a moment to stop."""
        self._close_by = time.monotonic() + CLOSE_SECONDS
        idle = []
        with suppress(queue.Empty):
            while True:
                idle.append(self._idle.get_nowait())
                idle[-1].connection.close()
        for child in idle:
            child.end()

    def perform(self, task: ClaimedTask[Any]) -> Report | None:
        """Have a child execute a task, and return what is to be reported of its end."""
        child = self._idle.get()
        if not child.process.is_alive():
            # between two tasks: this one is not to blame
            child.end()
            child = self._ready_child()
        try:
            report = self._report_of(child, task)
        except (EOFError, OSError):
            error = f"the process of this task {child.end()}"
            report = report_of(task, TaskStatus.FAILED, error=error, error_type=ErrorType.CRASHED)
            if task.cancelled:
                report = report_of(task, TaskStatus.CANCELLED)
            log.error("task %s of %s: %s", task.task_id, task.job_name, error)
            self._hands.open(-1)
            self._hands.submit(self._add_child)
        else:
            self._idle.put(child)
        # the host knows what it has ended
        return None if task.ended else report

    def _add_child(self) -> None:
        with suppress(Exception):
            self._idle.put(self._ready_child())
            self._hands.open(1)

    def _ready_child(self) -> "_Child":
        """Start a child; if it can't be made ready, give up the worker and raise."""
        try:
            child = _Child(self._code)
            message: Any = None
            with suppress(EOFError, OSError):
                while message is None and not self._life.stopping.is_set():
                    message = child.receive()
            if message == ("ready",):
                return child
            cause = child.end() if message is None else f"could not begin: {message[1]}"
            raise RuntimeError(f"a process for tasks {cause}; its output may tell more")
        except Exception as exc:
            self._life.give_up(exc)
            raise

    def _report_of(self, child: "_Child", task: ClaimedTask[Any]) -> Report | None:
        """Return a child's report of a task; EOFError or OSError if it dies instead."""
        about = {name: getattr(task, name) for name in ABOUT}
        job = pickle.dumps((task.extension.cls, task.run_kwargs))
        child.output.task = task
        child.connection.send(("task", about, job, task.extension.payload))
        kill_at = math.inf
        signals = [signal.SIGKILL, signal.SIGTERM]
        while True:
            message = child.receive()
            if message is not None and message[0] == "report":
                child.output.end_task()
                report: Report | None = json.loads(message[1])
                return report
            if message is not None and message[0] == "checkpoint":
                task.save(json.loads(message[1]))
            elif message is not None:
                task.progress(*message[1:])
            if task.cancelled and kill_at == math.inf:
                kill_at = time.monotonic() + self._kill_after
                child.connection.send(("stop", task.ended))
            if signals and time.monotonic() > min(kill_at, self._close_by):
                log.warning("task %s of %s doesn't stop", task.task_id, task.job_name)
                kill_at = time.monotonic() + TERM_SECONDS
                child.kill(signals.pop())


def _pickled(what: str, content: Any) -> bytes:
    """Return classes and functions as a child imports them; ValueError if it can't."""
    try:
        pickled = pickle.dumps(content)
    except Exception as exc:
        raise ValueError(
            f"isolate=True: {what} can't go to a child process ({exc}). Classes and functions"
            " have to stand in a module, under their own names"
        ) from None
    main = sys.modules["__main__"]
    if b"__main__" in pickled and not (main.__spec__ or hasattr(main, "__file__")):
        raise ValueError(
            f"isolate=True: {what} was defined in a notebook or at a prompt, where a child"
            " process can't import it: put it into a file, and import it from there"
        )
    return pickled


class _Output:
    """What a child prints: it goes to the log of its task, and where the worker's errors go."""

    def __init__(self, pipe: Connection) -> None:
        #: empty when nobody can print any more
        self.pipes = [pipe]
        self.task: ClaimedTask[Any] | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._line = ""
        os.set_blocking(pipe.fileno(), False)

    def read(self) -> None:
        """Take what was printed by now."""
        with suppress(BlockingIOError):
            for _ in range(READS if self.pipes else 0):
                printed = os.read(self.pipes[0].fileno(), READ_BYTES)
                if not printed:
                    self.close()
                    return
                self._take(self._decode(printed))

    def _take(self, text: str) -> None:
        with suppress(Exception):
            sys.stderr.write(text)
            sys.stderr.flush()
        *lines, self._line = (self._line + text).split("\n")
        # of a bar that never ends its line, the last state
        self._line = self._line.rpartition("\r")[2][-MAX_LOG_LINE:]
        if self.task is not None and lines:
            self.task.log("\n".join([*lines, ""]))

    def end_task(self) -> None:
        """Let what is printed from now on belong to no task."""
        if self.task is not None and self._line:
            self.task.log(self._line)
        self.task, self._line = None, ""

    def close(self) -> None:
        """Listen no more."""
        while self.pipes:
            self.pipes.pop().close()


class _Child:
    """A child process, as its worker sees it."""

    def __init__(self, code: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        output, their_output = context.Pipe(duplex=False)
        self.output = _Output(output)
        # no daemon: that could have no children of its own, as tasks may want
        self.process = context.Process(
            target=_run, args=(theirs, their_output, code), name="zndraw-task"
        )
        self._worker_pid = os.getpid()
        # before multiprocessing would wait for it
        atexit.register(self.kill)
        self.process.start()
        theirs.close()
        their_output.close()

    def receive(self) -> Any:
        """Return its next message, or None if it has none by now; EOFError if it is dead."""
        ready = wait([self.connection, *self.output.pipes], TICK_SECONDS)
        # what was printed before the message is there by now
        self.output.read()
        if self.connection in ready:
            return self.connection.recv()
        # what it has started may keep the pipe open
        if not self.process.is_alive() and not self.connection.poll():
            raise EOFError
        return None

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send a signal to it and to what it has started."""
        if self.process.pid is None or os.getpid() != self._worker_pid:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)
        if self.process.is_alive():
            # it leads no group before it runs
            os.kill(self.process.pid, signum)

    def end(self) -> str:
        """End it, if it has not ended, and return how it did."""
        self.connection.close()
        self.process.join(CLOSE_SECONDS)
        self.kill()
        self.process.join()
        self.output.read()
        self.output.end_task()
        self.output.close()
        atexit.unregister(self.kill)
        code = self.process.exitcode or 0
        self.process.close()
        if code >= 0:
            return f"ended with exit code {code}"
        names = {signum.value: signum.name for signum in signal.Signals}
        memory = ", as when memory is short" if -code == signal.SIGKILL else ""
        return f"was killed by signal {-code} ({names.get(-code, 'unnamed')}{memory})"


def _run(connection: Connection, output: Connection, code: bytes) -> None:
    """Run tasks in this child until the worker ends."""
    # by C code, and by other processes, too
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output.fileno(), fd)
        setattr(sys, name, _printing_to(fd))
    output.close()
    # a failure's traceback is in the task's log
    logging.getLogger(execution.__name__).disabled = True
    _Tasks(connection).run(code)


def _printing_to(fd: int) -> TextIO:
    return open(fd, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)


class _Tasks:
    """The tasks of a child process: the main thread runs them, another one listens."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pid = os.getpid()
        self._log = partial(print, file=_printing_to(1))
        self._waiting: queue.SimpleQueue[tuple[bytes, str] | None] = queue.SimpleQueue()
        self._task: ClaimedTask[Any] | None = None
        # over what is sent, since progress is that of the task which runs
        self._lock = threading.Lock()

    def run(self, code: bytes) -> None:
        """Set up, and run one task after another until the worker ends."""
        self._follow_worker()
        threading.Thread(target=self._listen, name="zndraw-listen", daemon=True).start()
        try:
            execute, setup = pickle.loads(code)
            made = setup() if setup is not None else None
        except BaseException as exc:
            log.exception("a process for tasks could not begin")
            self._send("failed", describe(exc))
            return
        self._send("ready")
        jobs: dict[bytes, tuple[type[Any], dict[str, Any]]] = {}
        while (waiting := self._waiting.get()) is not None:
            job, payload = waiting
            task = self._task
            assert task is not None
            report: Report | None
            try:
                if job not in jobs:
                    jobs[job] = pickle.loads(job)
                cls, run_kwargs = jobs[job]
                task.run_kwargs = {**run_kwargs, **(made if isinstance(made, dict) else {})}
                task.extension = cls.model_validate_json(payload)
            except BaseException as exc:
                report = report_of(task, TaskStatus.FAILED, error=describe(exc), retryable=False)
            else:
                report = perform(execute, task)
            with self._lock:
                self._send_checkpoint(task)
                self._task = None
            self._send("report", json.dumps(report))

    def _follow_worker(self) -> None:
        """Have this process, and what it starts, end with the worker and not before."""
        import fcntl

        # Ctrl-C is for the worker, and a cluster may send SIGTERM to all processes
        os.setpgid(0, 0)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)
        # a pipe that carries nothing and is closed by the worker's end, whatever that is:
        # SIGIO comes from the kernel, also while a task holds the interpreter's lock
        worker = multiprocessing.parent_process()
        assert worker is not None
        fcntl.fcntl(worker.sentinel, fcntl.F_SETOWN, -self._pid)
        flags = fcntl.fcntl(worker.sentinel, fcntl.F_GETFL)
        fcntl.fcntl(worker.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
        with suppress(Exception):
            # what a task was at when it crashed
            faulthandler.enable()

    def _on_signal(self, signum: int, frame: object) -> None:
        cancelled = self._task is not None and self._task.cancelled
        # what a task has forked has inherited this
        if cancelled or os.getpid() != self._pid:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                if self._connection.poll(TICK_SECONDS if self._task else None):
                    self._take(*self._connection.recv())
                else:
                    self._send_progress()
        # the worker has closed the pipe: it waits a moment for what runs at exit
        self._waiting.put(None)

    def _take(self, what: str, *content: Any) -> None:
        if what == "task":
            about, job, payload = content
            self._task = ClaimedTask(extension=None, log=self._log, **about)
            self._waiting.put((job, payload))
        elif (task := self._task) is not None:
            (ended,) = content
            if ended:
                task.end()
            else:
                task.cancel()

    def _send_progress(self) -> None:
        with self._lock:
            if self._task is None:
                return
            self._send_checkpoint(self._task)
            if new := self._task.unsent_progress():
                self._connection.send(
                    ("progress", new.get("progress", math.nan), new.get("message"))
                )

    def _send_checkpoint(self, task: ClaimedTask[Any]) -> None:
        if checkpoint := task.unsent_checkpoint():
            self._connection.send(("checkpoint", checkpoint))
            task.keep_checkpoint(checkpoint)

    def _send(self, *message: Any) -> None:
        with self._lock:
            self._connection.send(message)
