"""What the benchmarks run on which processor."""

from __future__ import annotations

import pytest

from benchmarks import processor
from benchmarks.scenarios import SCENARIOS


@pytest.mark.parametrize(
    ("flags", "precision", "bars"),
    [
        ("avx2 avx512_bf16 amx_bf16", "bf16", (6, 3)),
        ("avx2 avx512_bf16", "bf16", (6, 3)),
        ("avx2 avx512f", "fp32", None),
        ("avx2", "fp32", None),
        ("", "fp32", None),
    ],
)
def test_without_units_for_bfloat16_both_sides_run_in_float32(flags, precision, bars, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    processor.CPUINFO.write_text(f"model name\t: Some CPU\nflags\t\t: {flags}\n")
    here = SCENARIOS["quickstart"].on_this_processor()
    assert (here.precision, here.bars, here.prompts) == (precision, bars, 8)
    assert SCENARIOS["long_prompt"].on_this_processor() == SCENARIOS["long_prompt"]  # float32 everywhere, with its bars
