"""Settings that contradict each other or cannot act are found, each with a line that names key and fix."""

from __future__ import annotations

import warnings

import pytest
import torch

from gspo_lightning.errors import UserError
from gspo_lightning.objective import Finding, Objective, check_objective
from gspo_lightning.objective.mismatch import MismatchCorrection
from gspo_lightning.objective.refusals import warn_or_refuse


def findings(objective=None, **changes):
    objective = Objective(**{"max_completion_length": 8, **(objective or {})})
    facts = {
        "num_iterations": 1,
        "num_minibatches": 4,
    }
    return [(f.kind, f.message) for f in check_objective(objective, **{**facts, **changes})]


VESPO = {"loss_type": "vespo", "importance_sampling_level": "token"}
CLIP_COV, KL_COV = ({"loss_type": loss, "importance_sampling_level": "token"} for loss in ("clip_cov", "kl_cov"))
CASES = {
    "a clip with one optimizer step": ({"epsilon": 0.1}, {"num_minibatches": 1}, "no_effect", "objective.epsilon cannot act"),
    "a gate with one optimizer step": (
        {"loss_type": "sapo", "tau_negative": 2.0}, {"num_minibatches": 1}, "no_effect",
        "objective.tau_negative cannot act: with one optimizer step per rollout the ratio is exactly 1; raise "
        "update.num_minibatches or update.num_iterations, or set it to 1.05",
    ),
    "a penalty of what cannot have moved": (
        KL_COV, {"num_minibatches": 1}, "no_effect",
        "objective.loss_type=kl_cov cannot act: with one optimizer step per rollout the ratio is exactly 1, where its penalty has no "
        "gradient; raise update.num_minibatches or update.num_iterations, or set objective=clip_cov",
    ),
    "a share of no tokens": ({**CLIP_COV, "clip_cov_ratio": 0.0}, {}, "contradiction", "objective.clip_cov_ratio=0.0 must be above 0 and at most 1"),
    "a share of more than all": ({**KL_COV, "kl_cov_ratio": 1.5}, {}, "contradiction", "objective.kl_cov_ratio=1.5 must be above 0 and at most 1"),
    "bounds with nothing between": (
        {**CLIP_COV, "clip_cov_lb": 5.0}, {}, "contradiction", "objective.clip_cov_lb=5.0 must be below objective.clip_cov_ub=5.0",
    ),
    "a penalty of no weight": ({**KL_COV, "ppo_kl_coef": 0.0}, {}, "contradiction", "objective.ppo_kl_coef=0.0 must be above 0"),
    "a share of another loss": (
        {**CLIP_COV, "kl_cov_ratio": 0.1}, {}, "no_effect", "objective.kl_cov_ratio has no effect on loss_type=clip_cov, which reads "
        "objective.epsilon and objective.epsilon_high and objective.clip_cov_ratio and objective.clip_cov_lb and objective.clip_cov_ub; "
        "set it to 0.002",
    ),
    "a bound of another loss": ({"clip_cov_ub": 3.0}, {}, "no_effect", "objective.clip_cov_ub has no effect on loss_type=grpo"),
    "a cap of a loss without one": ({**CLIP_COV, "delta": 3.0}, {}, "no_effect", "objective.delta has no effect on loss_type=clip_cov"),
    "a covariance at sequence level": ({"loss_type": "kl_cov"}, {}, "contradiction", "use token"),
    "the wide clip of Clip-Cov on policy": ({**CLIP_COV, "epsilon": 0.2}, {"num_minibatches": 1}, "no_effect", "objective.epsilon cannot act"),
    "a weight with one optimizer step": ({**VESPO, "k_positive": 3.0}, {"num_minibatches": 1}, "no_effect", "objective.k_positive cannot act"),
    "a step of the bonus without a target": (
        {"entropy_coef_delta": 0.01}, {}, "no_effect",
        "objective.entropy_coef_delta has no effect with objective.entropy_target=null; set a target, or leave it at 0.005",
    ),
    "a bound of the bonus without a target": (
        {"entropy_coef": 0.1, "entropy_coef_max": 0.5}, {}, "no_effect", "objective.entropy_coef_max has no effect",
    ),
    "a target of no entropy": ({"entropy_target": 0.0}, {}, "contradiction", "objective.entropy_target=0.0 must be above 0"),
    "a bonus that never moves": (
        {"entropy_target": 1.0, "entropy_coef_delta": 0.0}, {}, "contradiction", "objective.entropy_coef_delta=0.0 must be above 0",
    ),
    "bounds that are one": (
        {"entropy_target": 1.0, "entropy_coef": 0.5, "entropy_coef_min": 0.5, "entropy_coef_max": 0.5}, {}, "contradiction",
        "objective.entropy_coef_min=0.5 must be at least 0 and below objective.entropy_coef_max=0.5",
    ),
    "a bonus that begins out of its bounds": (
        {"entropy_target": 1.0, "entropy_coef": 2.0}, {}, "contradiction", "objective.entropy_coef=2.0 must lie between",
    ),
    "completions kept that the bonus keeps anyway": (
        {"entropy_target": 1.0}, {"keep_zero_advantage": True}, "no_effect", "objective.entropy_coef, objective.entropy_target): every completion",
    ),
    "a clip on a loss without one": ({"loss_type": "reinforce", "epsilon": 0.1, "importance_sampling_level": "token"},
                                     {"num_minibatches": 1}, "no_effect", "has no effect on loss_type=reinforce"),
    "a lower width of a loss with a cap alone": (
        {"loss_type": "cispo", "importance_sampling_level": "token", "epsilon": 0.2}, {}, "no_effect",
        "objective.epsilon has no effect on loss_type=cispo, which reads objective.epsilon_high; set it to null",
    ),
    "a cap of the ratio with cispo": (
        {"loss_type": "cispo", "importance_sampling_level": "token", "delta": 1.3}, {}, "no_effect",
        "objective.delta has no effect on loss_type=cispo, which reads objective.epsilon_high; set it to null",
    ),
    "a cap of the ratio with gmpo": (
        {"loss_type": "gmpo", "importance_sampling_level": "token", "delta": 2.0}, {}, "no_effect",
        "objective.delta has no effect on loss_type=gmpo, which reads objective.epsilon and objective.epsilon_high; set it to null",
    ),
    "a cap of weights below 1": (
        {"loss_type": "cispo", "importance_sampling_level": "token", "epsilon_high": 0.2}, {"num_minibatches": 1}, "warning",
        "objective.epsilon_high=0.2 is a bound of the ratio itself for loss_type=cispo",
    ),
    "reinforce one step off": (
        {"loss_type": "reinforce"}, {"num_minibatches": 1, "staleness": 1}, "warning", "rollout.engine.staleness=1 makes every",
    ),
    "kept completions that are kept anyway": (
        {"beta": 0.1}, {"keep_zero_advantage": True}, "no_effect", "update.keep_zero_advantage=true has no effect with a KL term",
    ),
    "kept completions with an entropy bonus": (
        {"entropy_coef": 0.1}, {"keep_zero_advantage": True}, "no_effect", "every completion is forwarded then; set it to false",
    ),
    "a wide clip at sequence level": ({"epsilon": 0.2}, {}, "warning", "will almost never act"),
    "a sequence's width at token level": ({"importance_sampling_level": "token", "epsilon": 0.03}, {}, "warning", "widths for the ratio of a sequence"),
    "a negative width": ({"epsilon": -0.1}, {}, "contradiction", "must not be negative"),
    "a cap that would act on all tokens of a trust region": (
        {"loss_type": "dppo_tv", "importance_sampling_level": "token", "delta": 0.9}, {}, "contradiction",
        "objective.delta=0.9 is below 1: it would cap every token that has not moved; raise it",
    ),
    "a correction of a ratio to the sampler": (
        {"mismatch": MismatchCorrection("sequence", "mask", 2.0)}, {"old_logprobs": "sampler"}, "contradiction",
        "update.old_logprobs=sampler contradicts objective.mismatch",
    ),
    "a ratio to the sampler that nothing reads": (
        {"loss_type": "reinforce", "beta": 0.1}, {"old_logprobs": "sampler", "num_minibatches": 1}, "no_effect",
        "update.old_logprobs=sampler has no effect on loss_type=reinforce",
    ),
    "a trust region that nothing leaves": (
        {"loss_type": "dppo_tv", "importance_sampling_level": "token", "epsilon_high": 1.0}, {}, "no_effect",
        "objective.epsilon_high=1.0 cannot act: no probability moves by 1",
    ),
    "a trust region of the width of a sequence's clip": (
        {"loss_type": "dppo_kl", "importance_sampling_level": "token", "epsilon": 3e-4}, {}, "warning",
        "objective.epsilon=0.0003 leaves out nearly every token that has moved: for loss_type=dppo_kl it is a distance of "
        "probabilities, 0.05 unless set",
    ),
    "ratios of sequences to a sampler one step ahead": (
        {}, {"old_logprobs": "sampler", "staleness": 1}, "warning", "nothing measures how far rounding moves the ratio",
    ),
    "a trust region on policy": (
        {"loss_type": "dppo_kl", "importance_sampling_level": "token", "epsilon": 0.1}, {"num_minibatches": 1}, "no_effect",
        "objective.epsilon cannot act: with one optimizer step per rollout",
    ),
    "delta below the upper clip": ({"importance_sampling_level": "token", "delta": 1.2}, {}, "contradiction", "objective.delta=1.2 is below"),
    "cispo at sequence level": ({"loss_type": "cispo"}, {}, "contradiction", "use token"),
    "gmpo at sequence level": ({"loss_type": "gmpo"}, {}, "contradiction", "use token"),
    "reinforce off policy": ({"loss_type": "reinforce"}, {}, "warning", "update.num_minibatches=1"),
    "negative beta_end": ({"beta": 0.1, "beta_end": -0.1}, {}, "contradiction", "objective.beta_end=-0.1"),
    "a schedule that goes nowhere": ({"beta": 0.1, "beta_end": 0.1}, {}, "no_effect", "set it to null"),
    "a KL estimator without KL": ({"kl_estimator": "k1"}, {}, "no_effect", "leave it at k3"),
    "a KL estimate without the reference in its gradient": (
        {"beta": 0.1, "kl_estimator": "k1"}, {}, "contradiction",
        "objective.kl_estimator=k1 is not a penalty without objective.kl_importance_weighted",
    ),
    "the same for a weight that begins at 0": (
        {"beta_end": 0.1, "kl_estimator": "k1"}, {}, "contradiction", "set kl_importance_weighted to true, or use k3",
    ),
    "a weighted estimate that is of no KL divergence": (
        {"beta": 0.1, "kl_estimator": "k2", "kl_importance_weighted": True}, {}, "warning", "with kl_estimator=k2 does not have the gradient",
    ),
    "tokens of highest entropy under the ratio of a sequence": (
        {"top_entropy_quantile": 0.2}, {}, "contradiction",
        "objective.top_entropy_quantile=0.2 leaves no token out with importance_sampling_level=sequence, where the tokens of a "
        "completion share one loss; use importance_sampling_level=sequence_token",
    ),
    "the same of sapo": (
        {"top_entropy_quantile": 0.2, "loss_type": "sapo"}, {}, "contradiction", "use importance_sampling_level=token",
    ),
    "the same of gmpo": (
        {"top_entropy_quantile": 0.2, "loss_type": "gmpo", "importance_sampling_level": "token"}, {}, "contradiction",
        "with loss_type=gmpo, where the tokens of a completion share one loss; use another loss_type",
    ),
    "masked tokens under the ratio of a sequence": (
        {"mismatch": MismatchCorrection("token", "mask", 5.0, 0.5)}, {}, "contradiction",
        "use importance_sampling_level=sequence_token, or mismatch=sequence_mask",
    ),
    "capped weights of tokens under the ratio of a sequence": (
        {"mismatch": MismatchCorrection("token", "truncate", 2.0)}, {}, "warning",
        "weighs each completion by the mean of its weights with importance_sampling_level=sequence",
    ),
    "a moving reference without KL": ({}, {"ref_sync_every_n_rollouts": 2}, "no_effect", "no effect with objective.beta=0"),
    "a moving reference of an adapter": ({"beta": 0.1}, {"ref_sync_every_n_rollouts": 2, "has_adapter": True}, "contradiction", "lora=none"),
    "a mixture out of range": ({"beta": 0.1}, {"ref_sync_every_n_rollouts": 2, "ref_model_mixup_alpha": 1.5}, "contradiction", "at most 1"),
    "a mixture of a reference that stays": ({"beta": 0.1}, {"ref_model_mixup_alpha": 0.5}, "no_effect", "ref_sync_every_n_rollouts=0"),
    "no tokens at all": ({"top_entropy_quantile": 0.0}, {}, "contradiction", "above 0 and at most 1"),
    "an off-policy mask on policy": ({"off_policy_mask_threshold": 0.5}, {"num_minibatches": 1}, "no_effect", "cannot act"),
    "a negative off-policy threshold": ({"off_policy_mask_threshold": -0.5}, {}, "contradiction", "must be above 0"),
    "a temperature of another loss": ({"tau_positive": 2.0}, {}, "no_effect", "no effect on loss_type=grpo"),
    "a width that is no number": ({"epsilon": float("nan")}, {}, "contradiction", "must not be negative"),
    "a threshold that is no number": ({"off_policy_mask_threshold": float("nan")}, {}, "contradiction", "must be above 0"),
    "a gate of no temperature": (
        {"loss_type": "sapo", "importance_sampling_level": "token", "tau_positive": 0.0}, {}, "contradiction",
        "objective.tau_positive=0.0 must be above 0",
    ),
    "a gate that turns the reward around": (
        {"loss_type": "sapo", "importance_sampling_level": "token", "tau_negative": -1.0}, {}, "contradiction",
        "objective.tau_negative=-1.0 must be above 0",
    ),
    "an exponent of another loss": (
        {"k_negative": 2.0}, {}, "no_effect", "objective.k_negative has no effect on loss_type=grpo, which reads objective.epsilon "
        "and objective.epsilon_high and objective.delta; set it to 3.0",
    ),
    "a decay of another loss": (
        {"loss_type": "sapo", "lambda_positive": 2.0}, {}, "no_effect", "objective.lambda_positive has no effect on loss_type=sapo",
    ),
    "a width of a loss without a clip": ({**VESPO, "epsilon": 0.2}, {}, "no_effect", "objective.epsilon has no effect on loss_type=vespo"),
    "a weight that keeps what the policy has left": ({**VESPO, "k_positive": 0.0}, {}, "contradiction", "objective.k_positive=0.0 must be above 0"),
    "the same for negative advantages": ({**VESPO, "k_negative": -1.0}, {}, "contradiction", "objective.k_negative=-1.0 must be above 0"),
    "a weight that grows with the ratio": (
        {**VESPO, "lambda_positive": 0.0}, {}, "contradiction", "objective.lambda_positive=0.0 must be above 0",
    ),
    "a weight that is no number": (
        {**VESPO, "lambda_negative": float("nan")}, {}, "contradiction", "objective.lambda_negative=nan must be above 0",
    ),
    "vespo at sequence level": ({"loss_type": "vespo"}, {}, "contradiction", "use token"),
    **{
        f"a correction per {level} inside the ratio of vespo": (
            {**VESPO, "mismatch": MismatchCorrection(level, "truncate", 2.0)}, {}, "contradiction",
            f"objective.mismatch.level={level} is not defined for loss_type=vespo, whose own ratio takes in a weight per token; use "
            "mismatch=token_truncate or token_mask",
        )
        for level in ("sequence", "sequence_mean")
    },
    "a denominator below 0": (
        {"loss_type": "dr_grpo", "max_completion_length": -8}, {}, "contradiction", "objective.max_completion_length=-8 must be at least 1",
    ),
    "a denominator of nothing": ({"max_completion_length": 0}, {}, "contradiction", "objective.max_completion_length=0 must be at least 1"),
    "a denominator that is not read": (
        {}, {"max_completion_length": 9}, "no_effect",
        "objective.max_completion_length=8 has no effect on loss_type=grpo, whose denominator counts what was sampled; leave it at "
        "${rollout.max_completion_length}",
    ),
    "negative beta": ({"beta": -0.1}, {}, "contradiction", "must be 0 or more"),
    "a KL option without KL": ({"kl_importance_weighted": True}, {}, "no_effect", "no effect with objective.beta=0"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "changes", "kind", "text"), CASES.values(), ids=CASES.keys())
