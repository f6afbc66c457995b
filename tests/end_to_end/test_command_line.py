"""`python train.py` as users run it, on the micro model: learning, leaving records, stopping, resuming, exporting."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command_line import MICRO, SHORT, assert_same_run, metrics, rows, run, run_and_stop, start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run(*SHORT, f"hydra.run.dir={folder}")
    return folder


@pytest.mark.parametrize(
    ("how", "after"),
    [
        (signal.SIGINT, 2),
        (signal.SIGTERM, 3),  # a validation is due
        pytest.param(signal.SIGINT, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_and_resumed_run_is_bit_identical_to_one_never_stopped(after, how, whole, tmp_path):
    code, output = run_and_stop(tmp_path / "cut", after, how)
    assert code == 0, output
    assert "Stopped after rollout" in output and "saved in" in output
    run(*SHORT, f"hydra.run.dir={tmp_path / 'new'}", f"ckpt_path={tmp_path / 'cut' / 'checkpoints' / 'last.ckpt'}")
    assert_same_run(tmp_path / "new", whole)
    before = 0.0
    for row in rows(tmp_path / "new")[1:]:  # the first is of the validation at the start
        sampled = float(row["count/rollout_tokens"]) - before
        assert float(row["perf/rollout_tokens_per_s"]) * float(row["time/rollout_s"]) == pytest.approx(sampled)
        before += sampled


@pytest.mark.parametrize(
    ("array", "job"),
    [
        ({"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7"}, "70_7"),
        pytest.param({}, "77", marks=pytest.mark.slow),
    ],
)
def test_a_preempted_slurm_job_is_saved_requeued_and_goes_on(array, job, whole, tmp_path, monkeypatch):
    """SIGUSR1, as ``sbatch --signal=USR1@120 --requeue`` sends it, with a `scontrol` that writes down its arguments."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    for name, value in {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", **array}.items():
        monkeypatch.setenv(name, value)
    code, output = run_and_stop(tmp_path / "run", 3, signal.SIGUSR1, "ckpt_path=auto")
    assert code == 0 and f"Slurm job {job} was requeued" in output, output
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
    run(*SHORT, f"hydra.run.dir={tmp_path / 'run'}", "ckpt_path=auto")
    assert_same_run(tmp_path / "run", whole)


def test_a_run_whose_reader_leaves_ends_with_one_line_and_goes_on_bit_identically(whole, tmp_path):
    """As of `| head`, or where the terminal of `| tee` was closed."""
    with (tmp_path / "errors").open("w+") as errors:
        process, written = start(*SHORT, f"hydra.run.dir={tmp_path / 'run'}", stderr=errors)
        with written:
            assert any(line.startswith("rollout 3/") for line in written)
        assert process.wait(60) == 2
        errors.seek(0)
        told = errors.read()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert told.splitlines()[-1] == f"error: standard output has no reader any more; resume with ckpt_path={last}"
    assert "Traceback" not in told and "BrokenPipe" not in told, told
    run(*SHORT, f"hydra.run.dir={tmp_path / 'run'}", "ckpt_path=auto")
    assert_same_run(tmp_path / "run", whole)


AHEAD = ["rollout.engine._target_=tests.training.test_one_step_off.Elsewhere", "~rollout.engine.max_concurrent"]


@pytest.mark.parametrize(
    ("step", "engine"),
    [(5, []), pytest.param(6, [], marks=pytest.mark.slow), pytest.param(5, AHEAD, marks=pytest.mark.slow)],
    ids=["in the sixth rollout", "in the validation behind it", "in the sixth, sampled ahead"],
)
def test_a_reward_that_fails_costs_no_rollout(step, engine, whole, tmp_path):
    """Checkpoints are due every 10 rollouts; what fails is mended, and the run goes on bit-identically."""
    if engine:
        whole = tmp_path / "whole"
        run(*SHORT, *engine, f"hydra.run.dir={whole}")
    (tmp_path / "fragile.py").write_text(
        "from pathlib import Path\n"
        "from gspo_lightning.rewards import letter_share as share\n"
        "def letter_share(trainer_state, **row):\n"
        f"    if trainer_state.global_step == {step} and not Path('mended').exists():\n"
        "        raise ZeroDivisionError('of this completion')\n"
        "    return share(trainer_state=trainer_state, **row)\n"
    )
    folder, function = tmp_path / "run", "reward.functions.letter_share.function.path=fragile.letter_share"
    settings = [*SHORT, *engine, function, "checkpoint.every_n_rollouts=10", f"hydra.run.dir={folder}"]
    done = run(*settings, "ckpt_path=auto", cwd=tmp_path, expect=2)
    last, told = folder / "checkpoints" / "last.ckpt", done.stderr.splitlines()[-1]
    assert "raised ZeroDivisionError: of this completion" in told
    assert told.endswith(f"; saved, resume with ckpt_path={last}")
    assert torch.load(last, weights_only=True)["gspo_lightning"]["rollouts_done"] == step
    (tmp_path / "mended").touch()
    run(*settings, "ckpt_path=auto", cwd=tmp_path)
    assert_same_run(folder, whole)


