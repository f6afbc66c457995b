"""Environments of users: what they are given, and the line that says what is wrong with one."""

from __future__ import annotations

import asyncio
import functools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from gspo_lightning.config.build import build, build_data, with_environments
from gspo_lightning.data import PromptDataModule
from gspo_lightning.dialogue import Environments, Reply
from gspo_lightning.dialogue.template import continuation
from gspo_lightning.errors import UserError
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.reading import load_tokenizer
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.engine import traits
from gspo_lightning.types import Prompt
from tests.conf.test_groups import resolved
from tests.dialogue.tool_support import heard

CHAT = [{"role": "user", "content": "?"}]


class Once:
    """One answer, then the end."""

    def __init__(self, answer=None, reward=1.0):
        self.answers, self.given = [answer], reward

    def reset(self, row, seed):
        self.row = row

    def step(self, text):
        return self.answers.pop() if self.answers else Reply(None)

    def reward(self):
        return self.given


@functools.cache
def tokenizer():
    return load_tokenizer(resolve_model("bundled:smollm2-135m-instruct"))


def begun(make, prompt=CHAT, **row):
    return Environments(make).begin(Prompt("t:3", prompt, torch.ones(1), row), 0, tokenizer())


def test_an_environment_that_two_dialogues_would_share_is_refused():
    prompts = [(Prompt(f"t:{n}", CHAT, torch.ones(1), {}), n) for n in range(2)]
    assert len(Environments(Once).begin_all(prompts, tokenizer())) == 2
    one = Once()
    shared = Environments(lambda: one)
    shared.begin_all(prompts[:1], tokenizer())
    with pytest.raises(
        UserError, match=r"^environment.make returned one object for two dialogues, .* a new one for each$"
    ):
        shared.begin_all(prompts, tokenizer())


@pytest.mark.parametrize("workers", [1, 2])
def test_environments_compute_in_their_own_precision(workers):
    class Model(Once):
        def reset(self, row, seed):
            self.dtype = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype

        def reward(self):
            return float(self.dtype == (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32)

    environments = Environments(Model, workers=workers)
    with torch.autocast("cpu", torch.bfloat16):  # around a rollout in bf16-mixed
        dialogue = environments.begin(Prompt("t:3", CHAT, torch.ones(1), {}), 0, tokenizer())
        assert dialogue.result()[0] == 1.0


def played(make, prompt=CHAT, **row):
    """The dialogue behind one turn, and the text between that and the next one."""
    dialogue = begun(make, prompt, **row)
    between = heard(dialogue, "a turn", (tokenizer().eos_token_id,))
    return dialogue, None if between is None else tokenizer().decode(between)


def test_what_one_dialogue_takes_from_its_row_is_there_for_the_others():
    image = torch.zeros(2)
    row = {"deck": [1, 2, 3], "nested": {"left": [{"a": [1]}]}, "pair": ([1],), "seen": {1}, "image": image}
    first, second = begun(Once, **row).environment.row, begun(Once, **row).environment.row
    first["deck"].clear()
    first["nested"]["left"][0]["a"].append(2)
    first["pair"][0].append(2)
    first["seen"].add(2)
    assert second == row == {**row, "deck": [1, 2, 3], "nested": {"left": [{"a": [1]}]}, "pair": ([1],), "seen": {1}}
    assert first["image"] is second["image"] is image


class Makes(Once):
    """Answers with ``Reply(*arguments)``."""

    def __init__(self, *arguments):
        super().__init__()
        self.arguments = arguments

    def step(self, text):
        return Reply(*self.arguments)


@pytest.mark.parametrize("prompt", [CHAT, "plain"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((42,), "Reply: the text is of type int; give a string, such as str(...), or None for the end"),
        (([{"type": "text", "text": "a"}],), "Reply: the text is of type list; give a string, such as str(...), or "),
        (("x", 5), "Reply: role=5 must be a string such as user or tool; assistant is the policy"),
        (("x", "assistant"), "Reply: role='assistant' must be a string such as user or tool; assistant is the policy"),
    ],
)
def test_a_reply_that_is_none_is_one_line_with_the_row(arguments, says, prompt):
    with pytest.raises(UserError) as caught:
        played(functools.partial(Makes, *arguments), prompt)
    line = str(caught.value)
    assert line.startswith(f"environment Makes.step: {says}") and line.endswith(" (row t:3)") and "\n" not in line


class Async(Once):
    async def reset(self, row, seed):
        raise AssertionError("nobody runs this")


class AsyncStep(Once):
    async def step(self, text):
        return Reply(None)


class Cancelled(Once):
    def step(self, text):
        raise asyncio.CancelledError("gone")


def cannot_be_made():
    raise FileNotFoundError("no such file")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (cannot_be_made, "environment.make raised FileNotFoundError: no such file (row t:3)"),
        (
            Async,
            "environment Async.reset is async, but nothing awaits it; make it a plain function (row t:3)",
        ),
        (AsyncStep, "environment AsyncStep.step is async, but nothing awaits it; make it a plain function (row t:3)"),
        (Cancelled, "environment Cancelled.step raised CancelledError: gone (row t:3)"),
    ],
)
def test_what_cannot_be_made_or_called_is_one_line_with_the_row(make, line):
    with warnings.catch_warnings(), pytest.raises(UserError) as caught:
        warnings.simplefilter("error")  # a coroutine that nobody awaited warns
        played(make)
    assert str(caught.value) == line


