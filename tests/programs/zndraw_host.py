"""A released ZnDraw on this package: a server, a worker and people in rooms.

Run by ``nox -s zndraw``, in an environment with that release. The server and the worker
are processes of their own, in a home of their own; what is asked of them is asked through
ZnDraw's own client, and through a Socket.IO client that listens as a browser does.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import ase
import httpx
import socketio
from pages import DOCS, blocks
from zndraw import ZnDraw

from zndraw_joblib import Category, Extension

HANG = 180
ADMIN = {"user": "admin@example.org", "password": secrets.token_urlsafe()}
ROOM, MOUNTED = "office", "archive"


class Grow(Extension):
    """Append frames, as a modifier does."""

    category: ClassVar[Category] = Category.MODIFIER
    frames: int

    def run(self, vis: Any, **kwargs: Any) -> None:
        vis.extend([ase.Atoms("H2", [(0, 0, 0), (0, 0, n)]) for n in range(self.frames)])


class Everywhere(Grow):
    """The same, offered to all rooms."""


class Fails(Extension):
    """Raise."""

    category: ClassVar[Category] = Category.ANALYSIS

    def run(self, vis: Any, **kwargs: Any) -> None:
        raise ValueError("no such element: Qq")


class Slow(Extension):
    """Take some seconds, whatever is asked of it meanwhile."""

    category: ClassVar[Category] = Category.ANALYSIS

    def run(self, vis: Any, **kwargs: Any) -> None:
        time.sleep(4)


class Folder:
    """The part of an fsspec file system that ZnDraw's provider and LoadFile use."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]:
        return [
            {"name": f"/{p.name}", "size": p.stat().st_size, "type": "file"}
            for p in sorted(self._inside(path).iterdir())
        ]

    def open(self, path: str, mode: str) -> Any:
        return self._inside(path).open(mode)

    def _inside(self, path: str) -> Path:
        return self.path / path.lstrip("/")


def frames(count: int, element: str = "He") -> list[ase.Atoms]:
    return [ase.Atoms(element, [(n, 0, 0)]) for n in range(count)]


def work(url: str, folder: str, password: str) -> None:
    """Be the worker: until SIGINT, then leave as ZnDraw's own command does."""
    vis = ZnDraw(url=url, room=ROOM, user=ADMIN["user"], password=password, polling_interval=1)
    source = ZnDraw(url=url, room=MOUNTED, user=ADMIN["user"], password=password)
    try:
        for extension in (Grow, Fails, Slow):
            vis.register_job(extension)
        vis.register_job(Everywhere, room="@global")
        vis.register_fs(Folder(Path(folder)), name="files")
        source.mount(frames(3, "Ne"))
        print("ready", flush=True)
        vis.wait()
    except KeyboardInterrupt:
        pass
    finally:
        source.disconnect()
        vis.disconnect()
    print("left", flush=True)


def until(done: Callable[[], Any], what: str) -> Any:
    """Return what ``done`` returns, once it is true."""
    deadline = time.monotonic() + HANG
    while not (found := done()):
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.05)
    return found


@contextmanager
def process(log: Path, *command: Any) -> Iterator[Any]:
    """Run a command; what it says is shown when something goes wrong."""
    with log.open("wb") as out:
        popen = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield popen
    except BaseException:
        print(f"--- {log.name}\n{log.read_text()}", flush=True)
        raise
    finally:
        if popen.poll() is None:
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait(HANG)


def ends(popen: Any) -> int:
    """Interrupt a process, and return its exit status when nothing of it is left."""
    popen.send_signal(signal.SIGINT)
    status = popen.wait(HANG)
    try:
        os.killpg(popen.pid, 0)
    except ProcessLookupError:
        return status
    raise AssertionError(f"children of {popen.args} are left")


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/health").is_success
    except httpx.TransportError:
        return False


@contextmanager
def browser(vis: ZnDraw) -> Iterator[list[tuple[str, Any]]]:
    """Yield what a page in the room hears, as it comes."""
    heard: list[tuple[str, Any]] = []
    tsio = socketio.Client()
    tsio.on("*", lambda event, data: heard.append((event, data)))
    tsio.connect(vis.url, auth={"token": vis.api.token}, wait_timeout=HANG)
    try:
        joined = tsio.call("room_join", {"room_id": vis.room})
        assert joined["room_id"] == vis.room, joined
        yield heard
    finally:
        tsio.disconnect()


def jobs(vis: ZnDraw) -> set[str]:
    return {job["full_name"] for job in vis.api.list_extensions(vis.room)["items"]}


def people(url: str, worker: Any, files: Path) -> None:
    """Do in rooms what people do, and look at what becomes of it."""
    vis = ZnDraw(url=url, room=ROOM)
    with browser(vis) as heard:
        jobs_run(vis, heard)
        data_read(vis, files)
        frames_mounted(url)
        page_shown(url)
        assert "provider_result_ready" in dict(heard)
        heard.clear()
        worker_left(url, vis, heard, worker)
    vis.disconnect()
    say("people left")


