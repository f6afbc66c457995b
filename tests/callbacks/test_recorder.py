"""The run's files: every row once, whatever was written behind the checkpoint."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.callbacks import RunRecorder
from gspo_lightning.types import Completion, Prompt, ScoredRollout

TRAINER = SimpleNamespace(is_global_zero=True)


def module(step, **metrics):
    completion = Completion(torch.tensor([1, 2]), f"text {step} <b> é", torch.zeros(2), "stop")
    scored = ScoredRollout(
        prompts=[Prompt("t:0", "ask", torch.tensor([1]), {})],
        completions=[[completion, completion]],
        reward_names=("a", "b"),
        rewards_by_function=torch.tensor([[[1.0, float("nan")], [0.5, 2.0]]], dtype=torch.float64),
        rewards=torch.tensor([[1.0, 2.5]], dtype=torch.float64),
        advantages=torch.tensor([[-0.75, 0.75]], dtype=torch.float64),
    )
    return SimpleNamespace(
        rollouts_done=step, last_metrics={"reward/mean": 0.1 * step, **metrics}, last_scored=scored,
        last_validation={"val/accuracy": step / 10}, validation_samples=[{"prompt": "p"}],
    )  # fmt: skip


def rollout(recorder, step, **metrics):
    recorder.on_train_batch_end(TRAINER, module(step, **metrics), None, None, 0)


def validate(recorder, step):
    recorder.on_validation_end(TRAINER, module(step))


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_rollout_with_validation_in_it_and_floats_that_read_back_exactly(tmp_path):
    recorder = RunRecorder(tmp_path)
    validate(recorder, 0)
    rollout(recorder, 1, grad_norm=0.1 + 0.2)
    validate(recorder, 1)
    rollout(recorder, 2, late=7.0)
    table = rows(tmp_path)
    assert [row["step"] for row in table] == ["0", "1", "2"]
    assert [row["val/accuracy"] for row in table] == ["0.0", "0.1", ""]
    assert float(table[1]["grad_norm"]) == 0.1 + 0.2
    assert table[0]["late"] == "" and table[2]["late"] == "7.0"


def test_completions_are_one_json_line_each(tmp_path):
    recorder = RunRecorder(tmp_path)
    rollout(recorder, 3)
    first, second = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert first == {
        "step": 3, "uid": "t:0", "prompt": "ask", "completion": "text 3 <b> é", "rewards": {"a": 1.0, "b": None},
        "reward": 1.0, "advantage": -0.75, "finish_reason": "stop", "tokens": 2,
    }  # fmt: skip
    assert second["rewards"] == {"a": 0.5, "b": 2.0}


@pytest.mark.parametrize("same_folder", [True, False])
@pytest.mark.parametrize("ahead", [0, 1, 3], ids="{} rollouts behind the checkpoint are lost".format)
def test_a_resumed_record_equals_one_never_interrupted(same_folder, ahead, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    new = cut if same_folder else tmp_path / "new"
    for folder in {whole, cut, new}:
        folder.mkdir()

    def play(recorder, steps):
        for step in steps:
            rollout(recorder, step, **({"late": 1.5} if step >= 4 else {}))
            if step % 2 == 0:
                validate(recorder, step)

    recorder = RunRecorder(whole)
    validate(recorder, 0)
    play(recorder, range(1, 7))
    first = RunRecorder(cut)
    validate(first, 0)
    play(first, range(1, 3))
    state = first.state_dict()
    play(first, range(3, 3 + ahead))
    second = RunRecorder(new, resume_dir=cut)
    second.load_state_dict(state)
    play(second, range(3, 7))
    for name in ("completions.jsonl", "validation_before.json", "validation_after.json"):
        assert (new / name).read_bytes() == (whole / name).read_bytes()
    assert rows(new) == rows(whole)


def test_missing_records_of_the_run_before_are_said(tmp_path):
    recorder = RunRecorder(tmp_path, resume_dir=tmp_path / "gone")
    with pytest.warns(
        UserWarning, match="gone/metrics.csv is missing: the records of this run begin at the checkpoint"
    ):
        recorder.load_state_dict({"rows": 3, "completions_bytes": 10, "seconds": 2.5})
