"""``README.md`` of an exported model: what it is made of, by which method, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo_lightning.objective.losses import LOSSES

LICENCE_NOTE = "The licence of the base model holds for this one."


def model_card(plain: dict[str, Any], summary: dict[str, Any], *, is_adapter: bool) -> str:
    """The card, with the front matter that the hub reads.

    Args:
        plain: the resolved config, with nothing secret in it.
        summary: of `gspo_lightning.report.summary.write_summary`.
        is_adapter: whether the folder holds an adapter alone.
    """
    base, objective = plain["model"]["path"], plain["objective"]
    loss = _loss(objective["loss_type"])
    method = _method(loss, objective["importance_sampling_level"])
    tags = ["reinforcement-learning", method.lower().replace(". ", "-"), "gspo_lightning"]
    # A folder of one's own is no model of the hub, and the hub refuses a card that names it as one.
    is_name = base.count("/") == 1 and not base.startswith(("/", ".")) and ":" not in base
    on_hub = is_name and not Path(base).exists()
    front = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        f"tags: {json.dumps(tags)}",
        "---",
    ]
    rows = [
        ("held-out accuracy, greedy", "val_accuracy"),
        ("held-out accuracy, sampled", "val_sampled"),
        ("held-out reward", "val_reward"),
    ]
    table = [
        f"| {label} | {_number(summary[f'{key}_before'])} | {_number(summary[f'{key}_after'])} |" for label, key in rows
    ]
    task = plain["data"]["task"]
    name = task.get("name") or task.get("_target_", "").rpartition(".")[2] if isinstance(task, dict) else str(task)
    prompts, completions = plain["data"]["prompts_per_rollout"], plain["rollout"]["num_generations"]
    return "\n".join(
        [
            *front,
            "",
            f"# {'An adapter for ' if is_adapter else ''}{base}, trained by {method}",
            "",
            f"{method} (`loss_type={loss}`{_ratio(loss, objective['importance_sampling_level'])}) on the task "
            f"`{name}`: {summary['steps']} rollouts of {prompts} prompts with {completions} completions each, "
            f"{summary['optimizer_steps']} optimizer steps, seed {plain['seed']}.",
            "",
            "| | before | after |",
            "|---|---|---|",
            *table,
            "",
            LICENCE_NOTE,
            "",
        ]
    )


def _loss(loss_type: Any) -> str:
    """The name of a loss of the project, or that of the function or class that the config names instead."""
    if isinstance(loss_type, dict):
        return str(loss_type.get("path") or loss_type["_target_"]).rpartition(".")[2]
    return str(loss_type)


def _method(loss: str, level: str) -> str:
    """How papers call it: GSPO and GRPO are one loss with two ratios, the others have a name of their own."""
    if loss == "grpo":
        return "GRPO" if level == "token" else "GSPO"
    if loss not in LOSSES:
        return loss
    return "Dr. GRPO" if loss == "dr_grpo" else loss.upper()


def _ratio(loss: str, level: str) -> str:
    has_ratio = loss not in LOSSES or LOSSES[loss].levels
    return f", importance ratio per {level}" if has_ratio else ""


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