def jobs_run(vis: ZnDraw, heard: list[tuple[str, Any]]) -> None:
    task = vis.run(Grow(frames=2), job_room=ROOM).wait(timeout=HANG)
    assert task.status == "completed", task.fetch()
    assert len(vis) == 2
    until(lambda: "completed" in states(heard, task.id), "the end of the task")
    told = states(heard, task.id)
    assert told == ["pending", "claimed", "running", "completed"], told
    say("a job of the room ran, and its page heard of it")

    task = vis.run(Everywhere(frames=1)).wait(timeout=HANG)
    assert (task.status, len(vis)) == ("completed", 3), task.fetch()
    say("a job of all rooms ran")

    task = vis.run("@internal:selections:All").wait(timeout=HANG)
    assert task.status == "completed", task.fetch()
    assert vis.selection == (0, 1)
    until(lambda: "completed" in states(heard, task.id), "the end of the internal one")
    say("a job of the server itself ran")

    task = vis.run(Fails(), job_room=ROOM).wait(timeout=HANG)
    assert task.status == "failed"
    assert "no such element: Qq" in task.fetch().error
    say("a job failed, and said why")

    task = vis.run(Slow(), job_room=ROOM)
    until(lambda: task.status == "running", "the slow one")
    answer = vis.api.http.patch(
        f"/v1/joblib/tasks/{task.id}", json={"status": "cancelled"}, headers=vis.api.get_headers()
    )
    vis.api.raise_for_status(answer)
    after = vis.run(Grow(frames=1), job_room=ROOM).wait(timeout=HANG)
    assert (after.status, task.status) == ("completed", "cancelled")
    assert states(heard, task.id)[-1] == "cancelled"
    say("a job was cancelled while it ran, and its worker went on")


def states(heard: list[tuple[str, Any]], task_id: str) -> list[str]:
    return [
        data["status"]
        for event, data in list(heard)
        if event == "task_status_event" and data["id"] == task_id
    ]


def page_shown(url: str) -> None:
    """Run the program of the page about ZnDraw, as it stands there."""
    block, *_ = blocks(DOCS / "zndraw.md", "python")
    names: dict[str, Any] = {}
    exec(block.code.replace("http://localhost:8000", url), names)
    with names["vis"] as vis:
        assert list(vis.tasks(status="completed"))
        vis.cached_length = None
        assert len(vis) == 2
    say("the program of the docs ran")


def data_read(vis: ZnDraw, files: Path) -> None:
    def read(path: str) -> httpx.Response:
        name = f"{ROOM}:filesystem:files"
        return vis.api.http.get(
            f"/v1/joblib/rooms/{ROOM}/providers/{name}",
            params={"path": path},
            headers=vis.api.get_headers(),
        )

    answer = read("/")
    assert answer.status_code == 200, answer.text
    assert [item["name"] for item in answer.json()] == ["two.xyz"]
    say("a provider was read")
    answer = read("/nowhere")
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    assert "nowhere" in answer.json()["detail"], answer.text
    say(f"a read of a provider failed, and said why ({answer.status_code})")

    had = len(vis)
    task = vis.run(
        f"{ROOM}:modifiers:LoadFile", provider_name=f"{ROOM}:filesystem:files", path="/two.xyz"
    ).wait(timeout=HANG)
    assert task.status == "completed", task.fetch()
    assert len(vis) == had + 2
    assert str(vis[-1].symbols) == "Ar"
    say("a file was loaded through it")


def frames_mounted(url: str) -> None:
    with ZnDraw(url=url, room="mounts", **ADMIN) as owner, ZnDraw(url=url, room="mounts") as reader:
        for element, count in (("He", 5), ("Kr", 3)):
            owner.mount(frames(count, element))
            reader.cached_length = None
            assert len(reader) == count
            assert str(reader[2].symbols) == element
            taken = reader[1:3]
            assert [a.positions[0, 0] for a in taken] == [1, 2]
            assert {str(a.symbols) for a in taken} == {element}
            owner.unmount()
            reader.cached_length = None
            assert len(reader) == 0
    say("frames were mounted, read, unmounted and mounted again")


def worker_left(url: str, vis: ZnDraw, heard: list[tuple[str, Any]], worker: Any) -> None:
    names = {f"{ROOM}:{job}" for job in ("modifiers:Grow", "analysis:Slow")}
    assert jobs(vis) >= names, jobs(vis)
    with ZnDraw(url=url, room=MOUNTED) as reader, browser(reader) as pages:
        assert len(reader) == 3
        assert str(reader[0].symbols) == "Ne"
        ends(worker)
        until(lambda: not jobs(vis) & names, "the jobs of a worker that left")
        until(lambda: "jobs_invalidate" in dict(heard), "that the jobs are gone")
        until(lambda: "frames_invalidate" in dict(pages), "that the frames are gone")
        reader.cached_length = None
        assert len(reader) == 0
    say("the worker was interrupted: its jobs, its data and its frames are gone")


def say(what: str) -> None:
    print(f"ok  {what}", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="zndraw") as home:
        files = Path(home, "files")
        files.mkdir()
        files.joinpath("two.xyz").write_text("1\n\nAr 0 0 0\n1\n\nAr 1 0 0\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "HOME": home,
            "PYTHONWARNINGS": "ignore",
            "ZNDRAW_AUTH_DEFAULT_ADMIN_EMAIL": ADMIN["user"],
            "ZNDRAW_AUTH_DEFAULT_ADMIN_PASSWORD": ADMIN["password"],
            "ZNDRAW_AUTH_SECRET_KEY": secrets.token_urlsafe(),
        }
        url = f"http://127.0.0.1:{port}"
        zndraw = Path(sys.executable).with_name("zndraw")
        command = (zndraw, "--port", port, "--no-browser")
        with process(Path(home, "server.log"), *command) as server:
            until(lambda: answers(url) or server.poll() is not None, "the server")
            assert server.poll() is None, "the server ended"
            say("the server started")
            log = Path(home, "worker.log")
            command = (sys.executable, __file__, url, files, ADMIN["password"])
            with process(log, *command) as worker:
                until(lambda: "ready" in log.read_text() or worker.poll() is not None, "the worker")
                assert worker.poll() is None, "the worker ended"
                people(url, worker, files)
            ends(server)
            say("the server ended, and nothing of it is left")


if __name__ == "__main__":
    work(*sys.argv[1:]) if sys.argv[1:] else main()
