"""Line charts as inline SVG: no script, no link, readable on a phone, in light and dark."""

from __future__ import annotations

import math
from html import escape

from gspo_lightning.report.files import Series

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 48, 12, 14, 30


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover ``[low, high]``, about ``count`` of them."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def line_chart(title: str, lines: dict[str, Series], unit: str = "") -> str:
    """One chart of up to a few named lines over the rollouts; an empty string if there is nothing to draw."""
    lines = {name: series for name, series in lines.items() if series}
    points = [point for series in lines.values() for point in series]
    if not points:
        return ""
    ticks_x = nice_ticks(min(x for x, _ in points), max(x for x, _ in points))
    ticks_y = nice_ticks(min(y for _, y in points), max(y for _, y in points))
    parts = [
        f'<figure><figcaption>{escape(title)}{f" <small>{escape(unit)}</small>" if unit else ""}</figcaption>',
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_in_words(title, lines))}">',
    ]
    scale = _Scale(ticks_x[0], ticks_x[-1], ticks_y[0], ticks_y[-1])
    for tick in ticks_y:
        y = scale.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in ticks_x:
        parts.append(f'<text class="tick" x="{scale.x(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{_label(tick)}</text>')
    for number, (name, series) in enumerate(lines.items()):
        parts.append(_line(name, series, scale, number))
    parts.append("</svg>")
    if len(lines) > 1:
        names = "".join(f'<span class="key s{n}">{escape(name)}</span>' for n, name in enumerate(lines))
        parts.append(f'<p class="keys">{names}</p>')
    return "".join([*parts, "</figure>"])


class _Scale:
    def __init__(self, x0: float, x1: float, y0: float, y1: float) -> None:
        self.x0, self.dx = x0, (WIDTH - LEFT - RIGHT) / (x1 - x0)
        self.y0, self.dy = y0, (HEIGHT - TOP - BOTTOM) / (y1 - y0)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) * self.dx

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) * self.dy


def _line(name: str, series: Series, scale: _Scale, number: int) -> str:
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in series)
    dots = "".join(
        f'<circle class="s{number}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="{2.5 if len(series) <= 60 else 1}">'
        f"<title>{escape(name)}, rollout {x:g}: {y:.4g}</title></circle>"
        for x, y in series
    )
    return f'<polyline class="s{number}" points="{path}"/>{dots}'


def _in_words(title: str, lines: dict[str, Series]) -> str:
    return f"{title}: " + "; ".join(f"{n} from {s[0][1]:.4g} to {s[-1][1]:.4g}" for n, s in lines.items())


def _label(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value / 1000:.4g}k"
