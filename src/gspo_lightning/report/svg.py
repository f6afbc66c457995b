"""Line charts as inline SVG: no script, no link, readable on a phone, in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from gspo_lightning.report.files import Series

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 48, 12, 14, 40
MAX_POINTS = 300
SMOOTH_FROM = 60
"""Number of points from which on values are drawn pale, with a running mean over them."""
COLOURS = 8
"""Colours of the style sheet (``s0`` to ``s7``); further lines reuse them, dashed."""


@dataclass(frozen=True)
class Band:
    """A shaded range around a line."""

    points: list[tuple[float, float, float]]
    """(x, low, high)"""


def nice_ticks(low: float, high: float, count: int = 4, least_step: float = 0.0) -> list[float]:
    """Round numbers that cover ``[low, high]`` in about ``count`` steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-30:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = max(least_step, next((m * magnitude for m in (1, 2, 2.5, 5) if m * magnitude >= raw), 10 * magnitude))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def thin_out(series: Series) -> Series:
    """At most ``MAX_POINTS`` points, each a mean of neighbours, so that the page of a long run stays small."""
    size = math.ceil(len(series) / MAX_POINTS)
    if size <= 1:
        return series
    return [_mean(series[start : start + size]) for start in range(0, len(series), size)]


def running_mean(series: Series) -> Series:
    """Means of a window around each point, a twentieth of the series wide and narrower at the ends."""
    half = max(1, len(series) // 40)
    smooth = []
    for index, (x, _) in enumerate(series):
        reach = min(half, index, len(series) - 1 - index)
        smooth.append((x, _mean(series[index - reach : index + reach + 1])[1]))
    return smooth


def line_chart(
    title: str,
    lines: dict[str, Series],
    unit: str = "",
    span: tuple[float, float] | None = None,
    reach: tuple[float, ...] = (),
    bands: Mapping[str, Band] | None = None,
    across: str = "rollout",
) -> str:
    """One figure of named lines over the rollouts; an empty string if there is nothing to draw.

    Args:
        title: of the figure.
        lines: name -> points.
        unit: of the values.
        span: first and last rollout of the horizontal axis; by default those of the points.
        reach: values that the vertical axis always includes, such as 0 and 1 for a share.
        bands: name of a line -> the range around it.
        across: what the horizontal axis counts.
    """
    numbers = {name: number for number, name in enumerate(lines)}
    lines = {name: series for name, series in lines.items() if series}
    if not lines:
        return ""
    points = [point for series in lines.values() for point in series]
    steps = span or (min(x for x, _ in points), max(x for x, _ in points))
    drawn = {name: band for name, band in (bands or {}).items() if name in lines and band.points}
    edges = [y for band in drawn.values() for _, low, high in band.points for y in (low, high)]
    scale = _Scale(*steps, [y for _, y in points] + edges + list(reach))
    words = escape(_in_words(title, lines))
    return "".join(
        [
            f"<figure><figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>",
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">',
            *_axes(scale, across),
            *(_band(band, scale, numbers[name]) for name, band in drawn.items()),
            *(_line(name, thin_out(series), scale, numbers[name]) for name, series in lines.items()),
            "</svg>",
            _legend(lines, numbers),
            "</figure>",
        ]
    )


class _Scale:
    """Maps data to pixels. The horizontal axis ends with the data, the vertical one at round numbers."""

    def __init__(self, x_low: float, x_high: float, values: list[float]) -> None:
        if x_low == x_high:
            x_low, x_high = x_low - 1, x_high + 1
        ticks_x = nice_ticks(x_low, x_high, count=5, least_step=1.0)
        self.ticks_x, self.ticks_y = (
            [x for x in ticks_x if x_low <= x <= x_high],
            nice_ticks(min(values), max(values)),
        )
        self.x_low, self.dx = x_low, (WIDTH - LEFT - RIGHT) / (x_high - x_low)
        self.y_low = self.ticks_y[0]
        self.dy = (HEIGHT - TOP - BOTTOM) / (self.ticks_y[-1] - self.ticks_y[0])

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) * self.dx

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) * self.dy


def _axes(scale: _Scale, across: str) -> list[str]:
    parts = []
    for tick in scale.ticks_y:
        y, label = scale.y(tick), format_number(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in scale.ticks_x:
        x, y, label = scale.x(tick), HEIGHT - BOTTOM + 16, format_number(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{across}</text>')
    return parts


def _style(number: int) -> str:
    return f"s{number % COLOURS}" + (" again" if number >= COLOURS else "")


def _band(band: Band, scale: _Scale, number: int) -> str:
    low = thin_out([(x, y) for x, y, _ in band.points])
    high = thin_out([(x, y) for x, _, y in band.points])
    corners = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in [*high, *reversed(low)])
    return f'<polygon class="{_style(number)}" points="{corners}"/>'


def _line(name: str, series: Series, scale: _Scale, number: int) -> str:
    noisy = len(series) >= SMOOTH_FROM
    style = _style(number)
    parts = [_path(series, scale, f"{style} pale" if noisy else style)]
    if noisy:
        parts.append(_path(running_mean(series), scale, style))
    for x, y in series:
        # The dots of a long series are invisible, but still show their value under a pointer.
        dot = f'class="hit" r="{5}"' if noisy else f'class="{style}" r="2.6"'
        words = f"{escape(name)}, rollout {x:.6g}: {y:.4g}"
        parts.append(f'<circle {dot} cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}"><title>{words}</title></circle>')
    return "".join(parts)


def _path(series: Series, scale: _Scale, style: str) -> str:
    points = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in series)
    return f'<polyline class="{style}" points="{points}"/>'


def _legend(lines: dict[str, Series], numbers: Mapping[str, int]) -> str:
    notes = {name: " (bold: running mean)" if len(s) >= SMOOTH_FROM else "" for name, s in lines.items()}
    keys = "".join(
        f'<span class="key {_style(numbers[name])}">{escape(name + note)}</span>' for name, note in notes.items()
    )
    return f'<p class="keys">{keys}</p>'


def _in_words(title: str, lines: dict[str, Series]) -> str:
    return f"{title}: " + "; ".join(f"{n} from {s[0][1]:.4g} to {s[-1][1]:.4g}" for n, s in lines.items())


def _mean(series: Series) -> tuple[float, float]:
    return (math.fsum(x for x, _ in series) / len(series), math.fsum(y for _, y in series) / len(series))


def format_number(value: float) -> str:
    """The number with four digits, and ``k`` or ``M`` if it is large."""
    for size, suffix in ((1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else 1e6):.4g}{suffix}"
    return f"{value:.4g}"
