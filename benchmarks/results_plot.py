"""What `scripts/benchmark.py` measured, as a plot: TRL / ours by scenario, in time and in memory."""

from __future__ import annotations

from typing import Any

LEFT, WIDTH, RIGHT, TOP, ROW = 130, 560, 60, 54, 44

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 } .grid { stroke: #ddd } .even { stroke: #888 }
.time { fill: #0b6bcb } .memory { fill: #c2410c } .spread { stroke: #444 }
@media (prefers-color-scheme: dark) { text { fill: #ccc } .grid { stroke: #444 } .spread { stroke: #ccc }
.time { fill: #6cb4ff } .memory { fill: #ff9b6b } }
"""


def plot(scenarios: dict[str, Any], machine: str, threads: int) -> str:
    """One SVG file with two bars per scenario that was run on both sides, and the spread of each.

    Args:
        scenarios: by name, as in ``benchmarks/results.json``.
        machine: its name, for the heading.
        threads: of each side.
    """
    rows = {name: result["ratios"] for name, result in scenarios.items() if "ratios" in result}
    most = max((ratios[kind][2] for ratios in rows.values() for kind in ("step_wall", "memory")), default=1.0)
    unit = WIDTH / most
    bottom = TOP + ROW * len(rows)
    parts = [
        f'<text x="{LEFT}" y="18">TRL / gspo_lightning, {threads} threads, {machine}</text>',
        f'<rect class="time" x="{LEFT}" y="28" width="12" height="12"/>'
        f'<text x="{LEFT + 18}" y="38">time of a step</text>',
        f'<rect class="memory" x="{LEFT + 140}" y="28" width="12" height="12"/>'
        f'<text x="{LEFT + 158}" y="38">peak memory</text>',
    ]
    for tick in range(0, int(most) + 1, 2 if most > 5 else 1):
        x = LEFT + tick * unit
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
    parts.append(f'<line class="even" x1="{LEFT + unit:.1f}" x2="{LEFT + unit:.1f}" y1="{TOP}" y2="{bottom}"/>')
    for number, (name, ratios) in enumerate(rows.items()):
        y = TOP + ROW * number + 6
        parts.append(f'<text x="{LEFT - 8}" y="{y + 20}" text-anchor="end">{name}</text>')
        parts.append(_bar("time", y, ratios["step_wall"], unit))
        parts.append(_bar("memory", y + 17, ratios["memory"], unit))
    size = f"{LEFT + WIDTH + RIGHT} {bottom + 26}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _bar(kind: str, y: int, spread: list[float], unit: float) -> str:
    low, middle, high = spread
    return (
        f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{middle * unit:.1f}" height="14"/>'
        f'<line class="spread" x1="{LEFT + low * unit:.1f}" x2="{LEFT + high * unit:.1f}" y1="{y + 7}" y2="{y + 7}"/>'
        f'<text x="{LEFT + high * unit + 5:.1f}" y="{y + 12}">{middle:.1f}</text>'
    )
