"""The guard against slower and larger training, without measuring anything."""

from __future__ import annotations

import json

import pytest

from benchmarks import guard, processor


def result(rollout_s, update_s, peak, tokens=100.0):
    step = {"rollout_cpu_s": rollout_s, "update_cpu_s": update_s, "processed_tokens": tokens}
    return {"steps": [step, step], "peak_rss_gb": peak}


def rounds(**found):
    """A `run` that gives each side's results one after another."""
    left = {side: list(results) for side, results in found.items()}
    return lambda side: left[side].pop(0)


def test_ratios_are_those_of_the_better_round_of_each_side():
    run = rounds(
        ours=[result(2.0, 4.0, 3.0), result(1.0, 5.0, 3.5)], plain=[result(3.0, 24.0, 6.0), result(4.0, 20.0, 6.5)]
    )
    results = {}
    guard.add_round(run, results)
    guard.add_round(run, results)
    assert guard.summary(results) == {
        "rollout_speed": 3.0,
        "update_speed": 5.0,
        "memory": 0.5,
        "processed_tokens": 100.0,
    }


@pytest.fixture
def baseline(tmp_path, monkeypatch):
    file = tmp_path / "baseline.json"
    before = {"rollout_speed": 2.0, "update_speed": 4.0, "memory": 0.5, "processed_tokens": 100.0}
    file.write_text(json.dumps({"AMX": before}))
    monkeypatch.setattr(guard, "BASELINE", file)
    return file


def test_a_disturbed_round_is_measured_again(baseline, capsys):
    """Two rounds in which ours looks slow, and a third that is as it was."""
    good, slow = result(1.0, 1.0, 1.0), result(3.0, 1.0, 1.0)
    run = rounds(ours=[slow, slow, good, good, good], plain=[result(2.0, 4.0, 2.0)] * 5)
    assert guard.check(run, "AMX")
    assert "WORSE" not in capsys.readouterr().out
    assert run("ours") is good and run("ours") is good  # two rounds are left
    assert not guard.check(rounds(ours=[slow] * 5, plain=[result(2.0, 4.0, 2.0)] * 5), "AMX")
    assert "rollout_speed     baseline    2.000   now    0.667   WORSE" in capsys.readouterr().out


def test_each_kind_of_processor_has_a_baseline_of_its_own(baseline, capsys):
    assert guard.check(rounds(), "AVX2")  # nothing is run
    assert "no baseline for a processor with AVX2" in capsys.readouterr().out
    guard.write_baseline(rounds(ours=[result(1.0, 1.0, 1.0)] * 5, plain=[result(3.0, 5.0, 4.0)] * 5), "AVX2")
    written = json.loads(baseline.read_text())
    assert written["AMX"]["update_speed"] == 4.0
    assert written["AVX2"] == {"rollout_speed": 3.0, "update_speed": 5.0, "memory": 0.25, "processed_tokens": 100.0}


@pytest.mark.parametrize(
    ("flags", "units", "name"),
    [
        ("fpu avx2 avx512_bf16 amx_bf16", "AMX", "Some CPU with AMX"),
        ("fpu avx2 avx512_bf16", "AVX-512 with bfloat16", "Some CPU"),
        ("fpu avx2", "AVX2", "Some CPU"),
    ],
)
def test_a_processor_is_known_by_its_widest_units(flags, units, name, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    processor.CPUINFO.write_text(f"processor : 0\nmodel name\t: Some CPU\nflags : {flags}\n")
    assert (processor.units(), processor.name()) == (units, name)


def test_fifteen_percent_of_speed_and_five_of_memory_are_allowed_and_no_token_more():
    before = {"rollout_speed": 2.0, "update_speed": 4.0, "memory": 0.5, "processed_tokens": 100.0}
    just = {"rollout_speed": 1.71, "update_speed": 3.41, "memory": 0.524, "processed_tokens": 100.0}
    assert all(good for *_, good in guard.verdict(just, before))
    worse = {"rollout_speed": 1.69, "update_speed": 3.39, "memory": 0.526, "processed_tokens": 101.0}
    assert not any(good for *_, good in guard.verdict(worse, before))


def test_the_baselines_hold_what_is_measured():
    for before in json.loads(guard.BASELINE.read_text()).values():
        assert set(before) == {"rollout_speed", "update_speed", "memory", "processed_tokens"}
