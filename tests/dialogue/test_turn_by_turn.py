"""Dialogues of engines that answer with whole turns: the same sequences as those drawn token by token."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from gspo_lightning.dialogue import Environments, Reply
from gspo_lightning.errors import UserError
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.turn_by_turn import sample_dialogues
from gspo_lightning.types import Completion, Prompt, SamplingParams
from tests.dialogue.test_sampling import Says
from tests.support import make_prompt, micro_policy


@pytest.fixture(scope="module")
def policy(micro_model_dir):
    return micro_policy(micro_model_dir)


@pytest.fixture()
def prompts():
    return [make_prompt(torch.arange(5, 5 + n), uid=f"t:{n}") for n in (3, 9, 1, 6, 12)]


def followed(future):
    """The request that follows."""
    return None if future is None else future.result(timeout=60)()


def engine(answer, asked):
    """An engine that answers one request after another with a turn, and notes their numbers and themselves."""

    def complete(requests, next_of):
        done, queue = {}, list(enumerate(requests))
        while queue:
            number, request = queue.pop(0)
            asked.append((number, request))
            done[number] = [answer(request)]
            if (following := followed(next_of(number, done[number]))) is not None:
                queue.append((number, following))
        return [done[number] for number in range(len(requests))]

    return complete


def whole_turns(policy, asked):
    """`engine` that draws turns from the policy."""

    def answer(request):
        prompt, sampling, seed = request
        return TransformersEngine().generate(policy, [prompt], sampling, seed).completions[0][0]

    return engine(answer, asked)


def told(answers, asked):
    """`engine` that gives the answers one after another."""
    return engine(lambda request: next(answers), asked)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_dialogues_equal_those_drawn_token_by_token(penalty, policy, prompts):
    prompts += [make_prompt(torch.arange(n, n + 9) * 7 % 90 + 3, uid=f"u:{n}") for n in range(6)]
    greedy = SamplingParams(1, 30, temperature=0.0, stop=tuple("aeiounrst"), repetition_penalty=penalty)
    environments = Environments(functools.partial(Says, (0.5, 0.25, 0.125)), 4)
    expected = TransformersEngine(environments=environments).generate(policy, prompts, greedy, 3).completions
    found = sample_dialogues(whole_turns(policy, []), policy, prompts, greedy, 3, environments)
    assert max(c.dialogue.num_turns for group in expected for c in group) == 3
    assert {c.finish_reason for group in expected for c in group} == {"stop", "length"}
    for a, b in zip(sum(expected, []), sum(found, []), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.dialogue.trained.tolist() == b.dialogue.trained.tolist()
        assert a.dialogue.begins.tolist() == b.dialogue.begins.tolist()
        assert (a.text, a.finish_reason, a.dialogue.messages) == (b.text, b.finish_reason, b.dialogue.messages)
        assert (a.dialogue.reward, a.dialogue.turn_rewards) == (b.dialogue.reward, b.dialogue.turn_rewards)
        assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() < 1e-5


def turn(tokens, finish_reason="stop"):
    return Completion(torch.tensor(tokens), "", torch.full((len(tokens),), -0.5), finish_reason)


def test_a_request_holds_all_tokens_so_far_and_what_is_left_of_the_length(policy):
    """By hand: turns of 3, 2 and 4 tokens, replies of 3, a limit of 15, so that the third turn is cut."""
    asked = []
    answers = iter([turn([7, 8, 9]), turn([10, 11]), turn([12, 13, 14, 15], "length")])
    said = [policy.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("<1>", "<2>")]
    assert list(map(len, said)) == [3, 3]
    sampling = SamplingParams(1, 15, temperature=0.7)
    prompt = make_prompt([3, 4], uid="t:0")
    ((made,),) = sample_dialogues(told(answers, asked), policy, [prompt], sampling, 5, Environments(Says, 4))
    tokens = [7, 8, 9, *said[0], 10, 11, *said[1], 12, 13, 14, 15]
    assert made.token_ids.tolist() == tokens and made.finish_reason == "length"
    assert made.dialogue.trained.tolist() == [True] * 3 + [False] * 3 + [True] * 2 + [False] * 3 + [True] * 4
    assert made.dialogue.begins.nonzero().flatten().tolist() == [0, 6, 11]
    assert made.sampler_logprobs.tolist() == [-0.5 * own for own in made.dialogue.trained.tolist()]
    assert made.dialogue.reward == 2  # the environment has not seen the turn that was cut
    requests = [(p.input_ids.tolist(), p.uid, s.max_completion_length) for _, (p, s, _) in asked]
    assert requests == [([3, 4], "t:0", 15), ([3, 4, *tokens[:6]], "t:0", 9), ([3, 4, *tokens[:11]], "t:0", 4)]
    assert {replace(s, max_completion_length=15) for _, (_, s, _) in asked} == {sampling}


def test_without_room_for_the_reply_and_a_token_the_dialogue_ends_with_the_turn(policy):
    for limit, turns in ((7, 2), (6, 1)):  # 3 of a turn and 3 of the reply leave one token, or none
        answers = iter([turn([7, 8, 9]), turn([10], "length")])
        sampling = SamplingParams(1, limit)
        ((made,),) = sample_dialogues(told(answers, []), policy, [make_prompt([3])], sampling, 0, Environments(Says, 4))
        assert (made.dialogue.num_turns, made.finish_reason) == (turns, "length")
        assert [m["role"] for m in made.dialogue.messages] == ["assistant", "user", "assistant"][: 2 * turns - 1]


def test_dialogues_are_asked_for_together_and_draw_numbers_of_their_own(policy, prompts):
    asked = []
    sampling = SamplingParams(3, 40, temperature=1.0, stop=tuple("aeiou"))
    sample_dialogues(whole_turns(policy, asked), policy, prompts, sampling, 1, Environments(Says, 2))
    assert [number for number, _ in asked[:15]] == list(range(15))
    drawn = [(prompt.uid, seed) for _, (prompt, _, seed) in asked]
    assert len(set(drawn)) == len(drawn) > 15
    again = []
    sample_dialogues(whole_turns(policy, again), policy, prompts[::-1], sampling, 1, Environments(Says, 2))
    assert {(p.uid, seed) for _, (p, _, seed) in again} == set(drawn)
    assert {single.num_generations for _, (_, single, _) in asked} == {1}
    later = []
    sample_dialogues(whole_turns(policy, later), policy, prompts, sampling, 2, Environments(Says, 2))
    assert not {seed for _, (_, _, seed) in later} & {seed for _, seed in drawn}


def test_environments_have_the_seeds_that_they_have_where_dialogues_are_drawn_token_by_token(policy, prompts):
    sampling, of = SamplingParams(3, 9), []

    def noting():
        of[-1].append(Says())
        return of[-1][-1]

    for seed in (1, 2):
        for sample in (
            lambda seed, own: TransformersEngine(environments=own).generate(policy, prompts, sampling, seed),
            lambda seed, own: sample_dialogues(whole_turns(policy, []), policy, prompts, sampling, seed, own),
        ):
            of.append([])
            sample(seed, Environments(noting, 1))
    token, turn, token_later, turn_later = ([environment.seed for environment in made] for made in of)
    assert turn == token and turn_later == token_later
    assert len(set(turn)) == 15 and not set(turn) & set(turn_later)


def test_a_dialogue_does_not_wait_for_the_turns_of_others(policy):
    """The first dialogue's only turn is answered last: by then the second has had all three of its turns."""
    asked = []

    def complete(requests, next_of):
        second = requests[1]
        while second is not None:
            asked.append(len(second[0].input_ids))
            answer = [turn([7])]
            second = followed(next_of(1, answer))
        slow = [turn([8, 9], "length")]
        assert next_of(0, slow) is None
        return [slow, answer]

    prompts = [make_prompt([3], uid="t:0"), make_prompt([3], uid="t:1")]
    made = sample_dialogues(complete, policy, prompts, SamplingParams(1, 40), 0, Environments(Says, 4))
    assert [completion.dialogue.num_turns for (completion,) in made] == [1, 3]
    assert [completion.token_ids.tolist()[:2] for (completion,) in made][0] == [8, 9]
    assert asked == [1, 5, 9]  # a token of the policy and three of the environment each time


