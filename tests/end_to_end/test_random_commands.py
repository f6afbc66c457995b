"""Commands of random settings: a run resumes with the same bits, and what must change nothing changes nothing."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.command_line import metrics, run
from tests.support import relative_distance

BASE = [
    "experiment=micro", "max_rollouts=4", "checkpoint.every_n_rollouts=1", "checkpoint.keep_last=4", "print_config=false",
    "trainer.precision=64-true", "model.dtype=float64", "allow_no_effect=true", "data.max_prompt_length=160",
]  # fmt: skip
"""In float64, so that rounding draws no other token."""
GAME = ["data=secret_number", "environment=guess_the_number", "reward=environment"]
POOL = [
    "data=rows", "data.task.source=tests/conf/letters.jsonl", "data.task.prompt_column=question",
    "data.task.num_validation=2", "num_epochs=2", "data.overlong_prompts=drop",
]  # fmt: skip
CHOICES: list[list[str]] = [
    [f"objective={name}" for name in (
        "grpo", "gspo_paper", "gspo_token", "bnpo", "cispo", "clip_cov", "dapo", "dppo_kl", "dppo_tv", "dr_grpo", "gmpo",
        "kl_cov", "luspo", "reinforce", "sapo", "vespo",
    )],
    ["objective.importance_sampling_level=token", "objective.importance_sampling_level=sequence_token"],
    ["objective.beta=0.04"], ["objective.beta_end=0.1"], ["objective.entropy_coef=0.01"], ["objective.entropy_target=3.0"],
    ["objective.mask_truncated_completions=true"], ["objective.top_entropy_quantile=0.5"],
    ["objective.off_policy_mask_threshold=0.05"],
    [f"mismatch={name}" for name in ("sequence_mask", "sequence_mean_mask", "sequence_truncate", "token_truncate")],
    [f"advantages={name}" for name in (
        "batch", "none", "opo", "pass_at_k", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "rloo",
    )],
    ["rollout.num_generations=2", "rollout.num_generations=4"], ["rollout.max_completion_length=3"],
    ["rollout.temperature=0.5", "rollout.temperature=1.5"], ["rollout.top_p=0.8"], ["rollout.top_k=5"], ["rollout.stop=[b]"],
    ["lora=language"], ["model=micro_gpt_oss"], ["model.gradient_checkpointing=true"], ["dynamic_sampling.max_draws=2"],
    ["update.num_iterations=2"], ["update.num_minibatches=1", "update.num_minibatches=4"], ["update.old_logprobs=sampler"],
    ["update.max_grad_norm=0.01"], ["update.ref_sync_every_n_rollouts=1"], ["update.log_entropy=true"],
    ["optimizer.weight_decay=0.1"], ["optimizer.fused=false"], ["scheduler=cosine", "scheduler=linear"],
    ["scheduler.warmup_ratio=0.3"], ["validation.every_n_rollouts=2"], ["record_tokens=true"],
]  # fmt: skip
SAME = {
    "micro-batches": "update.max_tokens_per_microbatch=192",
    "silent groups forwarded": "update.keep_zero_advantage=true",
    "fewer rows at a time": "rollout.engine.max_concurrent=3",
}


def drawn(rng: random.Random) -> list[str]:
    """A few settings, and sometimes other data."""
    settings = [rng.choice(values) for values in rng.sample(CHOICES, rng.randint(3, 9))]
    return [*rng.choice([[], GAME, POOL]), *settings]


def train(folder: Path, *overrides: str) -> bool:
    """Trains; returns False if the settings do not go together, which one line must have said."""
    done = run(*BASE, *overrides, f"hydra.run.dir={folder}", expect=None)
    said = done.stdout + done.stderr
    assert done.returncode in (0, 2) and "Traceback" not in said, said
    return done.returncode == 0


def weights(folder: Path) -> Tensor:
    (file,) = (folder / "model").glob("*.safetensors")
    return torch.cat([value.flatten() for _, value in sorted(load_file(file).items())])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_random_settings_resume_with_the_same_bits_and_do_not_depend_on_how_work_is_cut(seed, tmp_path):
    rng, whole = random.Random(seed), tmp_path / "whole"
    settings = drawn(rng)
    while not train(whole, *settings):
        shutil.rmtree(whole, ignore_errors=True)
        settings = drawn(rng)
    checkpoint = rng.choice(sorted((whole / "checkpoints").glob("rollout-*.ckpt"))[:-1])
    resumed = tmp_path / "resumed"
    assert train(resumed, *settings, f"ckpt_path={checkpoint}")
    assert metrics(resumed)[-1] == metrics(whole)[-1], settings
    assert weights(resumed).equal(weights(whole)), settings
    for name, change in SAME.items():
        assert train(tmp_path / name, *settings, change)
        # 1e-16, but for what is computed from log-probabilities of the sampler, which are kept in float32.
        assert relative_distance(weights(tmp_path / name), weights(whole)) < 1e-8, (settings, name)
