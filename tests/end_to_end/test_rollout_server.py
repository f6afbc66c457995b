"""A training run whose only rollout server dies: saved, one line, and resumed as if nothing had happened."""

from __future__ import annotations

import csv

import pytest
import torch
from safetensors.torch import load_file

from gspo_lightning.rollout.vllm_server import VLLMServerEngine
from tests.command_line import run
from tests.rollout.fake_server import FakeServer
from tests.support import relative_distance

GAME = [
    "data=secret_number", "data.max_prompt_length=256", "reward=environment", "environment=guess_the_number",
    "environment.make.turn_rewards=true", "rollout.max_completion_length=40",
    "data.prompts_per_rollout=2", "rollout.num_generations=3", "environment.max_turns=2", "data.task.num_validation=4",
    "update.num_minibatches=1", "allow_no_effect=true",
    "objective.importance_sampling_level=sequence_token", "rollout.stop=[a,e,i,o,u]",
]  # fmt: skip
"""Dialogues whose turns have rewards; a turn ends with a vowel."""


def train(server, folder, *arguments):
    return run(
        "experiment=micro", "rollout=vllm_server", "rollout.max_completion_length=12",
        "max_rollouts=4", "validation.every_n_rollouts=null", f"rollout.engine.urls=[{server.url}]",
        "rollout.engine.give_up_after_s=0.5", "rollout.engine.pause_s=0.05", f"hydra.run.dir={folder}", *arguments,
        expect=None, timeout=120,
    )  # fmt: skip


def records(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in csv.DictReader(file)]
    return rows, (folder / "completions.jsonl").read_bytes(), load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("staleness", "options"),
    [
        pytest.param(0, [], marks=pytest.mark.slow),
        (1, []),
        pytest.param(0, GAME, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_lost_its_server_is_saved_and_resumes_bit_identically(staleness, options, micro_model_dir, tmp_path):
    options = [f"rollout.engine.staleness={staleness}", *options]
    server = FakeServer(micro_model_dir)
    try:
        whole = train(server, tmp_path / "whole", *options)
        assert whole.returncode == 0, whole.stderr
        loads = server.count("gspo_load_folder")
        # In the middle of the third rollout: its weights have arrived, some of its prompts are answered. Sampled ahead,
        # that rollout has the weights of the second one's update, and the first two have the same.
        third = 3 - staleness
        server.fault = lambda path, number: (
            "500" if server.count("gspo_load_folder") >= loads + third and number % 2 else None
        )
        cut = train(server, tmp_path / "cut", "rollout.engine.max_attempts=3", *options)
        assert cut.returncode == 4, cut.stdout + cut.stderr
        (line,) = [line for line in cut.stderr.splitlines() if line.startswith("error:")]
        last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
        assert line.endswith(f"saved, resume with ckpt_path={last}") and last.exists()
        assert torch.load(last, weights_only=True)["gspo_lightning"]["rollouts_done"] == 2
        server.fault = lambda path, number: None
        resumed = train(server, tmp_path / "cut", f"ckpt_path={last}", *options)
        assert resumed.returncode == 0, resumed.stderr
    finally:
        server.close()
    expected, found = records(tmp_path / "whole"), records(tmp_path / "cut")
    for a, b in zip(found[0], expected[0], strict=True):
        assert {k: (a[k], b[k]) for k in a if a[k] != b[k]} == {}
    assert found[1] == expected[1]
    assert all(torch.equal(found[2][name], value) for name, value in expected[2].items())


@pytest.mark.parametrize("options", [[], pytest.param(GAME, marks=pytest.mark.slow)])
def test_two_ranks_share_the_servers_and_take_the_update_of_one(options, micro_model_dir, tmp_path):
    """Five held-out prompts in batches of two: a rank runs out of them first and must take part all the same."""
    common = [
        "update.num_minibatches=1", "allow_no_effect=true", "max_rollouts=2", "trainer.precision=32-true",
        "data.task.num_validation=5", "data.validation_batch_size=2", *options,
    ]  # fmt: skip
    results = {}
    fsdp = ["trainer=fsdp", "trainer.accelerator=cpu"]
    for ranks, trainer in ((1, []), (2, ["trainer=ddp"]), ("2 with parts", fsdp)):
        server = FakeServer(micro_model_dir)
        try:
            done = train(server, tmp_path / str(ranks), *common, *trainer)
            assert done.returncode == 0, done.stderr
            # Once per version of the weights, and not once per rank.
            assert server.count("gspo_load_folder") == 3
        finally:
            server.close()
        results[ranks] = records(tmp_path / str(ranks))
    rows_one, _, one = results.pop(1)
    assert not options or min(float(row["dialogue/turns"]) for row in rows_one[1:]) > 1.1
    for rows_two, _, two in results.values():
        assert_like_one_rank(rows_one, one, rows_two, two, micro_model_dir)
    # The copy of a policy in parts is on the rank that asks.
    assert VLLMServerEngine.samples_on == "first_rank"


def assert_like_one_rank(rows_one, one, rows_two, two, micro_model_dir):
    for before, after in zip(rows_one, rows_two, strict=True):
        for name in (
            "val/accuracy",
            "val/reward",
            "reward/mean",
            "grad_norm",
            "completion/mean_tokens",
            "dialogue/turns",
        ):
            assert float(after.get(name) or 0) == pytest.approx(float(before.get(name) or 0), rel=1e-4), (
                name,
                before,
                after,
            )
    start = load_file(micro_model_dir / "model.safetensors")
    moved_two, moved_one = (torch.cat([(w[n] - start[n]).flatten() for n in start]) for w in (two, one))
    # As one vector: Adam makes a visible step of the rounding of a gradient near zero.
    assert relative_distance(moved_two, moved_one) < 1e-4


def test_on_two_ranks_a_dead_server_ends_both_with_one_line_and_a_checkpoint(micro_model_dir, tmp_path):
    server = FakeServer(micro_model_dir)
    try:
        server.fault = lambda path, number: "500" if server.count("gspo_load_folder") >= 3 else None
        done = train(server, tmp_path, "trainer=ddp", "rollout.engine.max_attempts=3")
    finally:
        server.close()
    assert done.returncode == 4, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert line.endswith(f"saved, resume with ckpt_path={last}") and last.exists()


@pytest.mark.slow
def test_sampling_ahead_is_refused_on_two_ranks(micro_model_dir, tmp_path):
    server = FakeServer(micro_model_dir)
    try:
        done = train(server, tmp_path, "trainer=ddp", "rollout.engine.staleness=1")
    finally:
        server.close()
    assert done.returncode == 2
    assert "error: rollout.engine.staleness=1 runs in one process, and there are 2" in done.stderr
