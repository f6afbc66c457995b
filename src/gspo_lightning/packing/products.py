"""Precision and operand shapes that make matrix products fast, on CPUs and on GPUs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TILE_ROWS = 32
"""Rows that AMX kernels process at a time; kernels of other processors are faster at multiples of it too."""

_ONEDNN: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@contextmanager
def onednn_float32(device: torch.device) -> Iterator[None]:
    """Computes float32 products by oneDNN on AMD processors with AVX-512, of which MKL would use half.

    MKL runs its AVX2 kernels there: 98 GFLOP/s on a core where oneDNN's reach 220. torch calls oneDNN only if float32
    operands may be rounded to bfloat16, and oneDNN rounds them only on processors with bfloat16 matrix units (AMX).
    Without such units allowing it loses no digit; one product is checked, and if it was rounded after all, this does
    nothing. A precision that the user has chosen is kept.

    Args:
        device: device of the products; if it is not a CPU, this does nothing.
    """
    if device.type != "cpu" or _ONEDNN.fp32_precision != "none" or not _mkl_is_slow() or not _stays_float32():
        yield
        return
    _ONEDNN.fp32_precision = "bf16"
    try:
        yield
    finally:
        if _ONEDNN.fp32_precision == "bf16":  # else the user has chosen another meanwhile
            _ONEDNN.fp32_precision = "none"


def _mkl_is_slow() -> bool:
    """Whether this is an AMD processor with AVX-512 and without AMX."""
    facts = torch.cpu.get_capabilities()
    return "AMD" in facts.get("cpu_name", "") and bool(facts.get("avx512_f")) and not facts.get("amx_tile")


@functools.cache
def _stays_float32() -> bool:
    """Whether oneDNN keeps all digits of float32 operands although it may round them."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 512, generator=generator, device="cpu", dtype=torch.float32) for _ in range(2))
    _ONEDNN.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", enabled=False):
            product = a @ b.t()
    finally:
        _ONEDNN.fp32_precision = "none"
    exact = a.double() @ b.t().double()
    return bool((product - exact).abs().max() <= 1e-5 * exact.abs().max())


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes products of this dtype on a CPU now; else MKL does, or torch itself."""
    return dtype == torch.bfloat16 or (dtype == torch.float32 and _ONEDNN.fp32_precision == "bf16")


def rows_missing(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """Number of zero rows to append to the operands of oneDNN's products: those in bfloat16 on a CPU, and in float32
    inside `onednn_float32`; 0 elsewhere.

    oneDNN builds a kernel for every shape: 3 ms and up to 2 MB for each new number of rows, in each of 20 products of a
    training step. Multiples of ``TILE_ROWS`` recur, and a product over such a multiple is a third faster.
    """
    return -rows % TILE_ROWS if device.type == "cpu" and by_onednn(dtype) else 0


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of products with this operand: autocast's if that is on and the operand is not float64."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


def float32_products(a: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """``a @ b.T`` in float32 from bfloat16 products, for GPUs, whose float32 products run at a tenth of the speed.

    The matrix units multiply bfloat16 numbers exactly and add them in float32; an ordinary bfloat16 product loses
    digits only by rounding its *result*. So bfloat16 operands give float32 logits at no cost. Float32 operands are
    split into sums of two bfloat16 numbers each, which keeps 16 of their 24 bits, and of the four products the smallest
    is left out: an error near 1e-5, where bfloat16 logits are off by hundredths (what torch calls ``bf16_3x``).

    Args:
        a: ``(N, H)`` float32 or bfloat16; split once, whatever the number of calls.
        dtype: dtype of b, float32 or bfloat16.

    Returns:
        b ``(M, H)`` -> ``(N, M)`` float32.
    """
    if a.dtype == dtype == torch.bfloat16:
        return lambda b: _product(a, b)
    # One product over three times the columns: high x high + high x low + low x high.
    high, low = _split(a)
    columns = torch.cat([high, high, low], dim=1)
    return lambda b: _product(columns, _high_low_high(b))


def _high_low_high(x: Tensor) -> Tensor:
    high, low = _split(x)
    return torch.cat([high, low, high], dim=1)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 number, and the bfloat16 number nearest to the remainder."""
    high = x.bfloat16()
    return high, (x.float() - high.float()).bfloat16()


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return a.float() @ b.float().t()
