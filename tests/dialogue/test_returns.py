"""What is measured and recorded of dialogues whose turns have rewards is what they are trained on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.callbacks.recorder import completion_entries
from gspo_lightning.callbacks.strict_json import to_json
from gspo_lightning.dialogue.turns import silent_rollout
from gspo_lightning.errors import UserError
from gspo_lightning.pass_at_k import PassAtK
from gspo_lightning.rewards import RewardSet, RewardSpec, environment_reward
from gspo_lightning.rewards.calling import RECORDED
from gspo_lightning.training.rollout_collection import compare
from gspo_lightning.training.rollout_log import rollout_metrics
from gspo_lightning.training.validation import ValidationSettings, Validator
from gspo_lightning.types import Completion, Dialogue, Prompt, RewardedRollout, Rollout, SamplingParams

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
WORDS = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]


def dialogue(*turn_rewards: float, reward: float = 0.0, turns: int = 0) -> Completion:
    """Turns of one token each, with a token of the environment between them."""
    turns = turns or len(turn_rewards)
    size = 2 * turns - 1
    own = torch.tensor([place % 2 == 0 for place in range(size)])
    talk = Dialogue(own, (WORDS * turns)[:-1], reward, turn_rewards)
    return Completion(torch.arange(size), "a", torch.zeros(size), "stop", talk)


def scored(*groups: list[Completion], rewards: list[list[float]]):
    table = torch.tensor(rewards, dtype=torch.float64)
    prompts = [Prompt(f"t:{number}", "", torch.tensor([1]), {}) for number in range(len(groups))]
    rollout = RewardedRollout(prompts, list(groups), ("environment",), table[..., None], table)
    return compare(rollout, AdvantageEstimator(scale_rewards="none"))


def means(metrics):
    return {name: (total / count).item() for name, (total, count) in metrics.items()}


def test_with_turn_rewards_metrics_and_records_are_of_the_returns():
    # Returns by turn: (3, 2) and (1); mean of the first turn 2, so advantages 1 and -1. The second turn of the first is
    # compared with no other and has 1 too. In the other group: 0.5 and 0.5, nothing.
    rollout = scored(
        [dialogue(1.0, 2.0), dialogue(1.0)], [dialogue(0.5), dialogue(0.5)], rewards=[[0.0, 0.0], [0.0, 0.0]]
    )
    assert rollout.turn_advantages == [[(1.0, 1.0), (-1.0,)], [(0.0,), (0.0,)]]
    values = means(rollout_metrics(rollout))
    assert (values["reward/mean"], values["reward/std"]) == (0.0, 0.0)
    assert values["dialogue/return"] == (3 + 1 + 0.5 + 0.5) / 4 and values["dialogue/turns"] == 5 / 4
    # 1, 1 and -1: variance (2 * (2/3)^2 + (4/3)^2) / 2 = 4/3; and nothing in the other group.
    assert values["advantage_std"] == pytest.approx((4 / 3) ** 0.5 / 2, abs=1e-12)
    assert values["silent_frac"] == 0.5
    assert [name for name in (*values, "val/return") if f"`{name}`" not in DOCS] == ["reward/environment"]
    records = [json.loads(to_json(entry)) for entry in completion_entries(1, rollout)]
    assert [entry["turn_advantages"] for entry in records] == [[1.0, 1.0], [-1.0], [0.0], [0.0]]
    assert [entry["advantage"] for entry in records] == [0.0] * 4
    assert completion_entries(1, rollout, tokens=True)[0].keys() == RECORDED - {"thinking"}  # that is of gpt-oss


def test_without_turn_rewards_the_return_is_the_reward_and_no_turn_has_an_advantage():
    rollout = scored([dialogue(turns=2), dialogue(turns=1)], rewards=[[1.0, 0.25]])
    values = means(rollout_metrics(rollout))
    assert values["dialogue/return"] == values["reward/mean"] == 0.625 and values["dialogue/turns"] == 1.5
    assert values["advantage_std"] == pytest.approx(0.75 / 2**0.5)
    assert all("turn_advantages" not in entry for entry in completion_entries(1, rollout))


def test_a_group_without_rewards_of_turns_is_compared_as_a_whole_whatever_the_other_groups_have():
    """As where tasks of a mixture have environments of both kinds: which groups share a rank is chance."""
    plain, rewarded = [dialogue(turns=n) for n in (2, 2, 1)], [dialogue(1.0, 2.0), dialogue(1.0), dialogue(0.0)]
    own, zeros = [1.0, 0.5, 0.0], [0.0, 0.0, 0.0]
    alone, beside = scored(plain, rewards=[own]), scored(plain, rewarded, rewards=[own, zeros])
    assert [beside.token_advantages(0, n).tolist() for n in range(3)] == [[0.5, 0.5], [0.0, 0.0], [-0.5]]
    assert [beside.has_zero_advantage(0, n) for n in range(3)] == [False, True, False]
    assert beside.turn_advantages[1] == scored(rewarded, rewards=[zeros]).turn_advantages[0]
    rollouts = beside, alone, scored(rewarded, rewards=[zeros])
    values, of_alone, of_rewarded = (means(rollout_metrics(rollout)) for rollout in rollouts)
    for name in ("advantage_std", "silent_frac"):
        assert values[name] == (of_alone[name] + of_rewarded[name]) / 2
    assert ["turn_advantages" in entry for entry in completion_entries(1, beside)] == [False] * 3 + [True] * 3


def test_rewards_of_the_whole_and_of_turns_that_cancel_leave_a_group_without_signal():
    groups = [[dialogue(0.0), dialogue(1.0)], [dialogue(0.0, 0.0), dialogue(0.0, 1.0)]]
    rollout = scored(*groups, rewards=[[1.0, 0.0], [1.0, 0.0]])
    assert rollout.turn_advantages == [[(0.0,), (0.0,)], [(0.0, 0.0), (0.0, 0.0)]]
    assert silent_rollout(groups, rollout.rewards).tolist() == [True, True]
    # A reward at the end of the first turn is not to come behind it: 1 and 1 at first, then 1 and 0.
    later = [[dialogue(0.0, 0.0), dialogue(1.0, 0.0)]]
    assert silent_rollout(later, torch.tensor([[1.0, 0.0]], dtype=torch.float64)).tolist() == [False]


def test_dialogues_without_rewards_of_turns_are_compared_as_wholes_by_the_best_of_k():
    """A turn that fewer than k dialogues reach is no matter."""
    estimator, turns = PassAtK(k=2), (1, 2, 1, 1)
    group = [dialogue(turns=n) for n in turns]
    rewards = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0] * 4], dtype=torch.float64)
    assert silent_rollout([group] * 3, rewards, estimator).tolist() == [True, False, True]
    assert silent_rollout([group] * 3, rewards).tolist() == [False, False, True]


def test_returns_that_differ_by_rounding_alone_leave_a_group_without_signal():
    groups = [[dialogue(0.1, 0.2), dialogue(0.3)]]
    assert 0.1 + 0.2 != 0.3
    rollout = scored(*groups, rewards=[[0.0, 0.0]])
    assert rollout.turn_advantages == [[(0.0, 0.0), (0.0,)]]
    assert silent_rollout(groups, rollout.rewards).tolist() == [True]
    # Also where the return itself is no measure of the rounding: 0.1 + 0.2 - 0.3 is not quite 0.
    rollout = scored(*groups, rewards=[[-0.3, -0.3]])
    assert rollout.turn_advantages == [[(0.0, 0.0), (0.0,)]]
    assert silent_rollout(groups, rollout.rewards).tolist() == [True]
    assert means(rollout_metrics(rollout))["silent_frac"] == 1.0


def test_turns_are_counted_by_tokens_whatever_became_of_the_messages():
    rollout = scored([dialogue(1.0, 2.0), dialogue(1.0)], rewards=[[0.0, 0.0]])
    rollout.completions[0][0].dialogue.messages.clear()
    assert rollout_metrics(rollout)["dialogue/turns"][0] == 3
    assert rollout.token_advantages(0, 0).tolist() == [1.0, 1.0]


def test_in_groups_of_one_an_own_estimator_gets_every_turn():
    class Above(AdvantageEstimator):
        def __call__(self, rewards, everyone=None):
            return rewards - 0.5

    rollout = RewardedRollout(
        [Prompt(f"t:{number}", "", torch.tensor([1]), {}) for number in range(2)],
        [[dialogue(0.25, 1.0)], [dialogue(0.75)]],
        ("environment",),
        torch.tensor([[[2.0]], [[0.0]]], dtype=torch.float64),
        torch.tensor([[2.0], [0.0]], dtype=torch.float64),
    )
    scored = compare(rollout, Above())
    assert scored.turn_advantages == [[(2.75, 2.5)], [(0.25,)]]
    assert scored.token_advantages(0, 0).tolist() == [2.75, 2.5]


class Played:
    """Dialogues of two turns whose rewards of the whole are 0."""

    environments = SimpleNamespace()

    def generate(self, policy, prompts, sampling, seed):
        group = [dialogue(0.25, 0.5 * number) for number in range(sampling.num_generations)]
        return Rollout(prompts, [group for _ in prompts])


def test_a_validation_with_an_environment_has_the_return_too():
    rewards = RewardSet({"environment": RewardSpec(environment_reward)})
    validator = Validator(ValidationSettings(2), rewards, SamplingParams(2, 4), seed=0)
    validator.update(None, Played(), [Prompt("t:0", "", torch.tensor([1]), {})])
    values = validator.compute(torch.device("cpu"))
    assert (values["val/reward"], values["val/return"]) == (0.0, 0.5)  # 0.25 and 0.75
    validator.reset()
    assert "val/return" not in validator.means
    validator.update(None, Played(), [])  # a rank without prompts exchanges the same means
    assert "val/return" in validator.means


class Returning(AdvantageEstimator):
    """An estimator that returns what a function makes of the rewards, and names silent groups by another."""

    def __init__(self, make, silent=None):
        super().__init__(scale_rewards="none")
        object.__setattr__(self, "make", make)
        object.__setattr__(self, "name_silent", silent)

    def __call__(self, rewards, everyone=None):
        return self.make(rewards)

    def silent(self, rewards):
        return self.name_silent(rewards)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda rewards: rewards.flatten(), "returned (2,) for rewards of (1, 2); return a tensor of that shape"),
        (lambda rewards: rewards[:, :1], "returned (1, 1) for rewards of (1, 2); return a tensor of that shape"),
        (lambda rewards: rewards.tolist(), "returned list for rewards of (1, 2); return a tensor of that shape"),
        (
            lambda rewards: rewards / rewards.min(),
            "returned a number that is not finite for a group of rewards [1.0, 0.0]",
        ),
    ],
)
def test_advantages_of_turns_are_checked_as_those_of_whole_completions_are(make, line):
    rollout = scored([dialogue(1.0), dialogue(0.0)], rewards=[[0.0, 0.0]])
    with pytest.raises(UserError, match=f"^{re.escape(f'advantages: Returning {line}')}$"):
        compare(rollout, Returning(make))


@pytest.mark.parametrize("turns", [(), (1.0,)])
@pytest.mark.parametrize(
    ("silent", "found"),
    [
        (lambda rewards: rewards == 0, "torch.bool (1, 2)"),
        (lambda rewards: rewards.std(dim=1), "torch.float64 (1,)"),
        (lambda rewards: [False], "list"),
    ],
)
def test_a_mask_of_silent_groups_has_one_place_for_each(turns, silent, found):
    group = [dialogue(*turns, turns=1), dialogue(*turns, turns=1)]
    line = (
        f"advantages: Returning.silent returned {found} for rewards of (1, 2); return a mask of (1,) bool, one for "
        "each group"
    )
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        silent_rollout([group], torch.tensor([[1.0, 0.0]], dtype=torch.float64), Returning(None, silent))
