"""The image of the ratios: lengths are the numbers."""

from __future__ import annotations

import re

from benchmarks.results_plot import LEFT, WIDTH, plot


def test_bars_and_spreads_are_in_proportion_and_scenarios_without_trl_are_left_out():
    ratios = {"step_wall": [6.0, 7.0, 8.0], "memory": [2.0, 2.0, 2.0]}
    image = plot({"quickstart": {"ratios": ratios}, "alone": {}}, "A machine", 2)
    widths = {
        kind: float(w) for kind, w in re.findall(r'class="(\w+)" x="\d+" y="\d+" width="([\d.]+)" height="14"', image)
    }
    assert widths == {"time": round(7 / 8 * WIDTH, 1), "memory": WIDTH / 4}
    spread = re.search(r'class="spread" x1="([\d.]+)" x2="([\d.]+)"', image)
    assert [float(x) for x in spread.groups()] == [LEFT + 0.75 * WIDTH, LEFT + WIDTH]
    assert "quickstart" in image and "alone" not in image
