"""The decoding cache: attention to a shared prompt and to what a row drew equals attention over the whole row."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.rollout import cascade
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
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "by definition"])
@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4]], ids=["ragged", "equal"])
def test_each_row_attends_to_its_prompt_and_its_own_tokens_while_others_leave(
    window, with_sinks, fused, lengths, monkeypatch
):
    if not fused:
        monkeypatch.setattr(
            "gspo_lightning.rollout.cache.partial_attention", lambda *inputs: cascade._in_float32(*inputs)
        )
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sinks = random(HEADS) if with_sinks else None
    prefill = PrefillCache()
    packed = [(random(1, KV_HEADS, sum(lengths), SIZE), random(1, KV_HEADS, sum(lengths), SIZE)) for _ in range(2)]
    for layer, (key, value) in enumerate(packed):
        prefill.update(key, value, layer)
    cache = DecodeCache(prefill, lengths, REPEATS, STEPS)
    # What every row has seen, kept apart: (layer, row) -> [keys, values], each (kv_heads, n, D).
    ends = torch.tensor(lengths).cumsum(0).tolist()
    seen = {
        (layer, row): [x[0, :, ends[row // REPEATS] - lengths[row // REPEATS] : ends[row // REPEATS]] for x in states]
        for layer, states in enumerate(packed)
        for row in range(len(lengths) * REPEATS)
    }
    rows = list(range(len(lengths) * REPEATS))
    # The second prompt loses all its rows, the others some, at different times.
    leaving = {1: {3}, 2: {0, 8}, 3: {4, 5}, 4: {1, 6}}
    for step in range(STEPS):
        layout = cache.layout()
        for layer in range(2):
            query = random(len(rows), HEADS, 1, SIZE)
            key, value = cache.update(*(random(len(rows), KV_HEADS, 1, SIZE) for _ in range(2)), layer)
            out = layout.attend(query, key, value, scaling=0.4, window=window, sinks=sinks)
            for number, row in enumerate(rows):
                own = seen[layer, row]
                own[0] = torch.cat([own[0], key[number, :, -1:]], dim=1)
                own[1] = torch.cat([own[1], value[number, :, -1:]], dim=1)
                expected = reference(query[number, :, 0], *own, 0.4, window, sinks)
                assert torch.allclose(out[number, :, 0], expected, rtol=1e-12, atol=1e-13), (step, layer, row)
        cache.advance()
        kept = cache.keep(torch.tensor([row not in leaving.get(step, ()) for row in rows]))
        rows = [rows[index] for index in kept.tolist()]
    assert rows and not set(rows) & set.union(*leaving.values())


def test_a_prompt_is_kept_once_whatever_the_number_of_rows():
    prefill = PrefillCache()
    prefill.update(torch.zeros(1, KV_HEADS, 300, SIZE), torch.zeros(1, KV_HEADS, 300, SIZE), 0)
    cache = DecodeCache(prefill, [300], 64, 10)
    kept = sum(x.numel() for x in (*cache.prompts, *cache.drawn))
    assert kept == 2 * KV_HEADS * SIZE * (300 + 64 * 10)
    assert not prefill.states
