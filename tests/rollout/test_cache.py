"""The decoding caches: attention to a shared prompt and to what a row drew equals attention over the whole row."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.rollout import block_cache
from gspo_lightning.rollout.block_cache import BlockCache, rows_per_block
from gspo_lightning.rollout.cache import DecodeCache, PrefillCache

HEADS, KV_HEADS, SIZE, REPEATS, STEPS = 6, 2, 8, 3, 6
LENGTHS = [5, 2, 7]


def reference(query, keys, values, scaling, window, sinks):
    """One row: ``query`` ``(heads, D)`` against all tokens ``(kv_heads, n, D)`` so far, by the definition."""
    out = torch.zeros_like(query)
    first = 0 if window is None else max(0, keys.shape[1] - window)
    for head in range(HEADS):
        group = head * KV_HEADS // HEADS
        scores = keys[group, first:] @ query[head] * scaling
        if sinks is not None:
            scores = torch.cat([scores, sinks[head : head + 1]])
        out[head] = scores.softmax(0)[: keys.shape[1] - first] @ values[group, first:]
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 8], ids="window {}".format)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4]], ids=["ragged", "equal"])
@pytest.mark.parametrize("kind", ["float64", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("cache_of", [DecodeCache, BlockCache, "blocks of 2"], ids=str)
def test_each_row_attends_to_its_prompt_and_its_own_tokens_while_others_leave(
    window, with_sinks, lengths, kind, cache_of, monkeypatch
):
    """In bfloat16 too everything but the operands, and the result of bf16-true, is float32 at least.

    The fused kernel of blocks rounds its weights and its result as well.
    """
    if cache_of == "blocks of 2":
        monkeypatch.setattr(block_cache, "MOST_ROWS", 4)
        lengths = [min(x, STEPS - 1) for x in lengths]
        cache_of = BlockCache
    generator = torch.Generator().manual_seed(3)
    dtype = {"float64": torch.float64, "bf16-true": torch.bfloat16}.get(kind, torch.float32)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32)
    bounds = {"float64": (1e-12, 1e-13), "bf16-mixed": (2e-6, 1e-6), "bf16-true": (2**-8, 1e-6)}[kind]
    if cache_of is BlockCache and kind != "float64":
        bounds = 0, 2**-6

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def rounded(x):
        return (x if kind == "float64" else x.bfloat16()).double()

    sinks = random(HEADS) if with_sinks else None
    # The row is filled up by three tokens.
    prefill = PrefillCache(torch.arange(sum(lengths)))
    packed = [[random(1, KV_HEADS, sum(lengths) + 3, SIZE) for _ in range(2)] for _ in range(2)]
    for layer, (key, value) in enumerate(packed):
        prefill.update(key, value, layer)
    with mixed:
        cache = cache_of(prefill, lengths, REPEATS, STEPS)
    for states in [*cache.prompts[0], cache.drawn[0]] if cache_of is DecodeCache else cache.states:
        assert states.dtype == (torch.float64 if kind == "float64" else torch.bfloat16)
    # What every row has seen, kept apart: (layer, row) -> [keys, values], each (kv_heads, n, D).
    ends = torch.tensor(lengths).cumsum(0).tolist()
    seen = {
        (layer, row): [
            rounded(x[0, :, ends[row // REPEATS] - lengths[row // REPEATS] : ends[row // REPEATS]]) for x in states
        ]
        for layer, states in enumerate(packed)
        for row in range(len(lengths) * REPEATS)
    }
    rows = list(range(len(lengths) * REPEATS))
    # The second prompt loses all its rows, the others some, at different times.
    leaving = {1: {3}, 2: {0, 8}, 3: {4, 5}, 4: {1, 6}}
    for step in range(STEPS):
        for layer in range(2):
            query = random(len(rows), HEADS, 1, SIZE)
            with mixed:
                key, value = cache.update(*(random(len(rows), KV_HEADS, 1, SIZE) for _ in range(2)), layer)
                out = cache.attend(query, key, value, scaling=0.4, window=window, sinks=sinks)
            assert out.dtype == dtype
            for number, row in enumerate(rows):
                own = seen[layer, row]
                own[0] = torch.cat([own[0], rounded(key[number, :, -1:])], dim=1)
                own[1] = torch.cat([own[1], rounded(value[number, :, -1:])], dim=1)
                asked, sink = rounded(query[number, :, 0]), None if sinks is None else sinks.double()
                expected, (relative, absolute) = reference(asked, *own, 0.4, window, sink), bounds
                found = out[number, :, 0].double()
                assert torch.allclose(found, expected, rtol=relative, atol=absolute), (step, layer, row)
        cache.advance()
        kept = cache.keep(torch.tensor([row not in leaving.get(step, ()) for row in rows]))
        rows = [rows[index] for index in kept.tolist()]
    if cache_of is DecodeCache:
        # One prompt of three is left without rows: less than half, so that it stays.
        assert len(cache.prompts[0][0]) == len(lengths)
    assert cache.rows == len(rows)
    assert rows and not set(rows) & set.union(*leaving.values())


def test_prompts_are_dropped_when_half_of_them_have_no_rows():
    generator = torch.Generator().manual_seed(5)
    lengths = [4, 2, 6, 3, 5]
    key, value = (torch.randn(1, KV_HEADS, sum(lengths), SIZE, generator=generator).double() for _ in range(2))
    prefill = PrefillCache(torch.arange(sum(lengths)))
    prefill.update(key, value, 0)
    cache = DecodeCache(prefill, lengths, 2, 4)
    kept = cache.keep(torch.tensor([False, False, False, True, False, False, True, False, False, False]))
    assert len(cache.prompts[0][0]) == 2
    query, own_key, own_value = (torch.randn(2, n, 1, SIZE, generator=generator).double() for n in (HEADS, 2, 2))
    states = cache.update(own_key, own_value, 0)
    out = cache.attend(query, *states, scaling=0.4, window=None, sinks=None)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    for number, row in enumerate(kept.tolist()):
        span = slice(ends[row // 2] - lengths[row // 2], ends[row // 2])
        keys = torch.cat([key[0, :, span], own_key[number]], dim=1)
        values = torch.cat([value[0, :, span], own_value[number]], dim=1)
        expected = reference(query[number, :, 0], keys, values, 0.4, None, None)
        assert torch.allclose(out[number, :, 0], expected, rtol=1e-12, atol=1e-13)


def test_a_prompt_is_kept_once_whatever_the_number_of_rows():
    prefill = PrefillCache(torch.arange(300))
    prefill.update(torch.zeros(1, KV_HEADS, 300, SIZE), torch.zeros(1, KV_HEADS, 300, SIZE), 0)
    cache = DecodeCache(prefill, [300], 64, 10)
    kept = sum(x.untyped_storage().nbytes() // 4 for x in (*cache.prompts[0], cache.drawn[0]))
    assert kept == 2 * KV_HEADS * SIZE * (300 + 64 * 10)
    assert not prefill.states


def test_rows_that_are_left_move_together_when_half_of_the_places_are_empty(monkeypatch):
    monkeypatch.setattr(block_cache, "MOST_ROWS", 4)
    prefill = PrefillCache(torch.arange(30))
    prefill.update(torch.zeros(1, KV_HEADS, 30, SIZE), torch.zeros(1, KV_HEADS, 30, SIZE), 0)
    cache = BlockCache(prefill, [10, 9, 11], 4, 5)
    assert cache.states[0].shape == (2, 3, KV_HEADS, 11 + 5 * 4, SIZE)
    first = [True] * 4 + [True, True, False, False] + [False, False, False, True]
    assert cache.keep(torch.tensor(first)).tolist() == [0, 1, 2, 3, 4, 5, 11]
    assert cache.states[0].shape[1] == 3  # seven of twelve
    assert cache.keep(torch.tensor([True, True, True, False, True, False, True])).tolist() == [0, 1, 2, 4, 6]
    # Three, one and one: in blocks of two.
    assert cache.states[0].shape == (2, 4, KV_HEADS, 11 + 5 * 2, SIZE)
    assert cache.keep(torch.tensor([False, False, False, False, True])).tolist() == [4]
    assert cache.states[0].shape == (2, 1, KV_HEADS, 11 + 5, SIZE)


def test_short_prompts_beside_long_ones_see_no_padding():
    """The kernel goes over keys in runs of 512; a run in which nothing is seen counts for nothing."""
    generator = torch.Generator().manual_seed(7)
    lengths = [1100, 3]
    key, value = (torch.randn(1, KV_HEADS, sum(lengths), SIZE, generator=generator) for _ in range(2))
    prefill = PrefillCache(torch.arange(sum(lengths)))
    prefill.update(key, value, 0)
    cache = BlockCache(prefill, lengths, 1, 2)
    query, own_key, own_value = (torch.randn(2, n, 1, SIZE, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS))
    cache.update(own_key, own_value, 0)
    out = cache.attend(query, own_key, own_value, scaling=0.4, window=None, sinks=None)
    keys, values = (torch.cat([x[0, :, 1100:], own[1]], dim=1) for x, own in ((key, own_key), (value, own_value)))
    assert torch.allclose(out[1, :, 0], reference(query[1, :, 0], keys, values, 0.4, None, None), atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "prompt", "new", "expected"),
    [(8, 45, 16, 8), (8, 64, 256, 4), (12, 45, 16, 6), (9, 45, 16, 5), (1, 45, 16, 1), (2.5, 45, 16, 3), (5, 1, 2, 3)],
)
def test_a_block_has_few_rows_and_blocks_are_alike(rows, prompt, new, expected):
    assert rows_per_block(rows, prompt, new) == expected


def test_layers_may_differ_in_their_query_heads():
    prefill = PrefillCache(torch.arange(5))
    for layer in range(2):
        prefill.update(torch.zeros(1, KV_HEADS, 5, SIZE), torch.zeros(1, KV_HEADS, 5, SIZE), layer)
    cache = BlockCache(prefill, [5], 3, 4)
    own = torch.ones(3, KV_HEADS, 1, SIZE)
    for layer, heads in enumerate((6, 8)):
        cache.update(own, own, layer)
        out = cache.attend(torch.zeros(3, heads, 1, SIZE), own, own, scaling=1.0, window=None, sinks=None)
        # Five zeros and a one, all looked at alike.
        assert torch.allclose(out, torch.full((3, heads, 1, SIZE), 1 / 6), atol=1e-6)
