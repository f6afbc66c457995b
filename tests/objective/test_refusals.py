"""Settings that contradict each other or cannot act are found, each with a line that names key and fix."""

from __future__ import annotations

import pytest

from gspo_lightning.objective import Objective, check_objective


def findings(objective=None, **changes):
    objective = Objective(max_completion_length=8, **(objective or {}))
    facts = {
        "num_iterations": 1,
        "num_minibatches": 4,
        "num_generations": 8,
    }
    return [(f.kind, f.message) for f in check_objective(objective, **{**facts, **changes})]


CASES = {
    "a clip with one optimizer step": ({"epsilon": 0.1}, {"num_minibatches": 1}, "no_effect", "objective.epsilon cannot act"),
    "a clip on a loss without one": ({"loss_type": "reinforce", "epsilon": 0.1, "importance_sampling_level": "token"},
                                     {"num_minibatches": 1}, "no_effect", "has no effect on loss_type=reinforce"),
    "a wide clip at sequence level": ({"epsilon": 0.2}, {}, "warning", "will hardly ever act"),
    "a sequence's width at token level": ({"importance_sampling_level": "token", "epsilon": 0.03}, {}, "warning", "widths for the ratio of a sequence"),
    "a negative width": ({"epsilon": -0.1}, {}, "contradiction", "must not be negative"),
    "delta below the upper clip": ({"importance_sampling_level": "token", "delta": 1.2}, {}, "contradiction", "objective.delta=1.2 is below"),
    "cispo at sequence level": ({"loss_type": "cispo"}, {}, "contradiction", "use token"),
    "gmpo at sequence level": ({"loss_type": "gmpo"}, {}, "contradiction", "use token"),
    "reinforce off policy": ({"loss_type": "reinforce"}, {}, "warning", "update.num_minibatches=1"),
    "negative beta_end": ({"beta": 0.1, "beta_end": -0.1}, {}, "contradiction", "objective.beta_end=-0.1"),
    "a schedule that goes nowhere": ({"beta": 0.1, "beta_end": 0.1}, {}, "no_effect", "set it to null"),
    "a KL estimator without KL": ({"kl_estimator": "k1"}, {}, "no_effect", "leave it at k3"),
    "a moving reference without KL": ({}, {"ref_sync_every_n_rollouts": 2}, "no_effect", "no effect with objective.beta=0"),
    "a moving reference of an adapter": ({"beta": 0.1}, {"ref_sync_every_n_rollouts": 2, "has_adapter": True}, "contradiction", "lora=none"),
    "a mixture out of range": ({"beta": 0.1}, {"ref_sync_every_n_rollouts": 2, "ref_model_mixup_alpha": 1.5}, "contradiction", "at most 1"),
    "a mixture of a reference that stays": ({"beta": 0.1}, {"ref_model_mixup_alpha": 0.5}, "no_effect", "ref_sync_every_n_rollouts=0"),
    "no tokens at all": ({"top_entropy_quantile": 0.0}, {}, "contradiction", "above 0 and at most 1"),
    "an off-policy mask on policy": ({"off_policy_mask_threshold": 0.5}, {"num_minibatches": 1}, "no_effect", "cannot act"),
    "a negative off-policy threshold": ({"off_policy_mask_threshold": -0.5}, {}, "contradiction", "must be above 0"),
    "a temperature of another loss": ({"tau_positive": 2.0}, {}, "no_effect", "no effect on loss_type=grpo"),
    "negative beta": ({"beta": -0.1}, {}, "contradiction", "must be 0 or more"),
    "a KL option without KL": ({"kl_importance_weighted": True}, {}, "no_effect", "no effect with objective.beta=0"),
    "a group of one": ({}, {"num_generations": 1}, "contradiction", "rollout.num_generations=1"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "changes", "kind", "text"), CASES.values(), ids=CASES.keys())
def test_found_with_its_kind_key_and_fix(settings, changes, kind, text):
    found = findings(settings, **changes)
    assert any(k == kind and text in message for k, message in found), found
    assert all("\n" not in message for _, message in found)


@pytest.mark.parametrize(
    "settings", [{}, {"importance_sampling_level": "token"}, {"beta": 0.1}, {"epsilon": 0.03, "epsilon_high": 0.04}]
)
def test_sound_settings_find_nothing(settings):
    assert findings(settings) == []
