"""States of an estimator and a reward on two ranks: each rank gets its own back, from one file and from a folder."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.errors import UserError
from tests.distributed.run_states import Calls
from tests.distributed.test_fsdp import run
from tests.training.test_one_step_off import Data
from tests.training.test_part_states import fit, made


@pytest.fixture(scope="module")
def folder(micro_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    run("run_states.py", micro_model_dir, folder)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_rank_continues_with_its_own_state_to_the_bit(strategy, folder):
    """The script compares the weights; here: the ranks had different states, and an equal one is there once."""
    assert len({(folder / f"{strategy}-{rank}.done").read_text() for rank in (0, 1)}) == 2
    file = folder / "ddp.ckpt" if strategy == "ddp" else folder / "fsdp.ckpt" / "meta.pt"
    parts = torch.load(file, weights_only=True)["gspo_lightning"]["parts"]
    first, second = parts["advantages"]["states"]
    assert first["count"] == second["count"] == 2 * 6 and first["total"] != second["total"]
    assert parts["reward function calls"]["states"] == [{"calls": 2}]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_another_number_of_ranks_takes_equal_states_and_refuses_others(folder, micro_model_dir, tmp_path):
    module = made(micro_model_dir, rewards={"calls": Calls()})
    line = r"^ckpt_path: advantages \(RunningMean\) had another state on each of 2 ranks; resume with 2 ranks, not 1$"
    with pytest.raises(UserError, match=line):
        fit(module, Data(), ckpt=folder / "ddp.ckpt")
    checkpoint = torch.load(folder / "ddp.ckpt", weights_only=True)
    del checkpoint["gspo_lightning"]["parts"]["advantages"]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    fit(module, Data(), ckpt=tmp_path / "x.ckpt")
    assert module.rewards.functions["calls"].function.calls == 4
