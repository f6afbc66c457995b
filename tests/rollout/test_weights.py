"""The checksum by which an engine knows whether it has the trainer's weights."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.rollout.weights import checksum

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64, torch.int8: torch.int8}


@pytest.mark.parametrize("dtype", list(INTEGERS))
@pytest.mark.parametrize("count", [64, 61], ids=["eight bytes at a time", "one by one"])
def test_any_flipped_bit_changes_it(dtype, count):
    generator = torch.Generator().manual_seed(0)
    tensors = [(100 * torch.randn(count, generator=generator)).to(dtype) for _ in range(3)]
    whole = checksum(tensors)
    bits = 8 * dtype.itemsize
    for position in (0, 1, 2, 3, count - 1):
        for bit in (0, 1, bits - 2, bits - 1):
            changed = [tensor.clone() for tensor in tensors]
            word = 1 << bit if bit < bits - 1 else -(1 << bit)
            changed[1].view(INTEGERS[dtype])[position] ^= torch.tensor(word, dtype=INTEGERS[dtype])
            assert not torch.equal(changed[1].view(INTEGERS[dtype]), tensors[1].view(INTEGERS[dtype]))
            assert checksum(changed) != whole, (position, bit)


def test_the_order_of_tensors_counts_and_their_place_in_memory_does_not():
    first, second = torch.arange(8.0), torch.arange(8.0, 16.0)
    assert checksum([first, second]) != checksum([second, first])
    shifted = torch.cat([torch.zeros(1), first])[1:]
    assert checksum([shifted, second]) == checksum([first, second])
