"""Completions as a table in each logger that has tables."""

from __future__ import annotations

from html import escape
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from gspo_lightning.callbacks.recorder import completion_entries
from gspo_lightning.data.vision import last_text
from gspo_lightning.errors import UserError
from gspo_lightning.types import ScoredRollout

_MARKDOWN = frozenset("|*_`[]~$\\")
"""Characters with a meaning in Markdown tables."""


class CompletionsTable(L.Callback):
    """Periodically writes the completions of the first prompts, with rewards and advantages, to each logger.

    Weights & Biases gets a table, MLflow a table artifact, TensorBoard a text panel. A CSV logger has no tables:
    ``completions.jsonl`` in the run's folder has all completions in any case. With several ranks the table has those of
    rank 0, which are the first of the rollout.

    Args:
        every_n_rollouts: rollouts between tables; the first and the last rollout always have one.
        num_completions: rows of a table, all completions of a prompt before those of the next.
    """

    def __init__(self, every_n_rollouts: int = 10, num_completions: int = 16) -> None:
        for name, value in (("every_n_rollouts", every_n_rollouts), ("num_completions", num_completions)):
            if value < 1:
                raise UserError(f"callbacks.completions.{name}={value} must be at least 1")
        self.every_n_rollouts, self.num_completions = every_n_rollouts, num_completions

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes the table when it is time."""
        done = pl_module.rollouts_done
        due = done == 1 or done % self.every_n_rollouts == 0 or done >= pl_module.max_rollouts
        if due and trainer.is_global_zero and trainer.loggers:
            columns, rows = completions_table(done, pl_module.last_scored, self.num_completions)
            for logger in trainer.loggers:
                write_table(logger, columns, rows, done)


def completions_table(step: int, scored: ScoredRollout, count: int) -> tuple[list[str], list[list[Any]]]:
    """Column names and the first ``count`` rows; one column per reward function, None where it does not apply."""
    entries = completion_entries(step, scored)[:count]
    names = [f"reward/{name}" for name in scored.reward_names]
    columns = ["rollout", "uid", "prompt", "completion", *names, "reward", "advantage", "finish_reason", "tokens"]
    rows = []
    for entry in entries:
        prompt = last_text(entry["prompt"])
        values = [None if value != value else value for value in entry["rewards"].values()]
        rest = [entry[name] for name in ("reward", "advantage", "finish_reason", "tokens")]
        rows.append([step, entry["uid"], prompt, entry["completion"], *values, *rest])
    return columns, rows


def write_table(logger: Logger, columns: list[str], rows: list[list[Any]], step: int) -> None:
    """Hands the table to a logger in its own form; a logger without tables gets nothing."""
    if isinstance(logger, WandbLogger):
        logger.log_table("completions", columns=columns, data=rows, step=step)
    elif isinstance(logger, MLFlowLogger):
        data = {column: [row[number] for row in rows] for number, column in enumerate(columns)}
        logger.experiment.log_table(logger.run_id, data=data, artifact_file=f"completions/{step:06d}.json")
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("completions", markdown_table(columns, rows), step)


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table for TensorBoard; special characters of a model's text are escaped."""

    def cell(value: Any) -> str:
        text = escape(f"{value:.4g}" if isinstance(value, float) else str(value))
        return "".join(f"&#{ord(c)};" if c in _MARKDOWN else c for c in text).replace("\n", "<br>")

    lines = [[cell(value) for value in line] for line in ([*columns], *rows)]
    head, body = lines[0], lines[1:]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(columns), *body])
