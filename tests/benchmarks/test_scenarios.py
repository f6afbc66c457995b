"""What the benchmarks run on which processor."""

from __future__ import annotations

import pytest

from benchmarks import processor
from benchmarks.scenarios import GUARD, SCENARIOS, guard_here


@pytest.mark.parametrize(
    ("flags", "units", "precision", "bars"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16", "AMX", "bf16", (6, 3)),
        ("avx2 avx512f avx512_bf16", "AVX-512 with bfloat16", "bf16", (6, 3)),
        ("avx2 avx512f", "AVX-512", "fp32", None),
        ("avx2", "AVX2", "fp32", None),
        ("", "a machine", "fp32", None),
    ],
)
def test_without_units_for_bfloat16_both_sides_run_in_float32(flags, units, precision, bars, tmp_path, monkeypatch):
    monkeypatch.setattr(processor.platform, "machine", lambda: "a machine")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    processor.CPUINFO.write_text(f"model name\t: Some CPU\nflags\t\t: {flags}\n")
    here = SCENARIOS["quickstart"].on_this_processor()
    assert (processor.units(), here.precision, here.bars, here.prompts) == (units, precision, bars, 8)
    assert SCENARIOS["long_prompt"].on_this_processor() == SCENARIOS["long_prompt"]  # float32 everywhere, with its bars
    # The guard's work takes about as long: half of it where a product takes several times as long.
    assert (guard_here() == GUARD) == (precision == "bf16")
    assert (guard_here().prompts, guard_here().precision) == ((2, "bf16") if precision == "bf16" else (1, "fp32"))
