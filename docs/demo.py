"""The main job, from structure files to checked results: ``python docs/demo.py``.

Starts ``host.py`` on a new SQLite file and ``worker.py`` beside it, sends every
structure of ``structures/`` through both of the worker's extensions, shows the tasks
as they move through their states, prints what came out, and fails if it is wrong:

- the first peak of g(r) lies within 1 % of the neighbour distance of the benchmark's
  crystal, a / sqrt(2), and 12 neighbours belong to it;
- every relaxation converges, lowers the energy, and ends within 2 meV per atom and
  0.5 % of the neighbour distance of EMT's own fcc crystal, which a scan over its
  lattice constant finds here;
- the worker's files, read through the host, are those on the disk, and a path that
  leads out of their directory is refused.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import socketio
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.collections import dcdft
from ase.io import read
from scipy.optimize import minimize_scalar
from worker import STRUCTURES, File, Listing, RadialDistribution, Relaxation, Structure

from zndraw_joblib import JobManager

HERE = Path(__file__).resolve().parent
ROOM = "demo"
STATES = ("pending", "claimed", "running", "completed", "failed", "cancelled")
PATIENCE_SECONDS = 120
PEAK_TOLERANCE = 0.01
DISTANCE_TOLERANCE = 0.005
ENERGY_TOLERANCE = 0.002  # eV per atom

Check = Callable[[], None]


@contextmanager
def running(script: str, *args: str, log: Path, **env: str) -> Iterator[Check]:
    """Run a script of this folder in a process of its own.

    Yields what checks that it still runs. The process ends with the block, and with
    this process, whatever ends it.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "tied.py"), str(HERE / script), *args],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
            # Ctrl-C is for this process to handle
            start_new_session=True,
        )

    def check() -> None:
        if process.poll() is not None:
            sys.exit(f"{script} ended too early:\n{log.read_text()}")

    try:
        yield check
        process.terminate()
        process.wait(20)
    finally:
        process.kill()
        process.wait()


def wait_until(done: Callable[[], bool], what: str, *checks: Check) -> None:
    """Return when ``done``; give up when a check fails or patience ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        for check in checks:
            check()
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {PATIENCE_SECONDS} s")
        time.sleep(0.1)


class Progress:
    """The states that each task went through, as its room is told of them."""

    def __init__(self) -> None:
        self.states: dict[str, list[str]] = {}
        self.began = time.monotonic()
        self.shown = ""
        self.next_line = 0.0

    def on_event(self, event: dict[str, Any]) -> None:
        states = self.states.setdefault(event["id"], [])
        # reports of progress repeat the state
        if states[-1:] != [event["status"]]:
            states.append(event["status"])

    def all_ended(self, tasks: list[str]) -> bool:
        counts = Counter(self.states.get(task, STATES[:1])[-1] for task in tasks)
        ended = sum(counts[state] for state in STATES[3:]) == len(tasks)
        line = "   ".join(f"{state} {counts[state]:2}" for state in STATES[:5])
        live = sys.stdout.isatty()
        seconds = time.monotonic() - self.began
        if line != self.shown and (live or ended or seconds >= self.next_line):
            self.shown = line
            self.next_line = seconds + 1
            start, end = ("\r", "") if live else ("", "\n")
            print(f"{start}{seconds:5.1f} s   {line}", end=end, flush=True)
        return ended


def answers(http: httpx.Client) -> bool:
    """Tell whether the host takes requests."""
    try:
        return http.get("/v1/joblib/workers").status_code == 401
    except httpx.TransportError:
        return False


def log_in(http: httpx.Client, email: str, password: str) -> str:
    """Register a user and return a token."""
    http.post("/auth/register", json={"email": email, "password": password}).raise_for_status()
    answer = http.post("/auth/jwt/login", data={"username": email, "password": password})
    return answer.raise_for_status().json()["access_token"]


def served(http: httpx.Client) -> bool:
    """Tell whether the worker offers both of its extensions."""
    jobs = http.get(f"/v1/joblib/rooms/{ROOM}/jobs").raise_for_status().json()
    names = {job["name"] for job in jobs["items"]}
    return names >= {RadialDistribution.__name__, Relaxation.__name__}


def check_files(http: httpx.Client) -> list[str]:
    """Read the worker's files through the host; return what is wrong."""

    def ask(provider: type, path: str) -> httpx.Response:
        name = f"@global:{provider.category}:{provider.__name__}"
        return http.get(
            f"/v1/joblib/rooms/{ROOM}/providers/{name}",
            params={"path": path},
            headers={"Prefer": "wait=30"},
            timeout=PATIENCE_SECONDS,
        )

    disk = {f.name: f.read_bytes() for f in STRUCTURES.iterdir() if f.is_file()}
    name = min(name for name in disk if name.endswith(".xyz"))
    listing = ask(Listing, "/").raise_for_status().json()
    file = ask(File, name).raise_for_status().content
    outside = ask(File, "../worker.py")
    checks = {
        "the listing": {f["name"]: f["size"] for f in listing}
        == {name: len(data) for name, data in disk.items()},
        "the file": file == disk[name],
        "the answer to a path outside": outside.status_code == 400,
    }
    good = ["" if good else "  <-" for good in checks.values()]
    print(
        f"listing  {len(listing)} files in structures/, read through the host{good[0]}\n"
        f"file     {name}, {len(file)} bytes, read through the host{good[1]}\n"
        f"outside  {outside.status_code}: {outside.json()['detail']}{good[2]}"
    )
    return [check for check, good in checks.items() if not good]


