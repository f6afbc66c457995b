"""What the benchmarks run on which processor."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import processor
from benchmarks.scenarios import GUARD, SCENARIOS, Scenario, common_tokens, guard_here, quick_here, unique_flops


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
    quick = quick_here()
    assert (quick.name, quick.prompts) == (("quickstart", 8) if precision == "bf16" else ("half_quickstart", 4))


def test_the_operations_that_a_step_cannot_do_without_by_hand():
    """Four prompts of 10 tokens, 4 of which they share; 8 completions of 5, of which 4 tokens are inputs."""
    scenario = Scenario("by hand", prompts=4, generations=2, prompt_tokens=10, completion_tokens=5, precision="bf16")
    sizes = {"body_parameters": 1000, "head_parameters": 100, "prompt_tokens": 40, "common_tokens": 4}
    once = 4 + 4 * 6 + 8 * 4
    rollout = 2 * (1000 * once + 100 * 40)
    assert unique_flops(scenario, sizes, 40) == {"rollout": rollout, "update": 3 * rollout}
    # Two steps read the shared tokens once each, and the second one's old pass makes 3.5 passes.
    twice = dataclasses.replace(scenario, minibatches=2)
    assert unique_flops(twice, sizes, 40) == {"rollout": rollout, "update": 3.5 * 2 * (1000 * (once + 4) + 100 * 40)}
    # Of a group without signal nothing is forwarded in the update; the reference is one pass more.
    silent = dataclasses.replace(scenario, silent_groups=1, beta=0.04)
    update = 4 * 2 * (1000 * (4 + 3 * 6 + 6 * 4) + 100 * 30)
    assert unique_flops(silent, sizes, 40) == {"rollout": rollout, "update": update}


def test_tokens_in_common_by_hand():
    assert common_tokens([[1, 2, 3, 4], [1, 2, 3], [1, 2, 5]]) == 2
    assert common_tokens([[1, 2, 3]]) == 0  # nobody to share them with
