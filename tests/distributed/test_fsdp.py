"""FSDP2: resume to the bit, on any number of ranks; rollouts in step; engines with whole weights; safe checkpoints."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspo_lightning.errors import UserError
from gspo_lightning.resume import find_checkpoint
from gspo_lightning.sharded_checkpoint import is_whole_folder, read_index
from tests.support import relative_distance

HERE = Path(__file__).parent


def run(script, *arguments, cwd=None):
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=cwd, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]


def sharded(model, out, *arguments):
    run("run_sharded.py", model, out, *arguments)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def straight(micro_model_dir, tmp_path_factory):
    """Four rollouts in one go on two ranks."""
    return sharded(micro_model_dir, tmp_path_factory.mktemp("straight") / "run.pt", "--devices", 2)


@pytest.fixture(scope="module")
def half(micro_model_dir, tmp_path_factory):
    """The checkpoint behind two of them, on two ranks."""
    out = tmp_path_factory.mktemp("half") / "run.pt"
    assert sharded(micro_model_dir, out, "--devices", 2, "--stop-after", 2)["rollouts"] == 2
    return out.parent / "run-checkpoints" / "last.ckpt"


def assert_same(one, two, bound):
    assert one["rollouts"] == two["rollouts"] == 4
    assert relative_distance(one["weights"], two["weights"]) <= bound
    for name, moments in one["moments"].items():
        for kind, value in moments.items():
            assert relative_distance(two["moments"][name][kind], value) <= bound, (name, kind)


def test_a_run_goes_on_to_the_bit(straight, half, micro_model_dir, tmp_path):
    """Weights, Adam's moments and the reference that follows the policy."""
    resumed = sharded(micro_model_dir, tmp_path / "run.pt", "--devices", 2, "--resume", half)
    assert_same(resumed, straight, 0.0)


def test_from_two_ranks_to_one_and_from_one_to_two(straight, half, micro_model_dir, tmp_path):
    """In float64: ranks add up in another order, which is all that differs."""
    on_one = sharded(micro_model_dir, tmp_path / "one.pt", "--devices", 1, "--resume", half)
    assert_same(on_one, straight, 1e-12)
    sharded(micro_model_dir, tmp_path / "first.pt", "--devices", 1, "--stop-after", 2)
    resume = tmp_path / "first-checkpoints" / "last.ckpt"
    on_two = sharded(micro_model_dir, tmp_path / "two.pt", "--devices", 2, "--resume", resume)
    assert_same(on_two, straight, 1e-12)


def test_gathering_at_every_token_samples_the_same(straight, micro_model_dir, tmp_path):
    assert_same(sharded(micro_model_dir, tmp_path / "run.pt", "--devices", 2, "--gather", "no"), straight, 0.0)


def test_an_adapter_goes_on_to_the_bit(micro_model_dir, tmp_path):
    whole_run = sharded(micro_model_dir, tmp_path / "run.pt", "--devices", 2, "--lora")
    sharded(micro_model_dir, tmp_path / "half.pt", "--devices", 2, "--lora", "--stop-after", 2)
    resume = tmp_path / "half-checkpoints" / "last.ckpt"
    assert_same(
        sharded(micro_model_dir, tmp_path / "on.pt", "--devices", 2, "--lora", "--resume", resume), whole_run, 0.0
    )


@pytest.mark.parametrize(
    "what",
    [
        "layer by layer",
        "first_rank-lora",
        *(pytest.param(what, marks=pytest.mark.slow) for what in ("gathered", "first_rank", "every_rank")),
    ],
)
def test_ranks_stay_in_step_and_engines_see_whole_weights(what, micro_model_dir, tmp_path):
    run("run_engines.py", what, micro_model_dir, cwd=tmp_path)
    assert len(list(tmp_path.glob("*.done"))) == 2


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoints(half, tmp_path):
    """A folder with two good ones."""
    for name in ("last.ckpt", "previous.ckpt"):
        shutil.copytree(half, tmp_path / name)
    return tmp_path


# The index has no checksum of its own; every record it leads to has one.
@pytest.mark.parametrize(
    ("file", "how"),
    [(file, how) for file in ("__0_0.distcp", "__1_0.distcp", "meta.pt") for how in ("cut", "flipped", "missing")]
    + [(".metadata", "cut"), (".metadata", "missing")],
)
def test_a_damaged_part_gives_way_to_the_checkpoint_before(file, how, checkpoints, capsys):
    part = checkpoints / "last.ckpt" / file
    content = bytearray(part.read_bytes())
    if how == "missing":
        part.unlink()
    elif how == "cut":
        part.write_bytes(content[: len(content) * 9 // 10])
    else:
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
    found = find_checkpoint(str(checkpoints / "last.ckpt"), checkpoints, sharded=True)
    assert found == checkpoints / "previous.ckpt"
    assert "last.ckpt is damaged" in capsys.readouterr().out


def test_between_two_names_the_one_before_is_found(checkpoints):
    shutil.rmtree(checkpoints / "last.ckpt")
    assert find_checkpoint(str(checkpoints / "last.ckpt"), checkpoints, sharded=True) == checkpoints / "previous.ckpt"


class Payload:
    """What a pickle may hold: a call."""

    def __reduce__(self):
        return os.getcwd, ()


@pytest.mark.parametrize("where", ["index", "record"])
def test_a_payload_in_a_part_is_refused_and_never_run(where, checkpoints, monkeypatch):
    folder = checkpoints / "last.ckpt"
    index = read_index(folder)
    if where == "index":
        index.planner_data = Payload()
    else:
        torch.save(Payload(), folder / "evil.distcp")
        key = next(k for k in index.storage_data if not hasattr(index.state_dict_metadata[k.fqn], "size"))
        place = type(index.storage_data[key])("evil.distcp", 0, (folder / "evil.distcp").stat().st_size)
        index.storage_data[key] = place
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    monkeypatch.setattr(os, "getcwd", lambda: pytest.fail("the payload ran"))
    with pytest.raises(UserError, match="holds pickled Python objects"):
        find_checkpoint(str(folder), checkpoints, sharded=True)


def test_one_kind_of_checkpoint_is_not_taken_for_the_other(half, tmp_path):
    assert is_whole_folder(half)
    with pytest.raises(UserError, match="in parts, one per rank; go on with trainer=fsdp"):
        find_checkpoint(str(half), tmp_path)
    torch.save({"gspo_lightning": {}}, tmp_path / "one.ckpt")
    with pytest.raises(UserError, match="in one file; go on with trainer=ddp or trainer=default"):
        find_checkpoint(str(tmp_path / "one.ckpt"), tmp_path, sharded=True)