def test_a_reply_may_be_empty_and_tokens_after_an_image_are_text(policy):
    class Quiet(Says):
        def step(self, text):
            self.turns.append(text)
            return Reply("" if len(self.turns) == 1 else None)

    asked = []
    answers = iter([turn([7, 8]), turn([9])])
    kinds = {"mm_token_type_ids": torch.tensor([0, 1, 1, 0])}
    prompt = Prompt("t:0", "a", torch.tensor([3, 4, 4, 5]), {}, kinds)
    ((made,),) = sample_dialogues(
        told(answers, asked), policy, [prompt], SamplingParams(1, 9), 0, Environments(Quiet, 4)
    )
    assert made.token_ids.tolist() == [7, 8, 9] and made.dialogue.begins.tolist() == [True, False, True]
    assert [p.mm_inputs["mm_token_type_ids"].tolist() for _, (p, _, _) in asked] == [[0, 1, 1, 0], [0, 1, 1, 0, 0, 0]]
    assert prompt.mm_inputs["mm_token_type_ids"].tolist() == [0, 1, 1, 0]


def test_a_padded_model_is_refused(policy, prompts, monkeypatch):
    monkeypatch.setattr(policy, "is_padded", True)
    with pytest.raises(UserError, match="^environment: LlamaForCausalLM runs padded"):
        sample_dialogues(engine(None, []), policy, prompts, SamplingParams(1, 9), 0, Environments(Says, 4))
