"""On CUDA: a run of the micro model with every kind of setting takes the steps that it takes on a CPU."""

from __future__ import annotations

import pytest

from tests.conf.test_every_key import COMPLETIONS, METRICS, run

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]

CASES = {
    "as it is": [],
    "reference": ["objective.beta=0.1", "update.ref_sync_every_n_rollouts=1"],
    "entropy bonus": ["objective.entropy_coef=0.01"],
    "top entropy": ["objective.top_entropy_quantile=0.2", "objective.importance_sampling_level=sequence_token"],
    "tokens by covariance": [
        "objective=clip_cov", "objective.clip_cov_ratio=0.2", "objective.clip_cov_lb=-9.0", "objective.clip_cov_ub=9.0",
    ],
    "off-policy mask": ["objective.off_policy_mask_threshold=0.01"],
    "mismatch": ["mismatch=token_truncate"],
    "dynamic sampling": ["dynamic_sampling.max_draws=1"],
    "two iterations": ["update.num_iterations=2"],
    "tokens with delta": ["objective=grpo", "objective.delta=1.5"],
    "filters": ["rollout.top_p=0.9", "rollout.top_k=20", "rollout.min_p=0.05"],
    "dialogues": [
        "environment=guess_the_number", "data=secret_number", "reward=exact_match", "data.max_prompt_length=256",
        "data.task.num_validation=4", "data.prompts_per_rollout=4", "rollout.max_completion_length=40",
    ],
    "gradient checkpointing": ["model.gradient_checkpointing=true"],
    "block by block": ["model.attention=sdpa"],
    "in one kernel": ["model.attention=flex"],
}  # fmt: skip
ON_CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true"]
ON_GPU = ["trainer.accelerator=gpu", "trainer.precision=32-true"]


@pytest.mark.parametrize("case", CASES)
def test_the_steps_are_those_of_a_cpu(case, tmp_path):
    settings = CASES[case]
    cpu = run(tmp_path / "cpu", *[s for s in settings if not s.startswith("model.attention")], *ON_CPU)
    gpu = run(tmp_path / "gpu", *settings, *ON_GPU)
    assert gpu[COMPLETIONS] == cpu[COMPLETIONS]
    for ours, theirs in zip(gpu[METRICS], cpu[METRICS], strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            expected = float(value or "nan")
            assert float(ours[name] or "nan") == pytest.approx(expected, rel=2e-3, abs=2e-5, nan_ok=True), name
