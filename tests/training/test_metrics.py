"""Metrics of a rollout by hand, and no metric without its line in docs/metrics.md."""

from __future__ import annotations

import csv
import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from gspo_lightning.distributed.ranks import add_metrics, global_means
from gspo_lightning.module import GSPOModule
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.training.rollout_log import rollout_metrics, rollout_values
from gspo_lightning.training.timing import Stopwatch
from gspo_lightning.training.update import MicroBatch, sampler_mismatch
from gspo_lightning.types import Completion, Prompt, PromptBatch, ScoredRollout
from tests.scripted import Batches, Settings, build_module, scripted_prompts, scripted_reward, trainer, update_of
from tests.support import micro_policy, padded_logprobs

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()


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
            "silent_frac": 0.5,
            "advantage_std": 0.5,
            "reward/x": 2.4 / 6,
            "reward/y": 4.0,
        }
    )


def test_rewards_normalised_for_training_are_reported_by_weight(micro_model_dir):
    """Of z-scores the mean would be 0 whatever the policy does."""

    def long(completion_ids, **_):
        return [10.0 * len(ids) for ids in completion_ids]

    prompts = scripted_prompts()
    module = build_module(micro_model_dir, Settings(advantages="batch"))
    functions = {"scripted": RewardSpec(scripted_reward), "long": RewardSpec(long, weight=0.5)}
    module.rewards = RewardSet(functions, combine="normalize_then_sum")
    module.configure_model()
    trainer().fit(module, Batches(prompts).loader())
    rewards = torch.tensor(
        [
            [r + 5 * len(c.token_ids) for (_, r), c in zip(p.sample["scripted"], p.sample["completions"], strict=True)]
            for p in prompts
        ],
        dtype=torch.float64,
    )
    assert abs(module.last_scored.rewards.mean().item()) < 1e-12
    assert module.last_metrics["reward/mean"] == pytest.approx(rewards.mean().item(), rel=1e-12)
    assert module.last_metrics["reward/std"] == pytest.approx(rewards.std(dim=1).mean().item(), rel=1e-12)


def test_a_name_of_which_nothing_was_seen_is_left_out_and_what_is_not_finite_stays():
    def pair(total, count):
        return torch.tensor(total), torch.tensor(count)

    found = global_means({"none": pair(0.0, 0.0), "bad": pair(math.nan, 2.0), "a": pair(3.0, 2.0)}, torch.device("cpu"))
    assert found == {"a": 1.5, "bad": pytest.approx(math.nan, nan_ok=True)}


class Rollouts(L.LightningDataModule):
    """The second of three rollouts has no signal, and a reward function that applies to nothing in it."""

    def train_dataloader(self) -> DataLoader[PromptBatch]:
        rollouts = [scripted_prompts() for _ in range(3)]
        for prompt in rollouts[1]:
            prompt.sample.update(scripted=[(i, 0.3) for i in range(3)], quiet=True)
        return DataLoader([PromptBatch(prompts, cursor=0) for prompts in rollouts], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[PromptBatch]:
        return DataLoader([PromptBatch(scripted_prompts(generations=1), cursor=0)], batch_size=None)  # type: ignore[arg-type]


def now_and_then(completions, quiet=None, **_):
    return [None if quiet is not None and quiet[i] else 2.0 for i in range(len(completions))]


@pytest.mark.parametrize("every", [1, 2])
def test_loggers_have_what_a_rollout_measured_and_monitors_the_newest_value(every, micro_model_dir, tmp_path):
    module = build_module(micro_model_dir, Settings(rollouts=3))
    module.rewards = RewardSet({"scripted": RewardSpec(scripted_reward), "extra": RewardSpec(now_and_then)})
    seen = []

    def logged_steps():
        return [row["step"] for path in tmp_path.rglob("metrics.csv") for row in csv.DictReader(path.open())]

    class Monitored(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            assert f"{module.rollouts_done}" not in logged_steps()  # the loggers come last
            names = ("reward/extra", "ratio/mean")
            seen.append([(trainer.callback_metrics[n].item(), n in module.last_metrics) for n in names])

    stop = EarlyStopping("reward/extra", patience=9, check_finite=True)
    best = ModelCheckpoint(tmp_path / "best", monitor="reward/extra", every_n_train_steps=1)
    runner = trainer(
        callbacks=[Monitored(), stop, best], logger=CSVLogger(tmp_path), log_every_n_steps=every, limit_val_batches=1,
        val_check_interval=1, check_val_every_n_epoch=None, enable_checkpointing=True,
    )  # fmt: skip
    runner.fit(module, datamodule=Rollouts())
    assert module.rollouts_done == 3 and stop.wait_count == 2
    assert seen == [[(2.0, True), (1.0, True)], [(2.0, False), (1.0, False)], [(2.0, True), (1.0, True)]]
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["reward/mean"]]
    # The last rollout is logged in any case.
    expected = {1: [("1", "2.0", "1.0"), ("2", "", ""), ("3", "2.0", "1.0")], 2: [("2", "", ""), ("3", "2.0", "1.0")]}
    assert [(row["step"], row["reward/extra"], row["ratio/mean"]) for row in rows] == expected[every]


def test_files_of_checkpoints_and_own_values_are_counted_in_rollouts(micro_model_dir, tmp_path):
    """Also behind a validation, and where a subclass has a hook of its own."""

    class Own(GSPOModule):
        def on_train_batch_end(self, *_):
            self.log("own/value", 2.0)

    module = build_module(micro_model_dir, Settings(rollouts=3, update={"num_minibatches": 2}))
    module.__class__ = Own
    saved = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1)
    runner = trainer(
        callbacks=[saved], logger=CSVLogger(tmp_path), log_every_n_steps=1, limit_val_batches=1, val_check_interval=2,
        check_val_every_n_epoch=None, enable_checkpointing=True,
    )  # fmt: skip
    runner.fit(module, datamodule=Rollouts())
    found = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "saved").iterdir()}
    names = {name.partition("-")[2]: state["gspo_lightning"]["rollouts_done"] for name, state in found.items()}
    assert names == {"step=1.ckpt": 1, "step=3.ckpt": 3}  # the second has no step, and Lightning saves nothing then
    (path,) = tmp_path.rglob("metrics.csv")
    rows = [row for row in csv.DictReader(path.open()) if row["reward/mean"]]
    assert [(row["step"], row["own/value"]) for row in rows] == [("1", "2.0"), ("2", "2.0"), ("3", "2.0")]
    assert runner.logged_metrics["reward/mean"] == pytest.approx(module.last_metrics["reward/mean"])


