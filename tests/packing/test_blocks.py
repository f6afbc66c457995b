"""Blocks gathered into batches: their shapes by hand, and that filling them up and cutting them changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gspo_lightning.packing import GroupLayout, SharedPrefixLayout, blocks
from gspo_lightning.packing.attention import shared_prefix_attention
from gspo_lightning.packing.blocks import gather_blocks
from tests.support import relative_distance

CPU = torch.device("cpu")


def layout_of(*groups, common=0):
    return SharedPrefixLayout(tuple(GroupLayout(*group) for group in groups), CPU, common)


def drawn(tokens):
    """The same numbers every time: queries, keys, values, and the gradient that comes in."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, tokens, 8, generator=generator, dtype=torch.float64) for heads in (6, 2, 2)]
    grad = torch.randn(1, 6, tokens, 8, generator=generator, dtype=torch.float64)
    return *(x.requires_grad_() for x in inputs), grad


def attention_and_gradients(layout, tokens, window=None):
    *inputs, grad = drawn(tokens)
    out = shared_prefix_attention(*inputs, layout, scaling=0.3, window=window)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def by_definition(layout, tokens, window=None):
    """Every query against every key of the row, under one mask of groups, completions and positions."""
    query, key, value, grad = drawn(tokens)
    numbers, prompts = layout.owners()
    position, real = layout.positions, layout.num_tokens
    looks = (numbers[:, None] == numbers) | (prompts[:, None] == numbers) | (torch.arange(real) < layout.common)
    looks &= position[:, None] >= position
    if window is not None:
        looks &= position[:, None] - position < window
    scores = query[:, :, :real] @ key[:, :, :real].repeat_interleave(3, 1).transpose(2, 3) * 0.3
    weights = scores.masked_fill(~looks, -torch.inf).softmax(-1)
    out = torch.nn.functional.pad(weights @ value[:, :, :real].repeat_interleave(3, 1), (0, 0, 0, tokens - real))
    return [out, *torch.autograd.grad(out, (query, key, value), grad)]


def test_the_shapes_of_the_quickstart_by_hand():
    """45 + 8 x 15: completions by threes (45 >= 32), the last two together; 16 is what lengths are filled up to."""
    gathered = gather_blocks(layout_of((45, (15,) * 8), (45, (15,) * 8)), 330, 9, 3, None, torch.float32)
    shapes = [(len(batch.bias), *batch.bias.shape[1:]) for batch in gathered.batches]
    assert shapes == [(2, 48, 48), (4, 48, 96), (2, 32, 80)]
    # 14,080 scores a group and head, where one block has 165 x 165 = 27,225.
    assert sum(b * q * k for b, q, k in shapes) == 2 * (48 * 48 + 2 * 48 * 96 + 32 * 80)
    assert [batch.shape for batch in gathered.batches] == [(6, 144, 48), (12, 144, 96), (6, 96, 80)]


def test_the_shapes_of_the_quickstart_whose_prompts_have_24_tokens_in_common():
    gathered = gather_blocks(layout_of((45, (15,) * 8), (45, (15,) * 8), common=24), 306, 9, 3, None, torch.float32)
    shapes = [(len(batch.bias), *batch.bias.shape[1:]) for batch in gathered.batches]
    # The common tokens to themselves; the other 21 of each prompt to all 45; completions as without.
    assert shapes == [(1, 32, 32), (2, 32, 48), (4, 48, 96), (2, 32, 80)]


def test_many_keys_are_filled_up_to_few_numbers():
    """To multiples of 16 below 128, of 32 below 256, of 64 below 512, and so on: four numbers per doubling."""
    assert [blocks._filled_keys(n) for n in (1, 16, 17, 127, 128, 129, 255)] == [16, 16, 32, 128, 128, 160, 256]
    assert [blocks._filled_keys(n) for n in (256, 257, 511, 512, 513, 1025)] == [256, 320, 512, 512, 640, 1280]
    assert len({blocks._filled_keys(n) for n in range(513, 1025)}) == 4


@pytest.mark.parametrize("window", [None, 7], ids=["full", "window"])
@pytest.mark.parametrize("common", [0, 1, 40, 600])
@pytest.mark.parametrize("most", [1, 2**20], ids=["one block a batch", "all that are alike"])
@pytest.mark.parametrize(
    "groups",
    [
        [(5, (3, 9, 1)), (21, (17, 2)), (4, ())],
        [(70, (40, 150, 33)), (3, (1, 1, 1, 1))],
        [(530, (3,)), (16, (16, 16))],  # a prompt in chunks; lengths that need no filling
    ],
    ids=["short", "long completions", "long prompt"],
)
def test_batches_of_blocks_give_what_the_definition_gives_in_float64(groups, most, common, window, monkeypatch):
    monkeypatch.setattr(blocks, "MOST_SCORES", most)
    layout = layout_of(*((common + prompt, completions) for prompt, completions in groups), common=common)
    tokens = layout.num_tokens + 6
    found = attention_and_gradients(layout, tokens, window)
    for ours, theirs in zip(found, by_definition(layout, tokens, window), strict=True):
        assert relative_distance(ours, theirs) < 1e-14
        assert (ours[:, :, layout.num_tokens :] == 0).all()


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_scores_stay_float32_where_products_are_in_bfloat16(given, with_sinks):
    """Of 40 on average, and up to 400: rounded to bfloat16, they put results off by a fiftieth, gradients by more."""
    layout = layout_of((70, (40, 150, 33)), (5, (3, 9, 1)), common=2)
    query, key, value, grad = drawn(layout.num_tokens)
    inputs = [x.detach().bfloat16() for x in (20 * query, 3 * key, value)]
    sinks = torch.linspace(-5.0, 60.0, query.shape[1]) if with_sinks else None

    def result_and_gradients(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        result = shared_prefix_attention(*leaves, layout, scaling=0.3, sinks=sinks)
        return [result, *torch.autograd.grad(result, leaves, grad.to(result.dtype))]

    with torch.autocast("cpu", torch.bfloat16):
        ours = result_and_gradients(given)
    assert ours[0].dtype == torch.bfloat16
    for found, exact, bound in zip(ours, result_and_gradients(torch.float64), (2e-3, 1e-2, 1e-2, 4e-3), strict=True):
        assert relative_distance(found.double(), exact) < bound


def test_batches_are_cut_evenly(monkeypatch):
    """Eleven blocks of 6 heads x 16 x 32 = 3,072 scores: at most 10,000 are three of them, so four batches."""
    monkeypatch.setattr(blocks, "MOST_SCORES", 10_000)
    assert [len(batch) for batch in blocks._cut([object()] * 11, 3072)] == [2, 3, 3, 3]
