"""Charts as SVG, and the curves under them: bounded, whole, and readable aloud."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd3tune import charts
from sd3tune.curves import MOST, Series, curve_of
from sd3tune.history import smooth

FINITE = st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=300)


@settings(max_examples=60)
@given(FINITE, st.sampled_from([2, 4, 8, 64]))
def test_a_curve_is_bounded_and_keeps_every_peak_and_the_exact_average(values: list[float], most: int) -> None:
    series = Series(most)
    for step, value in enumerate(values, 1):
        series.add(step, value)
        curve = series.curve
        assert len(curve.stretches) <= most
        assert curve.latest == (step, value)
    assert min(s.low for s in curve.stretches) == min(values)
    assert max(s.high for s in curve.stretches) == max(values)
    assert curve.stretches[0].first == 1
    assert curve.stretches[-1].last == len(values)
    assert all(one.last < other.first for one, other in zip(curve.stretches, curve.stretches[1:], strict=False))
    averages = smooth(values)
    assert [s.smooth for s in curve.stretches] == pytest.approx([averages[s.last - 1] for s in curve.stretches], rel=1e-12)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    curve = curve_of([(1, 1.0), (2, math.nan), (3, math.inf), (4, 3.0)])
    assert [(s.first, s.low) for s in curve.stretches] == [(1, 1.0), (4, 3.0)]
    assert curve.not_finite == 2


@pytest.mark.parametrize("count", [0, 1, 2, 401, 5000])
@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_the_curve_is_valid_xml_without_nan_and_bounded(count: int, value: float) -> None:
    losses = [(k + 1, value if k % 3 == 0 else k * 0.1) for k in range(count)]
    svg = charts.line(curve_of(losses), [(0, value)], total=count, marks=[1], name="a < b & c")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("viewBox")
    drawn = " ".join(p.get("d", "") for p in root.iter())
    assert not re.search("nan|inf", drawn)
    assert max((p.get("d", "").count("L") for p in root.iter()), default=0) <= 2 * MOST + 4
    assert "currentColor" in svg
    assert "#000000" not in svg


def test_the_curve_can_be_read_aloud() -> None:
    root = ElementTree.fromstring(charts.line(curve_of([(1, 0.9), (2, 0.61234)]), [(2, 0.7)]))
    assert root.get("aria-label") == "loss 0.612 at step 2; 0.7 on held-out pictures"


def test_names_inside_two_charts_of_a_page_never_meet() -> None:
    """Browsers take the first element of a name on the page, also one of a chart that is hidden."""
    one, other = charts.line(curve_of([(1, 0.9)])), charts.line(curve_of([(1, 0.8)]))
    names = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, other)]
    assert names[0]
    assert not names[0] & names[1]
    for text, own in zip((one, other), names, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= own


def test_a_strip_says_every_number_and_draws_every_band() -> None:
    a, b = curve_of([(1, 0.5), (2, 0.4)]), curve_of([(1, 0.7), (2, 0.6)])
    svg = charts.strip({"learning rate": a, "loss by noise level": {"0 to 0.25": a, "0.25 to 0.5": b}}, total=4, marks=[1])
    says = ElementTree.fromstring(svg).get("aria-label", "")
    assert says == (
        "learning rate 0.4 at step 2; loss by noise level 0 to 0.25 0.4 at step 2, loss by noise level 0.25 to 0.5 0.6 at step 2"
    )
    assert all(colour in svg for colour in charts.BANDS[:2])


def test_bars_are_as_high_as_their_shares() -> None:
    """Ten bars whose heights are to each other as what was drawn; the shares are said in words."""
    counts = (100, 200, 0, 50, 50, 100, 100, 100, 100, 200)
    root = ElementTree.fromstring(charts.levels(counts))
    bars = [p.get("d", "") for p in root.iter() if charts.ACCENT in p.get("style", "")]
    heights = []
    for bar in bars:
        ys = [float(y) for _, y in re.findall(r"([\d.-]+) ([\d.-]+)", bar)]
        heights.append(max(ys) - min(ys))
    assert heights == pytest.approx([max(heights) * count / 200 for count in counts], abs=0.01)
    assert root.get("aria-label", "").endswith("10, 20, 0, 5, 5, 10, 10, 10, 10, 20")


def test_what_is_exact_is_not_smoothed() -> None:
    """A rate that was halved is a step in the chart and no slope."""
    halved = curve_of([(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)])
    exact, smoothed = (charts.strip({"learning rate": halved}, exact=names) for names in (("learning rate",), ()))
    lines = []
    for svg in (exact, smoothed):
        path = next(
            p for p in ElementTree.fromstring(svg).iter() if charts.ACCENT in p.get("style", "") and "fill: none" in p.get("style", "")
        )
        lines.append([float(y) for _, y in re.findall(r"([\d.-]+) ([\d.-]+)", path.get("d", ""))])
    assert lines[0][2] == lines[0][3] == max(lines[0])
    assert lines[1][2] < lines[1][3]
