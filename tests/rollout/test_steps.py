"""Decoding steps of fixed shapes, as a CUDA graph records them: they draw what others draw, whatever rows leave.

The kernel is replaced by its definition, in the dtype of the model, and the graph by a stand-in.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.policy.known_layers import KNOWN_LAYERS
from gspo_lightning.rollout import TransformersEngine, decoder, flash_cache, steps
from gspo_lightning.rollout.block_cache import BlockCache
from gspo_lightning.rollout.cache import PrefillCache
from gspo_lightning.rollout.flash_cache import FlashCache
from gspo_lightning.rollout.steps import GraphSteps, Steps
from gspo_lightning.types import SamplingParams
from tests.packing.test_flash import forward
from tests.support import make_prompt, micro_policy


class Recorded(GraphSteps):
    """Its replay knows what the cache's attributes were when it was recorded and nothing else, as a graph does."""

    def __init__(self, policy, cache):
        super().__init__(policy, cache, self.record)
        self.rows = []

    def record(self, function):
        then, place = dict(vars(self.cache)), []
        self.rows.append(self.cache.rows)

        def replay():
            now = dict(vars(self.cache))
            vars(self.cache).update(then)
            function()
            vars(self.cache).update(now)
            place.append(self._hidden)
            self._hidden = place[0].copy_(self._hidden)

        return replay


@pytest.fixture
def prompts():
    lengths = (5, 17, 2, 9, 9)
    generator = torch.Generator().manual_seed(0)
    return [
        make_prompt(torch.randint(3, 90, (length,), generator=generator), uid=f"p{number}")
        for number, length in enumerate(lengths)
    ]


@pytest.fixture
def policy(micro_model_dir, monkeypatch):
    policy = micro_policy(micro_model_dir)
    # A quarter of all tokens end a completion: rows leave from the first step to the last.
    monkeypatch.setattr(type(policy), "eos_token_ids", tuple(range(0, 90, 4)))
    return policy


