"""Sampling of dialogues: what the rows hold, that nothing is computed twice, and what an environment may not do."""

from __future__ import annotations

import functools

import pytest
import torch

from gspo_lightning.dialogue import Environments, Reply
from gspo_lightning.dialogue.template import continuation
from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.reading import load_tokenizer
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.types import Prompt, SamplingParams
from tests.support import make_prompt, micro_policy

SAMPLING = SamplingParams(num_generations=4, max_completion_length=40, temperature=1.0, stop=tuple("aeiou"))


class Says:
    """Answers the first two turns with fixed words, and notes all it was asked."""

    def __init__(self, rewards=(None, None, None)):
        self.turns, self.rewards = [], rewards

    def reset(self, row, seed):
        self.row, self.seed = row, seed

    def step(self, text):
        self.turns.append(text)
        reward = self.rewards[len(self.turns) - 1]
        return Reply(None if len(self.turns) == 3 else f"<{len(self.turns)}>", reward=reward)

    def reward(self):
        return float(len(self.turns))


@pytest.fixture(scope="module")
def policy(micro_model_dir):
    return micro_policy(micro_model_dir)


@pytest.fixture()
def prompts():
    return [make_prompt(torch.arange(5, 5 + n), uid=f"t:{n}") for n in (3, 9, 1, 6)]


def engine(make=Says, max_turns=4):
    return TransformersEngine(environments=Environments(make, max_turns))


def segments(completion):
    """Runs of (trained, tokens)."""
    runs = []
    for token, trained in zip(completion.token_ids.tolist(), completion.dialogue.trained.tolist(), strict=True):
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return runs


def test_turns_and_replies_alternate_and_only_turns_are_trained(policy, prompts):
    rollout = engine().generate(policy, prompts, SAMPLING, seed=1)
    everyone = [c for group in rollout.completions for c in group]
    assert max(c.dialogue.reward for c in everyone) == 3, "no dialogue reached its end"
    for completion in everyone:
        runs = segments(completion)
        assert runs[0][0] and runs[-1][0] and len(completion.token_ids) <= 40
        replies = [policy.tokenizer.decode(tokens) for trained, tokens in runs if not trained]
        assert replies == [f"<{n + 1}>" for n in range(len(replies))]
        said = [m["content"] for m in completion.dialogue.messages if m["role"] == "user"]
        assert said == replies
        turns = [m["content"] for m in completion.dialogue.messages if m["role"] == "assistant"]
        assert turns == [policy.tokenizer.decode(t, skip_special_tokens=True) for trained, t in runs if trained]
        assert completion.num_trained == sum(len(t) for trained, t in runs if trained)
        assert completion.finish_reason == ("stop" if completion.dialogue.reward == 3 else "length")


def test_sampler_logprobs_of_a_continued_cache_equal_those_of_one_fresh_forward(policy, prompts):
    rollout = engine().generate(policy, prompts, SAMPLING, seed=1)
    everyone = [c for group in rollout.completions for c in group]
    assert any(len(segments(c)) > 3 for c in everyone)
    groups = [(p.input_ids, [c.token_ids for c in g]) for p, g in zip(prompts, rollout.completions, strict=True)]
    with torch.no_grad():
        fresh, _ = policy(pack(groups, torch.device("cpu"), (), [c.dialogue.trained for c in everyone]))
    sampled = torch.cat([c.sampler_logprobs[c.dialogue.trained] for c in everyone])
    assert (sampled - fresh).abs().max() < 1e-5
    assert all((c.sampler_logprobs[~c.dialogue.trained] == 0).all() for c in everyone)


def test_no_token_of_a_dialogue_is_forwarded_twice(policy, prompts, monkeypatch):
    seen = []
    original = policy.hidden_states
    monkeypatch.setattr(
        policy, "hidden_states", lambda ids, *a, **k: seen.append(ids.numel()) or original(ids, *a, **k)
    )
    rollout = engine().generate(policy, prompts, SAMPLING, seed=1)
    completions = sum(len(c.token_ids) - 1 for group in rollout.completions for c in group)
    assert sum(seen) == sum(len(p.input_ids) for p in prompts) + completions


