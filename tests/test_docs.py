"""What the docs show is what the code does."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pages
import pytest
import states
import tables

import zndraw_joblib
from zndraw_joblib.lifecycle import TRANSITIONS, TaskStatus, Transition

#: what a block may be; of others nobody would know whether they are true
KINDS = {"python", "sh", "json", "ini", "mermaid", "text", "{toctree}", "{include}"}


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
async def test_code_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    kinds = {block.kind for block in pages.blocks(page)}
    assert kinds <= KINDS
    await pages.run(page)


def test_shell_blocks_name_what_there_is():
    sessions = (pages.ROOT / "noxfile.py").read_text()
    for page in pages.PAGES:
        shell = "".join(block.code for block in pages.blocks(page, "sh"))
        for session in re.findall(r'nox\b.* -s "?(\w+)', shell):
            assert f"\ndef {session}(" in sessions, (page, session)
        for file in re.findall(r"(?:docs|tests)/[\w/.]+", shell):
            assert (pages.ROOT / file).exists(), (page, file)


def ways() -> Iterator[tuple[str | None, str]]:
    for way in TRANSITIONS:
        for source in way.sources or [None]:
            yield source, way.target


def test_the_picture_shows_all_ways_and_no_others():
    picture = states.PICTURE.read_text()
    assert picture == states.draw(), "nox -s pictures"
    drawn = set()
    for group in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}g"):
        rows = {float(dot.get("cy")) for dot in group if dot.get("cy")}
        assert len(rows) == 1
        name, sources, target = (
            group.get(f"data-{key}") for key in ("name", "from", "to")
        )
        dots = {int(dot.get("cx")) for dot in group if dot.get("cx")}
        assert dots == {states.X[s] for s in sources.split()} or not sources
        tips = {int(path.get("d")[1:].split()[0]) for path in group if path.get("d")}
        assert all(abs(tip - states.X[target]) <= 2 for tip in tips)
        drawn.add((name, frozenset(sources.split()), target))
    assert drawn == {(w.name, w.sources, w.target) for w in TRANSITIONS}
    # one that comes from both sides has two arrows
    both = Transition("x", frozenset({"pending", "failed"}), TaskStatus.RUNNING)
    assert states.draw((both,)).count("<path") == 2


def test_the_diagram_of_the_readme_shows_all_ways_and_no_others():
    (diagram,) = pages.blocks(pages.ROOT / "README.md", "mermaid")
    arrows = re.findall(r"(\S+) --> (\w+):", diagram.code)
    drawn = {(None if source == "[*]" else source, to) for source, to in arrows}
    assert len(arrows) == diagram.code.count("-->")
    assert drawn == set(ways())


def test_the_reference_tells_everything():
    for what in tables.GENERATED:
        assert (
            f"<!-- generated: {what} -->" in (pages.DOCS / f"{what}.md").read_text()
        ), what
    made = {what: make() for what, make in tables.GENERATED.items()}
    operations = list(tables.operations(tables.openapi()))
    # what the app serves, not what is generated, says what there is
    served = {
        (method, route.path.removeprefix("/v1/joblib"))
        for route in zndraw_joblib.router.routes
        for method in route.methods
    }
    assert {(method, tables.unnamed(path)) for method, path, _ in operations} == {
        (method, tables.unnamed(path)) for method, path in served
    }
    for method, path, operation in operations:
        assert (
            f"\n## `{method} {path}`\n\n{operation['description']}"
            in "\n" + (made["routes"])
        )
    for name in zndraw_joblib.__all__:
        module = zndraw_joblib._MODULE_OF[name]
        assert re.search(rf":: zndraw_joblib\.({module}\.)?{name}\n", made["python"])
    for name, field in zndraw_joblib.JobLibSettings.model_fields.items():
        assert field.description in made["settings"], name
        assert f"`ZNDRAW_JOBLIB_{name.upper()}`" in made["settings"]


def test_every_problem_and_event_is_told():
    def heirs(cls: type) -> Iterator[type]:
        for heir in cls.__subclasses__():
            yield heir
            yield from heirs(heir)

    ours = [zndraw_joblib.exceptions.Problem, zndraw_joblib.FrozenEvent]
    for base, made in zip(
        ours, (tables.problems(), tables.event_sections()), strict=True
    ):
        for cls in heirs(base):
            if cls.__module__.startswith("zndraw_joblib"):
                name = tables.title(cls) if base is ours[0] else cls.event_name()
                assert f"## {name}\n\n{tables.told(cls)}" in made


def test_links_of_the_front_page_lead_somewhere():
    """The site's own links are checked when it is built; these pages are not of it."""
    for page in (pages.ROOT / "README.md", pages.ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert link.startswith("http") or (pages.ROOT / link).exists(), link
