"""`python -m gspo_lightning.objective.table` prints the table of docs/objectives/README.md from the registry."""

from __future__ import annotations

import argparse

from gspo_lightning.objective.aggregation import AGGREGATIONS
from gspo_lightning.objective.losses import LOSSES
from gspo_lightning.objective.ratios import CLIP_WIDTHS


def table() -> str:
    """One Markdown row per loss: formula, ratio levels, average over tokens, default clip."""
    lines = ["| `loss_type` | loss of a token | ratio level | average | default clip |", "|---|---|---|---|---|"]
    for name, spec in LOSSES.items():
        formula = (spec.function.__doc__ or "").split("``")[1].replace("|", "\\|")
        lines.append(
            f"| [`{name}`]({name}.md) | `{formula}` | {', '.join(spec.levels) or 'none'} "
            f"| `{AGGREGATIONS[spec.aggregation].formula}` | {_clip(name)} |".replace("|y_i|", "\\|y_i\\|")
        )
    return "\n".join(lines)


def _clip(name: str) -> str:
    spec = LOSSES[name]
    if spec.clip is None:
        return "none"
    if spec.epsilons is not None and "epsilon" not in spec.reads:
        return f"ratio at most {spec.epsilons[1]:g}"
    if spec.epsilons is not None:
        return f"{spec.epsilons[0]:g} / {spec.epsilons[1]:g}"
    widths = {level: CLIP_WIDTHS[level] for level in ("token", "sequence")}
    return "; ".join(f"{level} {low:g} / {high:g}" for level, (low, high) in widths.items())


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(table())
