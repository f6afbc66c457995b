"""Groups without signal make room for fresh prompts, drawn in order, none twice, and resumed exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.data import PromptDataModule
from gspo_lightning.dialogue.turns import silent_rollout
from gspo_lightning.errors import UserError
from gspo_lightning.policy.adapter import LoraSettings
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.training import dynamic_sampling
from gspo_lightning.training.dynamic_sampling import draw_until_signal
from gspo_lightning.training.rollout_collection import compare
from gspo_lightning.training.rollout_log import rollout_metrics
from gspo_lightning.types import Completion, Dialogue, Prompt, PromptBatch, RewardedRollout
from tests.scripted import (
    Batches,
    ScriptedEngine,
    ScriptedSource,
    Settings,
    build_module,
    scripted_prompts,
    scripted_reward,
    trainer,
)


def rewarded(prompts: list[Prompt], rewards: list[list[float]]) -> RewardedRollout:
    table = torch.tensor(rewards, dtype=torch.float64)
    completions = [[Completion(torch.tensor([5]), "", torch.zeros(1), "stop") for _ in row] for row in rewards]
    return RewardedRollout(prompts, completions, ("r",), table[..., None], table)


class Numbers:
    """An endless source of numbered prompts; those whose number is in ``silent`` get equal rewards."""

    def __init__(self, silent: set[int]) -> None:
        self.silent = silent
        self.collected: list[list[int]] = []

    def _take(self, start: int, count: int) -> list[Prompt]:
        return [Prompt(str(n), "", torch.tensor([3]), {}) for n in range(start, start + count)]

    def first(self) -> PromptBatch:
        return PromptBatch(self._take(0, 3), cursor=3)

    def draw(self, batch: PromptBatch, counts: Sequence[int]) -> PromptBatch:
        return PromptBatch(self._take(batch.cursor, counts[0]), batch.cursor + sum(counts))

    def collect(self, prompts: list[Prompt]) -> RewardedRollout:
        self.collected.append([int(p.uid) for p in prompts])
        return rewarded(
            prompts, [[1.0, 1.0] if int(p.uid) in self.silent else [0.0, float(p.uid) + 1] for p in prompts]
        )


def run(silent: set[int], max_draws: int):
    source = Numbers(silent)
    return source, *draw_until_signal(source, source.collect, max_draws)


@pytest.mark.parametrize(("more", "found"), [(-1, "1 prompt"), (1, "3 prompts")])
def test_a_source_that_draws_another_number_of_prompts_is_refused(more, found):
    class Odd(Numbers):
        def draw(self, batch: PromptBatch, counts: Sequence[int]) -> PromptBatch:
            return super().draw(batch, [counts[0] + more])

    source = Odd({0, 1})
    line = (
        f"^dynamic_sampling.max_draws: Odd.draw.. returned {found}, but was asked for 2 .counts.rank..; return as many"
    )
    with pytest.raises(UserError, match=line):
        draw_until_signal(source, source.collect, 1)
    assert source.collected == [[0, 1, 2]]


def dialogues(turn_rewards: Sequence[tuple[float, ...]]) -> list[Completion]:
    """Of two turns of one token each."""
    talk = [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    own = torch.tensor([True, False, True])
    return [
        Completion(torch.tensor([5, 6, 7]), "", torch.zeros(3), "stop", Dialogue(own, talk, 0.0, of_turns))
        for of_turns in turn_rewards
    ]


def test_a_group_has_signal_if_the_returns_of_a_turn_differ():
    completions = [
        dialogues([(0.2, 0.2), (0.2, 0.0)]),  # returns 0.4 and 0.2, then 0.2 and 0.0
        dialogues([(0.2, 0.2), (0.2, 0.2)]),
        dialogues([(0.25, 0.0), (0.0, 0.25)]),  # the same at first, not behind the first turn
        dialogues([(), ()]),
    ]
    rewards = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert silent_rollout(completions, rewards).tolist() == [False, True, False, True]
    rewards[3, 1] = 1.0
    assert silent_rollout(completions, rewards).tolist() == [False, True, False, False]
    source = Numbers(set())

    def collect(prompts: list[Prompt]) -> RewardedRollout:
        found = source.collect(prompts)
        return replace(found, completions=completions[:3], rewards=torch.zeros(3, 2, dtype=torch.float64))

    rollout, _, drawn = draw_until_signal(source, collect, max_draws=0)
    assert drawn.silent_left == 1
    scored = compare(rollout, AdvantageEstimator())
    assert [[scored.has_zero_advantage(b, g) for g in range(2)] for b in range(3)] == [
        [False] * 2,
        [True] * 2,
        [False] * 2,
    ]
    silent, groups = rollout_metrics(scored)["silent_frac"]
    assert (silent.item(), groups.item()) == (1.0, 3.0)


def test_silent_groups_are_replaced_in_place_until_all_have_signal():
    source, rollout, batch, drawn = run({0, 2, 3}, max_draws=5)
    assert source.collected == [[0, 1, 2], [3, 4], [5]]
    assert [p.uid for p in rollout.prompts] == ["5", "1", "4"]
    assert rollout.rewards.tolist() == [[0, 6], [0, 2], [0, 5]]
    assert batch.cursor == 6 and (drawn.draws, drawn.extra_prompts, drawn.silent_left) == (2, 3, 0)
    assert drawn.discarded_tokens == 6  # three groups of two completions of one token


def test_what_the_policy_earns_counts_the_groups_that_made_room():
    """Of what was kept alone the mean would be 13 / 6, and no group would be silent."""
    _, rollout, _, drawn = run({0, 2, 3}, max_draws=5)
    assert rollout.rewards.mean().item() == 13 / 6
    metrics = drawn.metrics(lambda by_function: 0.5 * by_function[..., 0])
    assert {name: (total.item(), count.item()) for name, (total, count) in metrics.items()} == {
        "dynamic_sampling/sampled_reward": (0.5 * (3 * (1 + 1) + 2 + 5 + 6), 12),
        "dynamic_sampling/silent_frac": (3, 6),
        "dynamic_sampling/draws": (2, 1),
        "dynamic_sampling/extra_prompts": (3, 1),
        "dynamic_sampling/silent_left": (0, 1),
    }


def test_groups_that_stay_silent_count_among_all_that_were_sampled():
    _, _, _, drawn = run({*range(100)} - {1}, max_draws=2)  # three prompts, then two, then two
    silent, sampled = drawn.metrics(lambda by_function: by_function[..., 0])["dynamic_sampling/silent_frac"]
    assert (silent.item(), sampled.item()) == (6, 7)


class Scripted(ScriptedSource):
    """Two prompts, the second without signal, and one that takes its place."""

    def first(self) -> PromptBatch:
        return PromptBatch(scripted_prompts(count=2), cursor=2)

    def draw(self, batch: PromptBatch, counts: Sequence[int]) -> PromptBatch:
        return PromptBatch(scripted_prompts(seed=1, count=sum(counts)), batch.cursor + sum(counts))

    def train_dataloader(self) -> DataLoader[PromptBatch]:
        return DataLoader([self.first()], batch_size=None)  # type: ignore[arg-type]


def test_a_run_logs_what_it_sampled_by_weight_and_what_it_kept(micro_model_dir):
    module = build_module(micro_model_dir, Settings(advantages="batch"))
    module.max_draws = 1
    module.rewards = RewardSet({"scripted": RewardSpec(scripted_reward, weight=0.5)}, combine="normalize_then_sum")
    trainer().fit(module, datamodule=Scripted())
    prompts = [*scripted_prompts(count=2), *scripted_prompts(seed=1, count=1)]
    first, silent, fresh = (0.5 * sum(value for _, value in prompt.sample["scripted"]) for prompt in prompts)
    found = module.last_metrics
    assert found["reward/mean"] == pytest.approx((first + fresh) / 6, rel=1e-12)
    assert found["dynamic_sampling/sampled_reward"] == pytest.approx((first + silent + fresh) / 9, rel=1e-12)
    assert (found["silent_frac"], found["dynamic_sampling/silent_frac"]) == (0.0, pytest.approx(1 / 3))


def test_draws_are_bounded_and_the_rollout_keeps_its_size():
    source, rollout, batch, drawn = run(set(range(100)), max_draws=2)
    assert len(rollout.prompts) == 3 and batch.cursor == 9
    assert (drawn.draws, drawn.silent_left) == (2, 3)


def test_a_rollout_with_signal_everywhere_draws_nothing():
    source, rollout, batch, drawn = run(set(), max_draws=2)
    assert source.collected == [[0, 1, 2]] and batch.cursor == 3 and drawn.draws == 0


def test_a_rank_with_signal_runs_along_while_another_draws(monkeypatch):
    """The other rank has one silent group in the first draw and none after it."""
    others, along = iter([1, 0]), []
    monkeypatch.setattr(
        dynamic_sampling, "gather_values", lambda values: torch.tensor([int(values), next(others)], dtype=torch.float64)
    )
    source = Numbers(set())
    draw_until_signal(source, source.collect, 3, lambda: along.append(len(source.collected)))
    assert along == [1] and source.collected == [[0, 1, 2]]


def test_running_along_is_sampling_as_any_other(monkeypatch, micro_model_dir):
    """Rank 0 of an engine that samples for all ranks may have no prompts of its own, and runs their environments."""
    seen = []

    class Calling(ScriptedEngine):
        def generate(self, policy, prompts, *arguments):
            seen.append((len(prompts), torch.get_default_dtype()))
            return super().generate(policy, prompts, *arguments)

    class Drawing(ScriptedSource):
        def train_dataloader(self):
            return Batches(scripted_prompts()).loader()

        def draw(self, batch, counts):
            return PromptBatch([], batch.cursor + sum(counts))

    monkeypatch.setattr(dynamic_sampling, "silent_rollout", lambda *_: torch.zeros(4, dtype=torch.bool))
    others = iter([1, 0])
    monkeypatch.setattr(dynamic_sampling, "gather_values", lambda values: torch.tensor([int(values), next(others)]))
    module = build_module(micro_model_dir, Settings(dtype="float32", lora=LoraSettings(r=2)))
    module.engine, module.max_draws = Calling(), 2
    trainer(precision="bf16-true").fit(module, Drawing())
    assert seen == [(4, torch.float32), (0, torch.float32)]


class Logging(Numbers):
    """Rewards that log: the prompt's number per completion, a second column now and then, and a sum."""

    def collect(self, prompts: list[Prompt]) -> RewardedRollout:
        numbers = [int(p.uid) for p in prompts for _ in range(2)]
        columns = {"number": numbers} | ({"late": [n * 10 for n in numbers]} if numbers[0] else {})
        logged = {"reward_log/number": (torch.tensor(float(sum(numbers))), torch.tensor(float(len(numbers))))}
        return replace(super().collect(prompts), extra_columns=columns, logged=logged)


