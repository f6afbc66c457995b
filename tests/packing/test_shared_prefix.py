"""A packed row gives the log-probabilities and gradients of ordinary padded rows."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.errors import UserError
from gspo_lightning.packing import (
    GroupLayout,
    SharedPrefixLayout,
    batch,
    common_prefix,
    least_common_on,
    pack,
    shared_prefix_attention,
)
from gspo_lightning.packing import layout as layout_module
from gspo_lightning.types import Prompt
from tests.support import flat_gradient, micro_policy, padded_logprobs, random_groups, relative_distance

SHAPES = {
    "one group": [(7, [3, 5])],
    "ragged groups, completions of one token": [(5, [1, 3, 7, 2]), (9, [4]), (1, [1, 1])],
    "a group above the whole-group limit": [(40, [100, 60, 1, 90, 80]), (5, [2, 2])],
    "a long prompt with many short completions": [(260, [3] * 6)],
}


@pytest.mark.parametrize("common", [0, 16, 530], ids=lambda n: f"{n} in common")
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_packed_equals_padded_in_float64(shapes, common, micro_model_dir):
    policy = micro_policy(micro_model_dir)
    groups = random_groups(shapes, policy.output_weight.shape[0])
    [(system, _)] = random_groups([(common, [])], policy.output_weight.shape[0], seed=1)
    groups = [(torch.cat([system, prompt]), completions) for prompt, completions in groups]
    packed = pack(groups, torch.device("cpu"))
    saved = common * (len(groups) - 1)
    assert packed.num_tokens == sum(len(p) + sum(len(c) - 1 for c in cs) for p, cs in groups) - saved
    logprobs, entropy = policy(packed, temperature=0.7, with_entropy=True)
    weights = torch.randn(2, len(logprobs), dtype=torch.float64)
    (logprobs @ weights[0] + entropy @ weights[1]).backward()
    ours = flat_gradient(policy)
    policy.zero_grad()
    expected, expected_entropy = padded_logprobs(policy.base_model, groups, temperature=0.7)
    (expected @ weights[0] + expected_entropy @ weights[1]).backward()
    assert relative_distance(logprobs, expected) < 1e-9
    assert relative_distance(entropy, expected_entropy) < 1e-9
    assert relative_distance(ours, flat_gradient(policy)) < 1e-12


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


@pytest.mark.parametrize("empty", [([], [[5, 6]]), ([5], [[6], []])], ids=["prompt", "completion"])
def test_what_holds_no_token_is_refused(empty):
    """A completion without a prompt would be predicted from the group before it."""
    prompt, completions = empty
    tensors = torch.tensor(prompt, dtype=torch.long), [torch.tensor(c, dtype=torch.long) for c in completions]
    with pytest.raises(UserError, match="^pack: group 1 has a prompt or a completion without a token; each needs one$"):
        pack([(torch.tensor([1, 2]), [torch.tensor([3, 4])]), tensors], torch.device("cpu"))


def test_what_prompts_begin_with_is_in_the_row_once(monkeypatch):
    monkeypatch.setattr(batch, "LEAST_COMMON", 2)
    groups = [([5, 6, 7], [[8, 9], [4]]), ([5, 6], [[3, 2, 1]]), ([5, 6, 7, 8], [[6]])]
    packed = pack([(torch.tensor(p), [torch.tensor(c) for c in cs]) for p, cs in groups], torch.device("cpu"))
    assert packed.layout.common == 0  # of [5, 6] only the 5 is shared: its 6 predicts its completions
    groups[1] = ([5, 6, 3], [[3, 2, 1]])
    packed = pack([(torch.tensor(p), [torch.tensor(c) for c in cs]) for p, cs in groups], torch.device("cpu"))
    assert packed.layout.common == 2
    #                                    5  6 |7  8 |3  3  2 |7  8
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 3, 3, 2, 7, 8]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4, 2, 3]]
    assert packed.predictor_index.tolist() == [2, 3, 2, 4, 5, 6, 8]
    assert packed.target_ids.tolist() == [8, 9, 4, 3, 2, 1, 6]
    assert packed.sequence_index.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert packed.layout.starts() == [2, 4, 7]
    assert [x.tolist() for x in packed.layout.prompt_places()] == [[0, 1, 2], [0, 1, 4], [0, 1, 7, 8]]


def test_the_blocks_of_a_row_whose_prompts_have_two_tokens_in_common_by_hand():
    layout = SharedPrefixLayout((GroupLayout(4, (2,)), GroupLayout(5, ())), torch.device("cpu"), 2)
    before = (0, 2)
    found = [(block.query, block.key_spans, block.causal) for block in layout.blocks]
    # Causal without a mask is only what attends to nothing but itself.
    assert found == [((0, 2), (before,), True), ((2, 6), (before, (2, 6)), False), ((6, 9), (before, (6, 9)), False)]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([list(range(20)), list(range(20))], 19),  # the same prompt twice: all but its last token
        ([list(range(20)), [*range(18), 0, 0, 0], list(range(30))], 18),
        ([list(range(16)), list(range(20))], 0),  # 15: too few
        ([list(range(20))], 0),
        ([list(range(20)), [1, *range(1, 20)]], 0),
    ],
)
def test_the_common_prefix_by_hand(prompts, expected):
    ids = [torch.tensor(prompt) for prompt in prompts]
    assert common_prefix(ids, 16) == expected
    assert common_prefix(ids, 20) == 0


def test_a_gpu_shares_only_what_is_worth_a_few_more_kernels_in_every_layer():
    assert (least_common_on(torch.device("cpu")), least_common_on(torch.device("cuda"))) == (16, 128)
    groups = [(torch.arange(n), [torch.tensor([1])]) for n in (20, 21)]
    layouts = [pack(groups, torch.device("cpu"), least_common=least).layout for least in (None, 19, 20)]
    assert [layout.common for layout in layouts] == [19, 19, 0]


def test_prompts_with_images_share_nothing():
    ids = torch.arange(40)
    prompts = [Prompt(str(n), "", ids, {}, {"pixel_values": torch.zeros(1)} if n else {}) for n in range(2)]
    assert common_prefix([ids, ids], 16, prompts) == 0
    assert common_prefix([ids, ids], 16, prompts[:1] * 2) == 39


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
    segments = [(None, 0)] * layout.common
    segments += [(g, s) for g, group in enumerate(layout.groups) for s in group.segments()[layout.common :]]
    positions = layout.positions.tolist()
    repeats = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for i, (group_i, segment_i) in enumerate(segments):
        seen = [
            j
            for j, (group_j, segment_j) in enumerate(segments)
            if group_j in (None, group_i) and segment_j in (0, segment_i) and positions[j] <= positions[i]
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
@pytest.mark.parametrize("common", [0, 3, 10])
def test_attention_equals_its_definition_token_by_token(window, with_sinks, limit, common, monkeypatch):
    monkeypatch.setattr(layout_module, "WHOLE_GROUP_TOKENS", limit)
    monkeypatch.setattr(layout_module, "TILE_QUERIES", 5)
    monkeypatch.setattr(layout_module, "WHOLE_PROMPT_TOKENS", limit)
    own = (16, (3, 0, 4, 2, 11, 2)), (5, ()), (1, (2,)), (11, ())
    groups = tuple(GroupLayout(common + prompt, completions) for prompt, completions in own)
    layout = SharedPrefixLayout(groups, torch.device("cpu"), common)
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
