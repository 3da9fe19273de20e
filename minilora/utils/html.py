"""Functions that build HTML pages: one file without scripts or network access, with charts as inline SVG.

Every value on a page is escaped, unless it is of type `Html`, which only this module makes.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

MAX_POINTS = 160  # of a line; a chart of this width cannot show more
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 210, 50, 10, 10, 24  # of a chart, in units of its viewBox
NUM_COLOURS = 6
FAINT, THIN, THICK = 1.1, 1.6, 3.6  # widths of a faint line, of the top line and of the bottom line of a style
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # with it a browser loads and runs nothing
STYLE = """
:root { color-scheme: light dark; --page: #f6f7f8; --card: #fff; --ink: #1c2430; --soft: #5d6878; --line: #dfe3e8;
  --good: #0b6e3f; --goodback: #d9f2e3; --c0: #0064b0; --c1: #c44a00; --c2: #00805c; --c3: #a8407c; --c4: #7a5c00;
  --c5: #5a52c0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12161b; --card: #1b2027; --ink: #e4e8ee; --soft: #98a4b3; --line: #323a45; --good: #7fdcaa;
    --goodback: #143a27; --c0: #5ab0f0; --c1: #ff9256; --c2: #45d0a5; --c3: #f08cc4; --c4: #e5c04a; --c5: #a8a0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; }
small { text-wrap: balance; }
main { max-width: 1180px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.5em; margin: .4em 0 .1em; overflow-wrap: anywhere; }
h2 { font-size: 1.1em; margin: 1.8em 0 .6em; }
.soft, small { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(max(160px, 22%), 1fr)); gap: 10px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(330px, 100%), 1fr)); gap: 12px; }
.card, figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; }
.card b { display: block; font-size: 1.25em; font-weight: 600; overflow-wrap: anywhere; }
.card > span, .card small { display: block; font-size: .85em; }
figcaption { font-weight: 600; } figcaption small { font-weight: 400; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--line); } .plot { fill: none; stroke: currentColor; stroke-linejoin: round; }
.faint { opacity: .35; } .dashed { stroke-dasharray: 5 4; } .dot { fill: currentColor; }
.near { fill: transparent; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); }
.legend { font-size: .85em; display: flex; flex-wrap: wrap; gap: 2px 14px; overflow-wrap: anywhere; }
.legend b { font-weight: 400; }
.legend i { display: inline-block; width: 16px; margin-right: 5px; border-top: 3px solid;
  vertical-align: middle; } .legend i.dashed { border-top-style: dashed; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 5px 12px; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; min-width: 4.5em; }
tbody th { white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; } td:first-child:not(.number) { min-width: 8em; }
 th { color: var(--soft); font-weight: 500; font-size: .9em; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 1%;
  min-width: 0; }
td code { white-space: nowrap; }
code, pre { font-family: ui-monospace, monospace, "Noto Sans Mono CJK SC"; font-size: .9em; }
.row { margin-bottom: 12px; } .row p { margin: .2em 0 .6em; } .row .reply + p { margin-top: .9em; }
.card.row b { font-size: 1em; }
.reply { display: grid; grid-template-columns: 5.5em 1fr; gap: 0 12px; margin-top: .4em; overflow-wrap: anywhere; }
.reply > .soft { font-size: .85em; line-height: 1.75; }
summary { cursor: pointer; font-size: .9em; margin-top: .6em; }
.chips span { display: inline-block; border: 1px solid var(--line); border-radius: 4px; padding: 0 5px; margin: 2px;
  font-size: .85em; white-space: pre-wrap; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; } .text { white-space: pre-wrap; }
.command { padding-left: 1.5em; text-indent: -1.5em; } .command + .command { margin-top: .35em; }
.bar { display: block; height: 10px; margin-top: 6px; min-width: 1px; border-radius: 2px; background: currentColor; }
mark { background: var(--goodback); color: var(--good); } .control { color: var(--c5); }
.cut { color: var(--soft); text-decoration: line-through; }
@media (max-width: 600px) { main { padding: 10px; } th, td { padding: 4px 6px; } table { font-size: .9em; }
  .card b { font-size: 1.1em; } }
