"""Ratios to what the sampler reported: no forward before the update, and refused where they would mean something else.

That the update is the equation is tested in tests/whole_update (`OF_THE_SAMPLER`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gspo_lightning.callbacks.health import _clip
from gspo_lightning.errors import UserError
from gspo_lightning.objective.mismatch import MismatchCorrection
from gspo_lightning.policy.model import Policy
from gspo_lightning.training.rollout_update import RolloutUpdate
from gspo_lightning.training.update import UpdateSettings
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer, update_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def forwards(folder, old, monkeypatch, **settings):
    """Forwards of packed rows in the update of one rollout: (without gradient, with it)."""
    seen, forward, prepare = [], Policy.forward, RolloutUpdate.prepare

    def counted(policy, *arguments, **more):
        seen.append(torch.is_grad_enabled())
        return forward(policy, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "forward", counted)
        patch.setattr(RolloutUpdate, "prepare", lambda update: [seen.clear(), prepare(update)])
        update_of(folder, Settings(update={"num_minibatches": 2, "old_logprobs": old}, **settings))
    return seen.count(False), seen.count(True)


def test_what_the_sampler_reported_takes_no_forward(micro_model_dir, monkeypatch):
    """Of two minibatches the second needs old log-probabilities of the policy."""
    assert forwards(micro_model_dir, "policy", monkeypatch) == (1, 2)
    assert forwards(micro_model_dir, "sampler", monkeypatch) == (0, 2)
    # Entropies of all tokens are still needed to choose among them.
    chosen = {"objective": {"importance_sampling_level": "token", "top_entropy_quantile": 0.5}}
    assert forwards(micro_model_dir, "sampler", monkeypatch, **chosen) == (2, 2)


def test_a_cut_of_the_distribution_is_refused_at_the_beginning_and_when_it_changes(micro_model_dir):
    module = build_module(micro_model_dir, Settings(update={"old_logprobs": "sampler"}))
    line = "rollout.top_k=3 contradicts update.old_logprobs=sampler: .* or update.old_logprobs=policy$"
    with pytest.raises(UserError, match=line):
        module.sampling = replace(module.sampling, top_k=3)


def test_a_correction_beside_it_is_refused_by_the_module_too(micro_model_dir):
    objective = {"mismatch": MismatchCorrection("sequence", "truncate", 2.0)}
    module = build_module(micro_model_dir, Settings(objective=objective, update={"old_logprobs": "sampler"}))
    with pytest.raises(UserError, match="update.old_logprobs=sampler contradicts objective.mismatch"):
        trainer().fit(module, Batches(scripted_prompts(), 1).loader())


def test_another_word_is_refused():
    with pytest.raises(
        UserError, match="update.old_logprobs='rollout': there is no such choice; choose policy, sampler"
    ):
        UpdateSettings(old_logprobs="rollout")


@pytest.mark.parametrize(("old", "acts"), [("policy", False), ("sampler", True)])
def test_with_one_optimizer_step_a_clip_can_act_on_ratios_to_the_sampler(old, acts, micro_model_dir):
    module = build_module(micro_model_dir, Settings(update={"num_minibatches": 1, "old_logprobs": old}))
    assert (_clip(module) is not None) == acts
