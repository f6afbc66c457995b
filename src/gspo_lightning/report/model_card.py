"""``README.md`` of an exported model: what it is made of, by which method, and what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LICENCE_NOTE = "The licence of the base model holds for this one."


def model_card(plain: dict[str, Any], summary: dict[str, Any], *, is_adapter: bool) -> str:
    """The card, with the front matter that the hub reads.

    Args:
        plain: the resolved config, with nothing secret in it.
        summary: of `gspo_lightning.report.summary.write_summary`.
        is_adapter: whether the folder holds an adapter alone.
    """
    base, objective = plain["model"]["path"], plain["objective"]
    method = "GRPO" if objective["importance_sampling_level"] == "token" else "GSPO"
    tags = ["reinforcement-learning", method.lower(), "gspo_lightning"]
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
    return "\n".join(
        [
            *front,
            "",
            f"# {'An adapter for ' if is_adapter else ''}{base}, trained by {method}",
            "",
            f"{method} (`loss_type={objective['loss_type']}`, importance ratio per "
            f"{objective['importance_sampling_level']}) on the task `{name}`: {summary['steps']} rollouts of "
            f"{plain['data']['prompts_per_rollout']} prompts with {plain['rollout']['num_generations']} completions "
            f"each, {summary['optimizer_steps']} optimizer steps, seed {plain['seed']}.",
            "",
            "| | before | after |",
            "|---|---|---|",
            *table,
            "",
            LICENCE_NOTE,
            "",
        ]
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
