"""A packed row gives the log-probabilities and gradients of ordinary padded rows."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.packing import GroupLayout, SharedPrefixLayout, pack, shared_prefix_attention
from gspo_lightning.packing import layout as layout_module
from tests.support import flat_gradient, micro_policy, padded_logprobs, random_groups, relative_distance

SHAPES = {
    "one group": [(7, [3, 5])],
    "ragged groups, completions of one token": [(5, [1, 3, 7, 2]), (9, [4]), (1, [1, 1])],
    "a group above the whole-group limit": [(40, [100, 60, 1, 90, 80]), (5, [2, 2])],
    "a long prompt with many short completions": [(260, [3] * 6)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_packed_equals_padded_in_float64(shapes, micro_model_dir):
    policy = micro_policy(micro_model_dir)
    groups = random_groups(shapes, policy.output_weight.shape[0])
    packed = pack(groups, torch.device("cpu"))
    logprobs, entropy = policy(packed, temperature=0.7, with_entropy=True)
    weights = torch.randn(2, len(logprobs), dtype=torch.float64)
    (logprobs @ weights[0] + entropy @ weights[1]).backward()
    ours = flat_gradient(policy)
    policy.zero_grad()
    expected, expected_entropy = padded_logprobs(policy.base_model, groups, temperature=0.7)
    (expected @ weights[0] + expected_entropy @ weights[1]).backward()
    assert relative_distance(logprobs, expected) < 1e-9
    assert relative_distance(entropy, expected_entropy) < 1e-9
    assert relative_distance(ours, flat_gradient(policy)) < 1e-6


def test_packed_equals_padded_on_smollm2_in_float32(smollm2_dir):
    policy = micro_policy(smollm2_dir, torch.float32)
    groups = random_groups([(48, [1, 9, 30, 17]), (33, [12, 5])], policy.output_weight.shape[0])
    packed = pack(groups, torch.device("cpu"))
    logprobs, _ = policy(packed)
    logprobs.sum().backward()
    ours = flat_gradient(policy)
    policy.zero_grad()
    expected, _ = padded_logprobs(policy.base_model, groups)
    expected.sum().backward()
    assert relative_distance(logprobs, expected) < 1e-5
    assert relative_distance(ours, flat_gradient(policy)) < 1e-5


def test_the_last_token_of_a_completion_is_never_forwarded():
    groups = [(torch.tensor([5, 6]), [torch.tensor([7, 8, 9]), torch.tensor([4])])]
    packed = pack(groups, torch.device("cpu"))
    assert packed.input_ids.tolist() == [[5, 6, 7, 8]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3]]
    assert packed.predictor_index.tolist() == [1, 2, 3, 1]
    assert packed.target_ids.tolist() == [7, 8, 9, 4]
    assert packed.sequence_index.tolist() == [0, 0, 0, 1]
    assert packed.lengths.tolist() == [3, 1]


def test_eos_stays_a_target_when_pad_is_eos(micro_model_dir):
    policy = micro_policy(micro_model_dir)
    eos = policy.tokenizer.eos_token_id
    assert policy.tokenizer.pad_token_id == eos
    completion = torch.tensor([5, eos])
    with torch.no_grad():
        two, _ = policy(pack([(torch.tensor([9, eos, 4]), [completion])], torch.device("cpu")))
        expected, _ = padded_logprobs(policy.base_model, [(torch.tensor([9, eos, 4]), [completion])])
    assert len(two) == 2
    assert torch.allclose(two, expected, rtol=1e-12)


def reference_attention(query, key, value, layout, scaling, window, sinks):
    """Every token by itself: gather the tokens it may see from the definition, softmax, weigh."""
    segments = [(g, s) for g, group in enumerate(layout.groups) for s in group.segments()]
    positions = layout.positions.tolist()
    repeats = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for i, (group_i, segment_i) in enumerate(segments):
        seen = [
            j
            for j, (group_j, segment_j) in enumerate(segments)
            if group_i == group_j and segment_j in (0, segment_i) and positions[j] <= positions[i]
            and (window is None or positions[i] - positions[j] < window)
        ]  # fmt: skip
        for head in range(query.shape[1]):
            scores = key[0, head // repeats, seen] @ query[0, head, i] * scaling
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            weights = scores.softmax(0)[: len(seen)]
            out[0, head, i] = weights @ value[0, head // repeats, seen]
    return out


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("limit", [256, 8], ids=["whole groups", "tiles"])
def test_attention_equals_its_definition_token_by_token(window, with_sinks, limit, monkeypatch):
    monkeypatch.setattr(layout_module, "WHOLE_GROUP_TOKENS", limit)
    monkeypatch.setattr(layout_module, "TILE_QUERIES", 5)
    monkeypatch.setattr(layout_module, "WHOLE_PROMPT_TOKENS", limit)
    layout = SharedPrefixLayout(
        (GroupLayout(16, (3, 0, 4, 2, 11, 2)), GroupLayout(5, ()), GroupLayout(1, (2,)), GroupLayout(11, ())),
        torch.device("cpu"),
    )
    tokens = layout.num_tokens
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(1, 2, tokens, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    inputs = [x for x in (query, key, value, sinks) if x is not None]
    ours = shared_prefix_attention(query, key, value, layout, scaling=0.3, window=window, sinks=sinks)
    expected = reference_attention(query, key, value, layout, 0.3, window, sinks)
    assert relative_distance(ours, expected) < 1e-12
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert relative_distance(a, b) < 1e-12


def test_a_long_completion_computes_no_scores_behind_the_end_of_a_chunk():
    chunk = layout_module.TILE_QUERIES
    layout = SharedPrefixLayout((GroupLayout(100, (4 * chunk,)),), torch.device("cpu"))
    prompt, *rest = layout.blocks
    assert prompt.causal and len(rest) == 4
    scores = [layout.mask(number).numel() for number in range(1, 5)]
    assert scores == [chunk * (100 + n * chunk) for n in range(1, 5)]
