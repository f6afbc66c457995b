"""The guard against slower and larger training, without measuring anything."""

from __future__ import annotations

import json

from benchmarks import guard


def result(rollout_s, update_s, peak, tokens=100.0):
    step = {"rollout_cpu_s": rollout_s, "update_cpu_s": update_s, "processed_tokens": tokens}
    return {"steps": [step, step], "peak_rss_gb": peak}


def test_ratios_are_those_of_the_better_round_of_each_side():
    found = {
        "ours": [result(2.0, 4.0, 3.0), result(1.0, 5.0, 3.5)],
        "plain": [result(3.0, 24.0, 6.0), result(4.0, 20.0, 6.5)],
    }
    asked = []

    def run(side):
        asked.append(side)
        return found[side][asked.count(side) - 1]

    assert guard.measure(run) == {"rollout_speed": 3.0, "update_speed": 5.0, "memory": 0.5, "processed_tokens": 100.0}
    assert asked == ["ours", "plain", "ours", "plain"]


def test_fifteen_percent_of_speed_and_five_of_memory_are_allowed_and_no_token_more():
    before = {"rollout_speed": 2.0, "update_speed": 4.0, "memory": 0.5, "processed_tokens": 100.0}
    just = {"rollout_speed": 1.71, "update_speed": 3.41, "memory": 0.524, "processed_tokens": 100.0}
    assert all(good for *_, good in guard.verdict(just, before))
    worse = {"rollout_speed": 1.69, "update_speed": 3.39, "memory": 0.526, "processed_tokens": 101.0}
    assert not any(good for *_, good in guard.verdict(worse, before))


def test_the_baseline_holds_what_is_measured():
    assert set(json.loads(guard.BASELINE.read_text())) == {
        "rollout_speed",
        "update_speed",
        "memory",
        "processed_tokens",
    }