def test_what_rewards_log_follows_the_groups_and_columns_that_come_late_are_empty_before():
    source = Logging({0, 2})
    rollout = draw_until_signal(source, source.collect, 1)[0]
    assert [p.uid for p in rollout.prompts] == ["3", "1", "4"]
    assert rollout.extra_columns == {"number": [3, 3, 1, 1, 4, 4], "late": [30, 30, None, None, 40, 40]}
    # Sums are over everything that was scored, the discarded groups included.
    total, count = rollout.logged["reward_log/number"]
    assert (total.item(), count.item()) == (2 * (0 + 1 + 2 + 3 + 4), 10)


class FiveRows:
    name, num_train_rows = "five", 5

    def train_row(self, index: int) -> dict:
        return {"prompt": f"row {index}"}

    def validation_rows(self) -> list:
        return []


@pytest.fixture
def data(micro_model_dir):
    return PromptDataModule(FiveRows(), str(micro_model_dir), prompts_per_rollout=2, max_prompt_length=64)


def numbers(batch: PromptBatch) -> list[int]:
    return [int(p.uid.rsplit(":", 1)[1]) for p in batch.prompts]


def test_fresh_prompts_follow_the_batch_and_none_is_in_the_rollout_twice(data):
    order = [int(data.stream.row_at(i)[0].rsplit(":", 1)[1]) for i in range(10)]
    first = data.first()
    assert numbers(first) == order[:2]
    more = data.draw(first, [3])
    assert numbers(more) == order[2:5] and more.cursor == 5
    with pytest.warns(UserWarning, match="the 5 rows do not have 1 more prompts .* groups without signal stay"):
        assert data.draw(more, [1]) is None


def test_where_no_fresh_prompt_is_left_silent_groups_stay_and_the_run_goes_on(data):
    def collect(prompts):
        return rewarded(prompts, [[1.0, 1.0] for _ in prompts])  # all is solved

    with pytest.warns(UserWarning, match="groups without signal stay"):
        rollout, batch, drawn = draw_until_signal(data, collect, max_draws=5)
    assert (drawn.draws, drawn.extra_prompts, drawn.silent_left) == (1, 2, 2)
    assert len(rollout.prompts) == 2 and batch.cursor == 4  # behind what was drawn, not behind what was looked at
    data.finish(batch)
    assert len(data.first().prompts) == 2


def test_draws_wrap_into_the_next_epoch_without_repeating_a_row_of_the_rollout(data):
    data.cursor = 2  # rows 2 and 3 of the epoch; the draw takes its last row and goes on in the next epoch
    first = data.first()
    drawn = numbers(data.draw(first, [2]))
    assert len({*numbers(first), *drawn}) == 4


def test_the_next_rollout_begins_behind_what_was_drawn(data):
    first = data.first()
    more = data.draw(first, [1])
    data.finish(PromptBatch(first.prompts, more.cursor, more.dropped))
    assert data.cursor == 3
