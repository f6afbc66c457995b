"""Decoding steps of fixed shapes: what a CUDA graph records computes what the layers do, whatever rows leave."""

from __future__ import annotations

import itertools

import pytest
import torch

from gspo_lightning.rollout import TransformersEngine, decoder, steps
from gspo_lightning.rollout.steps import GraphSteps, Steps, can_record
from gspo_lightning.types import SamplingParams
from tests.support import make_prompt, micro_policy


class Recorded(GraphSteps):
    """Its replay runs on what the cache's attributes were when it was recorded, as the kernels of a graph do."""

    def __init__(self, policy, cache):
        super().__init__(policy, cache, self.record)
        self.graphs = []

    def record(self, function):
        then = dict(vars(self.cache))
        self.graphs.append((self._fixed.rows, self._fixed.width))

        def replay():
            now = dict(vars(self.cache))
            vars(self.cache).update(then)
            function()
            vars(self.cache).update(now)

        return replay


@pytest.fixture
def prompts():
    lengths = (5, 17, 2, 9, 9)
    generator = torch.Generator().manual_seed(0)
    return [
        make_prompt(torch.randint(3, 90, (length,), generator=generator), uid=f"p{number}")
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("first_width", [1, 2, 64])
@pytest.mark.parametrize("count", [5, 2], ids=["ragged", "equal"])
def test_recorded_steps_draw_the_same_tokens(count, first_width, prompts, micro_model_dir, monkeypatch):
    policy = micro_policy(micro_model_dir)
    # A third of all tokens end a completion: rows leave from the first step to the last.
    monkeypatch.setattr(type(policy), "eos_token_ids", tuple(range(0, 90, 4)))
    monkeypatch.setattr(steps, "FIRST_WIDTH", first_width)
    sampling, chosen = SamplingParams(6, 20, temperature=1.3), prompts[-count:]
    expected = TransformersEngine().generate(policy, chosen, sampling, 1)
    made = []

    def recorded(policy, cache):
        made.append(Recorded(policy, cache))
        return made[0]

    monkeypatch.setattr(decoder, "steps_of", recorded)
    found = TransformersEngine().generate(policy, chosen, sampling, 1)
    lengths = set()
    for ours, theirs in zip(sum(found.completions, []), sum(expected.completions, []), strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert (ours.sampler_logprobs - theirs.sampler_logprobs).abs().max() < 1e-6  # kept in float32
        lengths.add(len(ours.token_ids))
    assert len(lengths) > 4
    rows, widths = zip(*made[0].graphs, strict=True)
    assert widths[0] == min(2 * first_width if first_width == 1 else first_width, 20)  # the first step filled a slot
    if first_width == 64:  # the slots suffice: graphs are for fewer and fewer rows
        assert count == 2 or len(rows) > 1
        assert all(4 * after <= before for before, after in itertools.pairwise(rows))
    else:
        assert len(set(widths)) >= 3 and list(widths) == sorted(widths)


def test_slots_that_nothing_was_written_to_are_not_read(prompts, micro_model_dir, monkeypatch):
    """Memory that was somebody else's may hold numbers that are none."""
    policy = micro_policy(micro_model_dir)
    monkeypatch.setattr(type(policy), "eos_token_ids", ())

    def poisoned(policy, cache):
        for drawn in cache.drawn:
            drawn.fill_(torch.nan)
        return Recorded(policy, cache)

    monkeypatch.setattr(decoder, "steps_of", poisoned)
    rollout = TransformersEngine().generate(policy, prompts, SamplingParams(2, 9), 1)
    assert all(torch.isfinite(c.sampler_logprobs).all() for group in rollout.completions for c in group)


def test_a_cpu_steps_through_the_layers(micro_model_dir):
    policy = micro_policy(micro_model_dir)
    assert not can_record(policy)
    assert type(steps.steps_of(policy, None)) is Steps
