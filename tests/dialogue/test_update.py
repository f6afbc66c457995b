"""What an environment says is context: it counts in no length, no mean and no gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.dialogue.turns import turn_advantages
from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.pass_at_k import PassAtK
from gspo_lightning.types import Completion, Dialogue
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer, update_of
from tests.support import flat_gradient, micro_policy, padded_logprobs, relative_distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TURNS = [{"role": "assistant", "content": ""}, {"role": "user", "content": ""}]


def talk(mask: str, turn_rewards: tuple[float, ...] = ()) -> Dialogue:
    """``m`` for a token of the model, ``e`` for one of the environment."""
    trained = torch.tensor([letter == "m" for letter in mask])
    turns = len([run for run in mask.split("e") if run])
    return Dialogue(trained, (TURNS * turns)[:-1], 0.0, turn_rewards)


def dialogues(turn_rewards: bool = False) -> list:
    """The scripted prompts, with every completion of three tokens or more turned into a dialogue."""
    prompts = scripted_prompts()
    for number, prompt in enumerate(prompts):
        for g, completion in enumerate(prompt.sample["completions"]):
            size = len(completion.token_ids)
            if size > 2:
                mask = "m" + "e" * (size - 2) + "m" if g % 2 else "mm" + "e" * (size - 3) + "m" if size > 3 else "mem"
                rewards = (0.1 * (g + 1), 0.3 * number) if turn_rewards else ()
                prompt.sample["completions"][g] = replace(completion, dialogue=talk(mask, rewards))
            elif turn_rewards:
                prompt.sample["completions"][g] = replace(completion, dialogue=talk("m" * size, (0.1 * (g + 1),)))
    return prompts


def mask_of(completion: Completion) -> torch.Tensor:
    return (
        completion.dialogue.trained if completion.dialogue else torch.ones(len(completion.token_ids), dtype=torch.bool)
    )


def by_hand(folder, prompts, kind, token_advantages=None):
    """The gradient of the first step from padded rows: log-probabilities of the model's own tokens alone."""
    policy = micro_policy(folder)
    groups = [(p.input_ids, [c.token_ids for c in p.sample["completions"]]) for p in prompts]
    logprobs, _ = padded_logprobs(policy.base_model, groups)
    loss, start = torch.zeros((), dtype=torch.float64), 0
    everyone = [c for p in prompts for c in p.sample["completions"]]
    total = sum(int(mask_of(c).sum()) for c in everyone)
    for b, prompt in enumerate(prompts):
        rewards = torch.tensor([r for _, r in prompt.sample["scripted"]], dtype=torch.float64)
        for g, completion in enumerate(prompt.sample["completions"]):
            end = start + len(completion.token_ids)
            own = logprobs[start:end][mask_of(completion)]
            if token_advantages is None:
                silent = rewards.max() == rewards.min()
                advantage = 0.0 if silent else (rewards[g] - rewards.mean()) / (rewards.std() + 1e-4)
            else:
                advantage = token_advantages[b][g]
            weight = 1 / (len(own) * len(everyone)) if kind == "grpo" else 1 / total
            loss = loss - (advantage * own).sum() * weight
            start = end
    loss.backward()
    return flat_gradient(policy)


def test_context_tokens_are_forwarded_but_no_targets():
    prompt, completion = torch.tensor([11, 12]), torch.tensor([21, 22, 23, 24, 25])
    packed = pack([(prompt, [completion, torch.tensor([31])])], torch.device("cpu"), (), [talk("mmeem").trained, None])
    assert packed.input_ids.tolist() == [[11, 12, 21, 22, 23, 24]]
    # 21 follows 12 (row position 1), 22 follows 21 (2), 25 follows 24 (5); 31 follows 12 again.
    assert packed.predictor_index.tolist() == [1, 2, 5, 1]
    assert packed.target_ids.tolist() == [21, 22, 25, 31]
    assert packed.sequence_index.tolist() == [0, 0, 0, 1] and packed.lengths.tolist() == [3, 1]


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_the_gradient_of_a_dialogue_is_that_of_its_own_tokens(kind, level, budget, micro_model_dir):
    settings = Settings(
        objective={"loss_type": kind, "importance_sampling_level": level}, update={"max_tokens_per_microbatch": budget}
    )
    ours, module = update_of(micro_model_dir, settings, dialogues())
    assert relative_distance(ours, by_hand(micro_model_dir, dialogues(), kind)) < 1e-12
    everyone = [c for p in dialogues() for c in p.sample["completions"]]
    assert module.counts["rollout_tokens"] == sum(int(mask_of(c).sum()) for c in everyone)