def emt_crystal(metal: str, a: float) -> tuple[float, float]:
    """Return energy per atom (eV) and neighbour distance (Å) of EMT's fcc crystal."""

    def energy(a: float) -> float:
        atoms = bulk(metal, "fcc", a)
        atoms.calc = EMT()
        return atoms.get_potential_energy()

    found = minimize_scalar(energy, bounds=(0.9 * a, 1.1 * a), method="bounded")
    return found.fun, found.x / 2**0.5


def check_results(names: list[str], results: dict[tuple[type, str], Any]) -> list[str]:
    """Print a row for each structure; return what is wrong."""
    print(
        f"{'':14}  first peak of g(r) [Å]     in       energy per atom [eV]"
        "        neighbours [Å]\n"
        f"{'structure':14}   peak  a/sqrt2    off  shell     before     after"
        "       EMT   relaxed     EMT"
    )
    wrong = []
    references = {}
    for name in names:
        metal, variant = name.split("-")
        a = dcdft[metal].cell.lengths()[0]
        if metal not in references:
            references[metal] = emt_crystal(metal, a)
        emt_energy, emt_distance = references[metal]
        known = a / 2**0.5 * (1.03 if variant == "expanded" else 1)

        rdf = results[RadialDistribution, name]
        off = rdf["first_peak"] / known - 1
        relaxed = results[Relaxation, name]
        before, after = relaxed["energy_before"], relaxed["energy_after"]
        atoms = Structure(**relaxed["structure"]).to_atoms()
        distance = (4 * atoms.get_volume() / len(atoms)) ** (1 / 3) / 2**0.5
        checks = {
            "the first peak": abs(off) < PEAK_TOLERANCE,
            "the number of neighbours": abs(rdf["coordination"] - 12) < 0.01,
            "convergence": relaxed["converged"],
            "the change of energy": after < before,
            "the relaxed energy": abs(after - emt_energy) < ENERGY_TOLERANCE,
            "the relaxed cell": abs(distance / emt_distance - 1) < DISTANCE_TOLERANCE,
        }
        wrong += [f"{name}: {check}" for check, good in checks.items() if not good]
        print(
            f"{name:14}  {rdf['first_peak']:5.3f}  {known:7.3f}  {off:+5.1%}"
            f"  {rdf['coordination']:5.1f}  {before:9.4f} {after:9.4f}"
            f" {emt_energy:9.4f}  {distance:8.3f} {emt_distance:7.3f}"
            f"  {'' if all(checks.values()) else '<-'}"
        )
    return wrong


def main() -> None:
    """Run the demo.

    Raises
    ------
    SystemExit
        When a process ends too early, a task fails, or a result is wrong.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        admin, password = "admin@example.org", secrets.token_urlsafe()
        print(f"host     {url} on SQLite, docs/host.py", flush=True)
        host = running(
            "host.py",
            log=folder / "host.log",
            DATABASE_URL=f"sqlite+aiosqlite:///{folder / 'demo.sqlite'}",
            REDIS_URL="",
            PORT=str(port),
            ZNDRAW_AUTH_SECRET_KEY=secrets.token_urlsafe(),
            ZNDRAW_AUTH_DEFAULT_ADMIN_EMAIL=admin,
            ZNDRAW_AUTH_DEFAULT_ADMIN_PASSWORD=password,
        )
        checks = [stack.enter_context(host)]
        http = stack.enter_context(httpx.Client(base_url=url))
        wait_until(lambda: answers(http), "the start of the host", *checks)

        print("worker   docs/worker.py", flush=True)
        worker = running(
            "worker.py",
            url,
            log=folder / "worker.log",
            WORKER_USER=admin,
            WORKER_PASSWORD=password,
            # for 32 atoms the threads of BLAS cost more than they bring
            OMP_NUM_THREADS="1",
        )
        checks.append(stack.enter_context(worker))

        token = log_in(http, "scientist@example.org", secrets.token_urlsafe())
        http.headers["Authorization"] = f"Bearer {token}"
        progress = Progress()
        tsio = socketio.Client()
        tsio.on("task_status_event", progress.on_event)
        tsio.connect(url, auth={"token": token})
        stack.callback(tsio.disconnect)
        tsio.call("join_room", {"room_id": ROOM})
        wait_until(lambda: served(http), "the registration of the jobs", *checks)

        structures = {
            path.stem: Structure.from_atoms(read(path)) for path in sorted(STRUCTURES.glob("*.xyz"))
        }
        manager = stack.enter_context(JobManager.connect(url, token=token))
        tasks = {
            manager.submit(extension(structure=structure), ROOM): (extension, name)
            for extension in (RadialDistribution, Relaxation)
            for name, structure in structures.items()
        }
        print(f"tasks    {len(tasks)}, for {len(structures)} structures\n", flush=True)
        wait_until(lambda: progress.all_ended(list(tasks)), "the end of the tasks", *checks)
        results = {
            key: manager.wait_for(task, timeout=PATIENCE_SECONDS).result
            for task, key in tasks.items()
        }
        print("\n")
        wrong = check_results(list(structures), results)
        print()
        wrong += check_files(http)
        wrong += [
            f"task {task} went through {states}"
            for task, states in progress.states.items()
            if states != list(STATES[:4])
        ]
        if wrong:
            sys.exit("\n".join(["", "not as expected:", *wrong]))
        print("\nall as expected")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
