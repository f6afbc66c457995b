"""The update on two ranks is the update on one rank over all their prompts."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from gspo_lightning.objective.losses import LOSSES
from tests import command_line
from tests.support import relative_distance

SCRIPT = Path(__file__).parent / "run_update.py"
BOTH = pytest.mark.parametrize("strategy", ["ddp", "fsdp"])

NO_SIGNAL = {
    "no signal at all": ["--case", "no signal at all", "--entropy"],
    "no signal, but all forwarded": ["--case", "no signal at all", "--keep"],
}
IN_FLOAT64 = {
    "ragged": [],
    "one rank without signal": ["--case", "one rank without signal"],
    "all forwarded, one rank without signal": ["--keep", "--case", "one rank without signal"],
    "entropies, one rank without signal": ["--entropy", "--case", "one rank without signal"],
    **NO_SIGNAL,
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
    "tokens of highest entropy": ["--quantile", "0.4", "--level", "token"],
    "tokens of highest entropy, one rank without signal": [
        "--quantile",
        "0.4",
        "--level",
        "sequence_token",
        "--case",
        "one rank without signal",
    ],
}
for loss in sorted(set(LOSSES) - {"grpo"}):
    IN_FLOAT64 |= {loss: ["--loss", loss], f"{loss}, LoRA": ["--loss", loss, "--lora"]}
AUXILIARY = {
    "an auxiliary loss": ["--auxiliary"],
    "an auxiliary loss and one rank without signal": ["--auxiliary", "--case", "one rank without signal"],
}
IN_FLOAT32 = {
    "float32": [],
    "float32, two minibatches": ["--minibatches", "2", "--loss", "cispo"],
    "float32, LoRA": ["--lora"],
    "bf16-mixed": ["--precision", "bf16-mixed"],
    "bf16-mixed, LoRA": ["--precision", "bf16-mixed", "--lora"],
    "bf16-true, LoRA": ["--precision", "bf16-true", "--lora"],
}
# Inner parts of these models are in float32 whatever the weights are.
OF_OTHER_MODELS = {
    "experts and sinks": ["--model", "gpt-oss"],
    "experts and sinks, LoRA": ["--model", "gpt-oss", "--lora"],
    "one rank without images": ["--model", "vlm", "--case", "one rank without images", "--budget", "60"],
    "one rank without images, LoRA":
        ["--model", "vlm", "--case", "one rank without images", "--budget", "60", "--lora"],
}  # fmt: skip
CASES = {
    **IN_FLOAT64,
    **AUXILIARY,
    **{name: [*case, "--dtype", "float32"] for name, case in IN_FLOAT32.items()},
    **OF_OTHER_MODELS,
}


def run(cases, models, out, devices, *arguments):
    """Weights and facts of one update per case, all in one process per rank, each from its model's own weights."""
    command_line.run(
        json.dumps({k: str(v) for k, v in models.items()}), out, "--devices", devices,
        "--runs", json.dumps(list(cases.values())), *arguments,
        script=SCRIPT, timeout=600,
    )  # fmt: skip
    outs = [out.with_name(f"{out.stem}-{number}.pt") for number in range(len(cases))]
    found = [(torch.load(o, weights_only=True), json.loads(o.with_suffix(".json").read_text())) for o in outs]
    return dict(zip(cases, found, strict=True))


@pytest.fixture(scope="module")
def models(micro_model_dir, smollm2_dir, tmp_path_factory):
    from gspo_lightning.policy.bundled import resolve_model
    from gspo_lightning.policy.tiny_vlm import build_processor
    from tests.vision.models import vision_policy

    folder = tmp_path_factory.mktemp("vlm")
    vision_policy("qwen2_5_vl").base_model.save_pretrained(folder)
    build_processor(smollm2_dir, tmp_path_factory.mktemp("scratch")).save_pretrained(folder)
    return {"micro": micro_model_dir, "gpt-oss": resolve_model("bundled:micro-gpt-oss"), "vlm": folder}


