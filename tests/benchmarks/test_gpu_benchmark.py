"""What the GPU's table divides by, by hand."""

from __future__ import annotations

import json
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
        "prompt_tokens": 20,
        "common_tokens": 0,
    }
    # 20 prompt tokens and 24 of completions reach the layers (the last of each predicts nothing); 30 are predicted.
    assert gpu_benchmark.update_flops(case) == pytest.approx(share * (6 * 1000 * 44 + 6 * 100 * 30))


def test_what_the_time_does_not_suffice_for_is_left_out_and_said(gpu_benchmark):
    case = gpu_benchmark.case("tiny", gpu_benchmark.TABLE, "cpu", 1)
    found = gpu_benchmark.collect("ours", sys.executable, [case, case], time.monotonic())
    assert found == [{"case": case, "error": gpu_benchmark.LEFT_OUT}] * 2


def test_every_result_is_kept_before_the_next_case_begins(gpu_benchmark, tmp_path):
    case, out = gpu_benchmark.case("tiny", gpu_benchmark.TABLE, "cpu", 1), tmp_path / "gpu.json"
    lines = [json.dumps({"case": case, "error": f"number {n}"}) for n in range(2)]
    worker = tmp_path / "worker"
    # It goes on only when the file has what it has just said.
    steps = [f"echo '{line}'; until grep -q 'number {n}' {out}; do sleep 0.05; done" for n, line in enumerate(lines)]
    worker.write_text("\n".join(["#!/bin/sh", *steps]) + "\n")
    worker.chmod(0o755)
    kept = []

    def keep(results):
        kept.append([result["error"] for result in results])
        gpu_benchmark.save({"ours": results}, out)

    found = gpu_benchmark.collect("ours", str(worker), [case] * 2, time.monotonic() + 60, keep)
    assert [result["error"] for result in found] == ["number 0", "number 1"]
    assert kept == [["number 0"], ["number 0", "number 1"]]
    assert [path.name for path in tmp_path.glob("*gpu.json*")] == ["gpu.json"]