@media print { body { background: #fff; } figure, .card { break-inside: avoid; } }
"""


class Html(str):
    """A text that is HTML already, so it is not escaped."""


def escape(value: object) -> Html:
    """A value as escaped HTML. Lone surrogates become question marks, since UTF-8 cannot encode them."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(str(value).encode("utf-8", "replace").decode()))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element. The keyword `class_` means class; an underscore inside a keyword means a dash."""
    text = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{text}>{''.join(map(escape, content))}</{name}>")


META = Html(
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
)


def is_page(path: Path) -> bool:
    """Whether a file begins as `page` begins a document."""
    start = f'<!doctype html>\n<html lang="en"><head>{META}'.encode()
    try:
        with open(path, "rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def page(title: str, *sections: Html) -> Html:
    """A complete HTML document."""
    body = tag("body", tag("main", tag("h1", title), *sections))
    head = tag("head", META, tag("title", title), tag("style", Html(STYLE)))
    return Html(f"<!doctype html>\n{tag('html', head, body, lang='en')}\n")


def section(title: str, *content: object) -> Html:
    """A part of a page with its heading."""
    return tag("section", tag("h2", title), *content)


def cards(facts: Iterable[tuple[str, str, str]]) -> Html:
    """A row of cards, one for each fact (name, value, remark)."""
    shown = [tag("div", tag("span", name, class_="soft"), tag("b", value), tag("small", remark), class_="card")
             for name, value, remark in facts]  # fmt: skip
    return tag("div", *shown, class_="cards")


def table(head: Sequence[object], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> Html:
    """A table. The columns `numbers` are aligned right. Without a head, the first column holds the row headings."""

    def line(names: Sequence[str], cells: Sequence[object]) -> Html:
        kinds = [{"class_": "number"} if place in numbers else {} for place in range(len(cells))]
        return tag("tr", *(tag(name, cell, **kind) for name, cell, kind in zip(names, cells, kinds, strict=False)))

    top = tag("thead", line(["th"] * len(head), head)) if head else Html()
    body = [line(["td" if head else "th", *["td"] * (len(row) - 1)], row) for row in rows]
    return tag("div", tag("table", top, tag("tbody", *body)), class_="wide")


def colour(number: int) -> str:
    """The CSS class of colour `number`, modulo NUM_COLOURS."""
    return f"c{number % NUM_COLOURS}"


def bar(share: float, number: int = 0) -> Html:
    """A horizontal bar that fills a share (0 to 1) of the width."""
    return tag("span", class_=f"bar {colour(number)}", style=f"width:{100 * min(1.0, max(0.0, share)):.2f}%")


# ---------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Line:
    """A line of a chart: points in the order of x, in colour `number`.

    style: line, faint (behind other lines), dots (joined by a line), dashed (a level that is not measured)
    """

    label: str
    points: Sequence[tuple[float, float]]
    number: int = 0
    style: str = "line"


def chart(title: str, unit: str, lines: Sequence[Line], from_zero: bool = False) -> Html:
    """A chart of lines over the steps. The pointer shows the value of a point. Without points it is empty."""
    drawn = [Line(line.label, thinned(line.points), line.number, line.style) for line in lines if line.points]
    if not drawn:
        return Html()
    frame = Frame.around([point for line in drawn for point in line.points], from_zero)
    widths = stroke_widths(drawn)
    picture = tag(
        "svg",
        *frame.axes(),
        *(stroke(frame, line, width) for line, width in zip(drawn, widths, strict=True)),
        *(mark for line, width in zip(drawn, widths, strict=True) for mark in marks(frame, line, width)),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=title,
    )
    keys = {line.label: line for line in drawn if line.label and line.style != "faint"}
    legend = [tag("b", tag("i", class_=f"{colour(line.number)} {line.style}"), label) for label, line in keys.items()]
    return tag(
        "figure",
        tag("figcaption", title, " ", tag("small", unit)),
        picture,
        tag("div", *legend, class_="legend") if legend else "",
    )


@dataclass(frozen=True)
class Frame:
    """The range of values of a chart, and their place on it."""

    left: float
    right: float
    bottom: float
    top: float

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]], from_zero: bool) -> "Frame":
        """The frame that holds these points. It starts at 0 if `from_zero`, or if the values are close to 0."""
        xs, ys = zip(*points, strict=True)
        low, high = min(ys), max(ys)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        bottom = 0.0 if low >= 0 and (from_zero or low < 0.5 * high) else low - margin
        left, right = min(xs), max(xs)
        return cls(left, right if right > left else left + 1, bottom, high + margin)

    def x(self, value: float) -> float:
        """The horizontal coordinate of a step."""
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """The vertical coordinate of a value."""
        return HEIGHT - BOTTOM - (value - self.bottom) / (self.top - self.bottom) * (HEIGHT - BOTTOM - TOP)

    def axes(self) -> list[Html]:
        """The grid lines and their numbers."""
        parts = []
        for value in ticks(self.bottom, self.top, 6):
            height = f"{self.y(value):.1f}"
            parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_="grid"))
            label = {"x": LEFT - 5, "y": height, "text_anchor": "end", "dominant_baseline": "middle"}
            parts.append(tag("text", short(value), **label))
        for value in ticks(self.left, self.right, 5):
            if value == int(value):  # steps are whole numbers
                label = {"x": f"{self.x(value):.1f}", "y": HEIGHT - 7, "text_anchor": "middle"}
                parts.append(tag("text", short(value), **label))
        return parts


