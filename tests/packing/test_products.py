"""Float32 logits from bfloat16 products; what the matrix units do (exact products, float32 sums) is done in float32."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.packing.products import float32_products
from tests.support import relative_distance


@pytest.mark.parametrize(
    ("a_dtype", "b_dtype", "bound"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 1e-6),
    ],
    ids=str,
)
def test_the_product_is_that_of_float64(a_dtype, b_dtype, bound):
    a, b = torch.randn(37, 96).to(a_dtype), torch.randn(53, 96).to(b_dtype)
    product = float32_products(a, b_dtype)
    ours = torch.cat([product(b[:20]), product(b[20:])], dim=1)
    assert ours.dtype == torch.float32
    expected = a.double() @ b.double().t()
    assert relative_distance(ours.double(), expected) < bound
    rounded = (a.float() @ b.float().t()).bfloat16()
    assert relative_distance(rounded.double(), expected) > 1e-3  # what an ordinary bfloat16 product would give
