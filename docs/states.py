"""The state machine as SVG: ``python docs/states.py`` writes ``pictures/states.svg``.

One line a way: dots where a task may come from, an arrow to where it goes.
"""

from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import quoteattr

from zndraw_joblib.lifecycle import TERMINAL, TRANSITIONS, TaskStatus, Transition

PICTURE = Path(__file__).parent / "pictures" / "states.svg"

LEFT, COLUMN, ROW, TOP = 190, 116, 40, 64
X = {status: LEFT + COLUMN * n for n, status in enumerate(TaskStatus)}
BORN = 160

STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1c2733; }
.name { text-anchor: end; }
.state { text-anchor: middle; font-weight: 600; }
.box { fill: #dbe9ff; stroke: #3a6fd8; }
.ended { fill: #e6e9ee; stroke: #6b7785; }
.life { stroke: #c3ccd6; }
.way { stroke: #3a6fd8; stroke-width: 2; }
.way circle, .way path { fill: #3a6fd8; stroke: none; }
"""


def draw(transitions: tuple[Transition, ...] = TRANSITIONS) -> str:
    """Return the picture."""
    bottom = TOP + ROW * len(transitions) + 20
    width = max(X.values()) + 70
    rows = [line for n, way in enumerate(transitions) for line in draw_way(way, TOP + ROW * n + 30)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom}">',
            "<title>The states of a task, and which may follow which</title>",
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{bottom}" rx="8" fill="#fff"/>',
            *(line for status in TaskStatus for line in draw_state(status, bottom)),
            *rows,
            "</svg>\n",
        ]
    )


def draw_state(status: TaskStatus, bottom: int) -> Iterator[str]:
    x = X[status]
    kind = "ended" if status in TERMINAL else "box"
    yield f'<line class="life" x1="{x}" y1="50" x2="{x}" y2="{bottom - 12}"/>'
    yield (
        f'<rect class="{kind}" x="{x - 52}" y="18" width="104" height="32" '
        f'rx="{16 if status in TERMINAL else 6}"/>'
    )
    yield f'<text class="state" x="{x}" y="39">{status}</text>'


def draw_way(way: Transition, y: int) -> Iterator[str]:
    sources = [X[status] for status in TaskStatus if status in way.sources] or [BORN]
    target = X[way.target]
    # the longest line from each side: it passes the dots of the others
    ends = {min([target, *sources]), max([target, *sources])} - {target}
    names = " ".join(status for status in TaskStatus if status in way.sources)
    yield (
        f"<g class='way' data-name={quoteattr(way.name)} "
        f'data-from="{names}" data-to="{way.target}">'
    )
    yield f'<text class="name" stroke="none" x="140" y="{y + 5}">{way.name}</text>'
    yield from (f'<circle cx="{x}" cy="{y}" r="5"/>' for x in sources)
    for x in sorted(ends):
        side = 1 if x > target else -1
        yield f'<line x1="{x}" y1="{y}" x2="{target + side * 10}" y2="{y}"/>'
        yield f'<path d="M{target + side * 2} {y} l{side * 12} -6 v12 z"/>'
    yield "</g>"


if __name__ == "__main__":
    PICTURE.write_text(draw())