def test_found_with_its_kind_key_and_fix(settings, changes, kind, text):
    found = findings(settings, **changes)
    assert any(k == kind and text in message for k, message in found), found
    assert all("\n" not in message for _, message in found)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"importance_sampling_level": "token"}, {"beta": 0.1}, {"epsilon": 0.03, "epsilon_high": 0.04},
        *({"beta": 0.1, "kl_estimator": kind, "kl_importance_weighted": w} for kind, w in (("k1", True), ("k2", False), ("k3", True))),
        *({"importance_sampling_level": level, "top_entropy_quantile": 0.2} for level in ("token", "sequence_token")),
        {"importance_sampling_level": "sequence_token", "mismatch": MismatchCorrection("token", "mask", 5.0, 0.5)},
        *({"mismatch": MismatchCorrection(level, "mask", 2.0)} for level in ("sequence", "sequence_mean")),
        {"loss_type": "dppo_kl", "importance_sampling_level": "token", "epsilon": 0.01, "delta": 1.0},
        VESPO, {**VESPO, "top_entropy_quantile": 0.2, "k_positive": 1.0, "lambda_negative": 0.5},
        {**CLIP_COV, "clip_cov_lb": -1.0, "epsilon": 0.2}, {**KL_COV, "ppo_kl_coef": 0.1, "top_entropy_quantile": 0.5},
        *({**VESPO, "mismatch": MismatchCorrection("token", how, 2.0)} for how in ("truncate", "mask")),
    ],
)  # fmt: skip
def test_sound_settings_find_nothing(settings):
    assert findings(settings) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "token", "epsilon": 0.2, "delta": 2.0},
        {"importance_sampling_level": "token", "loss_type": "cispo", "epsilon_high": 4.0},
        {"off_policy_mask_threshold": 0.5},
        {"loss_type": "sapo", "tau_positive": 2.0},
        {**VESPO, "lambda_negative": 1.0},
        KL_COV,
    ],
)
def test_one_step_off_the_ratio_is_not_1_and_a_clip_acts_with_one_optimizer_step(settings):
    assert findings(settings, num_minibatches=1, staleness=1) == []
    assert (
        findings(settings, num_minibatches=1, old_logprobs="sampler") == []
    )  # whose numbers are not quite the policy's
    assert [kind for kind, _ in findings(settings, num_minibatches=1)] == ["no_effect"]


