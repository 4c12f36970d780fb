"""What the demo's worker hands out."""

from pathlib import Path

import pytest
from worker import File, Listing

from zndraw_joblib.provider import read_content


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
