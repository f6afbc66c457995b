"""Completions reach each logger in its own form, when it is time, and what a model wrote stays text."""

from __future__ import annotations

import types
from importlib.util import find_spec

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from gspo_lightning.callbacks import CompletionsTable
from gspo_lightning.callbacks.completions import completions_table, markdown_table, write_table
from gspo_lightning.errors import UserError
from gspo_lightning.types import ScoredRollout
from tests.support import make_completion, make_prompt


def scored():
    completions = [[make_completion([5, 6], "a|b"), make_completion([7], "<b>x</b>\n*y*", "length")]] * 2
    return ScoredRollout(
        prompts=[make_prompt([1], uid=f"t:{n}") for n in range(2)],
        completions=completions,
        reward_names=("right", "short"),
        rewards_by_function=torch.tensor([[[1.0, float("nan")], [0.0, 0.5]]] * 2, dtype=torch.float64),
        rewards=torch.tensor([[1.0, 0.5]] * 2, dtype=torch.float64),
        advantages=torch.tensor([[0.7, -0.7]] * 2, dtype=torch.float64),
    )


COLUMNS = [
    "rollout",
    "uid",
    "prompt",
    "completion",
    "reward/right",
    "reward/short",
    "reward",
    "advantage",
    "finish_reason",
    "tokens",
]


def test_the_rows_are_the_completions_of_the_first_prompts_with_none_where_a_reward_does_not_apply():
    columns, rows = completions_table(4, scored(), 3)
    assert columns == COLUMNS
    assert rows == [
        [4, "t:0", "", "a|b", 1.0, None, 1.0, 0.7, "stop", 2],
        [4, "t:0", "", "<b>x</b>\n*y*", 0.0, 0.5, 0.5, -0.7, "length", 1],
        [4, "t:1", "", "a|b", 1.0, None, 1.0, 0.7, "stop", 2],
    ]


def test_a_markdown_table_has_a_line_per_row_and_nothing_in_it_is_markup():
    lines = markdown_table(["a", "b"], [["x|y", "<b>*z*</b>\n_"], [0.123456, None]]).split("\n")
    assert len(lines) == 4 and all(line.count("|") == 3 for line in lines)
    assert lines[2] == "| x&#124;y | &lt;b&gt;&#42;z&#42;&lt;/b&gt;<br>&#95; |"
    assert lines[3] == "| 0.1235 | None |"


class Recorder:
    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments, **named: self.calls.append((name, arguments, named))


def test_each_logger_gets_the_table_in_its_form(monkeypatch, tmp_path):
    columns, rows = ["a", "b"], [[1, "x"], [2, "y"]]
    seen = Recorder()
    wandb = object.__new__(WandbLogger)
    monkeypatch.setattr(WandbLogger, "log_table", seen.log_table)
    write_table(wandb, columns, rows, 7)
    assert seen.calls.pop()[2] == {"columns": columns, "data": rows, "step": 7}
    mlflow = object.__new__(MLFlowLogger)
    monkeypatch.setattr(MLFlowLogger, "experiment", seen)
    monkeypatch.setattr(MLFlowLogger, "run_id", "run")
    write_table(mlflow, columns, rows, 7)
    assert seen.calls.pop() == (
        "log_table", ("run",), {"data": {"a": [1, 2], "b": ["x", "y"]}, "artifact_file": "completions/000007.json"}
    )  # fmt: skip
    monkeypatch.setattr(TensorBoardLogger, "experiment", seen)
    write_table(TensorBoardLogger(tmp_path), columns, rows, 7)
    assert seen.calls.pop() == ("add_text", ("completions", markdown_table(columns, rows), 7), {})
    write_table(CSVLogger(tmp_path), columns, rows, 7)
    assert not seen.calls


def test_tables_come_at_the_first_rollout_every_so_many_and_at_the_last(monkeypatch):
    steps = []
    monkeypatch.setattr(
        "gspo_lightning.callbacks.completions.write_table", lambda logger, c, r, step: steps.append(step)
    )
    callback = CompletionsTable(every_n_rollouts=4)
    module = types.SimpleNamespace(last_scored=scored(), max_rollouts=10)
    for zero, loggers in ((True, [object()]), (False, [object()]), (True, [])):
        trainer = types.SimpleNamespace(is_global_zero=zero, loggers=loggers)
        for done in range(1, 11):
            module.rollouts_done = done
            callback.on_train_batch_end(trainer, module, None, None, 0)
    assert steps == [1, 4, 8, 10]


def test_counts_below_one_are_refused():
    with pytest.raises(UserError, match="callbacks.completions.num_completions=0 must be at least 1"):
        CompletionsTable(num_completions=0)


@pytest.mark.skipif(not find_spec("mlflow"), reason="needs mlflow")
def test_mlflow_keeps_the_table_in_a_local_folder(tmp_path):
    logger = MLFlowLogger(
        "x", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_location=str(tmp_path / "a")
    )
    write_table(logger, ["a"], [["x"]], 3)
    assert list(tmp_path.rglob("000003.json"))


@pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb")
def test_wandb_keeps_the_table_offline(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    write_table(logger, ["a"], [["x"]], 3)
    logger.experiment.finish()
    assert list(tmp_path.rglob("*.table.json"))