def test_a_weight_that_takes_in_a_correction_acts_with_one_optimizer_step():
    correction = {"mismatch": MismatchCorrection("token", "truncate", 2.0)}
    assert findings({**VESPO, **correction, "k_positive": 3.0}, num_minibatches=1) == []
    sapo = {"loss_type": "sapo", "importance_sampling_level": "token", "tau_positive": 2.0}
    assert [kind for kind, _ in findings({**sapo, **correction}, num_minibatches=1)] == ["no_effect"]


@pytest.mark.parametrize(
    "changes", [{"tau_positive": 0.3, "tau_negative": 7.0}, {**VESPO, "k_positive": 5.0, "lambda_negative": 0.1}]
)
def test_at_a_ratio_of_1_the_gradient_of_these_losses_is_that_of_the_policy_whatever_their_settings(changes):
    """So they cannot act there, which is why they are refused: ``-A`` per token, as for ``reinforce``."""
    own = {"loss_type": "sapo", "importance_sampling_level": "token", **changes}
    logprobs = torch.linspace(-3, -0.1, 6, dtype=torch.float64).requires_grad_()
    advantages = torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    index, lengths = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([3, 3])
    objective = Objective(max_completion_length=3, **own)
    found = objective(logprobs, logprobs.detach(), advantages, index, lengths)
    weights = objective.aggregation.token_weight(torch.full((6,), 3.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.loss, logprobs)
    assert torch.allclose(gradient, -advantages * weights, rtol=1e-14)


@pytest.mark.parametrize("reads", [{"off_policy_mask_threshold": 0.5}, {"beta": 0.1, "kl_importance_weighted": True}])
def test_a_loss_without_a_ratio_may_have_a_term_that_reads_the_old_log_probabilities(reads):
    assert findings({"loss_type": "reinforce", **reads}, num_minibatches=1, old_logprobs="sampler") == []


def test_a_clip_that_the_loss_does_not_read_is_not_told_to_take_more_steps():
    found = findings({"loss_type": "cispo", "importance_sampling_level": "token", "epsilon": 0.2}, num_minibatches=1)
    assert [message for _, message in found if "cannot act" in message] == []


def test_a_cap_of_weights_below_1_acts_on_policy_too():
    found = findings(
        {"loss_type": "cispo", "importance_sampling_level": "token", "epsilon_high": 0.2}, num_minibatches=1
    )
    assert [kind for kind, _ in found] == ["warning"]


def test_the_denominator_of_dr_grpo_may_be_another_length_than_that_of_the_rollouts():
    assert findings({"loss_type": "dr_grpo"}, max_completion_length=9) == []
    assert findings({"loss_type": "bnpo"}, max_completion_length=8) == []


def test_completions_without_advantage_can_be_kept_where_they_would_be_left_out():
    assert findings({}, keep_zero_advantage=True) == []


def test_a_contradiction_is_refused_and_anything_else_is_said_once_whoever_asks():
    with pytest.raises(UserError, match="^k1 is none$"):
        warn_or_refuse(Finding("contradiction", "k1 is none"))
    findings = [Finding("no_effect", "a cap that is not read"), Finding("warning", "a wide clip")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for finding in findings * 2:
            warn_or_refuse(finding)
    assert [str(w.message) for w in caught] == ["a cap that is not read", "a wide clip"]
