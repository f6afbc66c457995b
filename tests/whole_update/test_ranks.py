"""Two processes that train together do what the equations say of all prompts at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_lightning.rollout.seeds import rollout_seed
from tests.whole_update import product
from tests.whole_update.case import Case
from tests.whole_update.float64 import float64_layers
from tests.whole_update.reference import Run
from tests.whole_update.run_ranks import on_ranks
from tests.whole_update.scripted_rollouts import scripted_stream
from tests.whole_update.test_whole_update import metric_differences, network_of, weight_differences

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

SEEDS = (3, 61, 99, 209, 360, 534)
"""Among them each of `OCCURS`."""

OCCURS = {
    "scale of the batch": lambda c: c.scale == "batch",
    "GDPO": lambda c: c.combine == "normalize_then_sum",
    "selection of tokens": lambda c: c.top_entropy_quantile < 1,
    "prompts drawn anew": lambda c: c.max_draws > 0,
    "rollouts ahead": lambda c: c.stale,
    "turns": lambda c: c.turns == "dialogue",
    "turns with rewards": lambda c: c.turns == "rewarded",
    "KL with a moving reference": lambda c: c.ref_sync_every > 0,
    "LoRA": lambda c: c.lora,
    "auxiliary term": lambda c: c.auxiliary > 0,
    "zero advantages kept": lambda c: c.keep_zero_advantage,
    "entropy of what is left out": lambda c: c.log_entropy and not c.has_kl and not c.entropy_coef,
    "silent rollouts": lambda c: c.rewards == "silent",
    "clip of the gradient": lambda c: c.max_grad_norm < 1,
    "several micro-batches": lambda c: c.token_budget < 50,
    "truncation mask": lambda c: c.mask_truncated,
    "mean over tokens": lambda c: c.loss in ("dapo", "bnpo", "cispo", "reinforce"),
    "mean over sequences": lambda c: c.loss in ("grpo", "sapo", "gmpo"),
    "several minibatches": lambda c: c.minibatches > 1,
    "padded": lambda c: c.padded,
    "mismatch": lambda c: c.mismatch is not None,
}


@pytest.fixture(scope="module")
def on_two(micro_model_dir, tmp_path_factory):
    """What two ranks came to, by seed; all cases in one start of the processes."""
    out = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("run_ranks.py")
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(script), str(micro_model_dir), str(out), *map(str, SEEDS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {seed: torch.load(out / f"{seed}.pt", weights_only=True) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS, ids="seed-{}".format)
def test_two_ranks_give_the_weights_and_metrics_of_the_equations(seed, on_two, micro_model_dir):
    case, found = on_ranks(seed), on_two[seed]
    with float64_layers():
        network = network_of(micro_model_dir)
        trained = product.starting_point(case, network.start, found["before"])
        reference = Run(case, network, trained, scripted_stream(case, network))
        for number in range(case.rollouts):
            metrics = reference.rollout(rollout_seed(product.RUN_SEED, number))
            assert metric_differences(case, found["metrics"][number], metrics) == [], case
            assert weight_differences(found["before"], found["tensors"][number], trained.tensors) == [], case


def test_what_ranks_exchange_is_among_the_seeds():
    cases: list[Case] = [on_ranks(seed) for seed in SEEDS]
    assert [name for name, of in OCCURS.items() if not any(map(of, cases))] == []
