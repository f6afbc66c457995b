"""Dialogues that the engine samples with an environment: which tokens are whose, and what a turn is worth.

The package keeps that while it samples. Here it is read off the finished token ids alone, with the rules of the
environment and of docs/multi_turn.md, and handed to the reference, which trains on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from gspo_lightning.dialogue import Environments, Reply
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.rewards.functions import environment_reward
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.rollout.seeds import rollout_seed
from gspo_lightning.types import Completion, Dialogue, Prompt, Rollout
from tests.whole_update import product
from tests.whole_update.case import Case
from tests.whole_update.float64 import float64_layers
from tests.whole_update.reference import Run
from tests.whole_update.test_whole_update import metric_differences, network_of, weight_differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

STOP = tuple("0123456789!?;")
MOST_TURNS = 4

CASES = [
    (Case(turns="rewarded", level="token", beta=0.04, minibatches=2, max_length=70, rollouts=2, lr=0.05), True),
    (Case(turns="rewarded", level="sequence_token", loss="dapo", entropy_coef=0.01, max_length=25), False),
    (Case(turns="dialogue", mask_truncated=True, iterations=2, max_length=90, max_grad_norm=1.0), True),
    (Case(turns="dialogue", loss="reinforce", scale="none", length_reward="target", max_length=40), False),
]
"""With the chat template around what is said, or without."""


def answer(text: str, number: int) -> str | None:
    """What the environment says to the turn of this number: sometimes nothing, and None to end the dialogue."""
    return None if text.startswith("q") else ["", "<1>", "so?"][(len(text) + number) % 3]


def worth(text: str) -> float:
    """The reward of a turn that the environment was shown."""
    return round(0.1 * (len(text) % 4), 1)


class Talks:
    """The environment."""

    def reset(self, row: dict[str, Any], seed: int) -> None:
        self.rewarded, self.turns = row["rewarded"], 0

    def step(self, text: str) -> Reply:
        self.turns += 1
        return Reply(answer(text, self.turns), reward=worth(text) if self.rewarded else None)

    def reward(self) -> float:
        return 0.5 * self.turns


@dataclass
class Recording:
    """An engine that keeps what it sampled."""

    engine: Any
    rollouts: list[Rollout] = field(default_factory=list)

    def generate(self, *arguments: Any) -> Rollout:
        self.rollouts.append(self.engine.generate(*arguments))
        return self.rollouts[-1]


@pytest.mark.parametrize(("case", "templated"), CASES, ids=[f"{c.turns}-{c.loss}-{t}" for c, t in CASES])
def test_the_environments_tokens_are_context_and_every_turn_has_its_return(case, templated, micro_model_dir):
    with float64_layers():
        network, tokenizer = network_of(micro_model_dir), AutoTokenizer.from_pretrained(micro_model_dir)
        module = product.prepared(micro_model_dir, case)
        module.engine = engine = Recording(TransformersEngine(environments=Environments(Talks, MOST_TURNS)))
        rewards = {"f0": RewardSpec(environment_reward)}
        module.rewards = RewardSet(rewards | {k: v for k, v in product.rewards(case).functions.items() if k != "f0"})
        module.sampling = replace(module.sampling, stop=STOP)
        before = product.trained_tensors(module)
        recorder = product.train(module, case, prompts(case, templated, tokenizer))
        stream = [understood(case, prompt, group, tokenizer) for r in engine.rollouts for prompt, group in pairs_of(r)]
        trained = product.starting_point(case, network.start, before)
        reference = Run(case, network, trained, stream)
        for number in range(case.rollouts):
            metrics = reference.rollout(rollout_seed(product.RUN_SEED, number))
            assert metric_differences(case, recorder.metrics[number], metrics) == []
            assert weight_differences(before, recorder.tensors[number], trained.tensors) == []
            assert metrics["dialogue/turns"] > 1.5 and metrics["grad_norm"] > 0
            assert metrics["sampler_mismatch/abs_mean"] < 1e-5, "the sampler saw other tokens before"


def prompts(case: Case, templated: bool, tokenizer: Any) -> list[Prompt]:
    """Short ones, as messages or as text."""
    found = []
    for number in range(case.prompts * case.rollouts):
        text = "abcdefgh"[number % 8] * (1 + number)
        prompt: Any = [{"role": "user", "content": text}] if templated else text
        shown = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) if templated else text
        ids = torch.tensor(tokenizer(shown, add_special_tokens=False)["input_ids"])
        found.append(Prompt(f"talk:{number}", prompt, ids, {"rewarded": case.turns == "rewarded"}))
    return found


def pairs_of(rollout: Rollout) -> zip[tuple[Prompt, list[Completion]]]:
    return zip(rollout.prompts, rollout.completions, strict=True)


def understood(case: Case, prompt: Prompt, group: list[Completion], tokenizer: Any) -> Prompt:
    """The prompt with the completions and rewards that their token ids come to."""
    read = [_read(case, prompt, completion, tokenizer) for completion in group]
    return replace(prompt, sample={"completions": [c for c, _ in read], "rewards": [[reward] for _, reward in read]})


def _read(case: Case, prompt: Prompt, completion: Completion, tokenizer: Any) -> tuple[Completion, float]:
    ids, trained, begins, worths, shown = completion.token_ids.tolist(), [], [], [], 0
    while len(trained) < len(ids):
        turn, ends = _turn(ids[len(trained) :], tokenizer)
        begins += [True, *[False] * (len(turn) - 1)]
        trained += [True] * len(turn)
        text = tokenizer.decode(turn, skip_special_tokens=True)
        worths.append(worth(text) if ends else 0.0)
        if not ends:
            over = False
            break
        shown += 1
        reply = answer(text, shown)
        over = reply is None or shown == MOST_TURNS
        if over or len(trained) == len(ids):
            break
        between = _between(turn, reply, prompt, tokenizer)
        assert ids[len(trained) : len(trained) + len(between)] == between
        trained += [False] * len(between)
        begins += [False] * len(between)
    assert len(trained) == len(ids)
    assert over or len(ids) <= case.max_length
    dialogue = Dialogue(
        torch.tensor(trained), [], 0.0, tuple(worths) if case.turns == "rewarded" else (), torch.tensor(begins)
    )
    reason = "stop" if over else "length"
    return Completion(completion.token_ids, "", completion.sampler_logprobs, reason, dialogue), 0.5 * shown


def _turn(ids: list[int], tokenizer: Any) -> tuple[list[int], bool]:
    """The tokens up to the first that ends a turn, and whether one does."""
    for number, token in enumerate(ids):
        if token == tokenizer.eos_token_id or tokenizer.decode([token]) in STOP:
            return ids[: number + 1], True
    return ids, False


def _between(turn: list[int], reply: str | None, prompt: Prompt, tokenizer: Any) -> list[int]:
    """The chat template of the micro model around the reply; a turn without its end token is given one."""
    if isinstance(prompt.prompt, str):
        text = str(reply)
    else:
        end = "" if turn[-1] == tokenizer.eos_token_id else "<|im_end|>"
        text = f"{end}\n<|im_start|>user\n{reply}<|im_end|>\n<|im_start|>assistant\n"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
