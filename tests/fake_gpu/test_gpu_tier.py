"""The tests that need a GPU are run rarely: what they share is run here, on a CPU."""

from __future__ import annotations

import pytest

from tests.gpu.test_training import CASES, train


@pytest.mark.filterwarnings("ignore")
def test_whole_runs_of_the_gpu_tier_begin_and_end(tmp_path):
    short = [
        "trainer.accelerator=cpu",
        "max_rollouts=1",
        "validation.every_n_rollouts=null",
        "data.task.num_validation=2",
    ]
    weights = train(tmp_path, *CASES["FSDP2"], *short)
    assert weights and (tmp_path / "summary.json").is_file()
