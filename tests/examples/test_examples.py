"""The programs in examples/ run, do what their first line says, and stay short."""

from __future__ import annotations

import csv
import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

EXAMPLES = Path(__file__).parents[2] / "examples"
SILENT = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_shorter_than_60_lines(file):
    assert len(file.read_text().splitlines()) < 60


def test_a_data_module_and_a_reward_of_ones_own_train_in_a_plain_trainer():
    before, after = load("plain_trainer").main(**SILENT)
    assert before < 0.2 and after > 0.6


def test_every_rollout_of_the_plain_trainer_is_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    load("plain_trainer").main(rollouts=3, **{**SILENT, "logger": logger})
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        assert sum(bool(row["lr"]) for row in csv.DictReader(file)) == 3


def test_the_auxiliary_loss_of_a_subclass_holds_the_weights_it_names():
    free, held = (load("auxiliary_loss").main(weight, **SILENT) for weight in (0.0, 1000.0))
    assert held < 0.7 * free


def test_objective_and_packing_raise_the_expected_reward_in_a_bare_loop_under_any_micro_batching():
    one, many = (load("bare_loop").main(max_tokens=size) for size in (10_000, 8))
    assert all(b > a for a, b in itertools.pairwise(one))
    assert torch.allclose(torch.tensor(one), torch.tensor(many), rtol=1e-3)
