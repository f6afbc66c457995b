"""Charts: where points land, ticks, thinning, and what a reader without eyes or with a pointer gets."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_lightning.report.svg import format_number, line_chart, nice_ticks, running_mean, thin_out

NUMBERS = st.floats(-1e12, 1e12, allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.117, 0.986, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (7.5, 14.2, [6.0, 8.0, 10.0, 12.0, 14.0, 16.0]),
        (-3.0, 950.0, [-250.0, 0.0, 250.0, 500.0, 750.0, 1000.0]),
        (5.0, 5.0, [4.5, 4.75, 5.0, 5.25, 5.5]),
        (0.0, 0.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_numbers_around_the_data(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks, rel=1e-12, abs=1e-12)


def test_ticks_of_rollouts_are_whole():
    assert nice_ticks(1, 3, count=5, least_step=1.0) == [1.0, 2.0, 3.0]


@given(NUMBERS, NUMBERS)
def test_ticks_always_cover_the_data_and_are_few(a, b):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    slack = 1e-6 * (ticks[1] - ticks[0])
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 3 <= len(ticks) <= 7
    assert all(math.isfinite(tick) for tick in ticks)


def test_a_long_series_is_thinned_to_means_of_neighbours():
    series = [(float(n), float(n % 2)) for n in range(1000)]
    thin = thin_out(series)
    assert len(thin) == 250
    assert thin[0] == (1.5, 0.5) and thin[-1] == (997.5, 0.5)
    assert thin_out(series[:300]) == series[:300]


def test_the_running_mean_is_centred_and_keeps_a_straight_line():
    line = [(float(n), 2.0 * n - 5) for n in range(200)]
    assert [y for _, y in running_mean(line)] == pytest.approx([y for _, y in line], abs=1e-12)
    bump = [(float(n), 1.0 if n == 50 else 0.0) for n in range(100)]
    assert [y for _, y in running_mean(bump)[46:55]] == pytest.approx([0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0])


def draw(lines, span=(0.0, 10.0), **kwargs):
    return ElementTree.fromstring(line_chart("Clipped", lines, "share", span, **kwargs))


def test_points_land_where_the_axes_say():
    figure = draw({"greedy": [(0.0, 0.0), (5.0, 0.25), (10.0, 1.0)]})
    ticks = {
        t.text: (float(t.get("x")), float(t.get("y")) - 4) for t in figure.iter("text") if t.get("text-anchor") == "end"
    }
    below = {t.text: float(t.get("x")) for t in figure.iter("text") if t.get("text-anchor") == "middle"}
    points = [(float(c.get("cx")), float(c.get("cy"))) for c in figure.iter("circle")]
    assert points[0] == pytest.approx((below["0"], ticks["0"][1]))
    assert points[1][1] == pytest.approx(ticks["0.25"][1])
    assert points[2] == pytest.approx((below["10"], ticks["1"][1]))
    assert points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2)
    assert points[2][1] < points[0][1]  # more is further up
    assert "rollout" in below


def test_a_chart_tells_its_values_to_a_pointer_and_to_a_screen_reader():
    figure = draw({"below": [(1.0, 0.5), (2.0, 0.125)], "above": [(1.0, 0.0), (2.0, 0.25)], "gone": []})
    svg = next(figure.iter("svg"))
    assert svg.get("role") == "img"
    assert svg.get("aria-label") == "Clipped: below from 0.5 to 0.125; above from 0 to 0.25"
    assert "above, rollout 2: 0.25" in [title.text for title in figure.iter("title")]
    assert [key.text for key in figure.iter("span")] == ["below", "above"]


def test_no_data_draws_nothing_and_one_point_draws_a_chart():
    assert line_chart("Reward", {"reward": []}) == ""
    assert len(list(draw({"reward": [(3.0, 0.5)]}, span=None).iter("circle"))) == 1


def test_the_axis_of_a_share_reaches_from_zero_to_one():
    figure = draw({"greedy": [(0.0, 0.4), (10.0, 0.6)]}, reach=(0.0, 1.0))
    assert [t.text for t in figure.iter("text") if t.get("text-anchor") == "end"] == [
        "0",
        "0.25",
        "0.5",
        "0.75",
        "1",
    ]


def test_a_noisy_series_has_a_running_mean_over_pale_values():
    series = [(float(n), float(n % 2)) for n in range(1, 101)]
    figure = draw({"reward": series}, span=(1.0, 100.0))
    assert [line.get("class") for line in figure.iter("polyline")] == ["s0 pale", "s0"]
    assert "running mean" in next(figure.iter("span")).text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.25, "0.25"), (9999.0, "9999"), (12500.0, "12.5k"), (-2.5e6, "-2.5M"), (3e-5, "3e-05")],
)
def test_numbers_are_short(value, text):
    assert format_number(value) == text
