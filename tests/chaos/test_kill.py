"""SIGKILL at any moment, and at any write: the resumed run ends with the bits of the run that was never killed."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conf.test_every_key import ROWS
from tests.forked import ROOT, Script, start_script

RUN = ["experiment=micro", "max_rollouts=8", "checkpoint.every_n_rollouts=2", "validation.every_n_rollouts=3",
       "checkpoint.keep_best=val/reward", "ckpt_path=auto", "print_config=false"]  # fmt: skip


ELSEWHERE = "tests.training.test_one_step_off.Elsewhere"
TOGETHER = [
    [
        "lora=language", "objective.beta=0.1", "objective.beta_end=0.5", "optimizer=adamw_8bit", "scheduler=cosine",
        "dynamic_sampling.max_draws=2", "record_tokens=true", "update.num_iterations=2", "checkpoint.keep_last=2", *ROWS,
    ],
    [
        f"rollout.engine._target_={ELSEWHERE}", "~rollout.engine.max_concurrent", "mismatch=sequence_truncate",
        "objective=gspo_token", "objective.beta=0.1", "update.ref_sync_every_n_rollouts=2", "+optimizer.amsgrad=true",
        "advantages._target_=tests.training.test_part_states.RunningMean", "~advantages.scale_rewards",
        "~advantages.baseline",
    ],
]  # fmt: skip
"""What changes the state of a run, in as few runs as can have it."""
COUNTING = Path(__file__).with_name("counting.py")


def start(folder: Path, options: Sequence[str] = (), kill_at: int = 0) -> Script | subprocess.Popen[bytes]:
    """A run, which counts what it does to names in its folder; SIGKILL comes before the one of that number."""
    counting = [COUNTING, folder / "run", kill_at, folder / "writes.txt"]
    arguments = [*map(str, counting), *RUN, *options, f"hydra.run.dir={folder / 'run'}"]
    with (folder / "log.txt").open("a") as log:
        return start_script(arguments, ROOT, log.fileno(), log.fileno())


def finish(folder: Path, options: Sequence[str] = ()) -> float:
    """Lets a run end; returns its seconds, without those of imports that it does not make."""
    folder.mkdir(exist_ok=True)
    run, start_s = start(folder, options), time.monotonic()
    assert run.wait(200) == 0, (folder / "log.txt").read_text()[-3000:]
    return time.monotonic() - start_s


def run_with_kills(folder: Path, rng: random.Random, longest_s: float) -> int:
    """Kills and resumes until the run is through; returns how often it was killed."""
    folder.mkdir()
    kills = 0
    while True:
        run = start(folder)
        try:
            code = run.wait(rng.uniform(0.001, longest_s))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            code = run.wait(60)
        if code != -signal.SIGKILL:
            assert code == 0, (folder / "log.txt").read_text()[-3000:]
            return kills
        kills += 1


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in r.items() if not k.startswith(("time/", "perf/"))} for r in csv.DictReader(file)]


def assert_same(folder: Path, whole: Path) -> None:
    assert rows(folder) == rows(whole)
    assert (folder / "run/completions.jsonl").read_bytes() == (whole / "run/completions.jsonl").read_bytes()
    ours, expected = (load_file(next((f / "run" / "model").glob("*model.safetensors"))) for f in (folder, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    best, expected_best = (torch.load(f / "run/checkpoints/best.ckpt", weights_only=True) for f in (folder, whole))
    assert best["callbacks"]["RolloutCheckpoint"] == expected_best["callbacks"]["RolloutCheckpoint"]
    assert all(torch.equal(best["state_dict"][name], value) for name, value in expected_best["state_dict"].items())
    last, expected_last = (torch.load(f / "run/checkpoints/last.ckpt", weights_only=True) for f in (folder, whole))
    for name in ("optimizer_states", "lr_schedulers"):
        torch.testing.assert_close(last[name], expected_last[name], rtol=0, atol=0)
    names, expected_names = (sorted(os.listdir(f / "run/checkpoints")) for f in (folder, whole))
    assert names == expected_names
    summary = [name for name in ("summary.json", "report.html") if not (folder / "run" / name).exists()]
    assert not summary


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(kills, tmp_path):
    longest_s = finish(tmp_path / "whole")
    rng = random.Random(kills)
    total = runs = 0
    while total < kills:
        runs += 1
        total += run_with_kills(tmp_path / f"killed_{runs}", rng, longest_s)
        assert_same(tmp_path / f"killed_{runs}", tmp_path / "whole")
    print(f"{total} kills in {runs} runs of {longest_s:.1f} s")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", TOGETHER, ids=["adapter", "ahead"])
def test_a_run_killed_at_random_writes_ends_with_the_same_bits(options, kills, tmp_path):
    options = [*options, "max_rollouts=3", "data.prompts_per_rollout=2", "rollout.num_generations=4"]
    finish(tmp_path / "whole", options)
    writes = int((tmp_path / "whole" / "writes.txt").read_text())
    rng, killed, codes = random.Random(kills), tmp_path / "killed", []
    killed.mkdir()
    for _ in range(kills):
        codes.append(start(killed, options, rng.randint(writes // 8, writes // 2)).wait(200))
    # A run that was resumed may have ended before so many writes.
    assert codes[0] == -signal.SIGKILL and set(codes) <= {0, -signal.SIGKILL}, (killed / "log.txt").read_text()[-3000:]
    finish(killed, options)
    assert_same(killed, tmp_path / "whole")
