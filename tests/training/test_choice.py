"""Tokens chosen by their covariance: the same for any plan, order and memory, and drawn afresh in every pass.

That the update is the equation, on one rank and on two, is tested in tests/whole_update (`COVARIANT`).
"""

from __future__ import annotations

import functools

import pytest
import torch

from gspo_lightning.rollout.sampling import row_uniforms
from gspo_lightning.training import rollout_update
from gspo_lightning.training.choice import choose
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer, update_of
from tests.support import relative_distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TOKEN = {"importance_sampling_level": "token"}
LOSSES = {
    "clip_cov": {**TOKEN, "loss_type": "clip_cov", "clip_cov_ratio": 0.2, "clip_cov_lb": 0.0},
    "kl_cov": {**TOKEN, "loss_type": "kl_cov", "kl_cov_ratio": 0.2, "ppo_kl_coef": 3.0},
}
NOTHING = {"clip_cov": {"clip_cov_lb": 90.0, "clip_cov_ub": 91.0}, "kl_cov": {"ppo_kl_coef": 1e-9}}
"""Bounds that no covariance lies between, and a penalty of nearly nothing."""

TWICE = {"num_iterations": 2}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("budget", [1, 14, 25])
@pytest.mark.parametrize("keep", [False, True])
def test_tokens_are_chosen_over_the_minibatch_not_the_micro_batch(loss, budget, keep, micro_model_dir):
    """Nor does the order of prompts matter, nor whether completions without an advantage are forwarded."""
    whole, module = update_of(micro_model_dir, Settings(objective=LOSSES[loss], update=TWICE))
    without, _ = update_of(micro_model_dir, Settings(objective=LOSSES[loss] | NOTHING[loss], update=TWICE))
    cut = {**TWICE, "max_tokens_per_microbatch": budget, "keep_zero_advantage": keep}
    ours, other = update_of(micro_model_dir, Settings(objective=LOSSES[loss], update=cut), scripted_prompts()[::-1])
    assert relative_distance(ours, whole) < 1e-12
    assert relative_distance(whole, without) > 0.01
    assert 0 < other.last_metrics["covariance_frac"] <= module.last_metrics["covariance_frac"] < 0.3


def chosen_in(folder, monkeypatch, seed=0):
    """The tokens that each step of a run of two rollouts chooses, by prompt and completion."""
    seen = []

    def spy(passes, scored, minibatch, *arguments):
        fixed = choose(passes, scored, minibatch, *arguments)
        members = [(part.group, number) for plan in minibatch.plan for part in plan for number in part.completions]
        lengths = [scored.completions[group][number].num_trained for group, number in members]
        tokens = torch.cat(fixed.chosen).split(lengths)
        seen.append({member: own.tolist() for member, own in zip(members, tokens, strict=True)})
        return fixed

    standing = functools.partial(torch.optim.SGD, lr=0.0)
    settings = Settings(objective=LOSSES["clip_cov"], update=TWICE, rollouts=2, optimizer=standing)
    module = build_module(folder, settings)
    module.seed = seed
    with monkeypatch.context() as patch:
        patch.setattr(rollout_update, "choose", spy)
        trainer().fit(module, Batches(scripted_prompts(), 2).loader())
    return seen


def test_every_pass_and_every_rollout_draws_its_own_tokens_and_the_same_again(micro_model_dir, monkeypatch):
    """Weights that do not move leave the same tokens to draw from."""
    drawn = chosen_in(micro_model_dir, monkeypatch)
    assert len(drawn) == 4 and all(a != b for n, a in enumerate(drawn) for b in drawn[:n])
    counts = {sum(sum(own) for own in step.values()) for step in drawn}
    assert len(counts) == 1 and counts.pop() >= 3
    assert chosen_in(micro_model_dir, monkeypatch) == drawn
    assert chosen_in(micro_model_dir, monkeypatch, seed=1) != drawn


def test_draws_have_nothing_to_do_with_those_that_sampled_the_tokens(micro_model_dir, monkeypatch):
    """A small uniform samples one of the first tokens of the vocabulary, which must not be what is drawn here."""
    asked = []
    real = row_uniforms
    monkeypatch.setattr(
        "gspo_lightning.training.choice.row_uniforms",
        lambda seed, uid, generation, count: asked.append(uid) or real(seed, uid, generation, count),
    )
    chosen_in(micro_model_dir, monkeypatch)
    assert asked and not {prompt.uid for prompt in scripted_prompts()} & set(asked)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_rollout_of_silent_groups_chooses_nothing_and_takes_no_step(loss, micro_model_dir):
    silent = scripted_prompts()
    for prompt in silent:
        prompt.sample["scripted"] = [(number, 0.5) for number, _ in prompt.sample["scripted"]]
    change, module = update_of(micro_model_dir, Settings(objective=LOSSES[loss], update=TWICE), silent)
    assert change.abs().max() == 0 and module.counts["skipped_steps"] == 2
    assert "covariance_frac" not in module.last_metrics
