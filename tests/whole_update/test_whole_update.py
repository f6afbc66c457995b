"""A run is its papers' equations: random configurations, compared with a reference that is written out in plain loops.

`draw.py` draws a configuration, `scripted_rollouts.py` its prompts, completions and rewards, `product.py` trains on them
with the package (a Trainer and a `GSPOModule`), and `reference.py` once more by the equations, in float64 and one
unpadded sequence at a time. After every rollout the weights and every metric of docs/metrics.md that is not a time or
a peak of memory must agree.

**Tolerance.** A relative `TOLERANCE` of 1e-8, of the change of all weights since the start and of each metric, plus
`ROUNDING` for what cancels to nothing. Both sides are float64, where one operation rounds to 1e-16 and these runs differ
by 1e-12 at most, for `draw.py` keeps rates and rewards where a step does not amplify more than that. A single operation in
float32 is 1e-7 away, and a token averaged, clipped or left out wrongly 1e-4 and more. For that reason one function is
replaced on both sides: the norm of transformers' Llama, which computes in float32 whatever the model's dtype. (The
package's own norms of the layers are float64; the one after the last layer is transformers'.)

One case: `pytest tests/whole_update -k seed-18`, whose failure prints the configuration and every value that differs.
More of them: `pytest tests/whole_update -m slow`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from gspo_lightning.objective import LOSSES
from gspo_lightning.rollout.seeds import rollout_seed
from tests.whole_update import pairs, product
from tests.whole_update.case import Case
from tests.whole_update.controlled import CONTROLLED
from tests.whole_update.covariant import COVARIANT
from tests.whole_update.draw import draw
from tests.whole_update.estimators import OF_ESTIMATORS
from tests.whole_update.float64 import float64_layers
from tests.whole_update.reference import Run
from tests.whole_update.reference_losses import DPPO, SURROGATES
from tests.whole_update.reference_model import Network, Weights
from tests.whole_update.scripted_rollouts import scripted_stream

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TOLERANCE = 1e-8
ROUNDING = 1e-13

SEEDS = (
    5, 13, 16, 18, 27, 28, 30, 31, 33, 42, 47, 56, 58, 70, 83, 88, 90, 94, 95, 97, 99, 103, 108, 109, 113, 138, 146,
    156, 166, 167, 168, 171, 174, 176, 182, 190, 195, 203, 204, 206, 209, 210, 211, 220, 227, 230, 231, 232,
    235, 236, 238, 246, 263, 264, 265, 270, 295, 309, 321, 2504, 2535, 2774, 2962, 3262, 4282,
    8516,
)  # fmt: skip
"""Chosen among the first 360 so that each of `AXES` and `ACTS` occurs, most of them twice, in short runs; 108, 190,
204, 206 and 236 for what no metric tells: ``delta`` decides, and a reward is the mean of its group but for rounding;
those above 2,000 for rollouts ahead; and 8516 for a step on an auxiliary term alone."""

VESPO = Case(
    loss="vespo", level="token", prompts=4, iterations=2, minibatches=2, lr=0.05, k_positive=1.5, lambda_positive=0.8,
    k_negative=2.5, lambda_negative=1.2, max_grad_norm=1.0,
)  # fmt: skip

REGION = Case(loss="dppo_tv", level="token", prompts=4, iterations=2, minibatches=2, lr=0.05, temperature=0.5)

OF_NEW_LOSSES: tuple[Case, ...] = (
    replace(VESPO, seed=90_000, k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0),
    replace(VESPO, seed=90_001, turns="rewarded", mismatch=("token", "truncate", 1.2, 0.0), top_entropy_quantile=0.5),
    replace(VESPO, seed=90_002, mismatch=("token", "mask", 3.0, 0.3), beta=0.04, off_policy_threshold=0.1),
    replace(
        VESPO, seed=90_003, rollouts=2, stale=True, mismatch=("token", "truncate", 2.0, 0.0), optimizer="adamw", lr=1e-3
    ),
    replace(REGION, seed=92_000),
    replace(REGION, seed=92_001, epsilon=0.02, epsilon_high=0.01, delta=1.01, turns="rewarded"),
    replace(REGION, seed=92_002, loss="dppo_kl", mismatch=("token", "mask", 3.0, 0.3), beta=0.04),
    replace(REGION, seed=92_003, loss="dppo_kl", epsilon=2e-3, epsilon_high=1e-3, top_entropy_quantile=0.5),
)
"""A case for each loss that is not among `DRAWN`, such as ``Case(loss=..., level=..., prompts=4, iterations=2)``."""

TO_THE_SAMPLER = Case(old="sampler", level="token", prompts=4, iterations=2, minibatches=2, lr=0.05, max_grad_norm=1.0)

OF_THE_SAMPLER: tuple[Case, ...] = (
    replace(TO_THE_SAMPLER, seed=93_000, iterations=1, minibatches=1),  # whose ratios are not 1
    replace(TO_THE_SAMPLER, seed=93_001, level="sequence", epsilon=0.02, rollouts=2, beta=0.04, token_budget=20),
    replace(TO_THE_SAMPLER, seed=93_002, loss="dppo_tv", top_entropy_quantile=0.5, turns="rewarded", epsilon=0.01),
    replace(TO_THE_SAMPLER, seed=93_003, loss="cispo", stale=True, rollouts=3, off_policy_threshold=0.1),
    replace(TO_THE_SAMPLER, seed=93_004, loss="gmpo", stale=True, rollouts=2, fits=3, log_entropy=True, lora=True),
    replace(TO_THE_SAMPLER, seed=93_005, loss="vespo", padded=True, optimizer="adamw", lr=1e-3, system=20),
)
"""Runs whose ratios are to what the sampler reported."""

CASES = (
    *map(draw, SEEDS), *OF_ESTIMATORS, *OF_NEW_LOSSES, *COVARIANT, *OF_THE_SAMPLER, *CONTROLLED
)  # fmt: skip

MORE_SEEDS = (
    *range(10_000, 10_100),
    10101, 10206, 10219, 10226, 10229, 10298, 10322, 10536, 10596, 10603, 10697, 10941, 11253, 11292, 11420,
    11450, 11558, 11576, 11986, 12558, 12751, 13000, 13612,
)  # fmt: skip
"""A hundred drawn ones, and those by which any two options that are accepted together are so in some run (`pairs`)."""

COMBINED = Case(
    level="sequence_token", epsilon=0.01, delta=1.01, beta=0.04, prompts=4, iterations=2, max_grad_norm=1.0, lr=0.05
)  # fmt: skip

TOGETHER = [
    replace(COMBINED, seed=number, loss=loss, mismatch=mismatch, minibatches=minibatches)
    for number, (loss, mismatch, minibatches) in enumerate(
        [
            ("grpo", ("token", "mask", 1.5, 0.7), 2),
            ("dr_grpo", ("token", "truncate", 1.2, 0.0), 4),
            ("bnpo", ("sequence", "mask", 2.0, 0.5), 4),
            ("dapo", ("sequence", "truncate", 1.3, 0.0), 2),
            ("luspo", ("sequence_mean", "mask", 1.1, 0.9), 2),
            ("grpo", ("sequence_mean", "truncate", 1.05, 0.0), 4),
        ]
    )
]
"""The ratio of sequences by token, the two-sided clip, a correction, a KL term and minibatches, all in one run."""

AXES: dict[str, Callable[[Case], Any]] = {
    "loss and level": lambda c: (c.loss, c.level),
    "widths of the clip": lambda c: (c.loss in SURROGATES or c.loss, c.epsilon is None, c.epsilon_high is None),
    "cap of cispo": lambda c: c.loss == "cispo" and c.epsilon_high,
    "temperatures of sapo": lambda c: c.loss == "sapo" and (c.tau_positive, c.tau_negative),
    "reference": lambda c: c.has_kl and ("lora" if c.lora else "moving" if c.ref_sync_every else "frozen"),
    "moving reference over several rollouts": lambda c: c.rollouts > 1 and c.has_kl and c.ref_sync_every,
    "kl": lambda c: c.has_kl and (c.kl_estimator, c.kl_importance_weighted),
    "beta_end": lambda c: c.rollouts > 1 and c.beta_end,
    "mismatch": lambda c: c.mismatch and c.mismatch[:2],
    "advantages": lambda c: (c.scale, c.baseline),
    "rewards": lambda c: c.rewards,
    "turns": lambda c: c.turns,
    "minibatches and iterations": lambda c: (c.minibatches, c.iterations),
    "rollouts": lambda c: c.rollouts,
    "temperature": lambda c: c.temperature,
    "budget": lambda c: c.token_budget,
    "a system message": lambda c: c.system and (c.token_budget < 4096, c.prompts > c.minibatches),
    "clip of the gradient": lambda c: c.max_grad_norm,
    "optimizer over several rollouts": lambda c: c.rollouts > 1 and (c.optimizer, c.momentum > 0, c.weight_decay > 0),
    "schedule over several rollouts": lambda c: c.rollouts > 1 and (c.schedule, c.warmup_ratio > 0),
    "GDPO with functions that do not apply": lambda c: c.combine == "normalize_then_sum" and len(c.reward_weights) > 1,
    "entropy bonus": lambda c: c.entropy_coef,
    "entropy measured alone": lambda c: c.log_entropy and not c.entropy_coef,
    "zero advantages kept": lambda c: (c.keep_zero_advantage, c.momentum > 0),
    "LoRA": lambda c: (c.lora, c.optimizer),
    "delta": lambda c: c.delta is not None and c.level,
    "truncation mask with an average": lambda c: c.mask_truncated and c.loss,
    "selection": lambda c: (c.top_entropy_quantile, c.mask_truncated),
    "rollouts ahead and changes of the sampling": lambda c: (c.stale, c.later is not None),
    "rollouts ahead": lambda c: (c.stale, c.top_entropy_quantile < 1),
    "prompts drawn anew": lambda c: (c.max_draws, c.combine),
    "reward of the length": lambda c: (c.length_reward, c.turns is not None),
    "part of the vocabulary": lambda c: c.top_k,
    "scale of an adapter": lambda c: (c.lora, c.rslora),
    "auxiliary term": lambda c: (c.auxiliary, c.lora),
    "constant of dr_grpo": lambda c: c.loss == "dr_grpo" and c.constant_length,
    "how it is computed": lambda c: (c.padded, c.fits, c.has_kl),
    "checkpointing": lambda c: (c.checkpointing, c.lora),
}
"""What of a case must take every value among `SEEDS` that `draw` can give it."""


def clipped(metrics: dict[str, float]) -> tuple[float, float]:
    """Shares clipped from below and from above; 0 for a rollout without any loss."""
    return metrics.get("clip_frac_low", 0.0), metrics.get("clip_frac_high", 0.0)


def steps(metrics: dict[str, float]) -> tuple[float, float]:
    """Optimizer steps skipped and taken so far."""
    return metrics["count/skipped_steps"], metrics["count/optimizer_steps"]


ACTS: dict[str, Callable[[Case, dict[str, float]], bool]] = {
    "clip from below": lambda c, m: m.get("clip_frac_low", 0) > 0,
    "clip from above": lambda c, m: m.get("clip_frac_high", 0) > 0,
    "clip of a sequence": lambda c, m: c.level != "token" and 0 < m.get("clip_frac_high", 0) < 1,
    "cispo's cap": lambda c, m: c.loss == "cispo" and m.get("clip_frac_high", 0) > 0,
    "gmpo's clip, both sides": lambda c, m: c.loss == "gmpo" and min(clipped(m)) > 0,
    "off-policy mask": lambda c, m: 0 < m.get("off_policy_masked_frac", 0) < 1,
    "mismatch mask": lambda c, m: 0 < m.get("mismatch/masked_frac", 0) < 1,
    "mismatch cap": lambda c, m: 0 < m.get("mismatch/capped_frac", 0) < 1,
    "selection of tokens": lambda c, m: 0 < m.get("selected_frac", 0) < 1,
    "completions cut at the limit": lambda c, m: c.mask_truncated and 0 < m["completion/truncated_frac"] < 1,
    "batch scale with silent groups": lambda c, m: c.scale == "batch" and 0 < m["silent_frac"] < 1,
    "skipped and taken steps, with momentum": lambda c, m: c.momentum > 0 and min(steps(m)) > 0,
    "zero advantages kept, step skipped": lambda c, m: c.keep_zero_advantage and m["count/skipped_steps"] > 0,
    "turns with rewards": lambda c, m: c.turns == "rewarded" and m["dialogue/turns"] > 1.5,
    "prompts drawn twice": lambda c, m: m.get("dynamic_sampling/draws") == 2,
    "silent groups left": lambda c, m: m.get("dynamic_sampling/silent_left", 0) > 0,
    "a step on an auxiliary term alone": lambda c, m: c.auxiliary > 0 and "ratio/mean" not in m,
}
"""What must happen in the rollout of some seed, by its metrics; for a setting that never acts shows nothing."""


@dataclass(frozen=True)
class Outcome:
    """What a case came to."""

    differences: list[str]
    """Where the two sides do not agree, one line each."""
    metrics: list[dict[str, float]]
    """Of every rollout, by the reference."""


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"seed-{c.seed}")
def test_weights_and_metrics_are_those_of_the_equations(case, micro_model_dir):
    assert outcome(micro_model_dir, case).differences == [], case


@pytest.mark.parametrize("case", TOGETHER, ids=lambda c: f"{c.loss}-{c.mismatch[0]}-{c.mismatch[1]}-{c.minibatches}")
def test_ratios_by_token_two_sided_clip_corrections_and_minibatches_act_together(case, micro_model_dir):
    found = outcome(micro_model_dir, case)
    assert found.differences == [], case
    assert found.metrics[0]["clip_frac_high"] > 0


def test_the_bonus_acts_behind_steps_of_low_entropy_and_rests_behind_others(micro_model_dir):
    """Eight steps a rollout; the first has none before it. 0.7 is the most that a step may have."""
    first, second = outcome(micro_model_dir, CONTROLLED[0]).metrics
    assert 0 < first["entropy_coef"] < 7 * 0.7 / 8
    assert 0 < second["entropy_coef"] < 0.7
    (always,) = outcome(micro_model_dir, CONTROLLED[1]).metrics  # 0, then 0.7 (0.5 + 0.3 is more) seven times
    assert always["entropy_coef"] == pytest.approx(7 * 0.7 / 8, rel=1e-12)


def test_the_trust_regions_of_dppo_leave_out_tokens_on_both_sides(micro_model_dir):
    left = [clipped(outcome(micro_model_dir, case).metrics[0]) for case in OF_NEW_LOSSES if case.loss in DPPO]
    assert len(left) == 4 and all(0 < low < 0.3 and 0 < high < 0.5 for low, high in left), left


@pytest.mark.parametrize("case", COVARIANT, ids=lambda c: f"seed-{c.seed}")
def test_some_tokens_are_chosen_by_their_covariance_in_every_rollout(case, micro_model_dir):
    shares = [metrics["covariance_frac"] for metrics in outcome(micro_model_dir, case).metrics]
    assert all(0 < share < 0.5 for share in shares), shares


def test_the_off_policy_mask_decides_by_token_where_turns_have_rewards(micro_model_dir):
    """Eq. 9 of DeepSeek-V3.2: of a completion that the policy has left, tokens of positive advantage stay."""
    case = Case(
        seed=2, level="token", turns="rewarded", off_policy_threshold=0.01, iterations=2, minibatches=2, lr=0.05
    )
    found = outcome(micro_model_dir, case)
    assert found.differences == [], case
    share = found.metrics[0]["off_policy_masked_frac"] * case.prompts * case.generations * case.iterations
    assert share % 1 != 0, "completions are masked as a whole, if any"


def test_every_setting_and_every_rare_event_is_among_the_seeds(micro_model_dir):
    cases = [draw(seed) for seed in SEEDS]
    many = [draw(seed) for seed in range(5_000)]
    missing = {name: {of(c) for c in many} - {of(c) for c in cases} for name, of in AXES.items()}
    assert {name: values for name, values in missing.items() if values} == {}
    assert {c.loss for c in CASES} == set(LOSSES)
    rollouts = [(c, m) for c in cases for m in outcome(micro_model_dir, c).metrics]
    assert [name for name, happens in ACTS.items() if not any(itertools.starmap(happens, rollouts))] == []


def test_every_setting_of_the_update_varies_among_the_cases(micro_model_dir):
    """A new one belongs into `draw.py`, or, of a new loss, into `OF_NEW_LOSSES`; and into the reference."""
    modules = [product.build(micro_model_dir, case) for case in CASES]
    constant = [
        f"{part}.{setting.name}"
        for part in ("objective", "advantages", "schedule", "update_settings")
        for setting in fields(getattr(modules[0], part))
        if len({getattr(getattr(module, part), setting.name) for module in modules}) == 1
    ]
    assert constant == ["update_settings.max_nonfinite_steps"]


def test_any_two_options_that_are_accepted_together_are_together_in_some_run():
    alone = [replace(pairs.BASE, **option) for option in pairs.ALONE]
    assert [case for case in alone if not pairs.accepted(case)] == []
    assert pairs.missing([draw(seed) for seed in (*SEEDS, *MORE_SEEDS)]) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", MORE_SEEDS)
def test_weights_and_metrics_are_those_of_the_equations_for_more_seeds(seed, micro_model_dir):
    case = draw(seed)
    assert outcome(micro_model_dir, case).differences == [], case


@functools.cache
def outcome(folder: Any, case: Case) -> Outcome:
    """Trains on both sides and compares after every rollout."""
    with float64_layers():
        network = network_of(folder)
        stream = scripted_stream(case, network)
        module = product.prepared(folder, case)
        assert product.contradictions(module, case) == []
        before = product.trained_tensors(module)
        recorder = product.train(module, case, stream)
        assert module.policy is not None and module.policy.is_padded == case.padded, "it fell back"
        trained = product.starting_point(case, network.start, before)
        reference = Run(case, network, trained, stream)
        differences, metrics = [], []
        for number in range(case.rollouts):
            metrics.append(reference.rollout(rollout_seed(product.RUN_SEED, number)))
            lines = metric_differences(case, recorder.metrics[number], metrics[-1])
            lines += weight_differences(before, recorder.tensors[number], trained.tensors)
            differences += [f"rollout {number}: {line}" for line in lines]
    return Outcome(differences, metrics)


@functools.cache
def network_of(folder: Any) -> Network:
    """Loaded once: it is a function of weights, and has none that change."""
    return Network(folder)


def metric_differences(case: Case, ours: dict[str, float], theirs: dict[str, float]) -> list[str]:
    """Metrics that only one side has, or whose values differ."""
    left_out = ["time/", "perf/", "count/oom_splits"]
    if not case.forwards_all:  # a group in parts has its prompt forwarded once per part
        left_out.append("count/train_tokens")
    found = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name.startswith(tuple(left_out)):
            continue
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None or not agree(a, b):
            found.append(f"{name} is {a}, by the equations {b}")
    return found


def agree(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= TOLERANCE * abs(b) + ROUNDING


def weight_differences(before: Weights, ours: Weights, theirs: Weights) -> list[str]:
    """One line if the changes of all weights differ, as vectors."""
    assert before.keys() == ours.keys() == theirs.keys()
    apart, moved = distance(ours, theirs), distance(theirs, before)
    if apart <= TOLERANCE * moved + ROUNDING:
        return []
    return [f"weights are {apart:.3g} from those of the equations, which moved by {moved:.3g}"]


def distance(a: Weights, b: Weights) -> float:
    """L2, over all tensors."""
    return math.sqrt(sum(((a[name] - b[name]) ** 2).sum().item() for name in a))
