"""Runs of models that see images, have experts or run padded, and of losses that a user brings, are equations of papers.

As in `test_whole_update.py`, whose settings are drawn here too. The reference calls the model's own forward on one unpadded
sequence at a time, with all images of its prompt, and takes the gradient of it by autograd. More: `-m slow`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.whole_update import models, product
from tests.whole_update.case import Case
from tests.whole_update.draw_models import draw_model, draw_own_loss, draw_padded
from tests.whole_update.models import MIXTURES, SEEING, seen_prompt
from tests.whole_update.own_losses import OWN
from tests.whole_update.padded_models import PADDED
from tests.whole_update.test_whole_update import outcome

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SEEDS = (26, 34, 36, 58, 75, 76, 81, 93, 96, 100)
PADDED_SEEDS = (2, 4, 5, 9, 17, 36)
OWN_SEEDS = (13, 17, 27, 32, 35)
MORE_SEEDS = range(120)
MORE_PADDED_SEEDS = range(60)
MORE_OWN_SEEDS = range(40)

NARROW = {
    "top_p": Case(seed=1, top_p=0.9, level="token", iterations=2, lr=0.05),
    "min_p": Case(seed=2, min_p=0.05, level="token", minibatches=2, beta=0.04),
}


def parts(case: Case) -> set[int]:
    """How many images and videos the prompts of a run have."""
    prompts = [seen_prompt(case, "", number) for number in range(case.prompts * case.rollouts)]
    return {sum(len(v) for k, v in p.mm_inputs.items() if k.endswith("grid_thw")) for p in prompts}


AXES: dict[str, Callable[[Case], Any]] = {
    "model": lambda c: c.model,
    "half that sees": lambda c: c.model in SEEING and c.vision,
    "adapter": lambda c: c.lora and ("sees" if c.model in SEEING else "experts" if c.model != "gpt_oss" else "router"),
    "padded": lambda c: c.padded and c.model in SEEING,
    "balance of experts": lambda c: c.balance > 0,
    "budget that cuts groups": lambda c: c.token_budget <= 40 and c.model in SEEING,
    "recomputed layers": lambda c: c.checkpointing,
    "minibatches, iterations and rollouts": lambda c: min(c.minibatches, c.iterations, c.rollouts) > 1,
    "reference": lambda c: c.has_kl and c.model in SEEING,
}
"""What of a case must take every value among `SEEDS` that it takes among many."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a model, made when it is first asked for."""
    made: dict[str, Any] = {}

    def folder(kind: str) -> Any:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            models.build(kind, made[kind])
        return made[kind]

    return folder


@pytest.mark.parametrize("seed", SEEDS)
def test_a_model_that_sees_or_has_experts_is_trained_by_the_equations(seed, folders):
    case = draw_model(seed)
    found = outcome(folders(case.model), case)
    assert found.differences == [], case
    assert any(metrics["count/optimizer_steps"] > 0 for metrics in found.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("seed", MORE_SEEDS)
def test_a_model_that_sees_or_has_experts_is_trained_by_the_equations_for_more_seeds(seed, folders):
    case = draw_model(seed)
    assert outcome(folders(case.model), case).differences == [], case


@pytest.mark.parametrize("seed", PADDED_SEEDS)
def test_a_model_that_always_runs_padded_is_trained_by_the_equations(seed, folders):
    case = draw_padded(seed)
    assert outcome(folders(case.model), case).differences == [], case


@pytest.mark.slow
@pytest.mark.parametrize("seed", MORE_PADDED_SEEDS)
def test_a_model_that_always_runs_padded_is_trained_by_the_equations_for_more_seeds(seed, folders):
    case = draw_padded(seed)
    assert outcome(folders(case.model), case).differences == [], case


@pytest.mark.parametrize("seed", OWN_SEEDS)
def test_a_loss_that_a_user_brings_is_trained_by_its_equation(seed, micro_model_dir):
    case = draw_own_loss(seed)
    assert outcome(micro_model_dir, case).differences == [], case


@pytest.mark.slow
@pytest.mark.parametrize("seed", MORE_OWN_SEEDS)
def test_a_loss_that_a_user_brings_is_trained_by_its_equation_for_more_seeds(seed, micro_model_dir):
    case = draw_own_loss(seed)
    assert outcome(micro_model_dir, case).differences == [], case


@pytest.mark.parametrize("key", NARROW)
def test_a_narrower_sampler_changes_nothing_but_the_metrics_that_compare_with_it(key, micro_model_dir):
    """Log-probabilities are those of the whole vocabulary: docs/design.md has no other."""
    case = NARROW[key]
    found, wide = outcome(micro_model_dir, case), outcome(micro_model_dir, replace(case, top_p=1.0, min_p=0.0))
    assert found.differences == wide.differences == []
    compared = {"sampler_mismatch/abs_mean", "gspo/ratio_noise_floor"}
    assert wide.metrics[0].keys() - found.metrics[0].keys() == compared
    assert found.metrics[0] == {name: value for name, value in wide.metrics[0].items() if name not in compared}


def test_every_kind_of_model_prompt_and_loss_is_among_the_seeds(micro_model_dir):
    cases, many = [draw_model(seed) for seed in SEEDS], [draw_model(seed) for seed in range(1_000)]
    missing = {name: {of(c) for c in many} - {of(c) for c in cases} for name, of in AXES.items()}
    assert {name: values for name, values in missing.items() if values} == {}
    numbers = [parts(case) for case in cases if case.model in SEEING]
    assert set().union(*numbers) == {0, 1, 2, 3}
    assert any({0, 1} <= n and max(n) > 1 for n in numbers), "no run has prompts with none, one and several images"
    assert {draw_own_loss(seed).loss for seed in OWN_SEEDS} == set(OWN)
    drawn = [draw_own_loss(seed) for seed in (*OWN_SEEDS, *MORE_OWN_SEEDS)]
    modules = [(case, product.build(micro_model_dir, case)) for case in drawn]
    assert {(c.loss, level) for c in drawn for level in (c.level,)} == {
        (name, level) for name, own in OWN.items() for level in own.levels
    }
    assert [c for c, module in modules if product.contradictions(module, c)] == []
    assert {case.model for case in cases} == {*SEEING, *MIXTURES}
    padded = [draw_padded(seed) for seed in PADDED_SEEDS]
    assert {(case.model, case.lora) for case in padded} == {(kind, lora) for kind in PADDED for lora in (False, True)}
    images = [[len(seen_prompt(c, "", n).mm_inputs) > 0 for n in range(c.prompts)] for c in padded]
    assert all(map(any, images)) and not all(map(all, images))
    assert any(case.has_kl and not case.lora for case in padded) and any(case.token_budget < 50 for case in padded)