@pytest.fixture(scope="module")
def on_one(models, tmp_path_factory):
    return run(CASES, models, tmp_path_factory.mktemp("one") / "run.pt", 1)


@pytest.fixture(scope="module")
def on_two(models, tmp_path_factory):
    def start(strategy):
        # FSDP2 keeps a piece of each weight per rank: a term over all of them is no local sum.
        cases = {name: case for name, case in CASES.items() if strategy == "ddp" or name not in AUXILIARY}
        return run(cases, models, tmp_path_factory.mktemp(strategy) / "run.pt", 2, "--strategy", strategy)

    return functools.cache(start)


def moved(weights):
    return weights["after"].double() - weights["before"].double()


def assert_same_update(one, two, bound, metrics):
    """By what the update moved; metrics within their own bound."""
    (weights_one, facts_one), (weights_two, facts_two) = one, two
    assert torch.equal(weights_two["before"], weights_one["before"])
    assert weights_two["after"].dtype == weights_one["after"].dtype
    assert relative_distance(moved(weights_two), moved(weights_one)) < bound
    assert facts_two["counts"] == facts_one["counts"]
    assert facts_two["metrics"] == pytest.approx(facts_one["metrics"], rel=metrics, nan_ok=True)


@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        (strategy, name)
        for strategy in ("ddp", "fsdp")
        for name in IN_FLOAT64 | (AUXILIARY if strategy == "ddp" else {})
        if name not in NO_SIGNAL
    ],
)
def test_two_ranks_give_the_update_of_one(strategy, case, on_one, on_two):
    assert on_one[case][0]["after"].dtype == torch.float64
    assert_same_update(on_one[case], on_two(strategy)[case], 1e-12, 1e-9)


@BOTH
@pytest.mark.parametrize("case", NO_SIGNAL)
def test_without_any_signal_no_rank_steps(case, strategy, on_one, on_two):
    assert on_one[case][1]["counts"]["skipped_steps"] == on_two(strategy)[case][1]["counts"]["skipped_steps"] == 1
    for weights, _ in (on_one[case], on_two(strategy)[case]):
        assert torch.equal(weights["after"], weights["before"])
    assert on_two(strategy)[case][1]["metrics"] == pytest.approx(on_one[case][1]["metrics"], rel=1e-9, nan_ok=True)


@BOTH
@pytest.mark.parametrize("case", IN_FLOAT32)
def test_in_narrower_numbers_too(case, strategy, on_one, on_two):
    assert on_one[case][0]["after"].dtype == torch.float32
    assert_same_update(on_one[case], on_two(strategy)[case], 1e-5, 1e-4)


@BOTH
@pytest.mark.parametrize("case", OF_OTHER_MODELS)
def test_experts_and_images_too(case, strategy, on_one, on_two):
    """Experts that no token of a rank chose have a gradient of zero there; a rank without an image takes part in
    the update of the tower."""
    assert_same_update(on_one[case], on_two(strategy)[case], 1e-12, 1e-12)


def test_the_tower_of_a_vision_model_moves(on_one):
    from tests.vision.models import vision_policy

    tower = sum(p.numel() for p in vision_policy("qwen2_5_vl").base_model.model.visual.parameters())
    case = "one rank without images"
    assert moved(on_one[case][0])[:tower].norm() > 1e-3


@pytest.mark.slow
@BOTH
def test_compiled_layers_on_two_ranks_give_the_update_of_plain_ones_on_one(strategy, models, on_one, tmp_path):
    compiled = run({"ragged": []}, models, tmp_path / "two.pt", 2, "--strategy", strategy, "--compile")
    one, facts_one = on_one["ragged"]
    two, facts_two = compiled["ragged"]
    # The norms of a compiled layer are fused: their float32 inside is rounded elsewhere.
    assert relative_distance(two["after"], one["after"]) < 1e-7
    assert facts_two["counts"] == facts_one["counts"]
