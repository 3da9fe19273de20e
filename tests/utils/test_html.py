"""Pages: everything is escaped, nothing is fetched or run, and charts show the numbers they are given."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Page

from minilora.utils.html import (
    HEIGHT,
    WIDTH,
    Html,
    Line,
    bar,
    cards,
    chart,
    escape,
    page,
    section,
    short,
    smoothed,
    table,
    tag,
    thinned,
    ticks,
)

NASTY = "<script>alert(1)</script> & \"quoted\" 'too' \ud800 </style> <b onclick=x>"


def test_nothing_that_is_shown_becomes_markup():
    """Every way onto a page, with the text that would love to be more than text."""
    parts = [
        section(NASTY, NASTY),
        cards([(NASTY, NASTY, NASTY)]),
        table((NASTY,), [(NASTY,)]),
        tag("p", NASTY, class_=NASTY),
        chart(NASTY, NASTY, [Line(NASTY, [(1, 2), (2, 3)])]),
    ]
    found = Page(page(NASTY, *parts))
    readable = NASTY.encode("utf-8", "replace").decode()
    assert found.text.count("alert(1)") == len(found.text.split("<script>")) - 1 == 12
    assert readable in found.of("title")
    assert readable in found.of("td")
    assert [attributes["class"] for attributes in found.attributes("p")] == [readable]
    found.source.encode()


def test_what_is_html_already_stays():
    assert tag("p", tag("b", "x"), 1, Html("<i></i>")) == "<p><b>x</b>1<i></i></p>"
    assert escape(escape("<")) == "&lt;"
    assert tag("circle", stroke_width=2, viewBox="0 0 1 1", class_="a") == (
        '<circle stroke-width="2" viewBox="0 0 1 1" class="a"></circle>'
    )


def test_a_table_knows_its_numbers():
    found = Page(page("x", table(("a", "b"), [("c", 1), ("d", 2)], numbers=(1,))))
    assert found.of("th", "td") == ["a", "b", "c", "1", "d", "2"]
    assert [each.get("class") for each in found.attributes("td")] == [None, "number"] * 2


@pytest.mark.parametrize(
    ("share", "width"), [(0, "0.00%"), (0.5, "50.00%"), (1, "100.00%"), (7, "100.00%"), (-1, "0.00%")]
)
def test_a_bar_stays_in_its_place(share, width):
    assert f"width:{width}" in bar(share)


# ---------------------------------------------------------------------------------------- charts


def coordinates(found: Page) -> list[list[tuple[float, float]]]:
    """The points of each polyline."""
    lines = [attributes["points"].split() for attributes in found.attributes("polyline")]
    return [[tuple(map(float, point.split(","))) for point in line] for line in lines]


def test_a_chart_shows_its_numbers():
    """Higher values lie higher, equal distances are equal, and the pointer finds each value."""
    points = [(1, 4.0), (2, 2.0), (3, 3.0), (5, 3.0)]
    found = Page(page("x", chart("Loss", "nats", [Line("training", points)])))
    ((a, b, c, d),) = coordinates(found)
    assert a[1] < c[1] == d[1] < b[1]
    assert b[1] - c[1] == pytest.approx(c[1] - a[1], abs=0.11)
    assert d[0] - c[0] == pytest.approx(2 * (b[0] - a[0]), abs=0.21)
    assert [text for text in found.of("title") if "step" in text] == [
        "training, step 1: 4", "training, step 2: 2", "training, step 3: 3", "training, step 5: 3"
    ]  # fmt: skip
    labels = [float(text) for text in found.of("text")]
    assert {1, 2, 3, 4, 5} <= set(labels)
    assert "training" in found.of("b")


def test_lines_that_lie_on_each_other_are_both_seen():
    points = [(1, 4.0), (2, 2.0)]
    found = Page(page("x", chart("x", "", [Line("a", points, 0), Line("b", points, 1), Line("c", points, 2)])))
    widths = [float(each["stroke-width"]) for each in found.attributes("polyline")]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] >= widths[1] + 0.5 >= widths[2] + 1.0
    found = Page(page("x", chart("x", "", [Line("a", points, 0, "dots"), Line("b", points, 1, "dots")])))
    below, above = (float(each["r"]) for each in found.attributes("circle")[::2])
    assert below > above


@pytest.mark.parametrize("high", [1.0, 1.4, 2.1, 2.7, 3.5, 5.5, 7.0, 9.9])
def test_an_axis_has_enough_numbers(high):
    found = Page(page("x", chart("x", "", [Line("", [(1, 0.0), (2, high)])])))
    assert 3 <= len(found.of("text")) - 2 <= 8  # two are of the steps


finite = st.floats(-1e30, 1e30, allow_subnormal=False)


@given(st.lists(st.tuples(st.integers(0, 10**7), finite), min_size=1, max_size=30), st.sampled_from(["line", "dots"]))
def test_whatever_the_numbers_the_chart_stays_in_its_frame(points, style):
    found = Page(page("x", chart("x", "", [Line("", sorted(points), 0, style), Line("", [(0.0, 1.0)], 1, "dashed")])))
    places = [place for line in coordinates(found) for place in line]
    places += [(float(each["cx"]), float(each["cy"])) for each in found.attributes("circle")]
    places += [(float(each["x"]), float(each["y"])) for each in found.attributes("text")]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places), places
    assert len(found.of("text")) <= 20


def test_no_points_no_chart():
    assert chart("x", "", [Line("a", [])]) == ""
    assert "polyline" in chart("x", "", [Line("a", []), Line("b", [(1, 1)])])


def test_many_points_become_few_that_mean_the_same():
    points = [(float(i), math.sin(i / 50)) for i in range(10_000)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert few[-1] == points[-1]
    assert [x for x, _ in few] == sorted(x for x, _ in few)
    assert all(y == pytest.approx(math.sin(x / 50), abs=0.3) for x, y in few[:-1])
    assert sum(y for _, y in few) / 100 == pytest.approx(sum(y for _, y in points) / 10_000, abs=0.01)
    assert thinned(points[:100], 100) == points[:100]


def test_smooth_is_the_mean_around_a_point():
    points = [(float(x), y) for x, y in enumerate([3.0, 0.0, 6.0, 0.0, 9.0])]
    assert smoothed(points, 3) == [(0, 3.0), (1, 3.0), (2, 2.0), (3, 5.0), (4, 9.0)]
    straight = [(float(x), 2.0 * x) for x in range(50)]
    assert [y for _, y in smoothed(straight, 9)] == pytest.approx([y for _, y in straight])  # no lag


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(2, 6))
def test_ticks_are_round_and_inside(low, width, about):
    high = low + width
    found = ticks(low, high, about)
    assert len(found) <= about + 2
    slack = 1e-6 * width + 1e-9 * abs(low)
    assert all(low - slack <= value <= high + slack for value in found)
    gaps = {round((b - a) / width, 6) for a, b in itertools.pairwise(found)}
    assert len(gaps) <= 1 or abs(low) > 1e6 * width


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (2.34567, "2.35"),
        (1e-4, "1e-4"),
        (0.00025, "2.5e-4"),
        (-3e-7, "-3e-7"),
        (12345.6, "12,346"),
        (1e9, "1e9"),
        (-2000, "-2,000"),
    ],
)
def test_numbers_in_few_characters(value, text):
    assert short(value) == text