def test_the_same_seed_repeats_and_neither_order_nor_company_matters(policy, prompts):
    first, again = (engine().generate(policy, prompts, SAMPLING, seed=3) for _ in range(2))
    turned = engine().generate(policy, prompts[::-1], SAMPLING, seed=3)
    for a, b, c in zip(first.completions, again.completions, turned.completions[::-1], strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            assert torch.equal(x.token_ids, y.token_ids) and torch.equal(x.token_ids, z.token_ids)


def test_a_dialogue_ends_after_max_turns_and_environments_get_seeds_of_their_own(policy, prompts):
    made = []
    make = lambda: made.append(Says()) or made[-1]  # noqa: E731
    rollout = engine(make, max_turns=1).generate(policy, prompts, SAMPLING, seed=1)
    assert all(c.dialogue.trained.all() for group in rollout.completions for c in group)
    assert len({environment.seed for environment in made}) == len(made) == 16
    again = []
    engine(lambda: again.append(Says()) or again[-1]).generate(policy, prompts, SAMPLING, seed=1)
    assert [e.seed for e in again] == [e.seed for e in made]


def test_what_stands_between_turns_is_what_the_chat_template_puts_there():
    tokenizer = load_tokenizer(resolve_model("bundled:smollm2-135m-instruct"))
    eos = (tokenizer.eos_token_id,)
    ask, tool = {"role": "user", "content": "2 * 3?"}, {"role": "tool", "content": "6"}
    prompt = tokenizer.apply_chat_template([ask], add_generation_prompt=True, return_dict=False)
    turn = tokenizer("<calc>2 * 3</calc>", add_special_tokens=False)["input_ids"]
    between = continuation(tokenizer, [tool], {}, True, eos)
    conversation = [ask, {"role": "assistant", "content": "<calc>2 * 3</calc>"}, tool]
    whole = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert prompt + turn + list(eos) + between == whole
    assert continuation(tokenizer, [tool], {}, False, eos) == [*eos, *between]
    with pytest.raises(UserError, match="does not end an assistant's turn"):
        continuation(tokenizer, [tool], {}, True, (3,))


def test_a_chat_template_that_leaves_the_environments_words_out_is_refused():
    tokenizer = load_tokenizer(resolve_model("bundled:smollm2-135m-instruct"))
    turn = "<|im_start|>{{ m.role }}\n{{ %s }}<|im_end|>\n"
    template = (
        "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
    )
    tool, eos = {"role": "tool", "content": 'a "quoted" word'}, (tokenizer.eos_token_id,)
    tokenizer.chat_template = template % (turn % "m.content | tojson if m.role == 'tool' else m.content")
    assert 'a \\"quoted\\" word' in tokenizer.decode(continuation(tokenizer, [tool], {}, True, eos))
    tokenizer.chat_template = template % ("{% if m.role != 'tool' %}" + turn % "m.content" + "{% endif %}")
    with pytest.raises(UserError, match="the chat template leaves out what a message of role tool says"):
        continuation(tokenizer, [tool], {}, True, eos)
    assert continuation(tokenizer, [tool | {"role": "user"}], {}, True, eos)


class Broken(Says):
    def step(self, text):
        raise ValueError("no such move")


class Talks(Says):
    def step(self, text):
        return "hello"


class NotANumber(Says):
    def reward(self):
        return float("nan")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (Broken, r"environment Broken.step raised ValueError: no such move \(row t:3\)"),
        (Talks, r"environment Talks.step must return a Reply, not str \(row t:3\)"),
        (NotANumber, r"environment NotANumber: a reward must be a finite number, not nan \(row t:3\)"),
        (functools.partial(Says, (0.1, None, 0.1)), r"some turns have a reward and others none \(row "),
    ],
)
def test_what_an_environment_does_wrong_is_one_line_with_the_row(make, says, policy, prompts):
    with pytest.raises(UserError, match=says):
        engine(make).generate(policy, prompts, SAMPLING, seed=1)


def test_turn_rewards_come_one_per_turn_and_a_turn_cut_by_length_earns_nothing(policy, prompts):
    rollout = engine(functools.partial(Says, (0.1, 0.2, 0.3))).generate(policy, prompts, SAMPLING, seed=1)
    everyone = [c for group in rollout.completions for c in group]
    for completion in everyone:
        turns = sum(trained for trained, _ in segments(completion))
        shown = int(completion.dialogue.reward)  # Says counts them
        expected = (*(0.1, 0.2, 0.3)[:shown], *(0.0,) * (turns - shown)) if shown else ()
        assert completion.dialogue.turn_rewards == expected
    assert {len(c.dialogue.turn_rewards) for c in everyone} >= {2, 3}


class SaysNothing(Says):
    """Two empty replies, which put no token between the turns of a plain prompt."""

    def step(self, text):
        reply = super().step(text)
        return Reply(None if reply.text is None else "", reward=reply.reward)


def test_turns_with_nothing_between_them_stay_apart(policy, prompts):
    rollout = engine(functools.partial(SaysNothing, (0.1, 0.2, 0.3))).generate(policy, prompts, SAMPLING, seed=1)
    turns_seen = set()
    for completion in (c for group in rollout.completions for c in group):
        own = completion.dialogue
        assert own.trained.all()
        index = own.turn_index()
        parts = [completion.token_ids[index == n] for n in range(int(index.max()) + 1)]
        texts = [policy.tokenizer.decode(part, skip_special_tokens=True) for part in parts]
        said = [m["content"] for m in own.messages if m["role"] == "assistant"]
        assert texts == said
        turns_seen.add(len(texts))
    assert turns_seen >= {2, 3}


def test_no_turns_are_refused():
    with pytest.raises(UserError, match="environment.max_turns=0 must be at least 1"):
        Environments(Says, max_turns=0)
    assert isinstance(Environments(Says).begin(Prompt("u", "", torch.ones(1), {}), 0, None).messages, list)