@pytest.mark.parametrize(
    "update", [{}, {"num_minibatches": 2, "num_iterations": 2}, {"keep_zero_advantage": True}], ids=str
)
@pytest.mark.parametrize("case", ["as they are", "no signal at all", "one masked as truncated"])
def test_the_entropy_that_was_asked_for_is_that_of_every_completion(case, update, micro_model_dir):
    """With or without an advantage, each as often as the others; the weights stay where they are."""
    prompts = scripted_prompts()
    for prompt in prompts:
        if case == "no signal at all":
            prompt.sample["scripted"] = [(i, 0.3) for i, _ in prompt.sample["scripted"]]
        elif case == "one masked as truncated":
            prompt.sample["completions"][0] = replace(prompt.sample["completions"][0], finish_reason="length")
    counted = [[c.token_ids for c in p.sample["completions"] if c.finish_reason == "stop"] for p in prompts]
    groups = list(zip((p.input_ids for p in prompts), counted, strict=True))
    with torch.no_grad():
        expected = padded_logprobs(micro_policy(micro_model_dir).base_model, groups)[1].mean().item()
    settings = Settings(
        objective={"mask_truncated_completions": case == "one masked as truncated"},
        update={"log_entropy": True, "max_tokens_per_microbatch": 25, **update},
        optimizer=functools.partial(torch.optim.SGD, lr=0.0),
    )
    _, module = update_of(micro_model_dir, settings, prompts)
    assert module.last_metrics["entropy"] == pytest.approx(expected, rel=1e-9)


def test_sums_stay_on_their_device_until_the_rollout_ends():
    """A copy of each to the CPU would wait for the device once per metric and micro-batch; from "meta" there is none."""
    total = {}
    for value in (torch.ones(()), torch.ones((), device="meta"), torch.ones((), device="meta")):
        add_metrics(total, {"loss": (value, torch.tensor(2)), "entropy": (torch.tensor(0.5), torch.tensor(1))})
    (loss, count), (entropy, _) = total["loss"], total["entropy"]
    assert (loss.device.type, loss.dtype, count.item()) == ("meta", torch.float64, 6.0)
    assert (entropy.item(), entropy.dtype, entropy.device.type) == (1.5, torch.float64, "cpu")


def test_sampler_mismatch_by_hand():
    from gspo_lightning.packing import pack

    packed = pack([(torch.tensor([5]), [torch.tensor([6, 7]), torch.tensor([8])])], torch.device("cpu"))
    micro = MicroBatch(packed, torch.zeros(3), torch.tensor([-1.0, -2.0, -3.0]))
    values = means(sampler_mismatch(torch.tensor([-1.5, -1.75, -3.5]), micro))
    assert values["sampler_mismatch/abs_mean"] == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert values["gspo/ratio_noise_var"] == pytest.approx((0.125**2 + 0.5**2) / 2)


@pytest.mark.parametrize(("device", "peak"), [("cuda:1", 2.5), ("cpu", None)])
def test_the_peak_of_a_gpu_is_that_of_its_own_memory(device, peak, monkeypatch):
    """And not of the host's, which has a column of its own."""
    sizes = {torch.device("cuda:1"): 2.5 * 2**30}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: sizes[device])
    counts = {"rollout_tokens": 1, "train_tokens": 1}
    values = rollout_values(
        {}, torch.empty(0), counts, lr=0.1, stopwatch=Stopwatch(), before={}, device=torch.device(device)
    )
    assert values.get("perf/peak_gpu_gb") == peak
    assert values["perf/peak_rss_gb"] > 0 and values["perf/peak_rss_gb"] != peak
    assert set(values) <= set(re.findall(r"`([\w/@<>]+)`", DOCS))


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
