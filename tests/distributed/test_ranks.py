"""The update on two ranks is the update on one rank over all their prompts."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_lightning.objective.losses import LOSSES
from tests.support import relative_distance

SCRIPT = Path(__file__).parent / "run_update.py"


def update(folder, out, devices, *arguments):
    """Weights and facts of the one update that a process makes."""
    (found,) = updates(folder, out, devices, [[]], *arguments)
    return found


def updates(folder, out, devices, runs, *arguments):
    """Those of several updates, one after the other in one process per rank, all from the same weights."""
    arguments = ("--runs", json.dumps(runs), *arguments)
    command = [sys.executable, str(SCRIPT), str(folder), str(out), "--devices", str(devices), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outs = [out.with_name(f"{out.stem}-{number}.pt") for number in range(len(runs))]
    return [(torch.load(o, weights_only=True), json.loads(o.with_suffix(".json").read_text())) for o in outs]


AUXILIARY = {
    "an auxiliary loss": ["--auxiliary"],
    "an auxiliary loss and one rank without signal": ["--auxiliary", "--case", "one rank without signal"],
}
CASES = {
    "ragged": [],
    "one rank without signal": ["--case", "one rank without signal"],
    "no signal at all": ["--case", "no signal at all"],
    "LoRA": ["--lora"],
    "LoRA, one rank without signal": ["--lora", "--case", "one rank without signal"],
    "ratios per token": ["--level", "token"],
    "ratios per sequence, gradient per token": ["--level", "sequence_token"],
    "a reference": ["--beta", "0.04", "--minibatches", "2"],
    "truncated completions": ["--case", "truncated"],
    "two minibatches": ["--minibatches", "2"],
    "the scale of the batch": ["--advantages", "batch"],
    "activations recomputed": ["--checkpointing"],
    # Of 30 tokens at a time the ranks have different numbers of micro-batches, and talk about the threshold behind them.
    "tokens of highest entropy": ["--quantile", "0.4"],
    "tokens of highest entropy, one rank without signal": ["--quantile", "0.4", "--case", "one rank without signal"],
}
RUNS = [*(("ddp", name) for name in CASES | AUXILIARY), *(("fsdp", name) for name in CASES)]


@functools.cache
def on_one_rank(folder, scratch):
    return update(folder, scratch / "one.pt", 1)


@functools.cache
def all_cases(folder, scratch, devices, strategy):
    """The updates of `CASES`, and of `AUXILIARY` where the strategy can have it, by name: one start for all."""
    cases = CASES | AUXILIARY if strategy == "ddp" else CASES
    found = updates(folder, scratch / f"{strategy}{devices}.pt", devices, list(cases.values()), "--strategy", strategy)
    return dict(zip(cases, found, strict=True))


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("one-rank")


@pytest.mark.parametrize(("strategy", "case"), RUNS)
def test_two_ranks_give_the_update_of_one(strategy, case, micro_model_dir, scratch):
    from tests.support import micro_policy

    one, facts_one = all_cases(micro_model_dir, scratch, 1, "ddp")[case]
    two, facts_two = all_cases(micro_model_dir, scratch, 2, strategy)[case]
    if case == "no signal at all":
        assert torch.equal(one, two)
        assert facts_one["counts"]["skipped_steps"] == facts_two["counts"]["skipped_steps"] == 1
    elif "--lora" not in CASES.get(case, []):
        start = torch.cat([p.detach().flatten() for p in micro_policy(micro_model_dir).parameters()])
        assert relative_distance(two - start, one - start) < 1e-12
    assert relative_distance(two, one) < 1e-12
    assert facts_two["counts"] == facts_one["counts"]
    assert facts_two["metrics"] == pytest.approx(facts_one["metrics"], rel=1e-9, nan_ok=True)


OTHER_LOSSES = sorted(set(LOSSES) - {"grpo"})
EACH_LOSS = [["--loss", loss, *lora] for lora in ([], ["--lora"]) for loss in OTHER_LOSSES]


@functools.cache
def every_loss_on_one_rank(folder, scratch):
    return updates(folder, scratch / "every.pt", 1, EACH_LOSS)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_loss_on_two_ranks_gives_the_update_of_one(strategy, micro_model_dir, scratch, tmp_path):
    from tests.support import micro_policy

    start = torch.cat([p.detach().flatten() for p in micro_policy(micro_model_dir).parameters()])
    ones = every_loss_on_one_rank(micro_model_dir, scratch)
    twos = updates(micro_model_dir, tmp_path / "two.pt", 2, EACH_LOSS, "--strategy", strategy)
    for loss, (one, facts_one), (two, facts_two) in zip(EACH_LOSS, ones, twos, strict=True):
        assert relative_distance(two, one) < 1e-12, loss
        if "--lora" not in loss:
            assert relative_distance(two - start, one - start) < 1e-12, loss
        assert facts_two["counts"] == facts_one["counts"], loss
        assert facts_two["metrics"] == pytest.approx(facts_one["metrics"], rel=1e-9, nan_ok=True), loss


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_compiled_layers_on_two_ranks_give_the_update_of_plain_ones_on_one(
    strategy, micro_model_dir, scratch, tmp_path
):
    one, facts_one = on_one_rank(micro_model_dir, scratch)
    two, facts_two = update(micro_model_dir, tmp_path / "two.pt", 2, "--strategy", strategy, "--compile")
    # The norms of a compiled layer are fused: their float32 inside is rounded elsewhere.
    assert relative_distance(two, one) < 1e-7
    assert facts_two["counts"] == facts_one["counts"]


NARROWER = {
    "float32": [],
    "float32, two minibatches": ["--minibatches", "2", "--loss", "cispo"],
    "float32, LoRA": ["--lora"],
    "bf16-mixed": ["--precision", "bf16-mixed"],
    "bf16-mixed, LoRA": ["--precision", "bf16-mixed", "--lora"],
    "bf16-true, LoRA": ["--precision", "bf16-true", "--lora"],
}


@functools.cache
def narrower_on_one_rank(folder, scratch):
    return updates(folder, scratch / "narrow.pt", 1, list(NARROWER.values()), "--dtype", "float32")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_in_narrower_numbers_too(strategy, micro_model_dir, scratch, tmp_path):
    """By what the update moved; an adapter's B starts at zero, so its norm is that of the movement."""
    from tests.support import micro_policy

    start = torch.cat([p.detach().flatten() for p in micro_policy(micro_model_dir, torch.float32).parameters()])
    ones = dict(zip(NARROWER, narrower_on_one_rank(micro_model_dir, scratch), strict=True))
    twos = updates(
        micro_model_dir, tmp_path / "two.pt", 2, list(NARROWER.values()), "--dtype", "float32", "--strategy", strategy
    )
    for (name, case), (two, facts) in zip(NARROWER.items(), twos, strict=True):
        one, facts_one = ones[name]
        before = torch.zeros_like(one) if "--lora" in case else start
        assert one.dtype == two.dtype == torch.float32, name
        assert relative_distance((two - before).double(), (one - before).double()) < 1e-5, name
        assert facts["counts"] == facts_one["counts"], name
        assert facts["metrics"] == pytest.approx(facts_one["metrics"], rel=1e-4, nan_ok=True), name