def test_the_handler_of_a_launcher_is_called_behind_the_end_of_the_run(whole, tmp_path):
    """submitit announces the end of a job by SIGUSR2; its own handler would end the process in mid-rollout."""
    how = (signal.SIGTERM, signal.SIGUSR2)  # of a preempted job
    code, output = run_and_stop(tmp_path, 3, how, "ckpt_path=auto", script="tests/end_to_end/as_submitit.py")
    assert code == 144 and output.endswith("the launcher requeues the job\n"), output
    assert output.index("saved in") < output.index("the launcher requeues")
    run(*SHORT, f"hydra.run.dir={tmp_path}", "ckpt_path=auto")
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("after", "ckpt_path", "grace_s", "called"),
    [
        (3, "null", 60, False),
        pytest.param(8, "auto", 60, False, marks=pytest.mark.slow),
        (3, "auto", 0, True),
    ],
)
def test_a_launcher_requeues_what_would_go_on(after, ckpt_path, grace_s, called, tmp_path):
    """And not what would begin anew, or has ended; also where the rollout in hand does not fit the grace period."""
    settings = [f"ckpt_path={ckpt_path}", f"checkpoint.grace_s={grace_s}"]
    code, output = run_and_stop(tmp_path, after, signal.SIGUSR2, *settings, script="tests/end_to_end/as_submitit.py")
    assert (code == 144) == ("the launcher requeues" in output) == called, output
    assert called or code == 0
    assert ("not requeued: without ckpt_path=auto" in output) == (ckpt_path == "null")
    if after == 8:  # the held-out prompts are measured all the same
        assert rows(tmp_path)[-1]["step"] == "8" and rows(tmp_path)[-1]["val/accuracy"]


def test_a_killed_run_with_a_damaged_checkpoint_resumes_from_the_one_before(whole, tmp_path):
    code, output = run_and_stop(tmp_path, 5, signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])  # as a broken disk leaves it
    done = run(*SHORT, f"hydra.run.dir={tmp_path}", "ckpt_path=auto")
    assert f"{last} is damaged" in done.stdout and f"resuming from {tmp_path}/checkpoints/previous.ckpt" in done.stdout
    assert_same_run(tmp_path, whole)


def test_when_the_rollout_in_hand_does_not_fit_the_grace_period_the_last_checkpoint_stands(tmp_path):
    code, output = run_and_stop(tmp_path, 2, signal.SIGTERM, "checkpoint.grace_s=0")
    assert code in (0, 128 + signal.SIGTERM)
    assert "Stopped" in output and str(tmp_path / "checkpoints" / "last.ckpt") in output


