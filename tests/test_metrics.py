"""Metrics of a rollout by hand, and no metric without its line in docs/metrics.md."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from gspo_lightning.collect import rollout_metrics
from gspo_lightning.types import Completion, Prompt, ScoredRollout
from gspo_lightning.update import MicroBatch, sampler_mismatch
from tests.training import Settings, update_of

DOCS = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()


def means(metrics):
    return {name: (s / c).item() for name, (s, c) in metrics.items()}


def test_rollout_metrics_of_a_two_by_three_example():
    def completion(length, reason):
        return Completion(torch.zeros(length, dtype=torch.long), "", torch.zeros(length), reason)

    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.3, 0.3, 0.3]], dtype=torch.float64)
    by_function = torch.stack([rewards, torch.full_like(rewards, math.nan)], dim=-1)
    by_function[0, 0, 1] = 4.0
    scored = ScoredRollout(
        prompts=[Prompt("a", "", torch.tensor([1]), {})] * 2,
        completions=[
            [completion(2, "stop"), completion(8, "length"), completion(5, "stop")],
            [completion(1, "stop"), completion(8, "length"), completion(6, "stop")],
        ],
        reward_names=("x", "y"),
        rewards_by_function=by_function,
        rewards=rewards,
        advantages=torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64),
    )
    assert means(rollout_metrics(scored)) == pytest.approx(
        {
            "reward/mean": 2.4 / 6,
            "reward/std": 0.25,  # 0.5 and 0 of the two groups
            "completion/mean_tokens": 30 / 6,
            "completion/truncated_frac": 2 / 6,
            "frac_zero_std_groups": 0.5,
            "advantage_std": 0.5,
            "reward/x": 2.4 / 6,
            "reward/y": 4.0,
        }
    )


def test_sampler_mismatch_by_hand():
    from gspo_lightning.packing import pack

    packed = pack([(torch.tensor([5]), [torch.tensor([6, 7]), torch.tensor([8])])], torch.device("cpu"))
    micro = MicroBatch(packed, torch.zeros(3), torch.tensor([-1.0, -2.0, -3.0]))
    values = means(sampler_mismatch(torch.tensor([-1.5, -1.75, -3.5]), micro))
    assert values["sampler_mismatch/abs_mean"] == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert values["gspo/ratio_noise_var"] == pytest.approx((0.125**2 + 0.5**2) / 2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_metric_a_run_writes_is_documented(micro_model_dir):
    documented = set(re.findall(r"`([\w/@<>]+)`", DOCS))
    _, module = update_of(
        micro_model_dir, Settings(objective={"beta": 0.1, "entropy_coef": 0.01}, update={"num_minibatches": 2})
    )
    names = {"reward/<function>" if name == "reward/scripted" else name for name in module.last_metrics}
    names |= {"val/pass@k" if name.startswith("val/pass@") else name for name in module.validator.names}
    assert names - documented == set()
    assert {"kl/ref", "entropy", "gspo/ratio_noise_floor"} <= names
