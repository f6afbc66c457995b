"""Every loss at every ratio level: value and gradient against forms written by hand in NumPy, sequence by sequence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_lightning.errors import UserError
from gspo_lightning.objective import LOSSES, LossInputs, Objective
from gspo_lightning.objective.losses import SETTINGS, LossSpec
from gspo_lightning.objective.mismatch import MismatchCorrection

LENGTHS = [3, 1, 5, 2, 4, 2]
ADVANTAGES = [1.5, -0.7, -1.2, 0.9, 0.4, -0.3]
MAX_TOKENS = 8


def make(lengths=LENGTHS, advantages=ADVANTAGES, scale=0.3, seed=0):
    """Ragged sequences whose ratios fall on both sides of every clip edge."""
    rng = np.random.default_rng(seed)
    old = [-rng.uniform(0.1, 3.0, n) for n in lengths]
    new = [np.minimum(o + rng.normal(0, scale, len(o)), -1e-3) for o in old]  # of probabilities below 1
    return old, new, list(advantages)


def flat(sequences):
    return torch.tensor(np.concatenate(sequences), dtype=torch.float64)


def call(objective, old, new, advantages, **extra):
    lengths = torch.tensor([len(x) for x in new])
    index = torch.repeat_interleave(torch.arange(len(new)), lengths)
    if objective.spec.chooses:
        extra.setdefault("chosen", torch.zeros(int(lengths.sum()), dtype=torch.bool))
    logprobs = flat(new).requires_grad_()
    result = objective(
        logprobs, flat(old), torch.tensor(advantages, dtype=torch.float64)[index], index, lengths, **extra
    )
    total = objective.denominator(len(new), int(lengths.sum()))
    (gradient,) = torch.autograd.grad(result.loss / total, [logprobs])
    return (result.loss / total).item(), gradient.numpy(), result.metrics


# ------------------------------------------------------------ by hand


def hand_ratio(d, level):
    """(ratio of each token, d ratio_t / d logp_u as a matrix)."""
    n = len(d)
    if level == "token":
        return np.exp(d), np.diag(np.exp(d))
    s = math.exp(d.mean())
    if level == "sequence":
        return np.full(n, s), np.full((n, n), s / n)
    return np.full(n, s), np.diag(np.full(n, s))


def hand_surrogate(w, jacobian, a, low, high, delta):
    capped = w if delta is None else np.minimum(w, delta)
    unclipped, bounded = capped * a, np.clip(w, 1 - low, 1 + high) * a
    use = unclipped <= bounded
    slope = np.where(use, a * ((w < delta) if delta is not None else 1.0), a * ((w > 1 - low) & (w < 1 + high)))
    return -np.minimum(unclipped, bounded), -slope[:, None] * jacobian


def hand_loss(kind, d, new, a, level, low, high, delta, chosen):
    """(loss of each token, its Jacobian with respect to logp); ``chosen`` by covariance, for a loss that asks."""
    w, jacobian = hand_ratio(d, level)
    n = len(d)
    if kind in ("grpo", "dr_grpo", "bnpo", "dapo", "luspo"):
        return hand_surrogate(w, jacobian, a, low, high, delta)
    if kind == "reinforce":
        return -a * new, np.diag(np.full(n, -a))
    if kind == "cispo":
        weight = np.minimum(w, high)
        return -weight * a * new, np.diag(-weight * a)
    if kind == "sapo":
        tau = 1.0 if a > 0 else 1.05
        gate = 1 / (1 + np.exp(-tau * (w - 1)))
        slope = -a * gate * (1 - gate) * 4
        return -a * gate * 4 / tau, slope[:, None] * jacobian
    if kind == "gmpo":
        clipped = np.minimum(d, high) if a > 0 else np.maximum(d, -low)
        inside = d < high if a > 0 else d > -low
        g = math.exp(clipped.mean())
        return np.full(n, -g * a), np.tile(-g * a * inside / n, (n, 1))
    if kind == "vespo":
        whole, (k, decay) = math.prod(np.exp(d)), (2.0, 3.0) if a >= 0 else (3.0, 2.0)
        weight = whole**k * math.exp(-decay * whole) / math.exp(-decay)
        return -weight * a * new, np.diag(np.full(n, -weight * a))
    if kind in ("dppo_tv", "dppo_kl"):
        old, p, q = new - d, np.exp(new), np.exp(new - d)
        moved = np.abs(p - q) if kind == "dppo_tv" else q * (old - new) + (1 - q) * np.log((1 - q) / (1 - p))
        kept = ~((a > 0) & (p > q) & (moved > high)) & ~((a < 0) & (p < q) & (moved > low))
        weight = (w if delta is None else np.minimum(w, delta)) * kept
        return -weight * a * new, np.diag(-weight * a)
    if kind == "clip_cov":
        loss, slope = hand_surrogate(w, jacobian, a, low, high, None)
        return loss * ~chosen, slope * ~chosen[:, None]
    if kind == "kl_cov":
        return -w * a + 0.7 * np.abs(d) * chosen, -a * jacobian + np.diag(0.7 * np.sign(d) * chosen)
    raise NotImplementedError(f"write the loss {kind} here by hand")


def hand(kind, old, new, advantages, level, low, high, delta=None, chosen=None):
    how = LOSSES[kind].aggregation
    count, tokens = len(new), sum(map(len, new))
    value, gradients = 0.0, []
    chosen = chosen or [np.zeros(len(n), dtype=bool) for n in new]
    for o, n, a, c in zip(old, new, advantages, chosen, strict=True):
        loss, jacobian = hand_loss(kind, n - o, n, a, level, low, high, delta, c)
        weight = {
            "sequence_mean": 1 / len(n) / count,
            "sequence_sum": 1 / count,
            "tokens": 1 / tokens,
            "max_tokens": 1 / (count * MAX_TOKENS),
        }[how]
        value += weight * loss.sum()
        gradients.append(weight * jacobian.sum(axis=0))
    return value, np.concatenate(gradients)


WIDTHS = {"cispo": (0.0, 1.1), "gmpo": (0.2, 0.15), "dppo_tv": (0.05, 0.04), "dppo_kl": (0.02, 0.01)}
CASES = [(kind, level) for kind, spec in LOSSES.items() for level in spec.levels or ("token",)]


@pytest.mark.parametrize(("kind", "level"), CASES)
@pytest.mark.parametrize("delta", [None, 1.5])
def test_value_and_gradient_equal_the_form_written_by_hand(kind, level, delta):
    low, high = WIDTHS.get(kind, (0.12, 0.15))
    old, new, advantages = make()
    objective = Objective(
        max_completion_length=MAX_TOKENS, importance_sampling_level=level, loss_type=kind,
        epsilon=low, epsilon_high=high, delta=delta, ppo_kl_coef=0.7,
    )  # fmt: skip
    chosen = [np.arange(len(n)) % 2 == 1 for n in new]
    value, gradient, _ = call(objective, old, new, advantages, chosen=torch.tensor(np.concatenate(chosen)))
    expected, expected_gradient = hand(kind, old, new, advantages, level, low, high, delta, chosen)
    assert value == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


def test_gspo_equals_equations_5_7_and_10_of_the_paper_at_both_clip_edges():
    # One sequence just inside and one just outside each edge, for both signs of the advantage.
    edges = [-4e-4, -2e-4, 3e-4, 5e-4]
    lengths = [4, 7, 2, 5] * 2
    advantages = [1.0] * 4 + [-1.0] * 4
    rng = np.random.default_rng(1)
    old, new = [], []
    for n, shift in zip(lengths, edges * 2, strict=True):
        noise = rng.normal(0, 0.01, n)
        o = -rng.uniform(0.5, 2, n)
        old.append(o)
        new.append(o + noise - noise.mean() + math.log1p(shift))
    value, gradient, metrics = call(Objective(max_completion_length=MAX_TOKENS), old, new, advantages)
    s = np.array([math.exp((n - o).mean()) for o, n in zip(old, new, strict=True)])  # Eq. 7
    a = np.array(advantages)
    expected = -np.minimum(s * a, np.clip(s, 1 - 3e-4, 1 + 4e-4) * a).mean()  # Eq. 5
    assert value == pytest.approx(expected, rel=1e-12)
    active = [True, True, True, False, False, True, True, True]  # A > 0 above the edge and A < 0 below it are cut
    expected_gradient = np.concatenate(
        [np.full(n, -s_i * a_i / n / 8 * on) for n, s_i, a_i, on in zip(lengths, s, a, active, strict=True)]  # Eq. 10
    )
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-16)
    assert metrics["clip_frac_high"] == (1, 8)
    assert metrics["clip_frac_low"] == (1, 8)


def test_sequence_token_equals_sequence_for_equal_advantages():
    old, new, advantages = make(scale=2e-4)
    results = [
        call(Objective(max_completion_length=MAX_TOKENS, importance_sampling_level=level), old, new, advantages)
        for level in ("sequence", "sequence_token")
    ]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-10)


def test_grpo_equals_gspo_when_every_completion_is_one_token():
    old, new, advantages = make(lengths=[1] * 6)
    results = [
        call(
            Objective(max_completion_length=MAX_TOKENS, importance_sampling_level=level, epsilon=0.1, epsilon_high=0.2),
            old, new, advantages,
        )
        for level in ("token", "sequence")
    ]  # fmt: skip
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


@pytest.mark.parametrize(("kind", "level"), CASES)
def test_on_policy_the_gradient_is_the_policy_gradient(kind, level):
    """At ratio 1 every loss is -A/|y| (or its own normaliser) times the gradient of log pi, whatever the clip."""
    old, _, advantages = make()
    objective = Objective(max_completion_length=MAX_TOKENS, importance_sampling_level=level, loss_type=kind)
    _, gradient, _ = call(objective, old, old, advantages)
    tokens = sum(LENGTHS)
    weight = {
        "sequence_mean": lambda n: 1 / n / 6,
        "sequence_sum": lambda n: 1 / 6,
        "tokens": lambda n: 1 / tokens,
        "max_tokens": lambda n: 1 / (6 * MAX_TOKENS),
    }[LOSSES[kind].aggregation]
    expected = np.concatenate([np.full(n, -a * weight(n)) for n, a in zip(LENGTHS, ADVANTAGES, strict=True)])
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_kl_is_weighted_per_token_also_under_a_sequence_ratio(estimator, weighted, level):
    old, new, advantages = make()
    reference = [x + 0.1 * np.cos(np.arange(len(x))) for x in new]
    common = {"max_completion_length": MAX_TOKENS, "importance_sampling_level": level}
    with_kl = Objective(**common, beta=0.3, kl_estimator=estimator, kl_importance_weighted=weighted)
    value, gradient, metrics = call(with_kl, old, new, advantages, ref_logprobs=flat(reference))
    plain_value, plain_gradient, _ = call(Objective(**common), old, new, advantages)
    extra, extra_gradient = 0.0, []
    for o, n, r in zip(old, new, reference, strict=True):
        d = r - n
        kl = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}[estimator]
        slope = {"k1": np.ones_like(d), "k2": -d, "k3": 1 - np.exp(d)}[estimator]
        w = np.exp(n - o) if weighted else np.ones_like(d)
        extra += 0.3 * (w * kl).mean() / 6
        extra_gradient.append(0.3 * w * (slope + (kl if weighted else 0)) / len(n) / 6)
    assert value - plain_value == pytest.approx(extra, rel=1e-9)
    np.testing.assert_allclose(gradient - plain_gradient, np.concatenate(extra_gradient), rtol=1e-8, atol=1e-14)
    k3 = np.concatenate([np.exp(r - n) - 1 - (r - n) for n, r in zip(new, reference, strict=True)])
    assert metrics["kl/ref"][0].item() / metrics["kl/ref"][1].item() == pytest.approx(k3.mean(), rel=1e-12)


def test_entropy_bonus_is_subtracted_per_token():
    old, new, advantages = make()
    entropy = torch.linspace(0.5, 2.0, sum(LENGTHS), dtype=torch.float64)
    bonus = Objective(max_completion_length=MAX_TOKENS, entropy_coef=0.01, loss_type="dapo")
    plain = Objective(max_completion_length=MAX_TOKENS, loss_type="dapo")
    value, _, metrics = call(bonus, old, new, advantages, entropy=entropy)
    assert value == pytest.approx(call(plain, old, new, advantages)[0] - 0.01 * 1.25, rel=1e-10)
    assert metrics["entropy"][0].item() / metrics["entropy"][1].item() == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"beta": 0.1}, "objective.beta: the objective was called without ref_logprobs"),
        ({"entropy_coef": 0.1}, "objective.entropy_coef: the objective was called without entropy"),
        ({"top_entropy_quantile": 0.5}, "objective.top_entropy_quantile: the objective was called without selected"),
        (
            {"mismatch": MismatchCorrection("token", "mask", 2.0)},
            "objective.mismatch: the objective was called without sampler_logprobs",
        ),
    ],
    ids=str,
)
def test_a_term_is_not_left_out_where_what_it_needs_is_missing(changes, line):
    with pytest.raises(UserError, match=f"^{line}; give it$"):
        call(Objective(MAX_TOKENS, "token", **changes), *make())


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(CASES),
    st.lists(st.tuples(st.integers(1, 6), st.floats(-2, 2)), min_size=2, max_size=8),
    st.randoms(use_true_random=False),
)
def test_the_loss_is_a_sum_over_sequences_however_they_are_split_and_ordered(case, sequences, random):
    kind, level = case
    objective = Objective(max_completion_length=MAX_TOKENS, importance_sampling_level=level, loss_type=kind)
    old, new, advantages = make([n for n, _ in sequences], [a for _, a in sequences])
    order = list(range(len(new)))
    random.shuffle(order)
    cut = random.randrange(1, len(new))
    whole = call_sum(objective, old, new, advantages, range(len(new)))
    parts = [call_sum(objective, old, new, advantages, part) for part in (order[:cut], order[cut:])]
    assert math.isclose(parts[0] + parts[1], whole, rel_tol=1e-10, abs_tol=1e-12)


def call_sum(objective, old, new, advantages, members):
    pick = [[x[m] for m in members] for x in (old, new, advantages)]
    lengths = torch.tensor([len(x) for x in pick[1]])
    index = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    advantage = torch.tensor(pick[2], dtype=torch.float64)[index]
    chosen = torch.cat([torch.arange(n) % 2 == 1 for n in lengths.tolist()]) if objective.spec.chooses else None
    return objective(flat(pick[1]), flat(pick[0]), advantage, index, lengths, chosen=chosen).loss.item()


def test_metrics_of_a_two_by_three_example_by_hand():
    # Sequence log-ratios: mean(0.1, 0.3) = 0.2 and mean(-0.3, 0.0, 0.0) = -0.1; clip 0.05 / 0.1.
    old = [np.array([-1.0, -1.0]), np.array([-1.0, -1.0, -1.0])]
    new = [np.array([-0.9, -0.7]), np.array([-1.3, -1.0, -1.0])]
    sequence = Objective(max_completion_length=4, epsilon=0.05, epsilon_high=0.1)
    _, _, metrics = call(sequence, old, new, [1.0, -1.0])
    means = {name: (s / c).item() for name, (s, c) in metrics.items()}
    assert means["ratio/mean"] == pytest.approx((math.exp(0.2) + math.exp(-0.1)) / 2)
    assert means["log_ratio/abs_mean"] == pytest.approx(0.15)
    assert means["clip_frac_low"] == 0.5
    assert means["clip_frac_high"] == 0.5
    assert means["kl/old"] == pytest.approx(-(0.1 + 0.3 - 0.3) / 5)
    token = Objective(max_completion_length=4, importance_sampling_level="token", epsilon=0.05, epsilon_high=0.1)
    _, _, metrics = call(token, old, new, [1.0, -1.0])
    means = {name: (s / c).item() for name, (s, c) in metrics.items()}
    assert means["clip_frac_high"] == pytest.approx(2 / 5)  # exp(0.1) = 1.105 and exp(0.3) are above 1.1
    assert means["clip_frac_low"] == pytest.approx(1 / 5)


# Log-ratios -0.5, -0.3, 0.3, 0.5, 2.0 once with advantage 1 and once with -1, then 2.0 with advantage 0: 11 tokens.
# Their ratios: 0.607, 0.741, 1.350, 1.649, 7.389.
EDGES = [-0.5, -0.3, 0.3, 0.5, 2.0]
CLIPPED = {
    # kind: (settings, tokens clipped from below, from above)
    "grpo at 0.2 / 0.27": ("grpo", {}, 2, 3),  # 0.607, 0.741 below 0.8; 1.350, 1.649, 7.389 above 1.27
    "grpo with a cap": ("grpo", {"delta": 1.5}, 2, 5),  # 1.649 and 7.389 with advantage -1 as well
    "cispo at 5": ("cispo", {}, 0, 2),  # 7.389 of either sign
    "cispo at 1.5": ("cispo", {"epsilon_high": 1.5}, 0, 4),  # 1.649 and 7.389 of either sign
    "gmpo at 0.4": ("gmpo", {}, 1, 2),  # 0.607 below 0.670; 1.649, 7.389 above 1.492
    "gmpo at 0.2 / 0.6": ("gmpo", {"epsilon": 0.2, "epsilon_high": 0.6}, 2, 1),
    # p_old = 0.0498: p is 0.0302, 0.0369, 0.0672, 0.0821, 0.3679; their KL 0.0055, 0.0021, 0.0026, 0.0080, 0.2877.
    "dppo_tv at 0.15": ("dppo_tv", {}, 0, 1),
    "dppo_tv at 0.015 / 0.02": ("dppo_tv", {"epsilon": 0.015, "epsilon_high": 0.02}, 1, 2),
    "dppo_tv with a cap": ("dppo_tv", {"delta": 1.5}, 0, 4),  # 1.649 and 7.389 of either sign, not that of advantage 0
    "dppo_kl at 0.05": ("dppo_kl", {}, 0, 1),
    "dppo_kl at 0.001 / 0.005": ("dppo_kl", {"epsilon": 0.001, "epsilon_high": 0.005}, 2, 2),
}


@pytest.mark.parametrize(("kind", "widths", "low", "high"), CLIPPED.values(), ids=CLIPPED.keys())
def test_clip_metrics_count_what_the_loss_itself_clips(kind, widths, low, high):
    objective = Objective(max_completion_length=4, importance_sampling_level="token", loss_type=kind, **widths)
    shifts, advantages = [*EDGES, *EDGES, 2.0], [1.0] * 5 + [-1.0] * 5 + [0.0]
    old = [np.array([-3.0])] * 11
    _, _, metrics = call(objective, old, [o + d for o, d in zip(old, shifts, strict=True)], advantages)
    assert (metrics["clip_frac_low"], metrics["clip_frac_high"]) == ((low, 11), (high, 11))


def test_clip_metrics_of_a_sequence_are_the_share_of_its_tokens_that_are_clipped():
    """Advantages per token: of four tokens at ratio exp(0.1), the two with a positive advantage are clipped."""
    objective = Objective(max_completion_length=4, importance_sampling_level="sequence_token")
    old, advantages = torch.full((4,), -1.0, dtype=torch.float64), torch.tensor([1.0, 1.0, -1.0, 0.0]).double()
    metrics = objective(old + 0.1, old, advantages, torch.zeros(4, dtype=torch.long), torch.tensor([4])).metrics
    assert (metrics["clip_frac_low"], metrics["clip_frac_high"]) == ((0, 1), (0.5, 1))


def test_the_ratios_that_are_never_clipped():
    def bounds(**settings):
        return Objective(max_completion_length=4, **settings).ratio_bounds

    assert bounds(epsilon=0.25, epsilon_high=0.5) == (0.75, 1.5)
    assert bounds(loss_type="cispo") == (0.0, 5.0)
    assert bounds(loss_type="gmpo") == pytest.approx((0.67032, 1.49182), abs=1e-5)
    assert bounds(loss_type="sapo") is None
    assert bounds(loss_type=lambda x: x.ratio) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_that_are_or_were_certain_have_a_divergence_and_a_gradient(dtype):
    """KL to 0.94 of a certain token: -log 0.94 = 0.062; to 0.96: 0.041; of any other token to certainty: infinite. The
    last two are as good as certain, and by rounding more than that.
    """
    old = torch.tensor([1.0, 1.0, 0.5, 1.0, 1 - 2**-20, 0.2, 1.0, 0.5], dtype=dtype).log()
    new = torch.tensor([0.94, 0.96, 1.0, 1.0, 1 - 2**-10, 1e-30, 0.9, 1.0], dtype=dtype).log()
    old[6], new[7] = -torch.finfo(dtype).eps / 8, 1e-7
    new.requires_grad_()
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, 1.0], dtype=dtype)
    objective = Objective(max_completion_length=1, importance_sampling_level="token", loss_type="dppo_kl")
    result = objective(new, old, advantages, torch.arange(8), torch.ones(8, dtype=torch.long))
    assert (result.metrics["clip_frac_low"], result.metrics["clip_frac_high"]) == ((2, 8), (2, 8))
    (gradient,) = torch.autograd.grad(result.loss, new)
    expected = [0.0, 0.96, 0.0, -1.0, (1 - 2**-10) / (1 - 2**-20), -5e-30, 0.0, 0.0]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.parametrize("kind", ["dppo_tv", "dppo_kl"])
def test_a_token_outside_has_no_gradient_even_if_its_ratio_is_infinite(kind):
    new = torch.tensor([-0.1, -0.1], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1000.0, -0.1], dtype=torch.float64)
    objective = Objective(max_completion_length=1, importance_sampling_level="token", loss_type=kind)
    loss = objective(
        new, old, torch.ones(2, dtype=torch.float64), torch.arange(2), torch.ones(2, dtype=torch.long)
    ).loss
    assert loss.item() == pytest.approx(0.1)
    assert torch.autograd.grad(loss, new)[0].tolist() == [0.0, -1.0]


NO_CLIP = {"epsilon": 1e9, "epsilon_high": 1e9, "delta": None}


def losses_of_tokens(kind, **settings):
    """(loss of each token, inputs) for 400 completions of one token, at ratios from 0.1 to 10; with probabilities of 2
    to 98 % for a loss that clips by these."""
    rng = np.random.default_rng(3)
    old, d = torch.tensor(rng.uniform(-6, -4, 400)), torch.tensor(rng.uniform(-2.3, 2.3, 400))
    if kind.startswith("dppo"):
        old, new = torch.tensor(rng.uniform(0.02, 0.98, (2, 400))).log()
        d = new - old
    inputs = LossInputs(
        old + d, d, d.exp(), torch.tensor(rng.normal(size=400)), torch.arange(400), torch.ones(400),
        chosen=torch.arange(400) % 8 == 7 if kind == "kl_cov" else None,
        **settings,
    )  # fmt: skip
    return LOSSES[kind].function(inputs), inputs


@pytest.mark.parametrize("kind", list(LOSSES))
def test_the_masks_of_every_loss_are_the_tokens_whose_loss_the_clip_changes(kind):
    widths = {"epsilon": 0.3, "epsilon_high": 0.4, "delta": 1.6}
    clipped, inputs = losses_of_tokens(kind, **widths)
    free, _ = losses_of_tokens(kind, **NO_CLIP)
    clip = LOSSES[kind].clip
    if clip is None:
        assert torch.equal(clipped, free), f"{kind} clips: give its LossSpec a Clip"
        return
    low, high = clip.masks(inputs)
    assert not (low & high).any()
    assert torch.equal(low | high, clipped != free)
    assert 50 < (low | high).sum() < 390
    # No ratio inside the bounds is clipped, and of those outside on either side that exist, some are.
    if clip.bounds is None:
        assert low.any() and not (low | high)[(inputs.ratio - 1).abs() < 1e-3].any()
        return
    smallest, largest = clip.bounds(0.3, 0.4)
    assert inputs.ratio[low].max() < smallest if low.any() else smallest == 0
    assert largest < inputs.ratio[high].min() < largest * 1.1


@pytest.mark.parametrize("kind", list(LOSSES))
def test_every_loss_reads_the_settings_that_its_spec_says(kind):
    """What is not in ``reads`` is refused as without effect, and nothing else is."""
    start = {"epsilon": 0.3, "epsilon_high": 0.4, "delta": None}
    before, _ = losses_of_tokens(kind, **start)
    changed = {"epsilon": 0.2, "epsilon_high": 0.5, "delta": 1.6, **dict.fromkeys(SETTINGS, 0.9)}
    felt = {
        key
        for key, value in changed.items()
        if not torch.equal(losses_of_tokens(kind, **start | {key: value})[0], before)
    }
    assert felt == set(LOSSES[kind].reads)


def test_a_loss_cannot_be_registered_without_saying_what_it_clips():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'clip'"):
        LossSpec(lambda x: x.ratio, "tokens")


def test_a_width_that_the_loss_does_not_read_moves_no_other():
    assert Objective(max_completion_length=4, loss_type="cispo", epsilon=0.2).clip == (0.0, 5.0)


def test_clip_widths_belong_to_the_ratio_level():
    def clip(**settings):
        return Objective(max_completion_length=4, **settings).clip

    assert clip(importance_sampling_level="token") == (0.2, 0.27)
    assert clip(importance_sampling_level="sequence") == (3e-4, 4e-4)
    assert clip(importance_sampling_level="sequence_token") == (3e-4, 4e-4)
    assert clip(epsilon=0.1) == (0.1, 0.1)
    assert clip(epsilon_high=0.1) == (3e-4, 0.1)
    assert clip(importance_sampling_level="token", loss_type="cispo") == (0.0, 5.0)


def test_a_loss_of_ones_own_is_a_function_of_flat_tensors():
    objective = Objective(max_completion_length=4, loss_type=lambda x: x.ratio * x.advantages)
    old, new, advantages = make()
    s = [math.exp((n - o).mean()) for o, n in zip(old, new, strict=True)]
    assert call(objective, old, new, advantages)[0] == pytest.approx(
        np.mean(np.array(s) * np.array(advantages)), rel=1e-12
    )


def test_an_unknown_loss_is_refused_with_the_choices():
    with pytest.raises(UserError, match="loss_type=gppo: there is no such loss; choose grpo, dr_grpo"):
        Objective(max_completion_length=4, loss_type="gppo")


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "dr_grpo"])
def test_a_minibatch_of_which_nothing_counts_is_divided_by_one(loss):
    assert Objective(8, loss_type=loss).denominator(0, 0) == 1.0


def test_the_size_of_a_log_ratio_is_finite_where_the_ratio_is_too_small_for_its_dtype():
    objective = Objective(max_completion_length=4, importance_sampling_level="token")
    new = torch.tensor([-121.0, -1.0], requires_grad=True)
    old, advantages = torch.tensor([-1.0, -1.0]), torch.ones(2)
    assert (new - old).exp()[0] == 0  # e^-120 in float32
    metrics = objective(new, old, advantages, torch.tensor([0, 0]), torch.tensor([2])).metrics
    total, count = metrics["log_ratio/abs_mean"]
    assert (total / count).item() == 60.0
