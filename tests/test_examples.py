"""What the demo's worker hands out, and how its relaxation goes on."""

from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk
from worker import File, Listing, Relaxation, Structure, execute

from zndraw_joblib import ClaimedTask
from zndraw_joblib.provider import read_content
from zndraw_joblib.schemas import JobPolicy
from zndraw_joblib.testing import Host


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("not for readers")
    directory = tmp_path / "served"
    (directory / "below").mkdir(parents=True)
    (directory / "Cu.xyz").write_bytes(b"\xff\x00")
    (directory / "below" / "Au.xyz").write_bytes(b"gold")
    (directory / "link").symlink_to(tmp_path / "secret")
    return directory


def test_files_are_listed_and_read(directory: Path):
    (directory / "link").unlink()
    listed = b'[{"name":"Cu.xyz","size":2}]'
    assert read_content(Listing, directory, {"path": "/"}) == listed
    assert read_content(Listing, directory, {}) == listed
    assert read_content(File, directory, {"path": "Cu.xyz"}) == b"\xff\x00"
    assert read_content(File, directory, {"path": "/below/Au.xyz"}) == b"gold"


@pytest.mark.parametrize(
    "path", ["../secret", "/../secret", "below/../../secret", "link", "..", "//../.."]
)
@pytest.mark.parametrize("provider", [File, Listing])
def test_nothing_outside_is_read(directory: Path, provider: type, path: str):
    with pytest.raises(PermissionError, match="not in this directory"):
        read_content(provider, directory, {"path": path})
    absolute = str(directory.parent / "secret")
    with pytest.raises(FileNotFoundError):
        read_content(provider, directory, {"path": absolute})


@pytest.mark.makers("plain")
def test_a_relaxation_that_was_stopped_goes_on():
    atoms = bulk("Cu", "fcc", 4.2)
    relaxation = Relaxation(structure=Structure.from_atoms(atoms))
    taken: list[float] = []
    whole = relaxation.run()

    def stop_half_way(task: ClaimedTask) -> Any:
        def noting(fraction: float) -> None:
            taken.append(fraction)
            if task.attempt == 1 and len(taken) > whole["steps"] // 2:
                raise MemoryError

        task.progress = noting
        return execute(task)

    with Host() as host:
        manager = host.manager(execute=stop_half_way)
        manager.register(Relaxation, room="lab", policy=JobPolicy(max_attempts=2))
        result = manager.submit(relaxation, "lab", job_room="lab").result(60)
    assert result["energy_before"] == whole["energy_before"]
    assert result["energy_after"] == pytest.approx(whole["energy_after"], abs=1e-3)
    assert result["converged"]
    # each attempt tells where it begins, and one step had not been saved
    assert result["steps"] == len(taken) - 3
    assert whole["steps"] <= len(taken) < 2 * whole["steps"]
