"""Losses of one's own, as a function or as a `LossSpec`: what they may return, what comes with them, what is said."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from hydra.utils import instantiate

from gspo_lightning.errors import UserError
from gspo_lightning.objective import LOSSES, LossSpec, Objective, check_objective
from gspo_lightning.objective.losses import SETTINGS, SURROGATE_CLIP, clipped_surrogate
from gspo_lightning.objective.mismatch import MismatchCorrection
from gspo_lightning.objective.ratios import sequence_mean


def plain(x):
    return -x.ratio * x.advantages


def mean(x):
    return plain(x).mean()


def of_sequences(x):
    return sequence_mean(plain(x), x.sequence_index, x.lengths)


def column(x):
    return plain(x)[:, None]


def detached(x):
    return plain(x).detach()


def number(x):
    return plain(x).sum().item()


def gated(x):
    return -x.advantages * torch.sigmoid(x.tau_positive * x.ratio) - x.tau_negative


SPEC = LossSpec(plain, "max_tokens", None, ("epsilon",), ("token",), (0.3, 0.4))

# Two completions of one and three tokens at ratio 1: the losses of the tokens are -2, then 0.5 three times.
LENGTHS, ADVANTAGES = torch.tensor([1, 3]), torch.tensor([2.0, -0.5, -0.5, -0.5], dtype=torch.float64)


def call(loss, **settings):
    """(loss of the two completions, its gradient) at token level; a completion may have 5 tokens."""
    objective = Objective(
        max_completion_length=5, importance_sampling_level="token", loss_type=loss, epsilon=None, **settings
    )
    logprobs = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    value = objective(logprobs, logprobs.detach(), ADVANTAGES, torch.tensor([0, 1, 1, 1]), LENGTHS).loss
    loss = value / objective.denominator(2, 4)
    return loss.item(), torch.autograd.grad(loss, logprobs)[0].tolist()


def findings(loss, level="token", num_minibatches=4, staleness=0, **settings):
    objective = Objective(max_completion_length=5, importance_sampling_level=level, loss_type=loss, **settings)
    found = check_objective(objective, num_iterations=1, num_minibatches=num_minibatches, staleness=staleness)
    return [(f.kind, f.message) for f in found]


RETURNED = {
    mean: "returned shape () for tokens of shape (4,); return the loss of every token, without a mean or sum",
    of_sequences: "returned shape (2,) for tokens of shape (4,); return the loss of every token, without a mean or sum",
    column: "returned shape (4, 1) for tokens of shape (4,); return the loss of every token, without a mean or sum",
    number: "returned float for tokens of shape (4,); return the loss of every token, without a mean or sum",
    detached: "returned losses without a gradient; compute them from logprobs, log_ratio or ratio, without detach, "
    "item or numpy",
}


@pytest.mark.parametrize(("loss", "said"), RETURNED.items(), ids=[loss.__name__ for loss in RETURNED])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_no_loss_per_token_with_a_gradient_is_refused_in_one_line(loss, said, wrapped):
    with pytest.raises(UserError) as error:
        call(dataclasses.replace(SPEC, function=loss) if wrapped else loss)
    assert str(error.value) == f"objective.loss_type: {loss.__name__} {said}"


def test_without_a_gradient_of_the_policy_none_is_asked_of_the_loss():
    objective = Objective(max_completion_length=5, importance_sampling_level="token", loss_type=plain)
    logprobs = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        value = objective(logprobs, logprobs, ADVANTAGES, torch.tensor([0, 1, 1, 1]), LENGTHS).loss
    assert value.item() == pytest.approx(-1.5)


def test_a_function_alone_is_averaged_over_each_completion_and_a_spec_says_how():
    assert call(plain) == (pytest.approx(-0.75), pytest.approx([-1.0, 1 / 12, 1 / 12, 1 / 12]))  # (-2 + 0.5) / 2
    assert call(SPEC) == (pytest.approx(-0.05), pytest.approx([-0.2, 0.05, 0.05, 0.05]))  # (-2 + 1.5) / (2 * 5)
    tokens = dataclasses.replace(SPEC, aggregation="tokens")
    assert call(tokens) == (-0.125, [-0.5, 0.125, 0.125, 0.125])  # (-2 + 1.5) / 4


def test_a_function_alone_has_the_widths_of_the_level_and_a_spec_its_own():
    assert Objective(max_completion_length=5, loss_type=plain).clip == (3e-4, 4e-4)
    assert Objective(max_completion_length=5, loss_type=plain, importance_sampling_level="token").clip == (0.2, 0.27)
    assert Objective(max_completion_length=5, loss_type=SPEC).clip == (0.3, 0.4)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "hydra.utils.get_object", "path": "tests.objective.test_own_losses.SPEC"},
        {
            "_target_": "gspo_lightning.objective.LossSpec", "aggregation": "max_tokens", "clip": None,
            "reads": ["epsilon"], "levels": ["token"], "epsilons": [0.3, 0.4],
            "function": {"_target_": "hydra.utils.get_method", "path": "tests.objective.test_own_losses.plain"},
        },
    ],
)  # fmt: skip
def test_a_config_names_a_spec_or_spells_it(node):
    objective = instantiate(
        {"_target_": "gspo_lightning.objective.Objective", "max_completion_length": 5, "loss_type": node},
        _convert_="all",
    )
    assert (objective.loss_name, objective.spec.aggregation, objective.clip) == ("plain", "max_tokens", (0.3, 0.4))
    assert list(objective.spec.reads) == ["epsilon"]


def test_what_is_neither_a_name_nor_a_loss_is_refused():
    with pytest.raises(UserError) as error:
        Objective(max_completion_length=5, loss_type={"function": plain})
    assert str(error.value) == (
        "objective.loss_type is of type dict; set it to the name of a loss, a LossSpec or a function"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregation": "mean"}, "aggregation: there is no 'mean'; choose from sequence_mean, sequence_sum, tokens, max_tokens"),
        ({"reads": ("eps",)}, f"reads: there is no 'eps'; choose from epsilon, epsilon_high, delta, {', '.join(SETTINGS)}"),
        ({"levels": ("word",)}, "levels: there is no 'word'; choose from token, sequence, sequence_token"),
        ({"chooses": "all"}, "chooses: there is no 'all'; choose from draw, top"),
    ],
)  # fmt: skip
def test_a_spec_names_what_exists(changes, said):
    with pytest.raises(UserError) as error:
        dataclasses.replace(SPEC, **changes)
    assert str(error.value) == f"LossSpec.{said}"


def test_a_function_alone_may_read_every_setting():
    settings = {"epsilon": 0.3, "epsilon_high": 0.4, "delta": 1.5, **dict.fromkeys(SETTINGS, 0.9)}
    assert findings(gated, **settings) == []
    assert findings(gated, num_minibatches=1, **settings) == []  # whether it clips is not known


def test_a_setting_that_a_spec_does_not_read_is_refused_by_the_name_of_its_function():
    expected = "objective.{} has no effect on loss_type=plain, which reads objective.epsilon; set it to {}"
    assert findings(SPEC, epsilon_high=0.4) == [("no_effect", expected.format("epsilon_high", "null"))]
    assert findings(SPEC, tau_positive=2.0) == [("no_effect", expected.format("tau_positive", "1.0"))]
    assert findings(SPEC, tau_negative=2.0) == [("no_effect", expected.format("tau_negative", "1.05"))]


def test_a_temperature_that_is_read_must_be_above_0():
    spec = LossSpec(gated, "tokens", None, ("tau_negative",))
    assert findings(spec, tau_negative=0.0) == [("contradiction", "objective.tau_negative=0.0 must be above 0")]


def raised(x):
    return -x.ratio * x.advantages.where(x.advantages <= 0, x.k_positive * x.advantages)


def test_only_a_setting_that_changes_no_gradient_where_the_policy_has_not_moved_is_refused_there(monkeypatch):
    monkeypatch.setitem(LOSSES, "raised", LossSpec(raised, "tokens", None, ("k_positive", "tau_negative"), ("token",)))
    changed = {"k_positive": 3.0, "tau_negative": 2.0}
    assert findings("raised", **changed) == []
    ((kind, line),) = findings("raised", num_minibatches=1, **changed)
    assert kind == "no_effect" and line.startswith("objective.tau_negative cannot act: ") and line.endswith("to 1.05")


def test_a_function_without_a_name_goes_by_its_type():
    assert Objective(max_completion_length=5, loss_type=functools.partial(plain)).loss_name == "partial"


@pytest.mark.parametrize("kind", ["gmpo", "cispo", "reinforce", "sapo", "vespo", "clip_cov", "kl_cov", "grpo"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_a_second_registration_of_a_loss_is_told_what_the_first_is(kind, level, monkeypatch):
    """Nothing is known of a loss by its name."""
    monkeypatch.setitem(LOSSES, "second", LOSSES[kind])
    settings = [
        {}, {"epsilon": 0.2}, {"epsilon_high": 0.3}, {"delta": 1.1}, {"tau_positive": 0.0}, {"tau_negative": 2.0},
        {"kl_cov_ratio": 0.5}, {"clip_cov_lb": 9.0}, {"ppo_kl_coef": 0.5},
        {"k_positive": 0.0}, {"mismatch": MismatchCorrection("sequence", "mask", 2.0)}, {"top_entropy_quantile": 0.2}, {"num_minibatches": 1, "epsilon_high": 0.3}, {"staleness": 1},
        {"num_minibatches": 1, "tau_positive": 2.0}, {"num_minibatches": 1, "k_positive": 3.0},
    ]  # fmt: skip
    found = [[findings(name, level, **more) for more in settings] for name in (kind, "second")]
    assert any(found[0])
    assert str(found[0]).replace(f"loss_type={kind}", "loss_type=second") == str(found[1])


def test_the_tokens_share_one_loss_where_the_spec_or_the_level_says_so():
    def shared(loss, level):
        return Objective(max_completion_length=5, importance_sampling_level=level, loss_type=loss).shares_one_loss

    levels = ("token", "sequence", "sequence_token")
    everywhere = dataclasses.replace(SPEC, shares_one_loss=True)
    of_the_ratio = LossSpec(clipped_surrogate, "tokens", SURROGATE_CLIP)
    assert [shared(everywhere, level) for level in levels] == [True, True, True]
    assert [shared(of_the_ratio, level) for level in levels] == [False, True, False]
    assert [shared(plain, level) for level in levels] == [False, False, False]  # not known
    assert findings(everywhere, top_entropy_quantile=0.2) == [
        (
            "contradiction",
            "objective.top_entropy_quantile=0.2 leaves no token out with loss_type=plain, where the tokens of a "
            "completion share one loss; use another loss_type",
        )
    ]


@pytest.mark.parametrize(("level", "own", "said"), [
    ("sequence_token", (0.3, 0.3), "will almost never act"), ("token", (0.01, 0.01), "clip most tokens"),
])  # fmt: skip
def test_widths_that_the_loss_brings_are_not_warned_about_and_those_of_the_user_are(level, own, said):
    spec = LossSpec(clipped_surrogate, "tokens", SURROGATE_CLIP, epsilons=own)
    assert findings(spec, level) == []
    ((kind, message),) = findings(spec, level, epsilon=own[0])
    assert kind == "warning" and said in message


def anchored(x):
    return plain(x) + x.log_ratio.square()


def lowered(x):
    return plain(x) + x.logprobs


def bounded(x):
    """Pulls back what has moved further than e: most tokens have no gradient."""
    return plain(x) + (x.log_ratio.abs() - 1).relu()


def signed(x):
    """0 / 0 where the advantage is 0."""
    return -x.ratio * x.advantages / x.advantages.abs()


def particular(x):
    if len(x.lengths) != 7:
        raise ValueError("made for seven completions")
    return plain(x)


@pytest.mark.parametrize(("loss", "free"), [
    *((name, True) for name in LOSSES), (plain, True), (SPEC, True), (gated, True), (detached, True), (number, True),
    (signed, True), (anchored, False), (lowered, False), (bounded, False), (particular, False),
])  # fmt: skip
def test_completions_of_advantage_0_are_left_out_if_the_loss_has_no_gradient_there(loss, free):
    with torch.no_grad():
        assert Objective(max_completion_length=5, loss_type=loss).zero_advantage_is_free is free


def test_keeping_what_the_loss_itself_keeps_is_refused():
    objective = Objective(max_completion_length=5, importance_sampling_level="token", loss_type=anchored)
    found = check_objective(
        objective, num_iterations=1, num_minibatches=4, keep_zero_advantage=True
    )  # fmt: skip
    assert [f.message for f in found] == [
        "update.keep_zero_advantage=true has no effect with loss_type=anchored, which has a gradient where the "
        "advantage is 0: every completion is forwarded then; set it to false"
    ]


def held(x):
    """Holds the chosen tokens where they were."""
    return plain(x) + x.ppo_kl_coef * x.log_ratio.square() * x.chosen


def test_a_loss_of_ones_own_gets_the_tokens_that_its_spec_has_chosen():
    spec = LossSpec(held, "tokens", None, ("ppo_kl_coef",), ("token",), chooses="top")
    objective = Objective(max_completion_length=5, importance_sampling_level="token", loss_type=spec)
    logprobs = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([False, True, False, True])
    old = torch.full((4,), -1.5, dtype=torch.float64)
    loss = objective(logprobs, old, ADVANTAGES, torch.tensor([0, 1, 1, 1]), LENGTHS, chosen=chosen).loss
    assert loss.item() == pytest.approx(-0.5 * math.exp(0.5) + 2 * 0.25)
    assert findings(spec, kl_cov_ratio=0.1) == [] == findings(spec, num_minibatches=1, kl_cov_ratio=0.1)
    assert findings(spec, clip_cov_ratio=0.1) == [
        (
            "no_effect",
            "objective.clip_cov_ratio has no effect on loss_type=held, which reads objective.ppo_kl_coef and "
            "objective.kl_cov_ratio; set it to 0.0002",
        )
    ]


def test_nothing_is_chosen_for_a_function_alone():
    found = findings(plain, kl_cov_ratio=0.1, clip_cov_lb=0.5)
    assert [kind for kind, _ in found] == ["no_effect"] * 2
    assert all(
        f"objective.{key} has no effect on loss_type=plain" in m
        for key, (_, m) in zip(("clip_cov_lb", "kl_cov_ratio"), found, strict=True)
    )
