"""The calls that make up a shared-prefix row: with the kernel replaced by its definition in float64."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.packing import GroupLayout, SharedPrefixLayout, flash
from gspo_lightning.packing.attention import shared_prefix_attention
from gspo_lightning.packing.flash import can_flash, flash_calls, flash_shared_prefix_attention
from tests.support import relative_distance

LAYOUTS = {
    "ragged": (GroupLayout(6, (3, 0, 4, 2, 11, 2)), GroupLayout(5, ()), GroupLayout(1, (2,)), GroupLayout(3, (0, 0))),
    "long": (GroupLayout(40, (30, 3)), GroupLayout(9, (7, 61))),
    "prompts": (GroupLayout(4, ()), GroupLayout(7, ())),
}
COMMON = {"ragged": (0,), "long": (0, 1, 8), "prompts": (0, 3)}
"""Tokens in common, fewer than any prompt has."""


def by_spans(spans):
    """Slices of queries and of keys, span by span."""
    queries, keys = spans.query_ends.tolist(), spans.key_ends.tolist()
    for number in range(len(queries) - 1):
        assert queries[number + 1] - queries[number] <= spans.longest_query
        assert keys[number + 1] - keys[number] <= spans.longest_key
        end = keys[number + 1] if spans.keys_used is None else keys[number] + int(spans.keys_used[number])
        yield slice(queries[number], queries[number + 1]), slice(keys[number], end)


def scores_of(query, key, spans, scaling):
    """``(heads, Q, K)``, minus infinity behind the diagonal."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    if spans.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


def forward(query, key, value, spans, scaling):
    """What `torch.ops.aten._flash_attention_forward` promises."""
    out, total = torch.full_like(query, torch.nan), query.new_full((query.shape[1], len(query)), torch.nan)
    for q, k in by_spans(spans):
        scores = scores_of(query[q], key[k], spans, scaling)
        total[:, q] = scores.logsumexp(-1)
        wide = value[k].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        out[q] = torch.einsum("hqk,khd->qhd", (scores - total[:, q, None]).exp(), wide)
    return out, total


def backward(grad, query, key, value, out, total, spans, scaling):
    """The gradients by the formula of the paper (arXiv 2307.08691, algorithm 2), from the sums that it is given."""
    ratio = query.shape[1] // key.shape[1]
    grads = [torch.full_like(x, torch.nan) for x in (query, key, value)]
    for q, k in by_spans(spans):
        weights = (scores_of(query[q], key[k], spans, scaling) - total[:, q, None]).exp()
        wide_key, wide_value = (x[k].repeat_interleave(ratio, dim=1) for x in (key, value))
        along = (grad[q] * out[q]).sum(-1).t()[..., None]
        by_score = weights * (torch.einsum("qhd,khd->hqk", grad[q], wide_value) - along) * scaling
        grads[0][q] = torch.einsum("hqk,khd->qhd", by_score, wide_key)
        for place, wide in ((1, torch.einsum("hqk,qhd->khd", by_score, query[q])),
                            (2, torch.einsum("hqk,qhd->khd", weights, grad[q]))):  # fmt: skip
            grads[place][k] = wide.unflatten(1, (-1, ratio)).sum(2)
    return tuple(grads)


@pytest.mark.parametrize(("name", "common"), [(name, n) for name, some in COMMON.items() for n in some])
def test_the_calls_give_the_output_and_gradients_of_the_whole_row(name, common, monkeypatch):
    monkeypatch.setattr(flash, "flash_forward", forward)
    monkeypatch.setattr(flash, "flash_backward", backward)
    layout = SharedPrefixLayout(LAYOUTS[name], torch.device("cpu"), common)
    generator = torch.Generator().manual_seed(0)

    def draw(heads):
        shape = 1, heads, layout.num_tokens, 8
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = draw(6), draw(2), draw(2)
    found = []
    for attention in (flash_shared_prefix_attention, shared_prefix_attention):
        out = attention(*inputs, layout, scaling=0.4)
        weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        found.append([out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert relative_distance(ours, theirs) < 1e-13


def test_the_calls_of_a_row_by_hand():
    calls = flash_calls(SharedPrefixLayout((GroupLayout(2, (1, 3)), GroupLayout(4, ()), GroupLayout(1, (2,))),
                                           torch.device("cpu")))  # fmt: skip
    assert calls.own.query_ends.tolist() == calls.own.key_ends.tolist() == [0, 2, 3, 6, 10, 11, 13]
    assert calls.own.longest_query == 4 and calls.own.causal
    (prompts,) = calls.crossings
    assert not prompts.spans.causal
    assert prompts.spans.query_ends.tolist() == [0, 4, 6]
    assert prompts.spans.key_ends.tolist() == [0, 2, 3]
    assert (prompts.spans.longest_query, prompts.spans.longest_key) == (4, 2)
    assert prompts.queries.tolist() == [2, 3, 4, 5, 11, 12]
    assert prompts.keys.tolist() == [0, 1, 10]
    single = flash_calls(SharedPrefixLayout((GroupLayout(1, (1,)),), torch.device("cpu")))
    assert (single.own.longest_query, single.own.longest_key) == (2, 2)  # at 1 another kernel would answer
    assert flash_calls(SharedPrefixLayout((GroupLayout(3, ()),), torch.device("cpu"))).crossings == ()


def test_the_calls_of_a_row_whose_prompts_have_two_tokens_in_common_by_hand():
    # 0 1 | 2, 3, 4 5 6 | 7 8 | 9, 10 11
    groups = GroupLayout(3, (1, 3)), GroupLayout(4, ()), GroupLayout(3, (2,))
    calls = flash_calls(SharedPrefixLayout(groups, torch.device("cpu"), 2))
    assert calls.own.query_ends.tolist() == calls.own.key_ends.tolist() == [0, 2, 3, 4, 7, 9, 10, 12]
    prompts, common = calls.crossings
    assert prompts.queries.tolist() == [3, 4, 5, 6, 10, 11]
    assert prompts.keys.tolist() == [2, 9]
    assert (prompts.spans.query_ends.tolist(), prompts.spans.key_ends.tolist()) == ([0, 4, 6], [0, 1, 2])
    assert common.queries.tolist() == list(range(2, 12)) and common.keys.tolist() == [0, 1]
    assert (common.spans.query_ends.tolist(), common.spans.key_ends.tolist()) == ([0, 10], [0, 2])
    assert (common.spans.longest_query, common.spans.longest_key, common.spans.causal) == (10, 2, False)


def test_sums_in_one_order_are_asked_for_around_the_kernel_alone():
    assert not torch.are_deterministic_algorithms_enabled()
    with flash._one_order():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_cpu_has_no_such_kernel():
    assert not can_flash(torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16), None, None)