@pytest.mark.parametrize("kind", [Steps, Recorded])
@pytest.mark.parametrize("count", [5, 2], ids=["ragged", "equal"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_steps_of_fixed_shapes_draw_the_same_tokens(penalty, count, kind, prompts, policy, monkeypatch):
    sampling, chosen = SamplingParams(12, 20, temperature=1.3, repetition_penalty=penalty), prompts[-count:]
    expected = TransformersEngine().generate(policy, chosen, sampling, 1)
    made = []

    def of(policy, cache):
        for drawn in cache.drawn:
            drawn.fill_(torch.nan)  # of memory that was somebody else's
        made.append(kind(policy, cache))
        return made[0]

    monkeypatch.setattr(flash_cache, "flash_forward", forward)
    monkeypatch.setattr(decoder, "cache_of", lambda policy, *settings: FlashCache(*settings))
    monkeypatch.setattr(decoder, "steps_of", of)
    found = TransformersEngine().generate(policy, chosen, sampling, 1)
    lengths = set()
    for ours, theirs in zip(sum(found.completions, []), sum(expected.completions, []), strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert (ours.sampler_logprobs - theirs.sampler_logprobs).abs().max() < 1e-6  # kept in float32
        lengths.add(len(ours.token_ids))
    assert len(lengths) > 4
    if kind is Recorded:  # graphs are for fewer and fewer rows
        rows = made[0].rows
        assert len(rows) > 1 and all(4 * after <= before for before, after in itertools.pairwise(rows))


def test_a_graph_is_recorded_after_the_first_step_and_again_when_a_quarter_of_its_rows_is_left():
    class Cache:
        rows, live, steps = 8, 8, 0

        def hold(self):
            self.rows = self.live

        def advance(self):
            self.steps += 1

    def hidden_states(tokens, positions, layout, past_key_values):
        return (100 * tokens + positions)[..., None].float()

    cache, recorded = Cache(), []
    step = GraphSteps(
        SimpleNamespace(hidden_states=hidden_states), cache, lambda run: recorded.append(cache.rows) or run
    )
    seen, given = [], []
    for number, cache.live in enumerate((8, 8, 3, 2, 2, 1), 1):
        tokens = torch.arange(cache.live) + number
        given.append(tokens)
        hidden = step(tokens, 50 + tokens)
        assert hidden.tolist() == [[101.0 * token + 50] for token in tokens.tolist()] and cache.steps == number
        seen.append(list(recorded))
    assert seen == [[], [8], [8], [8, 2], [8, 2], [8, 2]]
    assert [tokens[0].item() for tokens in given] == [1, 2, 3, 4, 5, 6]  # a graph has its own place for them


@pytest.mark.parametrize("known", [True, False])
def test_flash_attention_is_for_models_that_attend_to_all(known, policy, monkeypatch):
    monkeypatch.setattr(steps, "can_flash", lambda *_: True)
    monkeypatch.setattr(steps, "_attends_to_all", lambda _: known)
    states, prefill = torch.zeros(1, 2, 4, 16), PrefillCache(torch.arange(4))
    prefill.update(states, states, 0)
    assert type(steps.cache_of(policy, prefill, [4], 2, 3)) is (FlashCache if known else BlockCache)


REASONS = ["hooks", "pre-hooks", "dynamic rotation", "long rotation", "quantised", "split", "compiled", None]


@pytest.mark.parametrize("why", REASONS)
def test_what_a_graph_cannot_hold_goes_through_the_layers(why, policy, monkeypatch):
    states = torch.zeros(1, 2, 4, 16)
    prefill = PrefillCache(torch.arange(4))
    prefill.update(states, states, 0)
    cache = FlashCache(prefill, [4], 2, 3)
    policy.base_model.get_input_embeddings().register_forward_hook(lambda *_: None)  # as peft does
    if why == "hooks":
        policy.base_model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *_: None)
    if why == "pre-hooks":
        policy.base_model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: None)
    if why == "long rotation":
        monkeypatch.setattr(policy.base_model.model.rotary_emb, "rope_type", "longrope")
    if why == "dynamic rotation":
        monkeypatch.setattr(policy.base_model.model.rotary_emb, "rope_type", "dynamic")
    if why == "quantised":
        policy.base_model.is_quantized = True
    if why == "split":
        policy.shards = object()
    if why == "compiled":
        policy.base_model.model.layers[0].compile()
    assert type(steps.steps_of(policy, cache)) is (Steps if why else GraphSteps)


def test_the_page_of_models_names_those_whose_steps_are_recorded():
    """`_attends_to_all` knows layers by the names of their classes, users know models by their types."""
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    (listed,) = re.findall(r"^\* the model is one of (.*), whose layers we know", page, re.MULTILINE)
    types = {kind.replace("_", "") for kind in re.findall(r"`(\w+)`", listed)}
    names = {re.sub("(Text)?DecoderLayer$", "", name).replace("_", "").lower() for name in KNOWN_LAYERS}
    assert types == names and len(types) == 7


@pytest.mark.parametrize(
    ("window", "name", "all_keys"),
    [(None, "LlamaDecoderLayer", True), (5, "LlamaDecoderLayer", False), (None, "SmolLM3DecoderLayer", False)],
)
def test_flash_attention_and_graphs_are_for_layers_we_know_without_windows(window, name, all_keys):
    layers = SimpleNamespace(layers=[type(kind, (), {})() for kind in ("LlamaDecoderLayer", name)])
    body = SimpleNamespace(config=SimpleNamespace(sliding_window=window))
    policy = SimpleNamespace(base_model=SimpleNamespace(get_decoder=lambda: layers), body=body)
    assert steps._attends_to_all(policy) is all_keys


def test_a_cpu_goes_through_the_layers(prompts, policy, monkeypatch):
    caches = []

    def of(policy, cache):
        caches.append(cache)
        return steps.steps_of(policy, cache)

    monkeypatch.setattr(decoder, "steps_of", of)
    TransformersEngine().generate(policy, prompts, SamplingParams(2, 3), 1)
    assert type(caches[0]) is BlockCache
    assert type(steps.steps_of(policy, caches[0])) is Steps