def test_an_environment_in_place_of_what_makes_one_is_refused_before_the_run():
    name = f"{__name__}.Once"
    node = {"_target_": "gspo_lightning.dialogue.Environments", "make": {"_target_": name}}
    with pytest.raises(UserError, match="^environment.make is of type Once, but must make .*make._partial_=true$"):
        build(node)
    with pytest.raises(UserError, match="^environment._target_ creates a Once; set it to gspo_lightning.dialogue.Env"):
        with_environments(TransformersEngine(), build({"_target_": name}))
    good = build({**node, "make": {"_target_": name, "_partial_": True}})
    assert with_environments(TransformersEngine(), good) == replace(TransformersEngine(), environments=good)


class Noting(TransformersEngine):
    """Has a constructor of its own."""

    def __init__(self, folder):
        super().__init__(max_concurrent=3)
        object.__setattr__(self, "folder", folder)


class Wholly:
    """An engine of one's own that samples dialogues."""

    environments = None

    def generate(self, policy, prompts, sampling, seed): ...


def test_engines_of_ones_own_are_given_the_environments():
    good = Environments(functools.partial(Once, None))
    engine, other = Noting("here"), Wholly()
    made, wholly = with_environments(engine, good), with_environments(other, good)
    assert (type(made), made.folder, made.max_concurrent, made.environments) == (Noting, "here", 3, good)
    assert engine.environments is None and other.environments is None
    assert type(wholly) is Wholly and traits(wholly).environments is good
    del Wholly.environments
    with pytest.raises(UserError, match="^environment: Wholly cannot sample dialogues; use rollout=transformers$"):
        with_environments(other, good)


@pytest.mark.parametrize("prompt", [CHAT, "plain"])
def test_half_a_character_is_replaced_in_the_message_and_in_its_tokens(prompt):
    dialogue, between = played(functools.partial(Once, Reply("\udc80é\ud83d\ude00日\ud83d")), prompt)
    assert dialogue.messages[-1] == {"role": "user", "content": "\ufffdé😀日\ufffd"}
    assert "\ufffdé😀日\ufffd" in between


@pytest.mark.parametrize(
    ("reward", "number"),
    [
        (np.float32(0.5), 0.5), (np.float64(-2), -2.0), (np.int64(3), 3.0), (np.bool_(True), 1.0), (np.array([2]), 2.0),
        (True, 1.0), (7, 7.0), (torch.tensor(0.25), 0.25), (torch.tensor([4]), 4.0),
    ],
)  # fmt: skip
def test_numbers_of_all_kinds_are_rewards(reward, number):
    whole, turns = played(functools.partial(Once, Reply(None, reward=reward), reward))[0].result()
    assert (whole, turns) == (number, (number,)) and type(whole) is type(turns[0]) is float


@pytest.mark.parametrize(
    "reward", [float("nan"), float("inf"), 10**400, "1", None, [1.0], np.ones(2), torch.ones(2)], ids=type
)
def test_what_is_no_number_is_no_reward(reward):
    with pytest.raises(UserError, match=r"^environment Once: a reward must be a finite number, not .* \(row t:3\)$"):
        played(functools.partial(Once, Reply(None), reward))[0].result()


