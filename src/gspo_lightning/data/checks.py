"""What is refused of the data of a run before a model is loaded."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

from gspo_lightning.data.columns import Needed, check_columns
from gspo_lightning.data.templating import check_template_kwargs
from gspo_lightning.errors import UserError
from gspo_lightning.types import Prompt

if TYPE_CHECKING:
    from gspo_lightning.data.datamodule import PromptDataModule


def check_settings(data: PromptDataModule) -> None:
    """Refuses settings without effect on this task or model, what is no task, and one with too few rows."""
    for name in ("name", "num_train_rows", "train_row", "validation_rows"):
        if not hasattr(data.task, name):
            raise UserError(
                f"data.task: {type(data.task).__name__} has no {name}; a task has name, num_train_rows, "
                "train_row(index) and validation_rows()"
            )
    size = data.task.num_train_rows
    if size is not None and not isinstance(size, Integral):
        raise UserError(
            f"data.task: num_train_rows of {type(data.task).__name__} is of type {type(size).__name__}; it must be a "
            "whole number, or None for a task that never runs out (an attribute or a property, not a method)"
        )
    if size is None and data.seed is not None:
        raise UserError(
            f"data.seed={data.seed} has no effect: {data.task.name} never runs out and has no order; "
            "set data.task.seed where the task has one, or remove it"
        )
    if size is not None and size < data.prompts_per_rollout:
        raise UserError(
            f"data.prompts_per_rollout={data.prompts_per_rollout} is more than the {size} training rows; lower it"
        )
    check_template_kwargs(data.tokenizer, data.chat_template_kwargs)
    if data.vision_settings.is_set and data.processor is None:
        raise UserError(f"data.min_pixels and data.max_pixels have no effect: {data.model_path} takes text only")


def check_prompt(prompt: Prompt, template_kwargs: dict[str, Any], required_columns: Needed) -> None:
    """Refuses options of the chat template for a prompt that it does not apply to, and a row that lacks a column or has
    one whose name is no text.

    Args:
        prompt: of any row.
        template_kwargs: options of the chat template.
        required_columns: see `PromptDataModule.check`.
    """
    if template_kwargs.get("tools") and isinstance(prompt.prompt, str):
        raise UserError(
            f"row {prompt.uid}: the prompt is a plain string, but tools are shown by the chat template, which "
            "applies only to lists of messages; use such prompts (data.task.conversational=true for rows of a "
            "file) or no tools"
        )
    if template_kwargs and isinstance(prompt.prompt, str):
        raise UserError("data.chat_template_kwargs has no effect on plain string prompts; remove it")
    for column in prompt.sample:
        if not isinstance(column, str):
            raise UserError(
                f"row {prompt.uid}: the name of the column {column!r} is no text, and reward functions get columns as "
                "arguments; rename it"
            )
    check_columns(prompt.sample, required_columns, f"row {prompt.uid}")
