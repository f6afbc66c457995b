"""Training with vLLM in the trainer's process: it learns what it learns without, and resumes exactly."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gspo_lightning.policy.micro import build_micro_model

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro32")
    build_micro_model(folder, num_attention_heads=2)
    return folder


def train(model, folder, *arguments, code=0):
    command = [
        sys.executable, "train.py", "experiment=micro", "rollout.max_completion_length=12", "model=path",
        f"model.path={model}", f"hydra.run.dir={folder}", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in csv.DictReader(file)]


def test_a_resumed_run_is_bit_identical(model, tmp_path):
    settings = ["rollout=vllm", "rollout.engine.kv_cache_gb=0.1", "max_rollouts=6", "checkpoint.every_n_rollouts=4"]
    train(model, tmp_path / "whole", *settings)
    before = tmp_path / "whole" / "checkpoints" / "previous.ckpt"
    assert torch.load(before, weights_only=True)["gspo_lightning"]["rollouts_done"] == 4
    train(model, tmp_path / "new", *settings, f"ckpt_path={before}")
    assert rows(tmp_path / "new") == rows(tmp_path / "whole")
    ours, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("new", "whole"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_it_learns_the_task_with_either_engine_at_one_seed(model, tmp_path):
    # The bound is that of two letters of four. A letter whose completions are all wrong gives no signal and stays so,
    # by chance, with either engine: here vLLM ended at 0.71 and the other at 1.0, at seed 2 it was 1.0 and 0.48.
    late = {}
    for engine in ("transformers", "vllm"):
        extra = ["rollout.engine.kv_cache_gb=0.1"] if engine == "vllm" else []
        train(
            model,
            tmp_path / engine,
            f"rollout={engine}",
            *extra,
            "seed=1",
            "max_rollouts=60",
            "validation.every_n_rollouts=null",
        )
        rewards = [float(row["reward/mean"]) for row in rows(tmp_path / engine) if row["reward/mean"]]
        assert sum(rewards[:5]) / 5 < 0.3
        late[engine] = sum(rewards[-10:]) / 10  # of 640 completions
    assert min(late.values()) > 0.45, late


def test_two_ranks_with_an_engine_each_take_the_update_of_one(model, tmp_path):
    settings = [
        "rollout=vllm", "rollout.engine.kv_cache_gb=0.1", "max_rollouts=2", "update.num_minibatches=1",
        "allow_no_effect=true", "trainer.precision=32-true",
    ]  # fmt: skip
    train(model, tmp_path / "one", *settings)
    train(model, tmp_path / "two", *settings, "trainer=ddp")
    for before, after in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for name in ("val/mean_tokens", "reward/mean", "grad_norm", "count/rollout_tokens"):
            assert float(after[name] or 0) == pytest.approx(float(before[name] or 0), rel=1e-4), name
    one, two, start = (
        torch.cat([value.flatten() for _, value in sorted(load_file(folder / "model.safetensors").items())])
        for folder in (tmp_path / "one" / "model", tmp_path / "two" / "model", model)
    )
    # Adam turns rounding of gradients near zero into steps of either sign.
    assert (two - one).norm() < 1e-2 * (one - start).norm()