@pytest.mark.parametrize(
    ("strategy", "lora"),
    [
        pytest.param("ddp", [], id="full-ddp"),
        pytest.param("fsdp", ["--lora"], id="LoRA-fsdp"),
        pytest.param("ddp", ["--lora"], id="LoRA-ddp", marks=pytest.mark.slow),
        pytest.param("fsdp", [], id="full-fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_rank_without_a_picture_takes_part_in_the_update_of_the_tower(lora, strategy, smollm2_dir, tmp_path):
    from gspo_lightning.policy.tiny_vlm import build_processor
    from tests.vision.models import vision_policy

    folder = tmp_path / "vlm"
    policy = vision_policy("qwen2_5_vl")
    policy.base_model.save_pretrained(folder)
    (tmp_path / "scratch").mkdir()
    build_processor(smollm2_dir, tmp_path / "scratch").save_pretrained(folder)
    case = ["--case", "one rank without pictures", "--budget", "60", *lora]
    one, facts_one = update(folder, tmp_path / "one.pt", 1, *case)
    two, facts_two = update(folder, tmp_path / "two.pt", 2, "--strategy", strategy, *case)
    assert relative_distance(two, one) < 1e-7
    assert facts_two["counts"] == facts_one["counts"]
    assert facts_two["metrics"] == pytest.approx(facts_one["metrics"], rel=1e-6, nan_ok=True)
    if not lora:
        start = torch.cat([p.detach().flatten() for p in policy.parameters()])
        assert relative_distance(two - start, one - start) < 1e-7
        tower = sum(p.numel() for p in policy.base_model.model.visual.parameters())
        assert (one - start)[:tower].norm() > 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_experts_and_sinks_too(strategy, scratch, tmp_path):
    """gpt-oss: experts that no token of a rank chose have a gradient of zero there, and are split like the rest."""
    from gspo_lightning.policy.bundled import resolve_model
    from tests.support import micro_policy

    cases = [[], ["--lora"]]
    folder = resolve_model("bundled:micro-gpt-oss")
    ones = experts_on_one_rank(folder, scratch)
    twos = updates(folder, tmp_path / "two.pt", 2, cases, "--strategy", strategy)
    start = torch.cat([p.detach().double().flatten() for p in micro_policy(folder).parameters()])
    for case, (one, facts_one), (two, facts_two) in zip(cases, ones, twos, strict=True):
        before = torch.zeros_like(one) if case else start
        assert relative_distance(two - before, one - before) < 1e-7, case
        assert facts_two["counts"] == facts_one["counts"]
        assert facts_two["metrics"] == pytest.approx(facts_one["metrics"], rel=1e-6, nan_ok=True)


@functools.cache
def experts_on_one_rank(folder, scratch):
    return updates(folder, scratch / "experts.pt", 1, [[], ["--lora"]])