def test_a_run_with_an_adapter_resumes_bit_identically_and_its_checkpoint_holds_the_adapter_alone(tmp_path):
    lora = ["lora=language", "optimizer.lr=0.01", "scheduler=cosine", "scheduler.warmup_ratio=0.2"]
    run(*SHORT, *lora, f"hydra.run.dir={tmp_path / 'whole'}")
    code, output = run_and_stop(tmp_path / "cut", 3, signal.SIGTERM, *lora)
    assert code == 0, output
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert all("lora" in name for name in torch.load(last, weights_only=True)["state_dict"])
    run(*SHORT, *lora, f"hydra.run.dir={tmp_path / 'cut'}", f"ckpt_path={last}")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    ours, expected = (load_file(tmp_path / f / "model" / "adapter_model.safetensors") for f in ("cut", "whole"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_dynamic_sampling_and_a_moving_reference_resume_bit_identically(tmp_path):
    """Prompts are drawn beyond the batch, and the reference is no longer where it was loaded from."""
    options = [
        "data=micro_digit", "reward=last_integer", "dynamic_sampling.max_draws=3",
        "objective.beta=0.05", "update.ref_sync_every_n_rollouts=2",
    ]  # fmt: skip
    run(*SHORT, *options, f"hydra.run.dir={tmp_path / 'whole'}")
    code, output = run_and_stop(tmp_path / "cut", 4, signal.SIGTERM, *options)
    assert code == 0, output
    run(*SHORT, *options, f"hydra.run.dir={tmp_path / 'cut'}", f"ckpt_path={tmp_path / 'cut/checkpoints/last.ckpt'}")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    rows = metrics(tmp_path / "whole")[1:]
    assert all(float(row["dynamic_sampling/extra_prompts"] or 1) > 0 for row in rows)


@pytest.mark.slow
def test_dialogues_with_rewards_of_turns_resume_bit_identically(tmp_path):
    options = [
        "data=secret_number", "data.max_prompt_length=256", "data.task.num_validation=4", "reward=environment",
        "environment=guess_the_number", "environment.make.turn_rewards=true", "rollout.max_completion_length=60",
        "objective.importance_sampling_level=sequence_token", "rollout.stop=[a,e,i,o,u]",
    ]  # fmt: skip
    run(*SHORT, *options, f"hydra.run.dir={tmp_path / 'whole'}")
    code, output = run_and_stop(tmp_path / "cut", 3, signal.SIGTERM, *options)
    assert code == 0, output
    run(*SHORT, *options, f"hydra.run.dir={tmp_path / 'cut'}", f"ckpt_path={tmp_path / 'cut/checkpoints/last.ckpt'}")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert max(float(row["dialogue/turns"]) for row in metrics(tmp_path / "whole")[1:]) > 1.5


def test_out_of_time_is_a_clean_stop_with_a_checkpoint(tmp_path):
    done = run(
        *MICRO,
        "max_rollouts=100000",
        "trainer.max_time='00:00:00:03'",
        "checkpoint.every_n_rollouts=1000000",
        f"hydra.run.dir={tmp_path}",
    )
    rollouts = int(metrics(tmp_path)[-1]["step"])
    assert f"{rollouts} of 100000 rollouts done; resume with ckpt_path=" in done.stdout
    assert rows(tmp_path)[0]["val/accuracy"] and not rows(tmp_path)[-1]["val/accuracy"]  # nobody asked for that one
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["gspo_lightning"]["rollouts_done"] == rollouts


def test_the_run_leaves_its_records(whole):
    config = (whole / "config.yaml").read_text()
    assert "max_rollouts: 8" in config and "${" not in config
    rows = metrics(whole)
    assert [int(row["step"]) for row in rows] == list(range(9))
    assert [row["step"] for row in rows if row["val/accuracy"]] == ["0", "3", "6", "8"]
    lines = [json.loads(line) for line in (whole / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 8 * 8 * 8
    assert set(lines[0]) == {
        "step",
        "uid",
        "prompt",
        "completion",
        "rewards",
        "reward",
        "advantage",
        "finish_reason",
        "tokens",
    }
    first = [line["reward"] for line in lines if line["step"] == 1]
    assert float(rows[1]["reward/mean"]) == pytest.approx(sum(first) / len(first), rel=1e-12)
    summary = json.loads((whole / "summary.json").read_text())
    assert {"seed", "steps", "wall_s", "train_tokens", "tokens_per_s", "peak_rss_gb", "val_accuracy_before", "export_dir",
            "val_accuracy_after", "val_sampled_before", "val_sampled_after"} <= summary.keys()  # fmt: skip
    assert summary["steps"] == 8
    report = (whole / "report.html").read_text()
    assert "<svg" in report and "://" not in report.replace("http://www.w3.org", "")


def test_the_reward_rises_on_the_micro_model(tmp_path):
    run("experiment=micro", "max_rollouts=50", f"hydra.run.dir={tmp_path}")
    rewards = [float(row["reward/mean"]) for row in metrics(tmp_path) if row["reward/mean"]]
    assert sum(rewards[:3]) / 3 < 0.1
    assert sum(rewards[-3:]) / 3 > 0.5


@pytest.mark.parametrize("merge", [None, "true", "false"], ids=["full", "lora merged", "lora adapter"])
def test_the_exported_model_loads_plainly_and_writes_the_same_greedy_text(merge, tmp_path):
    lora = [] if merge is None else ["lora=language", f"export.merge_lora={merge}", "optimizer.lr=0.02"]
    run(*MICRO, "max_rollouts=10", f"hydra.run.dir={tmp_path}", *lora)
    folder = tmp_path / "model"
    if merge == "false":
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = json.loads((tmp_path / "validation_after.json").read_text())["samples"]
    before = json.loads((tmp_path / "validation_before.json").read_text())["samples"]
    assert [s["completion"] for s in samples] != [s["completion"] for s in before]
    for sample in samples:
        ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        written = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == sample["completion"]


def test_a_saved_model_is_evaluated_as_it_was_in_training(whole):
    done = run("experiment=micro", "model=path", f"model.path={whole / 'model'}", script="evaluate.py")
    rows = metrics(whole)
    assert f"{float(rows[-1]['val/reward']):.4f}" in done.stdout
    assert "Greedy completions" in done.stdout


def test_two_seeds_in_one_sweep(tmp_path):
    run("-m", *MICRO, "max_rollouts=2", "seed=1,2", f"hydra.sweep.dir={tmp_path}")
    seeds = [json.loads((tmp_path / str(n) / "summary.json").read_text())["seed"] for n in (0, 1)]
    assert seeds == [1, 2]
    assert (tmp_path / "0" / "completions.jsonl").read_bytes() != (tmp_path / "1" / "completions.jsonl").read_bytes()


def test_debug_shows_where_a_user_error_comes_from(tmp_path):
    done = run(
        "experiment=micro", f"hydra.run.dir={tmp_path}", "rollout.num_generations=1", "debug=traceback", expect=2
    )
    assert "Traceback" in done.stderr