def stroke_widths(lines: Sequence[Line]) -> list[float]:
    """A width for each line. Lower lines are wider, so lines that overlap all stay visible."""
    widths = [FAINT if line.style == "faint" else THIN for line in lines]
    for style in ("line", "dots"):
        alike = [i for i, line in enumerate(lines) if line.style == style]
        for above, i in enumerate(reversed(alike)):
            widths[i] = round(THIN + above * (THICK - THIN) / max(1, len(alike) - 1), 2)
    return widths


def stroke(frame: Frame, line: Line, width: float) -> Html:
    """The SVG path of a line."""
    places = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
    return tag("polyline", points=places, stroke_width=width, class_=f"plot {line.style} {colour(line.number)}")


def marks(frame: Frame, line: Line, width: float) -> Iterable[Html]:
    """A circle at each point of a line that shows step and value under the pointer; it is visible for dots."""
    if line.style == "faint":
        return
    visible = line.style == "dots" or len(line.points) == 1
    for x, y in line.points:
        text = f"{line.label + ', ' if line.label else ''}step {x:,.0f}: {short(y)}"
        place = {"cx": f"{frame.x(x):.1f}", "cy": f"{frame.y(y):.1f}", "r": round(width + 1.4, 2) if visible else 5}
        yield tag("circle", tag("title", text), **place, class_=f"{'dot' if visible else 'near'} {colour(line.number)}")


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most `most` points: means of neighbours, then the last point unchanged."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * (len(points) - 1) / (most - 1)) for i in range(most)]
    groups = [points[a:b] for a, b in pairwise(edges)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [*means, points[-1]]


def smoothed(points: Sequence[tuple[float, float]], span: int) -> list[tuple[float, float]]:
    """Each point replaced by the mean of the `span` points centred on it; the window is smaller at both ends."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for i, (x, _) in enumerate(points):
        reach = min(span // 2, i, len(points) - 1 - i)
        found.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return found


def ticks(low: float, high: float, about: int) -> list[float]:
    """About `about` round numbers between low and high."""
    rough = (high - low) / about
    if not 1e-300 < rough < math.inf or low + rough == low:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in few characters."""
    if value == 0 or 0.001 <= abs(value) < 1000:
        return f"{value:.3g}"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"
