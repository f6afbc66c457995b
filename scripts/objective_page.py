"""Writes what the registry of losses says: the table of docs/objectives/README.md, the names in conf/_objective.yaml.

python scripts/objective_page.py
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from gspo_lightning.objective import LOSSES, LossSpec
from gspo_lightning.objective.aggregation import AGGREGATIONS
from gspo_lightning.objective.ratios import CLIP_WIDTHS

ROOT = Path(__file__).resolve().parents[1]
HEAD = "| `loss_type` | loss of a token | ratio level | average | default clip | settings |"


def table() -> str:
    """One Markdown row per loss."""
    return "\n".join([HEAD, "|---|---|---|---|---|---|", *(_row(name, spec) for name, spec in LOSSES.items())])


def _row(name: str, spec: LossSpec) -> str:
    formula = (spec.function.__doc__ or "").split("``")[1]
    levels = ", ".join(spec.levels) or "none"
    cells = [
        f"[`{name}`]({name}.md)",
        f"`{formula}`",
        f"{levels}; one loss per completion" if spec.shares_one_loss else levels,
        f"`{AGGREGATIONS[spec.aggregation].formula}`",
        _clip(spec),
        ", ".join(f"`{key}`" for key in spec.settings) or "none",
    ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _clip(spec: LossSpec) -> str:
    if spec.clip is None:
        return "none"
    if spec.epsilons is not None and "epsilon" not in spec.reads:
        return f"ratio at most {spec.epsilons[1]:g}"
    if spec.epsilons is not None:
        return f"{spec.epsilons[0]:g} / {spec.epsilons[1]:g}"
    widths = {level: CLIP_WIDTHS[level] for level in ("token", "sequence") if level in spec.levels}
    return "; ".join(f"{level} {low:g} / {high:g}" for level, (low, high) in widths.items())


def names() -> str:
    """A comment of all names, in lines of at most 120 characters that end with a bar."""
    joined = " | ".join(LOSSES).replace(" |", "\u00a0|")
    return textwrap.fill(joined, 120, initial_indent="# ", subsequent_indent="# ").replace("\u00a0", " ")


WRITTEN = {
    "docs/objectives/README.md": (r"^\| `loss_type` (?:.*\|\n)+", table),
    "conf/_objective.yaml": (r"^# grpo \|(?:.*\n)+?(?=loss_type:)", names),
}
"""File -> the lines that are written, as a pattern, and what writes them."""


def current(name: str) -> str:
    """The whole file as it should be."""
    pattern, lines = WRITTEN[name]
    text, count = re.subn(pattern, lambda _: lines() + "\n", (ROOT / name).read_text(), flags=re.MULTILINE)
    assert count == 1, f"{name} has {count} places to write to"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for file in WRITTEN:
        (ROOT / file).write_text(current(file))
        print(ROOT / file)
