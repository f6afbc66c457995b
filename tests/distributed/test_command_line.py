"""`python train.py` on several ranks: the run of one, stopped by a signal to one process, and gone on with on any number."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gspo_lightning.program.threads import available_cores
from tests.command_line import MICRO, ROOT, SHORT, assert_equal_up_to_order, assert_same_run, run, run_and_stop

WIDE = ["model.dtype=float64", "trainer.accelerator=cpu"]
TWO_RANKS = ["trainer=ddp", *WIDE, "trainer.devices=2"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run on two ranks that is never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    run(*SHORT, *TWO_RANKS, f"hydra.run.dir={folder}")
    return folder


def test_a_run_samples_and_learns_the_same_on_one_rank_and_on_two(straight, tmp_path):
    run(*SHORT, *WIDE, f"hydra.run.dir={tmp_path}")
    assert_equal_up_to_order(tmp_path, straight)
    recorded = (straight / "completions.jsonl").read_bytes()
    assert len(recorded.splitlines()) == 8 * 8 * 8  # rollouts, prompts and completions of each
    assert recorded == (tmp_path / "completions.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, str(available_cores())])
def test_ranks_share_the_cores_unless_the_user_set_a_count(given, tmp_path):
    (tmp_path / "tells_threads.py").write_text(
        "import lightning, torch\n"
        "class Tell(lightning.Callback):\n"
        "    def on_train_start(self, trainer, module):\n"
        "        print(f'rank {trainer.global_rank}: {torch.get_num_threads()} threads', flush=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": given}
    count = given or max(1, available_cores() // 2)
    done = run(
        *MICRO, *TWO_RANKS, "max_rollouts=1", "export.enabled=false", "+callbacks.tell._target_=tells_threads.Tell",
        f"hydra.run.dir={tmp_path / 'run'}", env={name: value for name, value in env.items() if value is not None},
    )  # fmt: skip
    told = sorted(re.findall(r"rank (\d): (\d+) threads", done.stdout))  # both may write into one line
    assert told == [("0", str(count)), ("1", str(count))]


def test_a_run_on_two_nodes_is_that_of_two_processes_on_one(straight, tmp_path):
    """Started once per node, as ``srun`` or a person does."""
    command = [sys.executable, "train.py", *SHORT, *TWO_RANKS, "trainer.devices=1", "trainer.num_nodes=2"]
    with socket.socket() as kept:  # until the run is over: nobody else is given the port, and the run may bind it
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.getsockname()[1])}
        nodes = [
            subprocess.Popen(
                [*command, f"hydra.run.dir={tmp_path}"],
                cwd=ROOT,
                env={**os.environ, **address, "NODE_RANK": str(number)},
            )
            for number in range(2)
        ]
        assert [node.wait(120) for node in nodes] == [0, 0]
    assert_same_run(tmp_path, straight)


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = run(*SHORT, *TWO_RANKS, f"hydra.run.dir={tmp_path / 'run'}", env=env, expect=2)
    line = (
        f"port {port} of this machine, at which the ranks were to meet, is taken by another program; set MASTER_PORT in "
        "the environment of every node to a free one, or on one node leave it unset"
    )
    errors = [text for text in done.stderr.splitlines() if not text.startswith("Initializing distributed")]
    assert errors[0] == f"error: {line}" and errors[1:] in ([], [f"error: rank 0: {line}"])  # rank 1 may end later


def test_a_checkpoint_in_parts_becomes_one_model_on_any_number_of_processes(tmp_path):
    """By going on from it for no further rollout."""
    sharded = [*SHORT, "trainer=fsdp", "trainer.accelerator=cpu", "max_rollouts=3", "validation.every_n_rollouts=null"]
    # By a value that never changes, the first rollout is the best.
    best = ["checkpoint.keep_best=val/accuracy", "validation.every_n_rollouts=1", "validation.threshold=9"]
    run(*sharded, *best, "checkpoint.keep_last=2", f"hydra.run.dir={tmp_path / 'run'}")
    numbered = tmp_path / "run" / "checkpoints" / "rollout-000003.ckpt"
    assert sorted(path.name for path in numbered.parent.glob("rollout-*")) == ["rollout-000002.ckpt", numbered.name]
    best_state = torch.load(numbered.with_name("best.ckpt") / "meta.pt", weights_only=True)
    assert best_state["gspo_lightning"]["rollouts_done"] == 1
    run(*sharded, "trainer.devices=1", f"ckpt_path={numbered}", f"hydra.run.dir={tmp_path / 'one'}")
    ours, expected = (load_file(tmp_path / f / "model" / "model.safetensors") for f in ("one", "run"))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_a_signal_to_one_process_stops_all_behind_one_rollout_and_the_run_goes_on(straight, tmp_path):
    code, output = run_and_stop(tmp_path / "cut", 3, signal.SIGUSR1, *TWO_RANKS, "ckpt_path=auto")
    assert code == 0, output
    assert output.count("Stopped after rollout") == output.count("outside a Slurm job") == 1
    last = f"ckpt_path={tmp_path / 'cut' / 'checkpoints' / 'last.ckpt'}"
    assert re.findall(r"\d of 8 rollouts done; (.*)", output) == [f"resume with {last}"]
    run(*SHORT, *TWO_RANKS, f"hydra.run.dir={tmp_path / 'two'}", last)
    assert_same_run(tmp_path / "two", straight)
    run(*SHORT, *WIDE, f"hydra.run.dir={tmp_path / 'one'}", last)
    assert_equal_up_to_order(tmp_path / "one", straight)


@pytest.mark.parametrize("trainer", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_reward_that_fails_on_one_rank_ends_both_and_costs_no_rollout(trainer, straight, tmp_path):
    """Checkpoints are due every 10 rollouts; what fails is mended, and the run goes on bit-identically."""
    ranks = [f"trainer={trainer}", *WIDE, "trainer.devices=2"]
    if trainer != "ddp":
        straight = tmp_path / "straight"
        run(*SHORT, *ranks, f"hydra.run.dir={straight}")
    (tmp_path / "fragile.py").write_text(
        "from pathlib import Path\n"
        "import torch.distributed as dist\n"
        "from gspo_lightning.rewards import letter_share as share\n"
        "def letter_share(trainer_state, **row):\n"
        "    if trainer_state.global_step == 5 and dist.get_rank() == 1 and not Path('mended').exists():\n"
        "        raise ZeroDivisionError('of this completion')\n"
        "    return share(trainer_state=trainer_state, **row)\n"
    )
    folder, function = tmp_path / "run", "reward.functions.letter_share.function.path=fragile.letter_share"
    settings = [*SHORT, *ranks, function, "checkpoint.every_n_rollouts=10", f"hydra.run.dir={folder}", "ckpt_path=auto"]
    done = run(*settings, cwd=tmp_path, expect=2)
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "reward function letter_share raised ZeroDivisionError: of this completion" in told
    assert told.endswith(f"; saved, resume with ckpt_path={folder / 'checkpoints' / 'last.ckpt'}")
    (tmp_path / "mended").touch()
    run(*settings, cwd=tmp_path)
    assert_same_run(folder, straight)


@pytest.mark.slow
def test_a_reward_that_fails_on_the_only_rank_that_draws_again_ends_the_others_too(tmp_path):
    (tmp_path / "fragile.py").write_text(
        "import torch.distributed as dist\n"
        "calls = 0\n"
        "def fragile(completions, trainer_state, **row):\n"
        "    global calls\n"
        "    calls += trainer_state.global_step == 2\n"
        "    if calls == 2:\n"
        "        raise ZeroDivisionError('of this completion')\n"
        "    silent = 8 if calls and dist.get_rank() == 1 else 0\n"
        "    return [0.0 if at < silent else float(at) for at in range(len(completions))]\n"
    )
    folder = tmp_path / "run"
    done = run(
        *SHORT, *TWO_RANKS, "reward.functions.letter_share.function.path=fragile.fragile", "dynamic_sampling.max_draws=2",
        "rollout.num_generations=8", "checkpoint.every_n_rollouts=10", f"hydra.run.dir={folder}", cwd=tmp_path, expect=2,
    )  # fmt: skip
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "raised ZeroDivisionError: of this completion" in told
    assert told.endswith(f"; saved, resume with ckpt_path={folder / 'checkpoints' / 'last.ckpt'}")


@pytest.mark.slow  # test_fsdp.py has the same of its checkpoints
def test_from_one_rank_to_two(straight, tmp_path):
    code, output = run_and_stop(tmp_path, 2, signal.SIGINT, *WIDE)
    assert code == 0, output
    run(*SHORT, *TWO_RANKS, f"hydra.run.dir={tmp_path}", "ckpt_path=auto")
    assert_equal_up_to_order(tmp_path, straight)


GAME = [
    "data=secret_number", "data.max_prompt_length=256", "data.task.num_validation=4", "reward=environment",
    "environment=guess_the_number", "environment.make.turn_rewards=true", "rollout.max_completion_length=60",
    "objective.importance_sampling_level=sequence_token", "rollout.stop=[a,e,i,o,u]",
]  # fmt: skip


@pytest.mark.slow  # run_engines.py and tests/vision/test_run.py have the same of plain completions
@pytest.mark.parametrize("case", ["an adapter", "dialogues"])
def test_rollouts_of_a_split_policy_are_those_of_a_whole_one(case, tmp_path):
    """Ranks step together in the engine of the process; they have other prompts and other turns."""
    options = ["lora=language"] if case == "an adapter" else GAME
    common = [*MICRO, *WIDE, *options, "max_rollouts=2", "validation.every_n_rollouts=null"]
    one, two = tmp_path / "one", tmp_path / "two"
    run(*common, f"hydra.run.dir={one}")
    run(*common, "trainer=fsdp", "trainer.accelerator=cpu", f"hydra.run.dir={two}")
    assert_equal_up_to_order(two, one, "adapter_model" if case == "an adapter" else "model")
