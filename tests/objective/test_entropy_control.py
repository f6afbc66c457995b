"""The weight of the entropy bonus, step by step, by hand."""

from __future__ import annotations

import math

import pytest

from gspo_lightning.objective import Objective
from gspo_lightning.objective.entropy_control import EntropyControl


def objective(**changes):
    given = {"entropy_target": 1.0, "entropy_coef": 0.5, "entropy_coef_delta": 0.25, "entropy_coef_max": 0.875}
    return Objective(max_completion_length=8, **{**given, **changes})


def weights(of, entropies, control=None):
    """The weight of each step, and the control behind the last."""
    control, found = control or EntropyControl(of.entropy_coef), []
    for entropy in entropies:
        found.append(control.at_this_step(of).entropy_coef)
        control.observe(of, entropy)
    return found, control


def test_the_weight_by_hand():
    #           target 1: low   low    at it  high   high  high  high  low   low
    entropies = [0.5, 0.9, 1.0, 1.5, 1.5, 1.5, 1.5, 0.2, 0.2]
    found, control = weights(objective(), entropies)
    # 0.5 -> 0.75 -> 0.875 (the most) -> 0.875 -> 0.625 -> 0.375 -> 0.125 -> 0 (the least) -> 0.25 -> 0.5
    assert found == [0.0, 0.75, 0.875, 0.875, 0.0, 0.0, 0.0, 0.0, 0.25]
    assert (control.coefficient, control.entropy) == (0.5, 0.2)


def test_the_least_weight_is_kept():
    _, control = weights(objective(entropy_coef_min=0.375), [2.0] * 5)
    assert control.coefficient == 0.375


def test_without_a_target_nothing_moves():
    of = objective(entropy_target=None)
    found, control = weights(of, [0.1, 9.0, 0.1])
    assert found == [0.5] * 3
    assert control == EntropyControl(0.5)
    assert control.at_this_step(of) is of


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_an_entropy_that_is_no_number_is_ignored(broken):
    with_it, one = weights(objective(), [0.5, broken, 0.5, 0.5])
    without, other = weights(objective(), [0.5, 0.5, 0.5])
    assert one == other
    assert with_it[2:] == without[1:]


def test_a_control_that_is_loaded_goes_on_where_it_was():
    entropies = [0.5, 1.5, 0.2, 3.0, 0.1, 0.4, 1.1]
    whole, _ = weights(objective(), entropies)
    first, control = weights(objective(), entropies[:3])
    loaded = EntropyControl(0.5)
    loaded.load_state_dict(control.state_dict())
    second, _ = weights(objective(), entropies[3:], loaded)
    assert first + second == whole
    assert len(set(whole)) > 2


def test_a_weight_from_a_checkpoint_is_brought_within_the_bounds_of_this_run():
    loaded = EntropyControl(0.875, entropy=0.5)
    narrower = objective(entropy_coef_max=0.25, entropy_coef=0.25)
    assert loaded.at_this_step(narrower).entropy_coef == 0.25
    loaded.observe(narrower, 2.0)
    assert loaded.coefficient == 0.25


def test_all_completions_are_forwarded_whatever_the_weight_is_now():
    """Their entropy is measured, and the bonus may act again."""
    resting = EntropyControl(0.5).at_this_step(objective())
    assert resting.entropy_coef == 0
    assert resting.needs_entropy and not resting.zero_advantage_is_free
