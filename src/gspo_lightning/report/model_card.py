"""``README.md`` of an exported model: its base model, the method, and the measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gspo_lightning.objective.losses import LOSSES
from gspo_lightning.report.summary import as_text
from gspo_lightning.screen import counted

LICENCE_NOTE = "The licence of the base model applies to this one."


def model_card(plain: dict[str, Any], summary: dict[str, Any], *, is_adapter: bool) -> str:
    """The model card, with the front matter that the hub reads.

    Args:
        plain: the resolved config, without secrets.
        summary: of `gspo_lightning.report.summary.write_summary`.
        is_adapter: whether the folder holds only an adapter.
    """
    base, objective = plain["model"]["path"], plain["objective"]
    loss = _loss(objective["loss_type"])
    method = _method(loss, objective["importance_sampling_level"])
    tags = ["reinforcement-learning", method.lower().replace(". ", "-"), "gspo_lightning"]
    # A local folder is no model of the hub, and the hub refuses a card that names it as one.
    is_name = base.count("/") == 1 and not base.startswith(("/", ".", "~")) and ":" not in base
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
        f"| {label} | {as_text(summary[f'{key}_before'])} | {as_text(summary[f'{key}_after'])} |" for label, key in rows
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
            f"`{name}`: {counted(summary['steps'], 'rollout')} of {counted(prompts, 'prompt')} "
            f"with {counted(completions, 'completion')} each, "
            f"{counted(summary['optimizer_steps'], 'optimizer step')}, seed {plain['seed']}.",
            "",
            "| | before | after |",
            "|---|---|---|",
            *table,
            "",
            LICENCE_NOTE,
            "",
        ]
    )


def whole_card(card: str) -> str | None:
    """The `model_card` of an adapter as that of the model with the adapter folded in; None for any other text."""
    if "\n# An adapter for " not in card:
        return None
    return card.replace("library_name: peft\n", "library_name: transformers\n", 1).replace("# An adapter for ", "# ", 1)


def _loss(loss_type: Any) -> str:
    """The name of a loss of the project, or that of the function or class that the config names instead."""
    if isinstance(loss_type, dict):
        return str(loss_type.get("path") or loss_type["_target_"]).rpartition(".")[2]
    return str(loss_type)


def _method(loss: str, level: str) -> str:
    """Name of the method in papers: GSPO and GRPO are one loss with two ratios, every other loss has its own name."""
    if loss == "grpo":
        return "GRPO" if level == "token" else "GSPO"
    if loss not in LOSSES:
        return loss
    return "Dr. GRPO" if loss == "dr_grpo" else loss.upper()


def _ratio(loss: str, level: str) -> str:
    """What the ratio is of, where a loss leaves the choice; that of ``vespo`` is of the sequence at level ``token``."""
    has_choice = loss not in LOSSES or len(LOSSES[loss].levels) > 1
    return f", importance ratio per {level}" if has_choice else ""
