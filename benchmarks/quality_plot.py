"""What `scripts/quality_per_time.py` measured, in words and as a plot for the README."""

from __future__ import annotations

import re
from typing import Any

from gspo_lightning.report.runs import mean_and_halfwidth
from gspo_lightning.report.svg import Band, line_chart

NAMES = {"ours": "gspo_lightning", "trl": "TRL 1.16.0"}
Curves = dict[str, dict[str, dict[str, list[float]]]]
"""Side -> seed -> ``reward`` and ``seconds``."""

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #444 } .tick { fill: #666 } .grid { stroke: #ddd }
polyline { fill: none; stroke-width: 2 } polyline.s0 { stroke: #0b6bcb } polyline.s1 { stroke: #c2410c }
circle.s0, rect.s0 { fill: #0b6bcb } circle.s1, rect.s1 { fill: #c2410c }
polygon { opacity: .18 } polygon.s0 { fill: #0b6bcb } polygon.s1 { fill: #c2410c }
@media (prefers-color-scheme: dark) { text { fill: #ccc } .tick { fill: #aaa } .grid { stroke: #444 }
polyline.s0 { stroke: #6cb4ff } polyline.s1 { stroke: #ff9b6b } circle.s0, rect.s0, polygon.s0 { fill: #6cb4ff }
circle.s1, rect.s1, polygon.s1 { fill: #ff9b6b } }
"""


def summary(curves: Curves) -> str:
    """Seconds per rollout, reward of the last five rollouts, and reward reached in the time ours took."""
    lines = ["| | seconds per rollout | reward, last 5 rollouts (seeds) | mean |", "|---|---|---|---|"]
    pace = {}
    for side, seeds in curves.items():
        pace[side] = [(c["seconds"][-1] - c["seconds"][2]) / (len(c["seconds"]) - 3) for c in seeds.values()]
        late = [sum(c["reward"][-5:]) / 5 for c in seeds.values()]
        lines.append(
            f"| {NAMES[side]} | {min(pace[side]):.1f} to {max(pace[side]):.1f} "
            f"| {', '.join(f'{x:.2f}' for x in late)} | {sum(late) / len(late):.2f} |"
        )
    if len(pace) == 2:
        ratios = [slow / fast for slow, fast in zip(pace["trl"], pace["ours"], strict=True)]
        lines.append(f"\nTime per rollout, TRL / ours, by seed: {', '.join(f'{x:.1f}' for x in ratios)}")
        for seed, ours in curves["ours"].items():
            trl = curves["trl"][seed]
            reached = sum(second <= ours["seconds"][-1] for second in trl["seconds"])
            lines.append(
                f"Seed {seed}: when ours began its last rollout ({ours['seconds'][-1]:.0f} s, reward "
                f"{ours['reward'][-1]:.2f}) TRL was in rollout {reached} (reward {trl['reward'][reached - 1]:.2f})"
            )
    return "\n".join(lines)


def plot(curves: Curves) -> str:
    """Reward over rollouts and over minutes: means over seeds with their 95 % confidence bands, one SVG file."""
    over_rollouts, over_minutes, bands, late_bands = {}, {}, {}, {}
    for side, seeds in curves.items():
        count = min(len(c["reward"]) for c in seeds.values())
        stats = [mean_and_halfwidth([c["reward"][i] for c in seeds.values()]) for i in range(count)]
        minutes = [sum(c["seconds"][i] for c in seeds.values()) / len(seeds) / 60 for i in range(count)]
        name = NAMES[side]
        over_rollouts[name] = [(i + 1.0, mean) for i, (mean, _) in enumerate(stats)]
        over_minutes[name] = [(minutes[i], mean) for i, (mean, _) in enumerate(stats)]
        bounds = [(max(0.0, mean - half), min(1.0, mean + half)) for mean, half in stats]
        bands[name] = Band([(i + 1.0, *bound) for i, bound in enumerate(bounds)])
        late_bands[name] = Band([(minutes[i], *bound) for i, bound in enumerate(bounds)])
    left = line_chart("Reward", over_rollouts, reach=(0.0, 1.0), bands=bands)
    right = line_chart("Reward", over_minutes, reach=(0.0, 1.0), bands=late_bands, across="minutes of training")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 270" width="880" height="270"><style>{STYLE}</style>'
        + "".join(
            f'<rect class="s{n}" x="{48 + 150 * n}" y="6" width="12" height="12"/>'
            f'<text x="{66 + 150 * n}" y="17">{name}</text>'
            for n, name in enumerate(over_rollouts)
        )
        + '<text x="370" y="17">mean reward of a rollout, three seeds, 95 % bands</text>'
        + f"{_inner(left, 0)}{_inner(right, 450)}</svg>\n"
    )


def _inner(figure: str, x: int) -> str:
    found: Any = re.search(r"<svg (.*?)>(.*)</svg>", figure, re.DOTALL)
    return f'<svg x="{x}" y="30" width="420" height="230" {found[1]}>{found[2]}</svg>'
