"""What is handed out, the wheel and the sdist, and that what the gates install is locked."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", built],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    return built


def tracked(*folders: str) -> set[str]:
    ran = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    # an sdist may be unpacked within one
    if ran.returncode or not ran.stdout:
        pytest.skip("no repository: what belongs to it is not known")
    return {file for file in ran.stdout.splitlines() if (ROOT / file).exists()}


def test_the_wheel_holds_the_package_alone(built: Path):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        about = path.name.rpartition("-py3")[0] + ".dist-info"
        metadata = message_from_bytes(wheel.read(f"{about}/METADATA"))
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "zndraw_joblib").glob("*.*")}
    assert {"zndraw_joblib/py.typed", "zndraw_joblib/__init__.pyi"} <= ours
    assert {name for name in names if not name.startswith(about)} == ours
    assert f"{about}/licenses/LICENSE" in names
    assert metadata["License-Expression"] == "MIT"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata.get_payload().startswith("# zndraw-joblib")
    # what is only for tests, docs and the example host is nobody's dependency
    assert set(metadata.get_all("Provides-Extra")) >= {"redis", "worker"}


def test_the_sdist_holds_what_the_suite_needs(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        top = path.name.removesuffix(".tar.gz") + "/"
        names = {member.name.removeprefix(top) for member in sdist.getmembers()}
    expected = tracked(*("zndraw_joblib", "tests", "docs"), *("*.md", "noxfile.py", "LICENSE"))
    assert expected <= names
    # a file of its own, and .gitignore, which the build backend takes along
    assert names - expected - {".gitignore", "PKG-INFO", "pyproject.toml"} <= untracked()


def untracked() -> set[str]:
    """Return what is not committed yet and would be: a build takes it along."""
    ran = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(ran.stdout.splitlines())


def test_all_that_the_gates_install_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    groups.pop("zndraw")
    wanted = [
        *project["project"]["dependencies"],
        *chain.from_iterable(project["project"]["optional-dependencies"].values()),
        *(one for group in groups.values() for one in group if isinstance(one, str)),
    ]
    locked = {
        line.partition("==")[0]
        for line in (ROOT / "tests/constraints.txt").read_text().splitlines()
    }
    names = {re.match(r"[\w.-]+", one)[0].replace("_", "-") for one in wanted}
    assert not names - locked, "nox -s lock"