def test_a_reward_whose_square_is_no_number_is_refused():
    with pytest.raises(
        UserError, match=r"^environment Once: a reward must not be beyond 1e\+100, but is 1e\+300 \(row"
    ):
        played(functools.partial(Once, Reply(None), 1e300))[0].result()


SYSTEM = {"role": "system", "content": "Rules."}
REFUSES = "{% if messages[0].role != 'system' %}{{ raise_exception('begin with a system message') }}{% endif %}"
REPEATS = (
    "{% if messages[0].role == 'system' %}{% set rules = messages[0].content + ' ' %}{% endif %}"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and rules is defined %}{{ rules }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture()
def own_template():
    """Sets the chat template for one test."""
    before = tokenizer().chat_template
    yield lambda template: setattr(tokenizer(), "chat_template", template)
    tokenizer().chat_template = before


def behind(prompt):
    message = {"role": "user", "content": "Go on."}
    return tokenizer().decode(continuation(tokenizer(), [message], {}, True, (tokenizer().eos_token_id,), prompt))


def test_a_template_that_wants_a_system_message_first_gets_that_of_the_prompt(own_template):
    expected = "\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    assert behind(CHAT) == behind([SYSTEM, *CHAT]) == expected
    own_template(REFUSES + tokenizer().chat_template)
    assert behind([SYSTEM, *CHAT]) == expected
    with pytest.raises(UserError, match="^the chat template refuses .* role user: begin with a system message$"):
        behind(CHAT)


def test_a_template_that_writes_the_system_message_into_the_newest_turn_does_not_write_it_again(own_template):
    own_template(REPEATS)
    assert behind([SYSTEM, *CHAT]) == "\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"


class Beginning(Once):
    """Notes the rows it begins with."""

    begun: list[dict] = []

    def reset(self, row, seed):
        self.begun.append(row)


def built(make, *overrides):
    plain = resolved("experiment=micro", "environment=calculator", f"environment.make._target_={make}", *overrides)
    rewards = build(plain["reward"])
    return build_data(plain, rewards)


def test_a_dialogue_about_a_row_of_each_kind_is_begun_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(PolicyLoader, "load", lambda self: pytest.fail("the model was loaded"))
    Beginning.begun.clear()
    built(f"{__name__}.Beginning")
    train, held_out = Beginning.begun
    assert train["letter"] and held_out["letter"] and train["prompt"] != held_out["prompt"]
    with pytest.raises(UserError) as refused:
        built("gspo_lightning.dialogue.Calculator")
    assert str(refused.value) == (
        "environment Calculator.reset raised KeyError: 'answer' (row micro_letters:train:0; it has prompt, letter)"
    )


class OwnData(PromptDataModule):
    def check(self, required_columns=None):
        super().check(required_columns)


def test_a_data_module_of_ones_own_must_take_what_begins_a_dialogue():
    with pytest.raises(UserError) as refused:
        built(f"{__name__}.Beginning", f"data._target_={__name__}.OwnData")
    assert str(refused.value) == (
        "data: OwnData.check() must take (required_columns, begin) and pass both on to super().check() (too many "
        "positional arguments)"
    )


@pytest.mark.parametrize(
    ("text", "room", "tokenised"),
    [("lorem " * 10_000, 5, [320]), ("lorem " * 10_000, 200, [12_800]), ("lorem " * 50, 5, [300]), (" " * 60_000, 5, [320, 60_000])],
)  # fmt: skip
def test_a_text_that_is_far_too_long_is_not_tokenised_to_its_end(text, room, tokenised, monkeypatch):
    seen = []

    def counted(own, messages, *arguments):
        seen.append(sum(len(message["content"]) for message in messages))
        return continuation(own, messages, *arguments)

    monkeypatch.setattr("gspo_lightning.dialogue.environment.continuation", counted)
    dialogue, eos = begun(lambda: Once(Reply(text))), (tokenizer().eos_token_id,)
    assert len(heard(dialogue, "a turn", eos, room)) >= room and seen == tokenised
    assert dialogue.messages[-1] == {"role": "user", "content": text}
    whole = heard(begun(lambda: Once(Reply(text))), "a turn", eos)
    assert seen[-1] == len(text) and len(whole) >= room
