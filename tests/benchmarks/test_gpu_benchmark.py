"""What the GPU's table divides by, by hand."""

from __future__ import annotations

import sys
import time
from importlib import util
from pathlib import Path

import pytest

from benchmarks.scenarios import Scenario


@pytest.fixture(scope="module")
def gpu_benchmark():
    spec = util.spec_from_file_location("gpu_benchmark", Path(__file__).parents[2] / "scripts" / "gpu_benchmark.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCENARIO = Scenario("by_hand", prompts=2, generations=3, prompt_tokens=10, completion_tokens=5, precision="bf16")


def test_every_prompt_counts_once_and_every_completion_token_once(gpu_benchmark):
    assert gpu_benchmark.unique_tokens(SCENARIO) == 2 * 10 + 6 * 5


@pytest.mark.parametrize(("model", "share"), [("Qwen2.5-0.5B", 1.0), ("Qwen2.5-7B", 2 / 3)])
def test_operations_are_six_per_weight_and_token_and_four_where_the_weights_are_frozen(gpu_benchmark, model, share):
    case = {
        "case": {"scenario": SCENARIO.as_dict(), "model": model},
        "body_parameters": 1000,
        "head_parameters": 100,
    }
    # 20 prompt tokens and 24 of completions reach the layers (the last of each predicts nothing); 30 are predicted.
    assert gpu_benchmark.update_flops(case) == pytest.approx(share * (6 * 1000 * 44 + 6 * 100 * 30))


def test_what_the_time_does_not_suffice_for_is_left_out_and_said(gpu_benchmark):
    case = gpu_benchmark.case("tiny", gpu_benchmark.TABLE, "cpu", 1)
    found = gpu_benchmark.collect("ours", sys.executable, [case, case], time.monotonic())
    assert found == [{"case": case, "error": gpu_benchmark.LEFT_OUT}] * 2
