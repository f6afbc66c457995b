"""`evaluate.py` leaves its numbers, and every completion that they can be computed from again."""

from __future__ import annotations

import json

import pytest

from tests.command_line import run


def records(folder):
    return [json.loads(line) for path in sorted(folder.glob("held_out*.jsonl")) for line in path.open(encoding="utf-8")]


def means(found):
    """The metrics, from nothing but the records."""
    greedy, sampled = ([r for r in found if r["how"] == how] for how in ("greedy", "sampled"))
    best = {r["uid"]: 0.0 for r in sampled}
    for r in sampled:
        best[r["uid"]] = max(best[r["uid"]], float(r["right"]))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "val/accuracy": mean([r["right"] for r in greedy]),
        "val/sampled_accuracy": mean([r["right"] for r in sampled]),
        "val/pass@3": mean(best.values()),
        "val/reward": mean([r["reward"] for r in sampled]),
        "val/mean_tokens": mean([r["tokens"] for r in sampled]),
    }


def test_the_numbers_are_those_of_the_completions_also_on_two_ranks(tmp_path):
    arguments = ["experiment=micro", "validation.num_generations=3", "validation.threshold=0.05", "trainer.precision=64-true", "model.dtype=float64"]  # fmt: skip
    alone, two = tmp_path / "alone", tmp_path / "two"
    (alone).mkdir()
    for name in ("held_out.jsonl", "held_out.rank1.jsonl"):
        (alone / name).write_text("of an earlier evaluation, on two ranks\n")
    done = run(*arguments, f"hydra.run.dir={alone}", script="evaluate.py")
    assert f"written: {alone}/evaluation.json and held_out.jsonl" in done.stdout
    found, evaluation = records(alone), json.loads((alone / "evaluation.json").read_text())
    assert len({r["uid"] for r in found}) == 8 and len(found) == 8 * (1 + 3)
    assert 0 < evaluation["metrics"]["val/sampled_accuracy"] < 1
    assert evaluation["metrics"] == pytest.approx(means(found), rel=1e-12)
    assert evaluation["config"]["validation"]["threshold"] == 0.05 and evaluation["model"] == "bundled:micro"

    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    run(*arguments, *ranks, f"hydra.run.dir={two}", script="evaluate.py")
    assert len(records(two)) == len(found) and (two / "held_out.rank1.jsonl").exists()
    order = lambda r: (r["uid"], r["how"], r["generation"])  # noqa: E731
    assert sorted(records(two), key=order) == sorted(found, key=order)
    assert json.loads((two / "evaluation.json").read_text())["metrics"] == pytest.approx(
        evaluation["metrics"], rel=1e-12
    )
