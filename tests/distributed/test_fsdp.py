"""FSDP2: resume to the bit, on any number of ranks; rollouts in step; engines with whole weights; safe checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from gspo_lightning.distributed.sharded_checkpoint import is_whole_folder, read_index
from gspo_lightning.errors import UserError
from gspo_lightning.program.resume import find_checkpoint
from tests import command_line
from tests.command_line import ROOT
from tests.distributed.run_own_parameter import anchored
from tests.support import relative_distance

HERE = Path(__file__).parent


def run(script, *arguments, cwd=ROOT):
    command_line.run(*arguments, script=HERE / script, cwd=cwd)


HALF = ["--stop-after", "2"]


@pytest.fixture(scope="module")
def runs(micro_model_dir, tmp_path_factory):
    """Runs by name, and the folder with their checkpoints. No process goes on from one that it wrote itself."""
    folder = tmp_path_factory.mktemp("runs")

    def start(devices, **runs):
        run("run_sharded.py", micro_model_dir, folder, "--devices", devices, "--runs", json.dumps(runs))
        return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in runs}

    adapter = {"adapter": ["--lora"], "adapter_half": ["--lora", *HALF]}
    first = start(2, straight=[], half=HALF, every_token=["--gather", "no"], **adapter)
    alone = start(1, two_then_one=["--resume", "half"], half_on_one=HALF)
    resumed = start(
        2, on=["--resume", "half"], one_then_two=["--resume", "half_on_one"],
        adapter_on=["--lora", "--resume", "adapter_half"],
    )  # fmt: skip
    return first | alone | resumed, folder


def assert_same(one, two, bound):
    assert one["rollouts"] == two["rollouts"] == 4
    assert relative_distance(one["weights"], two["weights"]) <= bound
    assert one["moments"].keys() == two["moments"].keys()
    for name, moments in one["moments"].items():
        for kind, value in moments.items():
            assert relative_distance(two["moments"][name][kind], value) <= bound, (name, kind)


@pytest.mark.parametrize(
    ("name", "expected", "bound"),
    [
        ("on", "straight", 0.0),  # weights, Adam's moments and the reference that follows the policy
        ("adapter_on", "adapter", 0.0),
        ("every_token", "straight", 0.0),  # weights gathered for each token, not for each rollout
        # In float64: ranks add up in another order, which is all that differs.
        ("two_then_one", "straight", 1e-12),
        ("one_then_two", "straight", 1e-12),
    ],
)
def test_runs_that_are_the_same(name, expected, bound, runs):
    found, _ = runs
    for half in ("half", "half_on_one", "adapter_half"):
        assert found[half]["rollouts"] == 2
    assert_same(found[name], found[expected], bound)


def test_ranks_stay_in_step_and_engines_and_checkpoints_see_whole_weights(micro_model_dir, tmp_path):
    cases = ["layer by layer", "gathered", "first_rank", "first_rank-lora", "every_rank", "reference"]
    run("run_engines.py", micro_model_dir, *cases, cwd=tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.done")) == sorted(
        f"{c}-{rank}" for c in cases for rank in (0, 1)
    )


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def half(runs):
    """The checkpoint behind two rollouts, on two ranks."""
    return runs[1] / "half" / "last.ckpt"


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
    with pytest.raises(UserError, match="in parts, one per rank; resume with trainer=fsdp"):
        find_checkpoint(str(half), tmp_path)
    torch.save({"gspo_lightning": {}}, tmp_path / "one.ckpt")
    with pytest.raises(UserError, match="in one file; resume with trainer=ddp or trainer=default"):
        find_checkpoint(str(tmp_path / "one.ckpt"), tmp_path, sharded=True)


def test_a_parameter_of_a_subclass_must_be_split_like_the_weights(micro_model_dir, tmp_path):
    """On rank r the head sees r + 1, so its gradient is 2 (1^2 + 2^2) / 2 = 5 times the sum of its weights, which is 1.

    A term of the output embedding, which is whole between forward and backward, is that of one process.
    """
    run("run_own_parameter.py", micro_model_dir, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["step"] == pytest.approx([5.0] * 4, rel=1e-6)
    assert found["refusal"].startswith(
        "trainer.strategy: the parameter head.weight is whole, but the other weights are split"
    )
    held = torch.load(tmp_path / "found.pt", weights_only=True)
    assert relative_distance(held, anchored(micro_model_dir)) < 1e-12