def test_turn_advantages_compare_what_came_after_a_turn():
    """Returns by hand: [1 + .2 + .4, 1 + .4], [0 + .6, 0 + 0] and, with one turn, [0.5 + .1]."""
    group = [
        Completion(torch.arange(3), "", torch.zeros(3), "stop", talk("mem", (0.2, 0.4))),
        Completion(torch.arange(3), "", torch.zeros(3), "stop", talk("mem", (0.6, 0.0))),
        Completion(torch.arange(1), "", torch.zeros(1), "stop", talk("m", (0.1,))),
    ]
    found = turn_advantages([group], torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64), AdvantageEstimator())
    # First turn: 1.6, 0.6, 0.6: mean 0.9333, deviations 0.6667 and twice -0.3333, standard deviation 0.57735 (+ 1e-4).
    assert [x[0] for x in found[0]] == pytest.approx([1.15450, -0.57725, -0.57725], abs=1e-5)
    # Second turn: 1.4 and 0: +-0.7, standard deviation 0.98995 (+ 1e-4).
    assert [x[1] for x in found[0][:2]] == pytest.approx([0.70704, -0.70704], abs=1e-5) and len(found[0][2]) == 1


def test_a_turn_that_no_other_dialogue_reached_has_the_advantage_of_the_first():
    group = [
        Completion(torch.arange(3), "", torch.zeros(3), "stop", talk("mem", (0.0, 1.0))),
        Completion(torch.arange(1), "", torch.zeros(1), "stop", talk("m", (0.0,))),
    ]
    found = turn_advantages([group], torch.zeros(1, 2, dtype=torch.float64), AdvantageEstimator())
    assert found[0][0][1] == found[0][0][0] > 0
    whole = [Completion(torch.arange(1), "", torch.zeros(1), "stop", talk("m"))] * 2
    assert turn_advantages([whole], torch.zeros(1, 2), AdvantageEstimator()) is None


def test_rewards_of_turns_are_refused_where_whole_completions_are_compared(micro_model_dir):
    module = build_module(micro_model_dir, Settings(objective={"importance_sampling_level": "token"}))
    module.advantages = PassAtK(k=2)
    with pytest.raises(UserError, match="the environment rewards turns, .* but PassAtK compares whole"):
        trainer().fit(module, Batches(dialogues(turn_rewards=True), 1).loader())
    module.advantages = AdvantageEstimator("none", "length")
    with pytest.raises(
        UserError, match="the environment rewards turns, .* but AdvantageEstimator with baseline=length compares whole"
    ):
        trainer().fit(module, Batches(dialogues(turn_rewards=True), 1).loader())


@pytest.mark.parametrize("level", ["token", "sequence_token"])
def test_each_turn_is_trained_on_its_own_advantage(level, micro_model_dir):
    prompts = dialogues(turn_rewards=True)
    ours, _ = update_of(micro_model_dir, Settings(objective={"importance_sampling_level": level}), prompts)
    rewards = torch.tensor([[r for _, r in p.sample["scripted"]] for p in prompts], dtype=torch.float64)
    turns = turn_advantages([p.sample["completions"] for p in prompts], rewards, AdvantageEstimator())
    tokens = []
    for p, group in zip(prompts, turns, strict=True):
        tokens.append([])
        for completion, own in zip(p.sample["completions"], group, strict=True):
            mask, values, turn = mask_of(completion).tolist(), [], 0
            for position, trained in enumerate(mask):
                if trained and position and not mask[position - 1]:
                    turn += 1
                if trained:
                    values.append(own[turn])
            tokens[-1].append(torch.tensor(values, dtype=torch.float64))
    assert relative_distance(ours, by_hand(micro_model_dir, prompts, "grpo", tokens)) < 1e-12


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        ({}, "use importance_sampling_level=sequence_token"),
        ({"loss_type": "gmpo", "importance_sampling_level": "token"}, "objective.loss_type=gmpo the tokens of a completion share one loss"),
    ],
    ids=["sequence", "gmpo"],
)  # fmt: skip
def test_turn_rewards_are_refused_where_a_completion_has_one_advantage(objective, line, micro_model_dir):
    with pytest.raises(UserError, match=line):
        update_of(micro_model_dir, Settings(objective=objective), dialogues(turn_rewards=True))
