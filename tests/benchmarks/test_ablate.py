"""Each ablation takes away what it names: counted in tokens that are forwarded, or seen in what is called."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ablate import ABLATIONS
from gspo_lightning.packing import batch, least_common_on, logprobs
from gspo_lightning.policy import load, model
from gspo_lightning.rollout import TransformersEngine, transformers_engine
from gspo_lightning.training import passes, update
from gspo_lightning.training.update import UpdateSettings, split_minibatches
from gspo_lightning.types import Completion, SamplingParams, ScoredRollout
from tests.support import make_prompt, micro_policy

CPU = torch.device("cpu")
TOUCHED = [
    (batch, "LEAST_COMMON"), (batch, "LEAST_COMMON_ON_GPU"), (load, "lighten"), (model, "rows_missing"),
    (logprobs, "rows_missing"), (passes, "build_micro_batch"),
    (passes.Passes, "before_update"), (transformers_engine, "Decoder"), (transformers_engine, "prepacked_weights"),
]  # fmt: skip
SYSTEM = 20


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    for owner, name in TOUCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))


def prompts():
    return [make_prompt(torch.cat([torch.arange(30, 30 + SYSTEM), torch.arange(60 + n, 63 + n)])) for n in range(3)]


def forwarded_in_the_update():
    """Of three prompts of 20 + 3 tokens, each with completions of 2 and 5."""

    def completion(length):
        return Completion(torch.arange(5, 5 + length), "", torch.zeros(length), "stop")

    rewards = torch.tensor([[1.0, -1.0]] * 3, dtype=torch.float64)
    completions = [[completion(2), completion(5)] for _ in range(3)]
    scored = ScoredRollout(prompts(), completions, (), rewards[..., None], rewards, rewards)
    settings = UpdateSettings(num_minibatches=1)
    least = least_common_on(CPU)
    kinds = {"zero_advantage_is_free": True, "mask_truncated": False, "least_common": least}
    minibatches = split_minibatches(scored, settings, **kinds, order=[0, 1, 2])
    rows = [passes.build_micro_batch(scored, plan, CPU, least).packed for plan in minibatches[0].plan]
    return sum(row.num_tokens for row in rows)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        (None, 20 + 3 * (3 + 1 + 4)),
        ("what all prompts begin with is shared", 3 * (23 + 1 + 4)),
        ("prefix sharing in the update", 3 * (23 + 1 + 23 + 4)),
        ("no padding in the update", 20 + 3 * (3 + 4 + 4)),
    ],
)
def test_tokens_of_an_update_by_hand(name, tokens):
    if name is not None:
        ABLATIONS[name]()
    assert update.build_micro_batch is not passes.build_micro_batch or "update" not in str(name)
    assert forwarded_in_the_update() == tokens


def rows_by_token(policy, monkeypatch):
    """Of every forward of a rollout of 3 x 2 rows whose completions end at random."""
    sizes, forward = [], type(policy).hidden_states

    def counting(self, ids, *arguments, **keywords):
        sizes.append(ids.numel())
        return forward(self, ids, *arguments, **keywords)

    monkeypatch.setattr(type(policy), "hidden_states", counting)
    rollout = TransformersEngine().generate(policy, prompts(), SamplingParams(2, 12, temperature=3.0), seed=3)
    return sizes, [len(c.token_ids) for group in rollout.completions for c in group]


def test_rows_that_have_ended_are_decoded_on(micro_model_dir, monkeypatch):
    policy = micro_policy(micro_model_dir)
    monkeypatch.setattr(type(policy), "eos_token_ids", tuple(range(0, 90, 4)))
    (prefill, *sizes), lengths = rows_by_token(policy, monkeypatch)
    assert prefill == SYSTEM + 3 * 3
    # A row is forwarded after each of its tokens but the last.
    assert sizes == [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert len(set(lengths)) > 2
    ABLATIONS["ended rows leave the decoder"]()
    (_, *without), same = rows_by_token(policy, monkeypatch)
    assert same == lengths
    assert without == [6] * (max(lengths) - 1)


@pytest.mark.parametrize(
    ("name", "owner", "replaced"),
    [
        ("no old pass for the first minibatch", passes.Passes, "before_update"),
        ("layers that keep less", load, "lighten"),
        ("weights packed once per rollout", transformers_engine, "prepacked_weights"),
        ("rows filled up to whole tiles", model, "rows_missing"),
    ],
)
def test_what_the_others_replace_is_there(name, owner, replaced):
    before = getattr(owner, replaced)
    ABLATIONS[name]()
    assert getattr(owner, replaced) is not before
